"""The laws that every model of the registry obeys; a new model inherits them by its registry line."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mil.models.base
import mil.models.stamp_vit
import mil.models.wikg
from mil.bag import Bag, Batch, collate
from mil.losses import cross_entropy
from mil.models import MODELS, MILModel, MILOutput, build_model
from wsi.errors import UsageError

DIM, CLASSES = 12, 3

# Narrower than the defaults where those take long; a model that is not here is tested with its defaults.
SMALL: dict[str, dict[str, Any]] = {
    "mean": {"embed_dim": 16},
    "max": {"embed_dim": 16},
    "abmil": {"embed_dim": 16, "attention_dim": 8},
    "abmil-gated": {"embed_dim": 16, "attention_dim": 8},
    "clam-sb": {"embed_dim": 16, "attention_dim": 8},
    "clam-mb": {"embed_dim": 16, "attention_dim": 8, "subtyping": True},
    "dsmil": {"query_dim": 8},
    "transmil": {"width": 16, "heads": 2},
    "dtfd": {"embed_dim": 16, "attention_dim": 8, "residual_blocks": 1},
    "transformer": {"width": 16, "heads": 2, "mlp_dim": 16},
    "stamp-vit": {"width": 16, "heads": 2, "mlp_dim": 16, "distances": True},
    "rrt": {"width": 16, "heads": 2, "regions": 4, "epeg_kernel": 3, "mlp": True, "shortcut": True, "pooling_dim": 8},
    "wikg": {"width": 16},
    "ilra": {"width": 16, "heads": 2, "norm": True},
    "additive": {"attention_dim": 16, "hidden_dim": 16},
    "panther": {"k": 4, "eps": 1.0},
    "panther-mlp": {"k": 4, "shared": 16, "individual": 8, "joint": 16},
    "protocounts": {"k": 4},
    "h2t": {"k": 4},
    "ot": {"k": 4},
}

every_model = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> MILModel:
    torch.manual_seed(3)
    model = build_model(name, DIM, CLASSES, **SMALL.get(name, {}))
    model.prepare([bag(40, 7), bag(30, 8)], seed=0)
    with torch.no_grad():
        for parameter in model.parameters():  # biases of zero and norms of one would hide what depends on them
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def bag(n_tiles: int, seed: int = 0) -> Bag:
    generator = torch.Generator().manual_seed(seed)
    xy = 256 * torch.randint(0, 40, (n_tiles, 2), generator=generator)
    return Bag(torch.randn(n_tiles, DIM, generator=generator), xy, f"bag {seed}")


def near(actual: Tensor, expected: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4)


def same(actual: MILOutput, expected: MILOutput, order: Tensor | None = None) -> None:
    """All of two outputs of single bags, the tiles of ``expected`` in ``order``."""
    near(actual.logits, expected.logits)
    near(actual.embedding, expected.embedding)
    tiles = slice(None) if order is None else order
    near(actual.attention, expected.attention[..., tiles])
    near(actual.scores, expected.scores[..., tiles], atol=1e-4)


@every_model
def test_padding_changes_nothing(name: str) -> None:
    model, single = make(name), collate([bag(21)])
    torch.manual_seed(1)
    assert single.xy is not None
    padded = Batch(
        torch.cat([single.features, 100 * torch.randn(1, 9, DIM)], dim=1),
        torch.cat([single.mask, torch.zeros(1, 9, dtype=torch.bool)], dim=1),
        torch.cat([single.xy, torch.randint(0, 99999, (1, 9, 2))], dim=1),
    )
    with torch.no_grad():
        alone, output = model(single), model(padded)
        truth = torch.tensor([1])
        near(model.auxiliary_loss(padded, output, truth), model.auxiliary_loss(single, alone, truth))
    assert output.attention.shape[-1] == 30
    assert torch.equal(output.attention[..., 21:], torch.zeros_like(output.attention[..., 21:]))
    assert bool((output.scores[..., 21:] == -torch.inf).all())
    if output.part_logits.shape[1] == 30:
        assert not output.part_logits[:, 21:].any()
    same(MILOutput(output.logits, output.attention[..., :21], output.scores[..., :21], *output[3:]), alone)


@every_model
def test_each_bag_of_a_batch_is_answered_as_if_alone(name: str) -> None:
    model, bags = make(name), [bag(21, 0), bag(5, 1), bag(33, 2), bag(1, 3)]
    with torch.no_grad():
        together = model(collate(bags))
        for index, single in enumerate(bags):
            rows = [part[index : index + 1] for part in together]
            output = MILOutput(rows[0], rows[1][..., : len(single)], rows[2][..., : len(single)], *rows[3:])
            same(output, model(collate([single])))


@every_model
def test_the_order_of_tiles_matters_where_the_model_says_so_and_nowhere_else(name: str) -> None:
    model, single = make(name), bag(21)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(5))
    assert single.xy is not None
    with torch.no_grad():
        expected = model(collate([single]))
        shuffled = model(collate([Bag(single.features[order], single.xy[order])]))
    if model.order_matters:
        assert not torch.allclose(shuffled.logits, expected.logits, atol=1e-5)
    else:
        same(shuffled, expected, order)


@every_model
def test_attention_is_the_softmax_of_the_scores_and_sums_to_one(name: str) -> None:
    model = make(name)
    with torch.no_grad():
        output = model(collate([bag(21), bag(8, 1)]))
    branches = CLASSES if model.attention_per_class else 1
    assert output.attention.shape == output.scores.shape == (2, branches, 21)
    near(output.attention.sum(-1), torch.ones(2, branches), atol=1e-6)
    near(output.scores.softmax(-1), output.attention, atol=1e-6)
    assert bool((output.attention >= 0).all())


@every_model
def test_logits_and_embedding_are_one_row_a_bag(name: str) -> None:
    with torch.no_grad():
        output = make(name)(collate([bag(21), bag(8, 1)]))
    assert output.logits.shape == (2, CLASSES)
    assert output.embedding.ndim == 2
    assert output.part_logits.shape[::2] == (2, CLASSES)
    assert all(part.dtype == torch.float32 for part in output)


@every_model
def test_a_bag_of_one_tile_is_answered_and_learned_from(name: str) -> None:
    model, single = make(name), collate([bag(1)])
    with torch.no_grad():
        output = model(single)
    near(output.attention, torch.ones_like(output.attention))
    assert bool(output.logits.isfinite().all())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(model.train(), single, [1]).values())


@every_model
def test_gradients_reach_every_parameter(name: str) -> None:
    model = make(name)  # in eval mode, so that no gradient is lost to dropout
    found = gradients(model, collate([bag(140, 0), bag(91, 1), bag(77, 2)]), [0, 1, 2])
    assert found.keys() == dict(model.named_parameters()).keys()
    # A bias in front of a softmax has a gradient, and it is zero.
    dead = [key for key, value in found.items() if not value.any() and not key.endswith("bias")]
    assert dead == []


def gradients(model: MILModel, batch: Batch, targets: list[int]) -> dict[str, Tensor]:
    output, truth = model(batch), torch.tensor(targets)
    loss = model.bag_weight * cross_entropy(output.logits, truth) + model.auxiliary_loss(batch, output, truth)
    torch.autograd.backward(loss)
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@every_model
def test_in_eval_mode_the_same_bag_gets_the_same_answer(name: str) -> None:
    model, batch = make(name), collate([bag(21), bag(8, 1)])
    with torch.no_grad():
        first = model(batch)
        torch.manual_seed(99)
        again = model(batch)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@every_model
def test_half_precision_features_are_computed_with_in_float32(name: str) -> None:
    model, single = make(name), bag(21)
    half = Bag(single.features.half(), single.xy)
    with torch.no_grad():
        same(model(collate([half])), model(collate([Bag(half.features.float(), single.xy)])))


@every_model
def test_taking_tiles_a_few_at_a_time_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make(name), collate([bag(40)])
    with torch.no_grad():
        whole = model(batch)
    monkeypatch.setattr(mil.models.base, "_CHUNK_TILES", 7)
    for module in (mil.models.stamp_vit, mil.models.wikg):
        monkeypatch.setattr(module, "_PAIRS_AT_ONCE", 90)
    with torch.no_grad():
        same(model(batch), whole)
        half = Batch(batch.features.half(), batch.mask, batch.xy)
        torch.testing.assert_close(model(half).logits, whole.logits, atol=2e-2, rtol=2e-2)


@every_model
def test_the_auxiliary_loss_is_a_finite_scalar(name: str) -> None:
    model, batch = make(name), collate([bag(21), bag(8, 1)])
    output = model(batch)
    loss = model.auxiliary_loss(batch, output, torch.tensor([0, 2]))
    assert loss.shape == ()
    own = type(model).auxiliary_loss is not MILModel.auxiliary_loss
    assert bool(loss > 0) if own else float(loss) == 0.0


def test_a_very_large_bag_is_answered_in_bounded_memory() -> None:
    """100,000 tiles, or 12,000 where time is quadratic: a matrix over pairs of tiles would take 0.58 to 40 GB."""
    code = """
