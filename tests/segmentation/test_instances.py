"""Instances: discs whose number and borders are known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segmentation.instances import InstanceOptions, part_by_contour, part_by_distance
from segmentation.place import MapPlace
from wsi.errors import UsageError

PLACE = MapPlace((2.0, 2.0), (0.5, 0.5))  # a map pixel is a micron


def discs(*centres: tuple[int, int], radius: int = 10, shape: tuple[int, int] = (60, 80)) -> np.ndarray:
    """(H, W) which pixels lie in any of them."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    inside = np.zeros(shape, np.bool_)
    for cx, cy in centres:
        inside |= (x - cx) ** 2 + (y - cy) ** 2 <= radius**2
    return inside


def test_touching_discs_are_parted_at_their_neck() -> None:
    each = discs((20, 20), (38, 20), (60, 45))
    probability = np.where(each, 0.9, 0.1)
    found = part_by_distance(probability, PLACE)
    assert found.max() == 3
    assert ((found > 0) == each).all()
    x = np.arange(80)
    left = found[20, 20]
    assert left == 1  # numbered by rows
    assert (found[:, x < 28][each[:, x < 28]] == left).all()
    assert (found[20, 31:48] == found[20, 38]).all()


def test_a_neck_hardly_narrower_than_its_sides_does_not_part_and_how_much_is_said_in_microns() -> None:
    probability = discs((20, 20), (30, 20)).astype(np.float32)  # 10 apart: the neck is 1.3 px narrower a side
    assert part_by_distance(probability, PLACE, InstanceOptions(depth_um=3)).max() == 1
    assert part_by_distance(probability, PLACE, InstanceOptions(depth_um=0.5)).max() == 2
    finer = MapPlace((0.2, 0.2), (0.5, 0.5))
    assert part_by_distance(probability, finer, InstanceOptions(depth_um=0.5)).max() == 1


def test_a_predicted_contour_parts_what_no_distance_would_and_the_objects_take_their_rims_back() -> None:
    interior = np.zeros((40, 60))
    contour = np.zeros((40, 60))
    interior[5:35, 5:55] = 0.9
    interior[5:35, 29:31] = 0.2
    contour[5:35, 29:31] = 0.7
    found = part_by_contour(interior, contour, PLACE)
    assert found.max() == 2
    assert ((found > 0) == (interior + contour > 0.5)).all()
    assert (found[5:35, 5:29] == 1).all()
    assert (found[5:35, 31:55] == 2).all()
    assert part_by_distance(interior + contour, PLACE).max() == 1


def test_an_area_that_is_all_contour_is_one_object_beside_the_others() -> None:
    interior, contour = np.zeros((20, 40)), np.zeros((20, 40))
    interior[4:16, 4:16] = 0.9
    contour[4:16, 24:36] = 0.9
    found = part_by_contour(interior, contour, PLACE)
    assert sorted(np.unique(found)) == [0, 1, 2]
    assert (found[4:16, 24:36] == found[5, 25]).all()
    assert found[5, 5] != found[5, 25]


def test_small_pieces_go_and_small_holes_are_filled_but_not_bays_or_large_holes() -> None:
    probability = np.ones((40, 60)) * 0.9
    probability[:, 50:] = 0
    probability[10:12, 10:12] = np.nan  # a hole of 4 µm²
    probability[20:30, 20:30] = 0  # one of 100 µm²
    probability[2:4, 54:56] = 0.9  # a piece of 4 µm²
    options = InstanceOptions(depth_um=100, min_area_um2=5, min_hole_um2=50)
    found = part_by_distance(probability, PLACE, options)
    expected = probability > 0.5
    expected[10:12, 10:12] = True
    expected[2:4, 54:56] = False
    assert ((found > 0) == expected).all()


@given(seed=st.integers(0, 1 << 30))
def test_objects_are_the_same_whichever_way_round_the_map_lies(seed: int) -> None:
    rng = np.random.default_rng(seed)
    centres = [(int(x), int(y)) for x, y in rng.integers(8, 52, (3, 2)) * (1, 1)]
    probability = discs(*centres, radius=7, shape=(60, 60)).astype(np.float64)
    found = part_by_distance(probability, PLACE, InstanceOptions(depth_um=1.5))
    mirrored = part_by_distance(probability[:, ::-1], PLACE, InstanceOptions(depth_um=1.5))[:, ::-1]
    assert found.max() == mirrored.max()
    assert ((found > 0) == (probability > 0.5)).all()
    assert set(np.unique(found)) == set(range(found.max() + 1))


def test_nothing_gives_nothing_and_what_cannot_be_is_refused() -> None:
    assert not part_by_distance(np.zeros((5, 5)), PLACE).any()
    assert not part_by_contour(np.zeros((5, 5)), np.zeros((5, 5)), PLACE).any()
    assert (part_by_distance(np.ones((5, 5)), PLACE) == 1).all()
    with pytest.raises(UsageError, match="on one map"):
        part_by_contour(np.zeros((5, 5)), np.zeros((5, 6)), PLACE)
    with pytest.raises(ValueError, match="thresholds"):
        InstanceOptions(threshold=1.0)
    with pytest.raises(ValueError, match="depth_um"):
        InstanceOptions(depth_um=-1)
