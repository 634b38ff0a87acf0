"""Choosing a few tiles of a slide: what is chosen, and that a store never mixes two choices."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.extract import extract
from features import ExtractOptions, FeatureStore, PrepareOptions, extract_slides
from features.keys import slide_key
from features.mosaic import Mosaic, colour_histograms, group, mosaic
from features.prepare import grid_slide, prepare_slide
from features.selection import (
    Selection,
    parse_selection,
    select_rows,
    select_tiles,
    selection_facts,
    selection_from_facts,
)
from mil.cohort import Cohort
from mil.sources import StoreSource
from tests.features.test_cohort import assert_equal_stores, slide_file
from tests.mil import made_up
from wsi import Slide, Tiling
from wsi.discover import SlideSource
from wsi.errors import BadFeaturesError, UsageError
from wsi.fps import FastPatches
from wsi.grid import Box, TileGrid
from wsi.slide import Overview

ENCODER = "colour-stats"
TILING = Tiling(mpp=1.0, tile_px=64, min_tissue=0.2)
COLOURS = ((180, 60, 120), (90, 60, 160), (230, 160, 200))


def options(select: Selection | None) -> ExtractOptions:
    return ExtractOptions(prepare=PrepareOptions(tiling=TILING, select=select), batch_size=4)


def stripes() -> tuple[Overview, TileGrid]:
    """A picture of 300 x 200 in three stripes of one colour each, 20 level-0 pixels a pixel, and tiles of 10 x 10 pixels."""
    image = np.zeros((200, 300, 3), np.uint8)
    for i, colour in enumerate(COLOURS):
        image[:, 100 * i : 100 * (i + 1)] = colour
    xy = np.stack(np.meshgrid(np.arange(0, 6000, 200), np.arange(0, 4000, 200)), -1).reshape(-1, 2)
    return Overview(image, (20.0, 20.0)), TileGrid(xy, 64, (200, 200), (200, 200), (0.5, 0.5))


def test_a_tile_is_described_by_the_colours_of_its_own_pixels() -> None:
    view, grid = stripes()
    looks = colour_histograms(view, grid)
    np.testing.assert_allclose(looks.reshape(len(grid), 3, 8).sum(-1), 1)
    for row, (x, _) in enumerate(grid.xy):
        expected = [8 * channel + value // 32 for channel, value in enumerate(COLOURS[x // 2000])]
        assert np.flatnonzero(looks[row]).tolist() == expected


def test_tiles_that_stick_out_of_the_picture_or_are_smaller_than_a_pixel_are_described_too() -> None:
    view, _ = stripes()
    grid = TileGrid(np.array([[5990, 3990], [7, 7]]), 64, (200, 200), (1, 1), (0.5, 0.5))
    tiny = TileGrid(np.array([[5999, 3999], [30, 30]]), 64, (1, 1), (1, 1), (0.5, 0.5))
    for each in (grid, tiny):
        np.testing.assert_allclose(colour_histograms(view, each).sum(-1), 3)


def test_a_mosaic_has_its_share_of_every_kind_from_all_over_it() -> None:
    view, grid = stripes()
    rows = mosaic(colour_histograms(view, grid), grid.xy, Mosaic(k=3, share=0.05))
    for stripe in range(3):
        inside = grid.xy[rows][grid.xy[rows, 0] // 2000 == stripe]
        assert len(inside) == 10  # of 200
        assert inside[:, 1].min() < 1000  # above and below
        assert inside[:, 1].max() >= 3000
        gaps = np.abs(inside[:, None] - inside).max(-1) + 9999 * np.eye(10, dtype=int)
        assert gaps.min() >= 400


def test_a_kind_of_one_tile_is_in_the_mosaic() -> None:
    looks = np.zeros((500, 2), np.float32)
    looks[123] = 5
    xy = np.stack([np.arange(500), np.zeros(500, int)], 1)
    assert 123 in mosaic(looks, xy, Mosaic(k=2, share=0.01))


@given(st.integers(0, 60), st.integers(1, 12), st.floats(0.01, 1), st.integers(0, 5), st.integers(1, 60))
def test_a_mosaic_is_a_part_of_the_tiles_in_ascending_order(
    n: int, k: int, share: float, seed: int, kinds: int
) -> None:
    rng = np.random.default_rng(seed)
    looks = rng.integers(0, kinds, (n, 1)).astype(np.float32)  # often the same
    xy = rng.integers(0, 9, (n, 2))  # often the same
    rows = mosaic(looks, xy, Mosaic(k, share, seed))
    assert (np.diff(rows) > 0).all()
    assert ((rows >= 0) & (rows < n)).all()
    assert bool(len(rows)) == bool(n)
    assert len(rows) <= max(k, round(share * n) + k)
    assert np.array_equal(rows, mosaic(looks, xy, Mosaic(k, share, seed)))


def test_groups_are_those_that_are_there() -> None:
    rng = np.random.default_rng(1)
    truth = np.repeat(np.arange(5), 300)
    points = 10 * rng.normal(size=(5, 4))[truth] + rng.normal(size=(1500, 4))
    found = group(points, 5, np.random.default_rng(0))
    pairs = {(int(a), int(b)) for a, b in zip(truth, found, strict=True)}
    assert len(pairs) == 5  # a relabelling


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=40), st.integers(1, 9))
def test_every_point_is_in_the_group_whose_mean_is_nearest(points: list[tuple[int, int]], k: int) -> None:
    x = np.array(points, np.float64)
    found = group(x, k, np.random.default_rng(0))
    means = np.stack([x[found == i].mean(axis=0) for i in range(found.max() + 1)])  # none is empty
    squares = ((x[:, None] - means) ** 2).sum(-1)
    assert (squares[np.arange(len(x)), found] <= squares.min(1) + 1e-9).all()
    assert found.max() + 1 <= min(k, len(set(points)))


def test_selections_are_said_in_words_and_kept_as_json() -> None:
    for text, expected in (
        ("mosaic", Mosaic()),
        ("mosaic:k=5, share=0.02,seed=3", Mosaic(5, 0.02, 3)),
        ("fps", FastPatches()),
        ("fps:patch_um=250,n=7", FastPatches(250.0, n=7)),
    ):
        found = parse_selection(text)
        assert found == expected
        assert selection_from_facts(json.loads(json.dumps(selection_facts(found)))) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mosiac", "there are fps, mosaic"),
        ("mosaic:n=3", "mosaic has no setting 'n'; it has k, share, seed"),
        ("mosaic:k", "KEY=VALUE"),
        ("mosaic:k=few", "k is a number"),
        ("mosaic:share=0", "share is above 0"),
        ("fps:patch_um=-1", "patch_um must be positive"),
    ],
)
def test_a_selection_without_a_meaning_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_selection(text)


@pytest.mark.parametrize("select", [Mosaic(k=3, share=0.1), FastPatches(patch_um=80, n=12)])
def test_a_store_holds_the_tiles_that_were_chosen_and_says_how(tmp_path: Path, select: Selection) -> None:
    slide_file(tmp_path / "a.tif")
    extract_slides(tmp_path / "a.tif", tmp_path / "all", ENCODER, options(None))
    report = extract_slides(tmp_path / "a.tif", tmp_path / "few", ENCODER, options(select))
    everything, few = (FeatureStore(tmp_path / name).slide("a.tif") for name in ("all", "few"))
    assert 5 < len(few.grid) < len(everything.grid) / 3
    assert report.outcomes[0].facts["n_tiles"] == len(few.grid)
    assert few.manifest["selection"] == selection_facts(select) | {"of_tiles": len(everything.grid)}
    assert "selection" not in everything.manifest
    at = {tuple(place): row for row, place in enumerate(everything.grid.xy.tolist())}
    rows = [at[tuple(place)] for place in few.grid.xy.tolist()]
    vectors = everything.features(ENCODER).numpy()[rows]
    np.testing.assert_array_equal(few.features(ENCODER).numpy(), vectors)
    np.testing.assert_array_equal(few.grid.tissue, everything.grid.tissue[rows])
    assert not FeatureStore(tmp_path / "few").verify(deep=True)


def test_a_store_never_mixes_two_selections(tmp_path: Path) -> None:
    slide_file(tmp_path / "a.tif")
    few, others = options(Mosaic(k=3)), (options(None), options(Mosaic(k=4)), options(FastPatches(80)))
    extract_slides(tmp_path / "a.tif", tmp_path / "few", ENCODER, few)
    before = (tmp_path / "few" / "wsi-store.json").read_bytes()
    for other in others:
        with pytest.raises(UsageError, match=r"another selection of tiles \(mosaic:k=3,share=0.1,seed=0 there"):
            extract_slides(tmp_path / "a.tif", tmp_path / "few", ENCODER, other)
    assert (tmp_path / "few" / "wsi-store.json").read_bytes() == before
    assert extract_slides(tmp_path / "a.tif", tmp_path / "few", ENCODER, few).count("skipped") == 1
    extract_slides(tmp_path / "a.tif", tmp_path / "all", ENCODER, options(None))
    with pytest.raises(UsageError, match=r"\(all tiles there, mosaic:k=3,share=0.1,seed=0 asked\)"):
        extract_slides(tmp_path / "a.tif", tmp_path / "all", ENCODER, few)


def test_a_run_that_was_interrupted_goes_on_with_the_same_tiles(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "a.tif")
    few = options(Mosaic(k=3, share=0.2))
    extract_slides(tmp_path / "a.tif", tmp_path / "whole", ENCODER, few)
    store = FeatureStore.create(tmp_path / "cut", TILING, few.prepare.select_facts)
    source = SlideSource(location=Path(path or tmp_path / "a.tif"), relpath="a.tif")
    prepare_slide(source, slide_key("a.tif"), store, few.prepare).slide.close()  # and here the power went
    assert extract_slides(tmp_path / "a.tif", tmp_path / "cut", ENCODER, few).count("done") == 1
    assert_equal_stores(tmp_path / "whole", tmp_path / "cut")


def test_where_nothing_is_chosen_the_slide_is_complete_and_a_note_says_why(tmp_path: Path) -> None:
    slide_file(tmp_path / "a.tif")
    report = extract_slides(tmp_path / "a.tif", tmp_path / "out", ENCODER, options(FastPatches(patch_um=5000)))
    (outcome,) = report.outcomes
    assert outcome.status == "empty"
    assert "none of" in outcome.message
    assert "patches of 5000 µm" in outcome.facts["notes"][0]
    assert len(FeatureStore(tmp_path / "out").slide("a.tif").grid) == 0


def test_tiles_where_the_picture_could_not_be_read_are_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide_file(tmp_path / "a.tif")
    with Slide.open(tmp_path / "a.tif") as slide:
        grid = slide.grid(TILING)
        lost = Box(0, 0, 800, 1200)
        overview = Slide.overview
        monkeypatch.setattr(
            Slide, "overview", lambda self, **asked: replace(overview(self, **asked), unreadable=(lost,))
        )
        for select in (Mosaic(k=3, share=0.3), FastPatches(patch_um=80)):
            rows = select_tiles(slide, grid, select).rows
            assert len(rows)
            assert (grid.xy[rows, 0] >= 800).all()


def test_a_very_large_slide_is_looked_at_in_a_picture_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    slide = Slide.from_array(np.full((1200, 1600, 3), 150, np.uint8), mpp=1.0)
    sizes = []
    overview = Slide.overview

    def noting(self: Slide, **asked: float) -> Overview:
        sizes.append(asked["mpp"])
        return overview(self, mpp=asked["mpp"])

    monkeypatch.setattr(Slide, "overview", noting)
    grid = slide.lattice(TILING)
    select_tiles(slide, grid, Mosaic())
    monkeypatch.setattr("features.selection.MAX_PIXELS", 10_000)
    select_tiles(slide, grid, Mosaic())
    assert sizes[0] == 2.0
    assert sizes[1] == pytest.approx((1600 * 1200 / 10_000) ** 0.5)


def test_the_grid_of_a_plan_is_the_chosen_one(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "a.tif") or tmp_path / "a.tif"
    source = SlideSource(location=Path(path), relpath="a.tif")
    few = options(Mosaic(k=3)).prepare
    with Slide.open(path) as slide:
        planned = grid_slide(slide, source, few)
    extract_slides(tmp_path / "a.tif", tmp_path / "out", ENCODER, options(Mosaic(k=3)))
    assert planned.grid == FeatureStore(tmp_path / "out").slide("a.tif").grid


def test_the_command_takes_a_selection_and_a_dry_run_counts_it(tmp_path: Path, capsys: Any) -> None:
    slide_file(tmp_path / "a.tif")
    words = [str(tmp_path / "a.tif"), str(tmp_path / "out"), "--encoder", ENCODER, "--mpp", "1", "--tile", "64"]
    words += ["--select", "mosaic:k=3"]
    extract.main([*words, "--dry-run"], standalone_mode=False)
    said = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    extract.main(words, standalone_mode=False)
    store = FeatureStore(tmp_path / "out")
    assert store.select == selection_facts(Mosaic(k=3))
    assert f"a.tif: {len(store.slide('a.tif').grid)} tiles" in said


def test_bags_of_a_cohort_can_be_a_few_of_the_stored_tiles(tmp_path: Path) -> None:
    root, table = made_up.stored_cohort(tmp_path)
    whole = Cohort.from_store(root, table, "subtype")
    few = Cohort.from_store(root, table, "subtype", select="mosaic:k=2,share=0.25")
    slide = few.slides[0]
    bag, everything = few.source.read(slide), whole.source.read(slide)
    assert bag.xy is not None
    assert 2 <= len(bag) < len(everything)
    place = few.source.place(slide)
    assert place.grid.xy[place.rows].tolist() == bag.xy.tolist()
    np.testing.assert_array_equal(bag.features, everything.features[place.rows])
    assert few.fingerprint != whole.fingerprint
    assert few.source.facts["select"] == {"method": "mosaic", "k": 2, "share": 0.25, "seed": 0}
    assert "select" not in whole.source.facts


def test_a_mosaic_of_stored_tiles_goes_by_their_features() -> None:
    grid = made_up.grid_of(12)
    features = np.zeros((12, 3), np.float32)
    features[5] = 9
    assert 5 in select_rows(grid, features, (0.25, 0.25), Mosaic(k=2, share=0.1))
    far = select_rows(grid, features, (0.25, 0.25), FastPatches(patch_um=2.4))  # 10 px are 2.5 µm
    gaps = np.sqrt(((grid.xy[far][:, None] - grid.xy[far]) ** 2).sum(-1)) + 99 * np.eye(len(far))
    assert gaps.min() * 0.25 >= 4.8


def test_a_bag_of_which_nothing_is_chosen_is_an_error_that_says_so(tmp_path: Path) -> None:
    root, _ = made_up.stored_cohort(tmp_path)
    store = FeatureStore(root)
    source = StoreSource(store, ["made-up"], FastPatches(tissue=1.0))
    assert len(source.read(store.keys[0])) == 1  # all within 1 mm of the first
    slide = source.slide(store.keys[1])
    slide.grid = replace(slide.grid, tissue=np.full(len(slide.grid), 0.5, np.float32))
    with pytest.raises(BadFeaturesError, match="none of 12 tiles is chosen"):
        source.read(store.keys[1])
