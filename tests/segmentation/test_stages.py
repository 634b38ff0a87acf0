"""Stages: what decides about a map names it, and objects are parted only where rims tell them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely

from segmentation.dense import DenseConfig, DenseLook, DenseSegmenter
from segmentation.instances import InstanceOptions
from segmentation.stages import DenseStage
from wsi.annotation import Annotation
from wsi.slide import Slide

CONFIG = DenseConfig(("gland",), 2.0, hyper={"filters": (4, 8)}, tile_px=32, overlap_px=8)
OBJECTS = InstanceOptions(min_area_um2=7)


def stage(config: DenseConfig = CONFIG, look: DenseLook | None = None, sha256: str = "a") -> DenseStage:
    return DenseStage(
        DenseSegmenter.untrained(config, device="cpu"), look or DenseLook(), OBJECTS, weights_sha256=sha256
    )


def test_objects_are_parted_where_rims_are_told_and_areas_stay_whole() -> None:
    assert stage().objects is None
    assert stage(replace(CONFIG, contour_um=6.0)).objects == OBJECTS


@pytest.mark.parametrize(
    "look", [DenseLook(turns=True), DenseLook(tile_px=64), DenseLook(overlap_px=16)], ids=["turns", "larger", "overlap"]
)
def test_maps_that_would_differ_are_made_of_something_else(look: DenseLook) -> None:
    assert stage(look=look).made_of != stage().made_of
    assert stage(sha256="b").made_of != stage().made_of
    assert stage(look=DenseLook(batch_size=1)).made_of == stage().made_of


def test_the_seconds_of_a_dense_network_are_counted_and_only_given_tissue_is_seen(tmp_path: Path) -> None:
    slide = Slide.from_array(np.full((256, 256, 3), 120, np.uint8), mpp=2.0)
    seen = stage()
    assert seen.busy_s == 0
    grid = seen.grid(slide, [Annotation(shapely.box(0, 0, 20, 20), "Tissue")])
    assert len(grid) == 1
    assert len(seen.grid(slide, [Annotation(shapely.box(0, 0, 256, 256), "Tissue")])) > 64
    heat = seen.score(slide, tmp_path / "h.zarr", grid)
    assert heat.facts["patches"] == 1
    assert seen.busy_s > 0
