"""The laws that every slide embedding obeys; a new method inherits them by its registry line."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mil.prototypes.rows
from mil.bag import Bag, Batch, collate
from mil.prototypes import EMBEDDERS, Embedder, OptimalTransport, Panther, Quantiles, build_embedder
from mil.prototypes.panther import _responsibilities, _State
from mil.prototypes.rows import TensorRows
from wsi.errors import UsageError

K, DIM = 3, 5
every_method = pytest.mark.parametrize("name", EMBEDDERS)


def method(name: str) -> Embedder:
    return build_embedder(name, **{"panther": {"em_iter": 2, "eps": 0.5}, "ot": {"eps": 1.0}}.get(name, {}))


def tiles(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed)) + 3


CENTRES = tiles(K, 99) * 1.5 - 1.5


def near(actual: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4)


@every_method
def test_the_vector_is_its_parts_one_after_the_other(name: str) -> None:
    found = method(name).embed(collate([Bag(tiles(9)), Bag(tiles(4, 1))]), CENTRES)
    assert len(found) == 2
    assert torch.equal(found.vector[1], torch.cat([part[1].flatten() for part in found.parts.values()]))
    assert found.vector.dtype == torch.float32
    assert bool(found.vector.isfinite().all())


@every_method
@given(n=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_the_order_of_tiles_changes_nothing(name: str, n: int, seed: int) -> None:
    x = tiles(n, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    near(method(name).embed(x[order], CENTRES).vector, method(name).embed(x, CENTRES).vector)
    near(method(name).assign(x[order], CENTRES), method(name).assign(x, CENTRES)[:, order])


@every_method
@given(n=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_every_tile_belongs_to_prototypes_as_a_whole(name: str, n: int, seed: int) -> None:
    shares = method(name).assign(tiles(n, seed), CENTRES)
    near(shares.sum(-1), torch.ones(1, n), atol=1e-6)
    assert bool((shares >= 0).all())


@every_method
def test_blocks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = tiles(50)
    whole, shares = method(name).embed(x, CENTRES).vector, method(name).assign(x, CENTRES)
    monkeypatch.setattr(mil.prototypes.rows, "_BLOCK_BYTES", {"cpu": 7 * 4 * DIM})
    assert [len(block) for block in TensorRows(x)] == [7] * 7 + [1]
    near(method(name).embed(x, CENTRES).vector, whole)
    near(method(name).assign(x, CENTRES), shares)


@every_method
def test_a_bag_of_a_batch_is_embedded_as_if_alone_wherever_its_tiles_lie(name: str) -> None:
    x, y = tiles(6), tiles(3, 1)
    mask = torch.tensor([[True] * 6, [False, True, False, True, True, False]])
    features = torch.full((2, 6, DIM), 1e4)
    features[0], features[1, mask[1]] = x, y
    vectors, shares = method(name).describe(Batch(features, mask), CENTRES)
    near(vectors.vector, torch.cat([method(name).embed(each, CENTRES).vector for each in (x, y)]))
    near(shares[1, mask[1]], method(name).assign(y, CENTRES)[0])
    assert not shares[~mask].any()


@every_method
def test_half_precision_is_computed_with_in_float32_whatever_autocast_says(name: str) -> None:
    x = tiles(30).half()
    expected = method(name).embed(x.float(), CENTRES).vector
    with torch.autocast("cpu", torch.bfloat16):
        near(method(name).embed(x, CENTRES).vector, expected)


@every_method
def test_gradients_reach_the_tiles_where_the_method_has_any(name: str) -> None:
    x = tiles(10).requires_grad_()
    vector = method(name).embed(x, CENTRES).vector
    if name == "protocounts":
        assert not vector.requires_grad
    else:
        (slope,) = torch.autograd.grad(vector.square().sum(), x)
        assert bool(slope.isfinite().all())
        assert bool(slope.any())


@given(n=st.integers(1, 30), times=st.integers(2, 4), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_what_a_slide_holds_twice_weighs_the_same_when_the_prior_weighs_nothing(n: int, times: int, seed: int) -> None:
    x, panther = tiles(n, seed), Panther(tau=1e-9, eps=2.0)
    once, often = (panther.mixture(each, CENTRES) for each in (x, x.repeat(times, 1)))
    near(often.importance, once.importance)
    there = once.importance > 1e-5  # the prior weighs nothing beside tiles, not beside none
    near(often.mean[there], once.mean[there], atol=1e-4)


@given(n=st.integers(1, 30), times=st.integers(2, 4), seed=st.integers(0, 99), em=st.integers(1, 3))
@settings(max_examples=30)
def test_what_slide_and_prior_hold_twice_weighs_the_same(n: int, times: int, seed: int, em: int) -> None:
    x = tiles(n, seed)
    once = Panther(em, tau=0.5, eps=2.0).mixture(x, CENTRES)
    often = Panther(em, tau=0.5 * times, eps=2.0).mixture(x.repeat(times, 1), CENTRES)
    for part, other in zip(once, often, strict=True):
        near(other, part, atol=1e-4)


@given(
    n=st.integers(1, 60), seed=st.integers(0, 99), tau=st.floats(1e-4, 50), eps=st.floats(0.05, 5), em=st.integers(1, 4)
)
@settings(max_examples=60)
def test_panther_is_the_formula_in_float64(n: int, seed: int, tau: float, eps: float, em: int) -> None:
    x = tiles(n, seed)
    expected = reference(x.double().numpy(), CENTRES.double().numpy(), em, tau, eps)
    found = Panther(em, tau, eps).mixture(x, CENTRES)
    for part, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(part[0].numpy(), other, atol=2e-4, rtol=2e-4)


def reference(x: Any, m: Any, em: int, tau: float, eps: float) -> tuple[Any, Any, Any]:
    """Equations of the paper as they stand, tile by prototype by feature."""
    pi, mu, sigma = np.full(len(m), 1 / len(m)), m, np.full(m.shape, eps)
    for _ in range(em):
        q = responsibilities(x, pi, mu, sigma)
        weight = q.sum(0) + tau
        pi = weight / weight.sum()
        mu = (q.T @ x + tau * m) / weight[:, None]
        sigma = (q.T @ x**2 + tau * (eps + m**2)) / weight[:, None] - mu**2
    return pi, mu, sigma


def responsibilities(x: Any, pi: Any, mu: Any, sigma: Any) -> Any:
    density = -0.5 * (np.log(2 * np.pi * sigma) + (x[:, None] - mu) ** 2 / sigma).sum(-1) + np.log(pi)  # (N, K)
    q = np.exp(density - density.max(1, keepdims=True))
    return q / q.sum(1, keepdims=True)


def test_tiles_between_two_tight_prototypes_are_told_apart_as_in_float64() -> None:
    """Terms of the density that cancel are a hundred thousand times what tells the two apart."""
    rng = np.random.default_rng(0)
    mean, variance = 5 + np.array([[0.0], [0.02]]) * np.ones(64), 0.01 * rng.uniform(0.5, 1.5, (2, 64))
    y = (5.01 + 0.1 * rng.normal(size=(40, 64))).astype(np.float32)
    of_state = np.array([0.3, 0.7]), mean, variance
    state = _State(torch.zeros(64), *map(torch.from_numpy, of_state))
    expected = responsibilities(y.astype(np.float64), *of_state)
    np.testing.assert_allclose(_responsibilities(torch.from_numpy(y), state).numpy(), expected, atol=1e-7)


def test_tiles_that_are_all_the_same_leave_the_variance_of_the_prior() -> None:
    x = torch.full((200, DIM), 100.37)
    found = Panther(3, tau=0.001, eps=0.1).mixture(x, torch.stack([x[0], x[0] + 211.1]))
    assert all(bool(part.isfinite().all()) for part in found)
    assert float(found.variance.min()) >= 0.999 * 0.001 * 0.1 / 200.001


def test_a_prototype_without_tiles_keeps_what_the_prior_says() -> None:
    centres = torch.cat([CENTRES, torch.full((1, DIM), 500.0)])
    found = Panther(tau=0.5, eps=0.3).mixture(tiles(20), centres)
    assert float(found.importance[0, -1]) == pytest.approx(0.5 / (20 + 4 * 0.5))
    near(found.mean[0, -1], centres[-1])
    near(found.variance[0, -1], torch.full((DIM,), 0.3), atol=1e-4)


def test_the_variance_is_never_below_what_the_prior_alone_adds_far_from_the_origin() -> None:
    """Features near 3,000 that hardly vary: a difference of squares in float32 would be off by one and turn negative."""
    x = 3000 + 0.01 * torch.randn(500, DIM, generator=torch.Generator().manual_seed(0))
    found = Panther(tau=0.001, eps=0.1).mixture(x, torch.stack([x.mean(0), x.mean(0) + 1]))
    assert bool((found.variance > 0).all())
    assert float(found.variance[0, 0].mean()) == pytest.approx(1e-4, rel=0.2)


def test_outputs_are_sums_and_selections_of_the_mixture() -> None:
    x = tiles(30)
    pi, mu, sigma = (part[0] for part in Panther(eps=2).mixture(x, CENTRES))
    assert all(a > b for a, b in pairwise(pi.sort(descending=True).values))
    of = {
        output: Panther(eps=2, output=output).embed(x, CENTRES).vector[0] for output in ("weight_avg_all", "select_bot")
    }
    near(of["weight_avg_all"], torch.cat([pi @ mu, pi @ sigma]))
    least = int(pi.argmin())
    near(of["select_bot"], torch.cat([pi[least, None], mu[least], sigma[least]]))


def test_ot_gives_each_prototype_the_same_part_of_the_slide() -> None:
    plan = OptimalTransport(eps=0.5, iterations=500).plan(TensorRows(tiles(24)), CENTRES)
    near(plan.sum(0), torch.ones(K, dtype=torch.float64), atol=1e-6)
    near(plan.sum(1), torch.full((24,), K / 24, dtype=torch.float64), atol=1e-6)


def test_ot_is_finite_far_from_every_prototype() -> None:
    found = build_embedder("ot", eps=0.01).embed(tiles(10) * 1000, CENTRES)
    assert bool(found.vector.isfinite().all())


@given(n=st.integers(1, 50), level=st.floats(0, 1))
def test_quantiles_are_those_of_numpy(n: int, level: float) -> None:
    x = tiles(n)
    found = Quantiles((level, 0.5)).embed(x)["quantiles"][0]
    np.testing.assert_allclose(found.numpy(), np.quantile(x.numpy(), [level, 0.5], axis=0), atol=1e-5)


def test_moments_are_those_of_numpy_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mil.prototypes.rows, "_BLOCK_BYTES", {"cpu": 11 * 4 * DIM})
    x = tiles(40) + 1000
    found = build_embedder("mean-variance").embed(x)
    np.testing.assert_allclose(found["mean"][0].numpy(), x.double().mean(0).numpy(), rtol=1e-6)
    np.testing.assert_allclose(found["variance"][0].numpy(), x.double().var(0, correction=0).numpy(), rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "hyper", "words"),
    [
        ("panther", {"tau": 0}, "tau and eps above 0"),
        ("panther", {"output": "allcats"}, "output is one of"),
        ("panther", {"output": "select_top0"}, "output is one of"),
        ("panther", {"em_iters": 3}, "did you mean em_iter"),
        ("ot", {"eps": -1}, "eps above 0"),
        ("quantiles", {"levels": [1.5]}, "from 0 to 1"),
        ("pantherr", {}, "did you mean panther"),
    ],
)
def test_what_has_no_meaning_is_refused(name: str, hyper: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build_embedder(name, **hyper)


def test_prototypes_that_do_not_fit_the_tiles_are_refused() -> None:
    with pytest.raises(UsageError, match="both of one encoder"):
        Panther().embed(tiles(4), torch.zeros(3, DIM + 1))
    with pytest.raises(UsageError, match="needs prototypes"):
        Panther().embed(tiles(4))
    with pytest.raises(UsageError, match="more prototypes than the 3"):
        Panther(output="select_top4").embed(tiles(4), CENTRES)
    with pytest.raises(UsageError, match="at least one"):
        Panther().embed(torch.zeros(0, DIM), CENTRES)
