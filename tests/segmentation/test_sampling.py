"""Sampling: patches are what was drawn, every group has its turn, and the same seed brings the same pixels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from segmentation.place import MapPlace
from segmentation.raster import Raster
from segmentation.sampling import (
    AnnotatedSlide,
    Draw,
    PatchIndex,
    PatchOptions,
    SlidePatches,
    index_slide,
    read_patches,
    weigh_hard,
    weigh_regions,
)
from tests.segmentation.patches import OPTIONS, PX, box, picture, slide
from wsi.annotation import Annotation
from wsi.errors import CohortError, ReadError, SlideNotFoundError, UsageError
from wsi.grid import TileGrid
from wsi.readers.array import ArrayReader
from wsi.readers.base import Pixels
from wsi.resolution import Mpp
from wsi.slide import Slide


def _patches(labels: list[int], facts: dict[str, str] | None = None, clusters: list[int] | None = None) -> SlidePatches:
    n = len(labels)
    xy = np.stack([np.arange(n) * PX, np.zeros(n, np.int64)], axis=1)
    grid = TileGrid(xy, PX, (PX, PX), (PX, PX), (1.0, 1.0))
    return SlidePatches(
        AnnotatedSlide("nowhere.svs", (), facts or {}),
        grid,
        np.array(labels, np.int16),
        np.arange(n) % 3 == 0,
        np.array(clusters or [0] * n, np.int16),
    )


# Deliberately lopsided: many patches in few groups.
LOPSIDED = PatchIndex(
    (
        _patches([0] * 40 + [1] * 3, {"grade": "1"}, [0] * 30 + [1] * 10 + [0] * 3),
        _patches([0] * 5 + [1] * 9, {"grade": "1"}),
        _patches([0] * 7, {"grade": "2"}),
        _patches([1] * 25 + [0], {"grade": "3"}),
    ),
    ("background", "tumour"),
)


def test_groups_are_drawn_uniformly_at_every_level_whatever_their_size() -> None:
    draw = Draw(LOPSIDED, ("grade", "slide", "class", "cluster"))
    rows = draw.rows(20_000, np.random.default_rng(5))
    expected = {
        (0, 0, 0, 0): 1 / 3 / 2 / 2 / 2, (0, 0, 0, 1): 1 / 3 / 2 / 2 / 2, (0, 0, 1, 0): 1 / 3 / 2 / 2,
        (0, 1, 0, 0): 1 / 3 / 2 / 2, (0, 1, 1, 0): 1 / 3 / 2 / 2, (1, 2, 0, 0): 1 / 3,
        (2, 3, 0, 0): 1 / 3 / 2, (2, 3, 1, 0): 1 / 3 / 2,
    }  # fmt: skip
    assert {tuple(code): chance for code, chance in zip(draw.codes.tolist(), draw.chances, strict=True)} == (
        pytest.approx(expected)
    )
    drawn = np.bincount(draw.leaf_of[rows], minlength=len(draw.chances))
    assert chisquare(drawn, 20_000 * draw.chances).pvalue > 0.01
    biggest = np.flatnonzero(draw.leaf_of == draw.leaf_of[0])
    assert chisquare(np.bincount(rows, minlength=len(LOPSIDED))[biggest]).pvalue > 0.01


def test_without_levels_every_patch_is_as_likely() -> None:
    rows = Draw(LOPSIDED, ()).rows(9_000, np.random.default_rng(0))
    assert chisquare(np.bincount(rows, minlength=len(LOPSIDED))).pvalue > 0.01


@given(
    labels=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_chances_sum_to_one_and_what_is_drawn_belongs_to_its_leaf(labels: list[list[int]], seed: int) -> None:
    index = PatchIndex(tuple(_patches(each) for each in labels), ("background", "a", "b"))
    weights = np.random.default_rng(seed).integers(0, 2, len(index)).astype(float)
    draw = Draw(index, ("class", "slide"), weights)
    assert draw.chances.sum() == pytest.approx(1)
    rows = draw.rows(200, np.random.default_rng(seed))
    positive = np.bincount(draw.leaf_of, weights) > 0
    assert (weights[rows][positive[draw.leaf_of[rows]]] > 0).all()
    assert rows.min() >= 0
    assert rows.max() < len(index)


def test_chosen_regions_get_their_share_of_every_leaf() -> None:
    rows = Draw(LOPSIDED, weights=weigh_regions(LOPSIDED, 0.8)).rows(8_000, np.random.default_rng(1))
    both = LOPSIDED.slide_of[rows] != 3  # its only background patch lies outside
    inside = LOPSIDED.in_region[rows][both]
    assert inside.mean() == pytest.approx(0.8, abs=0.02)
    first = Draw(LOPSIDED, weights=weigh_regions(LOPSIDED, 1.0)).rows(2_000, np.random.default_rng(1))
    outside = ~LOPSIDED.in_region[first]
    leaf = Draw(LOPSIDED).leaf_of
    assert not np.isin(leaf[first[outside]], leaf[LOPSIDED.in_region]).any()


def test_hard_patches_come_in_proportion_to_their_loss() -> None:
    index = PatchIndex((_patches([0] * 4),), ("background",))
    weights = weigh_hard(np.array([0.0, 1.0, 3.0, np.nan]), floor=0.5)
    assert weights / weights[0] == pytest.approx([1, 5 / 2, 11 / 2, 3])
    rows = Draw(index, ("class",), weights).rows(6_000, np.random.default_rng(2))
    assert chisquare(np.bincount(rows), 6_000 * weights / weights.sum()).pvalue > 0.01


@given(seed=st.integers(0, 500))
def test_coverage_is_that_of_the_drawn_annotations(seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = [
        Annotation(shapely.Point(*rng.uniform(10, 180, 2)).buffer(rng.uniform(8, 50)), name) for name in ("a", "b", "a")
    ]
    options = PatchOptions(("a", "b"), OPTIONS.tiling, min_coverage=0.4)
    with Slide.from_array(np.full((192, 192, 3), 128, np.uint8), mpp=1.0, name="grey") as opened:
        tissue = (box(0, 0, 192, 192, "Tissue"),)
        found = index_slide(AnnotatedSlide("grey", drawn, tissue=tissue), options, opened)
    fine = Raster(drawn, MapPlace((0.25, 0.25), (1.0, 1.0)), (768, 768), {"a": 1, "b": 2})[:768]
    for (x, y), label in zip(found.grid.xy * 4, found.labels, strict=True):
        tile = fine[y : y + 4 * PX, x : x + 4 * PX]
        share = np.bincount(tile.ravel(), minlength=3) / tile.size
        assert share[label] >= (0.9 if label == 0 else 0.4) - 0.01
        assert label == 0 or share[label] >= share[1:].max() - 0.01


def test_patches_are_of_what_was_drawn_and_background_is_tissue(tmp_path: Path) -> None:
    found = index_slide(slide(tmp_path, 0), OPTIONS)
    assert np.bincount(found.labels).tolist() == [16 * 10 - 36, 36]
    tumour = found.grid.xy[found.labels == 1]
    assert tumour.min(axis=0).tolist() == [64, 32]
    assert tumour.max(axis=0).tolist() == [160 - PX, 128 - PX]


def test_an_annotation_shifted_by_one_tile_is_noticed(tmp_path: Path) -> None:
    right = PatchIndex.of([index_slide(slide(tmp_path, 0), OPTIONS)], OPTIONS)
    shifted = PatchIndex.of([index_slide(slide(tmp_path, 0, shift=PX), OPTIONS)], OPTIONS)

    def reds(index: PatchIndex) -> list[float]:
        batch = next(read_patches(index, np.flatnonzero(index.labels == 1), batch_size=64))
        return sorted(round(float(patch[..., 0].mean())) for patch in batch.pixels)

    assert max(reds(right)) < 150
    assert sum(red > 200 for red in reds(shifted)) == 6  # the column of tiles that is no tumour


def test_ignored_places_are_left_out_and_background_keeps_to_chosen_regions(tmp_path: Path) -> None:
    drawn = slide(tmp_path, 0)
    ignoring = replace(drawn, annotations=(*drawn.annotations, box(0, 0, 20, 192, "Ignore*")))
    assert index_slide(ignoring, OPTIONS).grid.xy[:, 0].min() == 32
    chosen = replace(drawn, annotations=(*drawn.annotations, box(160, 0, 256, 192, "Region*")))
    found = index_slide(chosen, OPTIONS)
    assert found.grid.xy[found.labels == 0][:, 0].min() == 160
    assert found.in_region.tolist() == (found.labels == 0).tolist()


def test_memory_is_bounded_by_keeping_some_of_each_class(tmp_path: Path) -> None:
    few = replace(OPTIONS, most=7)
    found = index_slide(slide(tmp_path, 0), few)
    assert np.bincount(found.labels).tolist() == [7, 7]
    assert found.grid.xy.tolist() == index_slide(slide(tmp_path, 0), few).grid.xy.tolist()
    assert found.grid.xy.tolist() != index_slide(slide(tmp_path, 0), replace(few, seed=1)).grid.xy.tolist()


def test_the_same_seed_gives_the_same_pixels_with_any_number_of_threads(tmp_path: Path) -> None:
    slides = [slide(tmp_path, seed) for seed in range(3)]
    index = PatchIndex.of([index_slide(each, OPTIONS) for each in slides], OPTIONS)
    pictures = [
        np.asarray(Slide.open(each.location, mpp=1.0).read_tile(part.grid, 0))
        for each, part in zip(slides, index.slides, strict=True)
    ]
    rows = Draw(index).rows(100, np.random.default_rng(3))
    one, four = (list(read_patches(index, rows, batch_size=16, threads=threads)) for threads in (1, 4))
    assert [len(batch.rows) for batch in one] == [16] * 6 + [4]
    for a, b in zip(one, four, strict=True):
        assert (a.pixels == b.pixels).all()
        assert a.rows.tolist() == b.rows.tolist()
        assert a.labels.tolist() == index.labels[a.rows].tolist()
    assert sorted(np.concatenate([batch.rows for batch in one])) == sorted(rows)
    firsts = next(read_patches(index, np.flatnonzero(np.diff(index.slide_of, prepend=-1)), batch_size=3))
    assert all((a == b).all() for a, b in zip(firsts.pixels, pictures, strict=True))


def test_a_patch_drawn_twice_comes_twice(tmp_path: Path) -> None:
    index = PatchIndex.of([index_slide(slide(tmp_path, 0), OPTIONS)], OPTIONS)
    batch = next(read_patches(index, np.array([5, 3, 5]), batch_size=3))
    assert batch.rows.tolist() == [3, 5, 5]
    assert (batch.pixels[1] == batch.pixels[2]).all()
    assert (batch.pixels[0] != batch.pixels[1]).any()


class _Torn(AnnotatedSlide):
    """A slide of which one place cannot be read."""

    def open(self) -> Slide:
        class Reader(ArrayReader):
            def read(self, level: int, x: int, y: int, w: int, h: int) -> Pixels:
                if x <= 100 < x + w and y <= 50 < y + h:
                    raise ReadError("torn")
                return super().read(level, x, y, w, h)

        return Slide(Reader([picture(0)]), name="torn", path=None, mpp=Mpp(1.0, 1.0, "flag"))


def test_patches_that_cannot_be_read_are_left_out_and_the_others_keep_their_labels(tmp_path: Path) -> None:
    whole = slide(tmp_path, 0)
    index = PatchIndex.of([index_slide(_Torn("torn", whole.annotations, {}, None, whole.tissue), OPTIONS)], OPTIONS)
    batch = next(read_patches(index, np.arange(len(index)), batch_size=1000))
    missing = np.setdiff1d(np.arange(len(index)), batch.rows)
    assert index.slides[0].grid.xy[missing].tolist() == [[96, 48]]
    assert len(batch.pixels) == len(batch.labels) == len(batch.rows)
    assert ((batch.pixels[..., 0].mean((1, 2)) < 150) == (batch.labels == 1)).all()


def test_what_cannot_be_drawn_from_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="no slide has a patch of necrosis"):
        options = replace(OPTIONS, classes=("tumour", "necrosis"))
        PatchIndex.of([index_slide(slide(tmp_path, 0), options)], options)
    with pytest.raises(CohortError, match="no slide has patches"):
        PatchIndex.of([], OPTIONS)
    with pytest.raises(CohortError, match="no 'stage' is known"):
        Draw(LOPSIDED, ("stage",))
    with pytest.raises(UsageError, match="90 patches need"):
        Draw(LOPSIDED, weights=np.ones(3))
    with pytest.raises(UsageError, match="classes are different names"):
        PatchOptions(("background",))
    with pytest.raises(SlideNotFoundError):
        next(read_patches(LOPSIDED, np.array([0, 1])))
