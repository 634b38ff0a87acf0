"""Priors: the right number at the right place, whatever map it is asked for on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segmentation.place import MapPlace
from segmentation.prior import Prior
from wsi.errors import UsageError
from wsi.geojson import Frame
from wsi.grid import Tiling, cover
from wsi.heatmap import Heatmap
from wsi.pyramid import Pyramid

MPP = (0.5, 0.5)


def test_on_its_own_place_a_map_is_itself_and_what_was_not_scored_is_zero() -> None:
    values = np.random.default_rng(0).random((2, 5, 7)).astype(np.float32)
    values[0, 1, 2] = np.nan
    place = MapPlace((16.0, 8.0), MPP, (3.0, 5.0))
    np.testing.assert_allclose(Prior(values, place).on(place, (5, 7)), np.nan_to_num(values, nan=0.0), atol=1e-6)


@given(
    fine=st.floats(0.7, 5), coarse=st.floats(6, 40), x=st.floats(-30, 30), y=st.floats(-30, 30), share=st.floats(0, 1)
)
def test_a_ramp_over_the_slide_stays_the_same_ramp_at_any_scale_and_place(
    fine: float, coarse: float, x: float, y: float, share: float
) -> None:
    """Probability = 0.001 x + 0.002 y at level-0 (x, y): both interpolation and means must keep it."""
    place = MapPlace((coarse, coarse * (1 + share)), MPP, (-100.0, -120.0))
    shape = (60, 50)

    def ramp(where: MapPlace, size: tuple[int, int]) -> np.ndarray:
        xs = (np.arange(size[1]) + 0.5) * where.scale[0] + where.origin[0]
        ys = (np.arange(size[0]) + 0.5) * where.scale[1] + where.origin[1]
        return (0.001 * xs[None] + 0.002 * ys[:, None]).astype(np.float32)

    source = Prior(ramp(place, shape)[None], place)
    inside = MapPlace((fine, fine), MPP, (x, y))
    np.testing.assert_allclose(source.on(inside, (12, 9))[0], ramp(inside, (12, 9)), atol=2e-3)
    coarser = MapPlace((place.scale[0] * 2, place.scale[1] * 3), MPP, (x, y))
    np.testing.assert_allclose(source.on(coarser, (3, 4))[0], ramp(coarser, (3, 4)), atol=2e-3)


def test_off_the_map_there_is_nothing() -> None:
    source = Prior(np.ones((1, 2, 2), np.float32), MapPlace((10.0, 10.0), MPP))
    found = source.on(MapPlace((10.0, 10.0), MPP, (-20.0, -10.0)), (5, 6))[0]
    expected = np.zeros((5, 6))
    expected[1:3, 2:4] = 1
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_heatmaps_of_classes_become_channels_at_the_places_of_their_tiles() -> None:
    pyramid = Pyramid(((1000, 600),), MPP)
    grid = cover(pyramid, Tiling(0.5, 100))
    frame = Frame("s", mpp=MPP, size=(1000, 600))
    first = np.zeros(len(grid), np.float32)
    first[(grid.xy == (300, 200)).all(1).argmax()] = 0.75
    maps = Prior.of_heatmaps([Heatmap(grid, first, frame), Heatmap(grid, 1 - first, frame)])
    assert maps.values.shape == (2, 6, 10)
    assert maps.values[0, 2, 3] == 0.75
    assert maps.values[0].sum() == 0.75
    assert maps.values[1, 2, 3] == 0.25
    assert maps.place == MapPlace((100.0, 100.0), MPP)


def test_heatmaps_on_other_grids_are_refused() -> None:
    pyramid = Pyramid(((400, 400),), MPP)
    frame = Frame("s", mpp=MPP, size=(400, 400))
    one, other = (cover(pyramid, Tiling(0.5, px)) for px in (100, 50))
    with pytest.raises(UsageError, match="on one grid"):
        Prior.of_heatmaps([Heatmap(g, np.zeros(len(g), np.float32), frame) for g in (one, other)])
    with pytest.raises(UsageError, match="one at least"):
        Prior.of_heatmaps([])
    with pytest.raises(ValueError, match=r"\(C, H, W\)"):
        Prior(np.zeros((3, 3), np.float32), MapPlace((1.0, 1.0), MPP))


def test_classes_of_a_heat_map_become_channels_in_the_order_that_is_asked_for() -> None:
    class Heat:
        place = MapPlace((64.0, 64.0), MPP)

        def probability(self, name: str) -> np.ndarray:
            return np.full((2, 3), {"background": 0.1, "tumour": 0.7, "stroma": 0.2}[name], np.float32)

    prior = Prior.of_classes(Heat(), ("stroma", "tumour"))
    assert prior.place == Heat.place
    assert prior.values[:, 0, 0].tolist() == pytest.approx([0.2, 0.7])
