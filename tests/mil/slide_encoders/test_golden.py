"""Golden numbers of the slide encoders: with the authors' weights ours put out what theirs do."""

from typing import Any

import numpy as np
import pytest
import torch

from mil.bag import Bag
from mil.slide_encoders import CHIEF, COBRA, MADELEINE
from mil.slide_encoders.cobra import match_places
from mil.slide_encoders.madeleine import graph_transport, info_nce, transport_plan
from tests.mil import golden
from tests.mil.golden import arrays, assert_near, number
from wsi.errors import ModelMismatchError

LINE = np.stack([np.arange(64) * 224, np.zeros(64, np.int64)], axis=1)

both_cobras = pytest.mark.parametrize("tag", ["cobra1_like", "cobra2_like"])


def cobra(tag: str, **hyper: Any) -> COBRA:
    return COBRA.from_published(golden.state("cobra", tag), **hyper)


def tiles() -> Bag:
    return Bag(number("bags", "x_64x32_clustered"), LINE, "tiles")


def other_tiles() -> Bag:
    return Bag(number("cobra", "agg_64x24"), LINE, "other tiles")


@both_cobras
@torch.no_grad()
def test_cobra_agrees_layer_by_layer(tag: str) -> None:
    model = cobra(tag)
    mixed, _ = model.layers[0].mix(number("cobra", f"{tag}/mamba_layer0_in"))  # type: ignore[operator]
    assert_near(mixed, number("cobra", f"{tag}/mamba_layer0_out"))
    assert_near(model.embed["32"](tiles().features), number("cobra", f"{tag}/embed"))
    (h,) = model.tokens(tiles().features[None])
    assert_near(h, number("cobra", f"{tag}/h"), atol=2e-5)
    assert_near(model.score(h), number("cobra", f"{tag}/A_raw_heads").mean(-1))


@both_cobras
def test_cobra_agrees_for_one_extractor_and_for_two(tag: str) -> None:
    model = cobra(tag)
    found = model.encode(tiles())
    assert_near(found.attention, number("cobra", f"{tag}/A"), atol=1e-7, rtol=1e-4)
    assert_near(found.vector, number("cobra", f"{tag}/feats"))
    assert_near(model.encode(Bag(number("cobra", "x_64x48"))).vector, number("cobra", f"{tag}/feats_from_x48"))
    assert_near(model.encode_pair(tiles(), other_tiles()).vector, number("cobra", f"{tag}/feats_agg"))


@both_cobras
def test_cobra_agrees_on_the_ten_heaviest_tiles(tag: str) -> None:
    model = cobra(tag, top_k=10)
    assert_near(model.encode(tiles()).vector, number("cobra", f"{tag}/feats_top10"))
    assert_near(model.encode_pair(tiles(), other_tiles()).vector, number("cobra", f"{tag}/feats_agg_top10"))


def test_places_match_as_the_authors_match_them() -> None:
    found = arrays("cobra")
    rows = match_places(found["match/coords_w"], found["match/coords_a"])
    theirs = sorted(zip(found["match/idx_w"].tolist(), found["match/idx_a"].tolist(), strict=True))
    assert list(zip(rows.first.tolist(), rows.second.tolist(), strict=True)) == theirs  # they come in order of bytes


@pytest.mark.parametrize("prefix", ["", "cobra.", "momentum_enc.", "module.momentum_enc."])
def test_every_layout_that_cobra_was_published_in_loads(prefix: str) -> None:
    state = {f"{prefix}{name}": value for name, value in golden.state("cobra", "cobra2_like").items()}
    if "momentum" in prefix:
        state |= {f"{prefix}proj.0.weight": np.ones(3), "base_enc.norm.weight": np.ones(2)}
    model = COBRA.from_published(state)
    assert_near(model.encode(tiles()).vector, number("cobra", "cobra2_like/feats"))


