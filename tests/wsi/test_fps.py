"""Fast patch selection: as the authors' code chooses, and what a choice of tiles has to be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi.fps import FastPatches, apart, cleaned, draw, fast_patches, find_patches, spread
from wsi.grid import TileGrid
from wsi.slide import Overview

GOLDEN = Path(__file__).parents[1] / "golden" / "fps.npz"
PINK = (200, 120, 180)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(GOLDEN) as found:
        return dict(found)


def view_of(image: np.ndarray, scale: float = 20.0) -> Overview:
    return Overview(image, (scale, scale))


def picture(width: int = 300, height: int = 200) -> np.ndarray:
    """Glass with a rectangle of tissue from (40, 30) to (240, 170)."""
    image = np.full((height, width, 3), 243, np.uint8)
    image[30:170, 40:240] = PINK
    return image


def grid_of(width: int, height: int, side: int, tissue: Any = ()) -> TileGrid:
    xy = np.stack(np.meshgrid(np.arange(0, width, side), np.arange(0, height, side)), -1).reshape(-1, 2)
    return TileGrid(xy, 256, (side, side), (side, side), (0.5, 0.5), tissue=np.array(tissue, np.float32))


def test_the_thumbnail_is_cleaned_as_the_authors_clean_it(golden: dict[str, Any]) -> None:
    clean = cleaned(golden["thumbnail"])
    assert np.array_equal(clean, golden["clean"])
    assert np.array_equal((clean.mean(axis=2) != 255) * 255, golden["mask"])


@pytest.mark.parametrize("threshold", ["0.7", "0.9"])
def test_patches_are_those_of_the_authors(golden: dict[str, Any], threshold: str) -> None:
    patch = int(golden["mask_patch_w"]), int(golden["mask_patch_h"])
    found = find_patches(golden["mask"] > 0, patch, float(threshold))
    theirs = golden[f"thr{threshold}/candidates_xy_fraction"]
    assert np.array_equal(found.xy, theirs[:, :2].astype(int))
    np.testing.assert_allclose(found.tissue, theirs[:, 2], rtol=1e-12)
    kept = found.xy[apart(found.xy, float(golden["min_distance"]))]
    assert np.array_equal(kept, golden[f"thr{threshold}/kept_xy"])


def test_tiles_lie_in_the_middle_of_patches_on_the_tissue() -> None:
    grid = grid_of(6000, 4000, 250)
    rows = fast_patches(view_of(picture()), grid, (0.5, 0.5), FastPatches(patch_um=250, n=999))
    assert len(rows) >= 6
    middles = grid.xy[rows] + 125
    assert ((middles >= (800, 600)) & (middles <= (4800, 3400))).all()  # the rectangle, in level-0 pixels
    # Patches are 500 px wide from the corner of the tissue on; the tile nearest to one's middle is within half a tile.
    off = (middles - (800, 600)) % 500 - 250
    assert np.abs(off).max() <= 125
    for i, place in enumerate(middles):
        gap = np.sqrt(((np.delete(middles, i, axis=0) - place) ** 2).sum(axis=1)).min()
        assert gap >= 1000 - 2 * 125 * np.sqrt(2)


def test_microns_decide_how_large_a_patch_is_in_either_direction() -> None:
    image = picture()
    coarse = fast_patches(view_of(image), grid_of(6000, 4000, 250), (1.0, 1.0), FastPatches(patch_um=500, n=999))
    fine = fast_patches(view_of(image), grid_of(6000, 4000, 250), (0.5, 0.5), FastPatches(patch_um=250, n=999))
    assert np.array_equal(coarse, fine)
    more = fast_patches(view_of(image), grid_of(6000, 4000, 250), (0.5, 0.5), FastPatches(patch_um=125, n=999))
    assert len(more) > 2 * len(fine)


def test_the_scale_of_the_picture_is_taken_exactly() -> None:
    """A ratio of whole numbers would be 25 level-0 pixels a picture pixel, and miss by 1,400 at the far end."""
    image = np.full((100, 1000, 3), 243, np.uint8)
    image[10:90, 900:980] = PINK
    view = Overview(image, (25.6, 25.6))
    grid = grid_of(25600, 2560, 128)
    rows = fast_patches(view, grid, (0.5, 0.5), FastPatches(patch_um=256, n=999))
    assert len(rows)
    assert (grid.xy[rows, 0] >= 25.6 * 900).all()


def test_no_more_than_n_are_chosen_and_the_seed_says_which() -> None:
    def choose(**options: Any) -> list[int]:
        found = fast_patches(view_of(picture()), grid_of(6000, 4000, 250), (0.5, 0.5), FastPatches(100, **options))
        return [int(row) for row in found]

    everything = choose(n=999)
    some = choose(n=8)
    assert len(everything) > 20
    assert len(some) == 8
    assert some == sorted(set(some))
    assert set(some) < set(everything)
    assert some == choose(n=8)
    assert any(some != choose(n=8, seed=seed) for seed in range(1, 4))


def test_nothing_is_chosen_where_no_patch_fits_the_tissue() -> None:
    grid = grid_of(6000, 4000, 250)
    assert len(fast_patches(view_of(picture()), grid, (0.5, 0.5), FastPatches(patch_um=5000))) == 0
    glass = np.full((200, 300, 3), 243, np.uint8)
    assert len(fast_patches(view_of(glass), grid, (0.5, 0.5), FastPatches(100))) == 0
    empty = TileGrid(np.empty((0, 2), int), 256, (250, 250), (250, 250), (0.5, 0.5))
    assert len(fast_patches(view_of(picture()), empty, (0.5, 0.5), FastPatches(100))) == 0


def test_a_patch_far_from_every_tile_of_the_grid_stands_for_none() -> None:
    corner = TileGrid(np.array([[5500, 3500]]), 256, (250, 250), (250, 250), (0.5, 0.5))
    assert len(fast_patches(view_of(picture()), corner, (0.5, 0.5), FastPatches(250))) == 0


def test_a_grid_alone_is_thinned_out_by_distance_and_tissue() -> None:
    tissue = np.ones(24 * 16)
    tissue[::3] = 0.5
    grid = grid_of(6000, 4000, 250, tissue)
    rows = spread(grid, (0.5, 0.5), FastPatches(patch_um=250, tissue=0.9, n=999))
    assert (grid.tissue[rows] >= 0.9).all()
    um = grid.xy[rows] * 0.5
    gaps = np.sqrt(((um[:, None] - um) ** 2).sum(-1)) + 1e9 * np.eye(len(rows))
    assert gaps.min() >= 500
    left = np.setdiff1d(np.flatnonzero(grid.tissue >= 0.9), rows)
    nearest = np.sqrt((((grid.xy[left] * 0.5)[:, None] - um) ** 2).sum(-1)).min(1)
    assert nearest.max() < 500  # nobody was passed over without a reason


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=60), st.integers(0, 30))
def test_kept_places_are_apart_and_others_are_near_an_earlier_one(places: list[tuple[int, int]], least: int) -> None:
    xy = np.array(places, np.int64).reshape(-1, 2)
    rows = apart(xy, least)
    assert len(rows) or not places
    for i in range(len(xy)):
        before = rows[rows < i]
        gaps = np.sqrt(((xy[before] - xy[i]) ** 2).sum(axis=1))
        assert (i in rows) == bool((gaps >= least).all())


@given(st.integers(0, 40), st.integers(1, 40), st.integers(0, 99))
def test_a_draw_is_a_part_in_ascending_order(count: int, n: int, seed: int) -> None:
    rows = np.arange(count)[::-1] * 3
    found = draw(rows, n, seed)
    assert len(found) == min(n, count)
    assert set(found) <= set(rows)
    assert (np.diff(found) > 0).all()


@pytest.mark.parametrize("wrong", [{"patch_um": 0}, {"tissue": 1.1}, {"n": 0}, {"seed": -1}])
def test_options_without_a_meaning_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FastPatches(**wrong)