import resource, torch
from mil.bag import Bag, collate
from mil.models import build_model
from tests.mil.models.test_laws import DIM, CLASSES, SMALL, MODELS, bag
torch.set_num_threads(2)
torch.manual_seed(0)
print('alone', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
for name, kind in MODELS.items():
    n = 12_000 if kind.quadratic else 100_000
    batch = collate([Bag(torch.randn(n, DIM).half(), torch.randint(0, 100_000, (n, 2)))])
    model = build_model(name, DIM, CLASSES, **SMALL.get(name, {})).eval()
    model.prepare([bag(100)], seed=0)
    with torch.no_grad():
        output = model(batch)
    assert output.logits.isfinite().all(), name
    assert abs(float(output.attention.double().sum(-1).mean()) - 1) < 1e-3, name
    print(name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    peaks = {line.split()[0]: int(line.split()[1]) / 2**20 for line in done.stdout.splitlines()}
    assert peaks.keys() - {"alone"} == MODELS.keys()
    assert max(peaks.values()) - peaks["alone"] < 0.45, peaks  # GiB


def test_an_unknown_model_is_refused_with_the_name_that_was_meant() -> None:
    with pytest.raises(UsageError, match="did you mean transmil"):
        build_model("transmill", DIM, CLASSES)


def test_an_unknown_hyper_parameter_is_refused_with_the_name_that_was_meant() -> None:
    with pytest.raises(UsageError, match=r"abmil has no hyper-parameter 'attention_dims' \(did you mean attention_dim"):
        build_model("abmil", DIM, CLASSES, attention_dims=3)


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("clam-sb", {"instance_loss": "hinge"}),
        ("dsmil", {"value": "gelu"}),
        ("dtfd", {"distil": "max"}),
        ("dtfd", {"pseudo_bags": 0}),
        ("wikg", {"aggregation": "gcn"}),
        ("wikg", {"edge_score": "dot"}),
        ("rrt", {"pooling_activation": "gelu"}),
        ("abmil", {"embed_layers": 0}),
        ("transformer", {"width": 10, "heads": 4}),
        ("transmil", {"width": 10, "heads": 4}),
    ],
)
def test_hyper_parameters_without_a_meaning_are_refused(name: str, hyper: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        build_model(name, DIM, CLASSES, **hyper)


@pytest.mark.parametrize("name", ["clam-sb", "clam-mb", "dtfd"])
def test_an_auxiliary_loss_that_needs_classes_refuses_anything_else(name: str) -> None:
    model, batch = make(name), collate([bag(5)])
    output = model(batch)
    with pytest.raises(UsageError, match="class indices"):
        model.auxiliary_loss(batch, output, torch.tensor([[1.0, 0.0, 0.0]]))
    with pytest.raises(UsageError, match="classes 0 to 2"):
        model.auxiliary_loss(batch, output, torch.tensor([3]))


def test_a_model_that_looks_at_distances_asks_for_places() -> None:
    with pytest.raises(UsageError, match="need xy"):
        make("stamp-vit")(collate([Bag(torch.zeros(3, DIM))]))


def test_places_matter_to_a_model_that_looks_at_distances() -> None:
    model, single = make("stamp-vit"), bag(9)
    assert single.xy is not None
    with torch.no_grad():
        here, there = (model(collate([Bag(single.features, xy)])).logits for xy in (single.xy, single.xy.flip(0)))
    assert not torch.allclose(here, there, atol=1e-3)


def test_distances_are_measured_by_the_mean_distance_seen_in_training() -> None:
    model = build_model("stamp-vit", DIM, 2, width=16, heads=2, mlp_dim=8, distances=True)
    xy = torch.tensor([[300, 400], [600, 800]])  # and the class token at (0, 0): 500, 1000, 500 apart
    for _ in range(2):
        model(collate([Bag(torch.randn(2, DIM), xy)]))
    seen = model.get_buffer("layers.0.penalty.mean_distance")
    near(seen, torch.full((2,), 2 * (500 + 1000 + 500) / 9))


def test_distances_are_exact_on_a_slide_of_any_size() -> None:
    model = build_model("stamp-vit", DIM, 2, width=16, heads=2, mlp_dim=8, distances=True)
    xy = torch.tensor([[i % 8, i // 8] for i in range(64)]) + 200_000
    model(collate([Bag(torch.randn(64, DIM), xy)]))
    places = torch.cat([torch.zeros(1, 2), xy]).double()
    expected = (places[:, None] - places[None]).norm(dim=-1).mean()
    near(model.get_buffer("layers.1.penalty.mean_distance"), expected.float().expand(2), atol=0.01)


def test_contributions_of_additive_mil_add_up_to_the_logits() -> None:
    with torch.no_grad():
        output = make("additive")(collate([bag(21), bag(8, 1)]))
    near(output.part_logits.sum(1), output.logits)


def test_dtfd_draws_other_parts_in_training_and_averages_several_in_eval_mode() -> None:
    model = build_model("dtfd", DIM, 2, embed_dim=8, attention_dim=4, draws=3)
    batch = collate([bag(40)])
    with torch.no_grad():
        first, second = model(batch).logits, model(batch).logits
        assert not torch.equal(first, second)
        near(model.eval()(batch).logits.exp().sum(1), torch.ones(1))


def test_dtfd_lets_no_gradient_of_the_second_tier_into_the_first() -> None:
    for distil in ("afs", "maxs", "maxmins"):
        model = build_model("dtfd", DIM, 2, embed_dim=8, attention_dim=4, distil=distil)
        torch.autograd.backward(model(collate([bag(40)])).logits.sum())
        reached = {key.split(".")[0] for key, value in model.named_parameters() if value.grad is not None}
        assert reached == {"slide_attention", "slide_classifier"}


def test_dsmil_takes_the_largest_logit_of_real_tiles_even_if_all_are_below_zero() -> None:
    model, batch = make("dsmil"), collate([bag(21), bag(8, 1)])
    with torch.no_grad():
        model.get_parameter("tile_classifier.bias").fill_(-9)
        output = model(batch)
        truth = torch.zeros(2, CLASSES)
        singles = [collate([single]) for single in (bag(21), bag(8, 1))]
        losses = [model.auxiliary_loss(single, model(single), truth[:1]) for single in singles]
    near(model.auxiliary_loss(batch, output, truth), torch.stack(losses).mean(), atol=1e-7)