@torch.no_grad()
def test_madeleine_agrees() -> None:
    model = MADELEINE.from_published(golden.state("madeleine"))
    x = number("madeleine", "x")
    found = model(golden.batch(*x))
    assert_near(model.embed(x), number("madeleine", "pre_attn"))
    assert_near(found.scores.transpose(1, 2), number("madeleine", "attn_raw"))
    pooled = found.attention[:, :, None] @ model._heads_of(x).permute(0, 2, 1, 3)
    assert_near(pooled.squeeze(2).transpose(1, 2), number("madeleine", "heads_embedding"))
    assert_near(found.vector, number("madeleine", "slide_embedding"))
    assert_near(model.tokens(x), number("madeleine", "train/HE_tokens"))


@pytest.mark.parametrize("temperature", ["0.1", "0.001"])
def test_contrastive_loss_agrees(temperature: str) -> None:
    q, k = number("madeleine", "loss/q"), number("madeleine", "loss/k")
    for name, symmetric in (("infonce", False), ("infonce_sym", True)):
        loss = info_nce(q, k, temperature=float(temperature), symmetric=symmetric)
        assert_near(loss, number("madeleine", f"loss/{name}_T{temperature}"))


def test_graph_transport_agrees() -> None:
    v, w = number("madeleine", "loss/got_v"), number("madeleine", "loss/got_w")
    found = graph_transport(v, w)
    assert_near(found.wasserstein, number("madeleine", "loss/wd"))
    assert_near(found.gromov, number("madeleine", "loss/gwd"))
    assert_near(found.wasserstein.sum() + found.gromov.sum(), number("madeleine", "loss/got"))


def test_transport_plan_agrees_and_moves_everything() -> None:
    v, w = number("madeleine", "loss/got_v"), number("madeleine", "loss/got_w")
    cosine = torch.nn.functional.cosine_similarity(v[:, :, None], w[:, None], dim=-1)
    low, high = (1 - cosine).amin(), (1 - cosine).amax()
    plan = transport_plan((1 - cosine - low - 0.1 * (high - low)).relu(), beta=0.5, rounds=30)
    assert_near(plan, number("madeleine", "loss/ipot_T"))
    assert_near(plan.sum(1), torch.full((3, 12), 1 / 12))


def test_chief_agrees() -> None:
    model = CHIEF.from_published(golden.state("chief"))
    bag = Bag(number("chief", "x_64x384"))
    found = model.encode(bag)
    assert_near(found.scores, number("chief", "attention_raw"))
    assert_near(found.vector, number("chief", "WSI_feature"))
    told = model.anatomical(bag, int(number("chief", "organ_index")))
    assert_near(told.logits, number("chief", "bag_logits"))
    assert_near(told.logits.softmax(-1), number("chief", "bag_prob"))
    assert_near(told.vector, number("chief", "WSI_feature_anatomical"))
    assert_near(told.tiles, number("chief", "patch_prob"))


def test_chief_without_the_table_of_organs_gives_the_same_slide_vector() -> None:
    state = {name: value for name, value in golden.state("chief").items() if name != "organ_embedding"}
    found = CHIEF.from_published(state).encode(Bag(number("chief", "x_64x384")))
    assert_near(found.vector, number("chief", "WSI_feature"))


@pytest.mark.parametrize(
    ("kind", "state"),
    [(COBRA, ("cobra", "cobra1_like")), (MADELEINE, ("madeleine", "")), (CHIEF, ("chief", ""))],
)
def test_weights_that_lack_a_tensor_or_have_one_too_many_are_refused(kind: Any, state: tuple[str, str]) -> None:
    whole = golden.state(*state)
    victim = next(name for name in whole if name.endswith("attention_c.bias"))
    with pytest.raises(ModelMismatchError, match=victim):
        kind.from_published({name: value for name, value in whole.items() if name != victim})
    with pytest.raises(ModelMismatchError, match="unknown_part"):
        kind.from_published(whole | {"unknown_part.weight": np.ones(2)})
    with pytest.raises(ModelMismatchError):
        kind.from_published({})
