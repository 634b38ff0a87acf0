"""Explanations: they point at the tiles that carry the class, and the deletion test tells them from chance."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mil import cross_validate, explain
from mil.bag import Bag, Batch, collate
from mil.cohort import Cohort
from tests.mil.made_up import DIM, QUICK, bag_of, cohort, stored_cohort
from wsi import Slide
from wsi.errors import UsageError
from wsi.geojson import Frame
from wsi.grid import Tiling
from wsi.heatmap import Heatmap


@pytest.fixture(scope="module")
def members() -> Any:
    return cross_validate(cohort(60), replace(QUICK, folds=2, members=2, inner=1, epochs=60)).folds[0].members


@pytest.fixture(scope="module")
def bag() -> Any:
    """A positive bag of 24 tiles whose tiles with the class come first."""
    x = bag_of(1, np.random.default_rng(3), n=24)
    return Bag(x[np.argsort(-x[:, 0])])


@pytest.mark.parametrize("name", ["importance", "integrated_gradients"])
def test_tiles_that_carry_the_class_stand_out(members: Any, bag: Any, name: str) -> None:
    values = getattr(explain, name)(members, bag)
    assert set(np.argsort(-values)[:3].tolist()) < set(range(6))  # one that is left out is replaced by the others
    assert values[:6].mean() > 3 * abs(values[6:].mean())


def test_attention_of_a_bag_averages_one(members: Any, bag: Any) -> None:
    assert explain.attention(members, bag).mean() == pytest.approx(1, rel=1e-5)


def test_importance_is_the_loss_of_the_answer(members: Any, bag: Any) -> None:
    values = explain.importance(members, bag, output=1)

    def answer(tiles: Any) -> Any:
        part = Bag(bag.features[tiles])
        return np.mean([member.answer(member.logits(part)[None])[0, 1] for member in members])

    everything = list(range(24))
    for i in (0, 11, 23):
        expected = answer(everything) - answer([k for k in everything if k != i])
        assert values[i] == pytest.approx(expected, abs=1e-5)
    assert np.isnan(explain.importance(members, Bag(bag.features[:1]))).all()


def test_integrated_gradients_add_up_to_the_difference_of_the_logit(members: Any, bag: Any) -> None:
    shares = explain.integrated_gradients(members, bag, output=1, steps=200)
    difference = []
    for member in members:
        batch = member.scaling(collate([bag]))
        empty = Batch(torch.zeros_like(batch.features), batch.mask)
        with torch.no_grad():
            difference.append(float(member.model(batch).logits[0, 1] - member.model(empty).logits[0, 1]))
    assert shares.sum() == pytest.approx(np.mean(difference), rel=0.02, abs=0.02)


def test_the_deletion_test_tells_an_explanation_from_chance(members: Any, bag: Any) -> None:
    told = explain.deletion_test(members, bag, explain.importance(members, bag))
    assert told.matters
    assert told.effect > 0.05
    blind = explain.deletion_test(members, bag, np.arange(24, dtype=np.float32))  # the worst tiles first
    assert not blind.matters
    assert blind.effect < 0
    with pytest.raises(UsageError, match="nothing to take away"):
        explain.deletion_test(members, Bag(bag.features[:1]), np.zeros(1, np.float32))


def test_a_heatmap_has_nan_where_a_tile_has_no_features(tmp_path: Path, members: Any) -> None:
    store, table = stored_cohort(tmp_path, 6)
    made = Cohort.from_store(store, table, "subtype")
    for kind in ("attention", "importance", "gradients"):
        heat = explain.heatmap(members, made.source, made.slides[1], kind=kind)
        assert heat.name == kind
        assert heat.scored.all()
        assert heat.frame == Frame("s001.svs", (200, 160), (0.25, 0.25), (3, 5))
    with pytest.raises(UsageError, match="attention, importance, gradients"):
        explain.heatmap(members, made.source, made.slides[1], kind="luck")
    with pytest.raises(UsageError, match="without places"):
        explain.heatmap(members, cohort(8).source, "s000")
    assert made.source.dim == DIM


def test_the_contact_sheet_shows_the_highest_tiles_in_order_and_none_that_overlap() -> None:
    levels = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    pixels = np.repeat(np.repeat(levels, 32, 0), 32, 1)[..., None].repeat(3, -1)
    slide = Slide.from_array(pixels, mpp=0.5)
    grid = slide.lattice(Tiling(mpp=0.5, tile_px=32))
    heat = Heatmap(grid, np.arange(16, dtype=np.float32), slide.frame)
    sheet = explain.contact_sheet(slide, heat, k=4, columns=2)
    side, gap, text = 32, 4, 14
    corners = [
        sheet[gap + r * (side + text + gap) + 5, gap + c * (side + gap) + 5, 0] for r in range(2) for c in range(2)
    ]
    assert corners == [240, 224, 208, 192]
    dense = slide.lattice(Tiling(mpp=0.5, tile_px=32, overlap_px=16))
    rising = Heatmap(dense, dense.xy.sum(1).astype(np.float32), slide.frame)
    chosen = dense.xy[explain.top_tiles(rising, 5)]
    apart = np.abs(chosen[:, None] - chosen[None]).max(-1) + np.eye(len(chosen)) * 99
    assert (apart >= 32).all()
    assert len(explain.top_tiles(rising, 5, apart=False)) == 5
