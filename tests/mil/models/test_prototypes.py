"""Tests of the heads on slide embeddings beyond the laws of all models: prototypes, training, published weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mil.bag import Bag, collate
from mil.cohort import Cohort
from mil.config import TrainConfig
from mil.member import Member
from mil.metrics import measure
from mil.models import MODELS, build_model
from mil.models.prototypes import EmbeddingMIL, PrototypeMIL
from mil.prototypes import Panther
from mil.run import cross_validate
from mil.splits import Fold, make_folds
from mil.train import train_fold
from tests.mil.made_up import DIM, QUICK, cohort
from wsi.errors import ModelMismatchError, UsageError

HEADS = [name for name, kind in MODELS.items() if issubclass(kind, EmbeddingMIL)]
WITH_PROTOTYPES = [name for name in HEADS if issubclass(MODELS[name], PrototypeMIL)]
CONFIG = TrainConfig(**(vars(QUICK) | {"hyper": {}, "epochs": 20, "lr": 3e-2}))


def bags(n: int = 6) -> list[Bag]:
    generator = torch.Generator().manual_seed(0)
    return [Bag(torch.randn(30, 8, generator=generator), None, f"b{i}") for i in range(n)]


def config(name: str, **changes: Any) -> TrainConfig:
    hyper = {"k": 4} if name in WITH_PROTOTYPES else {}
    hyper |= {"iterations": 10} if name == "ot" else {}
    return TrainConfig(**(vars(CONFIG) | {"model": name, "hyper": hyper} | changes))


@pytest.mark.parametrize("name", WITH_PROTOTYPES)
def test_a_model_without_prototypes_says_what_to_do(name: str) -> None:
    with pytest.raises(UsageError, match="call prepare"):
        build_model(name, 8, 2, k=4)(collate(bags(1)))


@pytest.mark.parametrize("name", HEADS)
def test_a_head_learns_from_the_vectors_of_made_up_slides(name: str) -> None:
    result = cross_validate(cohort(36, shift=8.0), config(name))
    assert measure(result.predictions)["auroc"] > 0.8


def test_prototypes_are_fitted_on_the_training_bags_of_a_fold_alone() -> None:
    """Tiles of the test part lie far away: a prototype of theirs would be a leak."""
    rng = np.random.default_rng(0)
    n, tested = 12, (0, 1, 2, 3)
    x = [rng.normal(size=(20, DIM)).astype(np.float32) + (1000.0 if i in tested else 0.0) for i in range(n)]
    made = Cohort.from_arrays([Bag(each, None, f"s{i:02d}") for i, each in enumerate(x)], [i % 2 for i in range(n)])
    cases = made.cases()
    fold = Fold("a", tuple(i for i in range(n) if i not in tested), tested)
    trained = train_fold(made, cases, fold, 0, config("panther", epochs=1, scale="none", inner=1))
    centres = trained.members[0].model.get_buffer("centres")
    assert float(centres.abs().max()) < 10


def test_prototypes_are_of_scaled_tiles_and_the_same_for_the_same_seed() -> None:
    made = cohort(24)
    shifted = Cohort.from_arrays(
        [Bag(1000 + 50 * made.read([slide]).features, None, slide) for slide in made.slides],
        made.y.astype(int).tolist(),
        made.patients,
    )
    found = []
    for each in (made, made, shifted):
        cases = each.cases()
        fold = make_folds(cases, each.target, by="random", folds=3, seed=0)[0]
        trained = train_fold(each, cases, fold, 0, config("panther", epochs=1))
        found.append(trained.members[0].model.get_buffer("centres"))
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", HEADS)
def test_a_member_on_disk_answers_without_its_cohort(name: str, tmp_path: Path) -> None:
    made = cohort(24)
    cases = made.cases()
    fold = make_folds(cases, made.target, by="random", folds=3, seed=0)[0]
    member = train_fold(made, cases, fold, 0, config(name, epochs=2)).members[0]
    member.save(tmp_path / "m.safetensors")
    again = Member.load(tmp_path / "m.safetensors")
    bag = made.read([made.slides[3]])
    assert torch.equal(again.logits(bag), member.logits(bag))
    assert torch.equal(again.attention(bag), member.attention(bag))


def test_attention_is_how_common_the_kind_of_a_tile_is() -> None:
    model = build_model("protocounts", 2, 2, k=2)
    model.get_buffer("centres").copy_(torch.tensor([[0.0, 0.0], [9.0, 9.0]]))
    x = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.0, 0.1], [9.0, 9.0]])
    attention = model(collate([Bag(x)])).attention[0, 0]
    torch.testing.assert_close(attention, torch.tensor([0.75, 0.75, 0.75, 0.25]) / 2.5)


def test_a_published_linear_head_gives_the_product_with_the_embedding() -> None:
    generator = torch.Generator().manual_seed(1)
    prototypes = torch.randn(1, 3, 8, generator=generator)
    weight = torch.randn(2, 3 + 2 * 3 * 8, generator=generator)
    model = MODELS["panther"].from_published({"classifier.weight": weight, "prototypes": prototypes})
    bag = bags(1)[0]
    expected: Tensor = Panther().embed(bag, prototypes[0]).vector @ weight.T
    torch.testing.assert_close(model(collate([bag])).logits, expected)
    moments = MODELS["mean-variance"].from_published({"classifier.weight": weight[:, :16]})
    assert moments.dim == 8
    with pytest.raises(ModelMismatchError, match="lack 'prototypes'"):
        MODELS["panther"].from_published({"classifier.weight": weight})
    with pytest.raises(ModelMismatchError, match="no weights of it"):
        MODELS["panther-mlp"].from_published({})


def test_stages_of_the_network_can_be_left_out_one_by_one() -> None:
    batch = collate(bags(2))
    widths = {}
    for stage in ("shared", "individual", "joint"):
        model = build_model("panther-mlp", 8, 2, k=3, **{"shared": 16, "individual": 5, "joint": 7, stage: None})
        model.prepare(bags(), seed=0)
        widths[stage] = model.eval()(batch).embedding.shape[1]
        assert f"{stage}.0.weight" not in dict(model.named_parameters())
    assert widths == {"shared": 7, "individual": 7, "joint": 15}


def test_each_prototype_has_a_network_of_its_own() -> None:
    model = build_model("panther-mlp", 8, 2, k=3, shared=None, joint=None, individual=4)
    model.prepare(bags(), seed=0)
    before = model.eval()(collate(bags(1))).embedding
    with torch.no_grad():
        model.get_parameter("individual.1.0.bias").add_(1.0)
    changed = (model(collate(bags(1))).embedding != before)[0]
    assert changed[4:8].any()
    assert not changed[:4].any()
    assert not changed[8:].any()


def test_no_prototype_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one prototype"):
        build_model("h2t", 8, 2, k=0)
