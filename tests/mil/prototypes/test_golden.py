"""Golden numbers of slide embeddings: with the same prototypes ours are those of the published code."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mil.bag import Batch
from mil.prototypes import H2T, OptimalTransport, Panther, ProtoCounts
from mil.prototypes.embedder import SlideVectors
from mil.prototypes.rows import TensorRows
from tests.mil.golden import arrays, assert_near, number


def tiles(tag: str) -> Tensor:
    if tag == "soft":
        return number("panther", "soft/x")
    return number("bags", {"small": "x_64x32_clustered", "big": "x_1000x1024"}[tag])


def prototypes(tag: str, file: str = "panther") -> Tensor:
    return number(file, f"{tag}/prototypes")


def panther(setting: str, output: str = "allcat") -> Panther:
    """``em3_tau1_eps0.1`` as the method."""
    em, tau, eps = (float(word.lstrip("emtaups")) for word in setting.split("_"))
    return Panther(int(em), tau, eps, output)


ALONE = [name for name in arrays("panther") if name.endswith("/allcat") and not ("mask" in name or "batch" in name)]
SETTINGS = [tuple(name.split("/")[:2]) for name in ALONE]


def assert_allcat(found: SlideVectors, expected: Tensor) -> None:
    """π and μ to 1e-5, Σ, a difference of squares in the reference, to 1e-4."""
    split = found["importance"].flatten(1).shape[1] + found["mean"].flatten(1).shape[1]
    assert_near(found.vector[:, :split], expected[:, :split])
    assert_near(found.vector[:, split:], expected[:, split:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("tag", "setting"), SETTINGS)
def test_panther_puts_out_what_the_published_code_does(tag: str, setting: str) -> None:
    found = panther(setting).embed(tiles(tag), prototypes(tag))
    assert_allcat(found, number("panther", f"{tag}/{setting}/allcat"))


@pytest.mark.parametrize(("tag", "setting"), SETTINGS)
def test_panther_assigns_tiles_as_the_published_code_does(tag: str, setting: str) -> None:
    q = panther(setting).assign(tiles(tag), prototypes(tag))
    if tag == "big":
        assert torch.equal(q.argmax(-1), number("panther", f"{tag}/{setting}/hard_assign").long())
        assert_near(q.sum(1), number("panther", f"{tag}/{setting}/q_colsum"), atol=1e-3)
    else:
        assert_near(q, number("panther", f"{tag}/{setting}/q"), atol=5e-5)


@pytest.mark.parametrize(
    "output", ["weight_all_cat", "weight_avg_all", "weight_avg_mean", "select_top2", "select_bot2", "select_top1"]
)
def test_every_output_is_that_of_the_published_code(output: str) -> None:
    vector = panther("em1_tau1_eps1", output).embed(tiles("small"), prototypes("small")).vector
    assert vector.shape[1] == int(arrays("panther")[f"small/em1_tau1_eps1/{output}_outdim"])
    assert_near(vector, number("panther", f"small/em1_tau1_eps1/{output}"), atol=1e-4)


def test_select_top_without_a_number_is_the_first() -> None:
    one, bare = (panther("em1_tau1_eps1", output) for output in ("select_top1", "select_top"))
    assert torch.equal(*(each.embed(tiles("small"), prototypes("small")).vector for each in (one, bare)))


def test_masked_tiles_have_no_part() -> None:
    mask = number("panther", "small/masked_em3_tau1_eps1/mask").bool()
    found = panther("em3_tau1_eps1").embed(Batch(tiles("small")[None], mask), prototypes("small"))
    assert_allcat(found, number("panther", "small/masked_em3_tau1_eps1/allcat"))


def test_a_batch_is_embedded_bag_by_bag() -> None:
    x = number("panther", "small/batch2_em1_tau1_eps1/x")
    found = panther("em1_tau1_eps1").embed(Batch(x, torch.ones(2, 64, dtype=torch.bool)), prototypes("small"))
    assert_allcat(found, number("panther", "small/batch2_em1_tau1_eps1/allcat"))
    for part, name in (("importance", "tok_prob"), ("mean", "tok_mean"), ("variance", "tok_cov")):
        assert_near(found[part], number("panther", f"small/batch2_em1_tau1_eps1/{name}"), atol=1e-4)


@pytest.mark.parametrize("tag", ["small", "big", "empty"])
def test_h2t_and_protocounts_are_those_of_the_published_code(tag: str) -> None:
    x, centres = tiles("small" if tag == "empty" else tag), prototypes(tag, "proto_baselines")
    assert_near(H2T().embed(x, centres).vector, number("proto_baselines", f"{tag}/h2t"))
    assert_near(ProtoCounts().embed(x, centres).vector, number("proto_baselines", f"{tag}/protocount"))


@pytest.mark.parametrize("tag", ["small", "big"])
def test_ot_with_the_published_sign_is_that_of_the_published_code(tag: str) -> None:
    ot = OptimalTransport(eps=1, published_sign=True)
    found = ot.embed(tiles(tag), prototypes(tag, "proto_baselines"))
    assert_near(found.vector, number("proto_baselines", f"{tag}/ot_eps1/allcat"))
    assert_near(found["mean"].mean(1), number("proto_baselines", f"{tag}/ot_eps1/weight_avg_mean"))


@pytest.mark.parametrize("tag", ["small", "big"])
def test_ot_is_finite_where_the_published_code_overflows(tag: str) -> None:
    assert arrays("proto_baselines")[f"{tag}/ot_eps0.1/allcat_is_nonfinite"]
    found = OptimalTransport(eps=0.1, published_sign=True).embed(tiles(tag), prototypes(tag, "proto_baselines"))
    expected = torch.from_numpy(
        arrays("proto_baselines")[f"{tag}/ot_eps0.1/weight_avg_mean_float64"].astype(np.float32)
    )
    assert_near(found["mean"].mean(1), expected)


def test_ot_of_the_small_case_has_the_published_plan() -> None:
    plan = OptimalTransport(eps=1, published_sign=True).plan(
        TensorRows(tiles("small")), prototypes("small", "proto_baselines")
    )
    assert_near(plan.T.float(), number("proto_baselines", "small/ot_eps1/attn"))


def test_with_the_right_sign_near_prototypes_attract() -> None:
    x, centres = tiles("small"), prototypes("small", "proto_baselines")
    near, far = (OptimalTransport(published_sign=sign).embed(x, centres)["mean"][0] for sign in (False, True))
    assert float((near - centres).norm(dim=1).mean()) < float((far - centres).norm(dim=1).mean()) / 2
