"""Preparing a slide: what is read for it, and what is said of how it was done."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features.prepare import PrepareOptions, grid_slide, prepare_slide
from features.store import FeatureStore
from wsi import Slide, Tiling
from wsi.area import area_resize
from wsi.discover import SlideSource

SOURCE = SlideSource(location=Path("a.svs"), relpath="a.svs")
OPTIONS = PrepareOptions(tiling=Tiling(mpp=0.5, tile_px=64))


def small_slide() -> Slide:
    """A slide of 2,400 x 1,600 px at 0.25 mpp with a disc of tissue, and its reduced levels."""
    rows, columns = np.mgrid[:1600, :2400]
    pixels = np.full((1600, 2400, 3), 240, np.uint8)
    pixels[(rows - 800) ** 2 + (columns - 1100) ** 2 < 500**2] = (180, 90, 160)
    levels = [pixels, area_resize(pixels, (600, 400)), area_resize(pixels, (150, 100))]
    return Slide.from_array(levels, mpp=0.25, name="a.svs")


def test_level_0_of_a_small_slide_is_left_to_its_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide, levels = small_slide(), []
    read = slide.reader.read

    def noting(level: int, *box: int) -> Any:
        levels.append(level)
        return read(level, *box)

    monkeypatch.setattr(slide.reader, "read", noting)
    monkeypatch.setattr(Slide, "open", lambda *args, **kwargs: slide)
    (tmp_path / "a.svs").write_bytes(b"a slide")
    source = SlideSource(location=tmp_path / "a.svs", relpath="a.svs")
    prepared = prepare_slide(source, "a", FeatureStore.create(tmp_path / "out", OPTIONS.tiling), OPTIONS)
    assert len(prepared.store.grid) > 30
    assert (tmp_path / "out" / "thumbnails" / "a.jpg").stat().st_size > 1000
    assert set(levels) == {1, 2}


def test_the_resolution_at_which_tissue_was_found_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = grid_slide(small_slide(), SOURCE, OPTIONS).facts["options"]
    assert grid_slide(small_slide(), SOURCE, OPTIONS).facts["found_at_mpp"] == [8.0, 8.0]
    monkeypatch.setattr("wsi.tissue.MAX_PIXELS", 1000)
    facts = grid_slide(small_slide(), SOURCE, OPTIONS).facts
    assert facts["found_at_mpp"] == pytest.approx([15.5, 15.5], rel=0.03)
    assert facts["options"] == asked  # what was asked, by which a later run tells whether it is current
