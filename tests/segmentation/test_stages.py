"""Stages: what decides about a map names it, and objects are parted only where rims tell them."""

from dataclasses import replace

import pytest

from segmentation.dense import DenseConfig, DenseLook, DenseSegmenter
from segmentation.instances import InstanceOptions
from segmentation.stages import DenseStage

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
