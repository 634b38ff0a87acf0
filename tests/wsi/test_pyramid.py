"""Pyramid: exact downsamples, levels, and the scale for a wanted mpp."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi.errors import TooCoarseError
from wsi.pyramid import Pyramid


@pytest.mark.parametrize(
    ("full", "reduced", "factor"),
    [
        ((46000, 32914), (11500, 8228), 4.0),  # 32914 / 8228 = 4.00024: rounded down by the writer
        ((9950, 6698), (2488, 1675), 4.0),  # 3.9988: rounded up, and a tool that truncates reads a third too wide
        ((4001, 3001), (2000, 1500), 2.0),
        ((5075, 3088), (635, 386), 8.0),
        ((1000, 1000), (400, 400), 2.5),
    ],
)
def test_downsample_is_the_factor_the_writer_used(full: Any, reduced: Any, factor: Any) -> None:
    assert Pyramid((full, reduced), (0.5, 0.5)).downsample(1) == (factor, factor)


@given(st.integers(1, 64), st.integers(64, 100_000), st.integers(64, 100_000), st.booleans())
def test_any_whole_factor_is_recovered_however_sizes_were_rounded(
    factor: Any, width: Any, height: Any, up: Any
) -> None:
    small = tuple(-(-n // factor) if up else max(1, n // factor) for n in (width, height))
    if min(small) < 2 * factor:
        return  # then several whole factors explain the sizes
    assert Pyramid(((width, height), small), (0.25, 0.25)).downsample(1) == (factor, factor)


def test_level_for_takes_the_coarsest_that_leaves_the_pixels_asked_for() -> None:
    pyramid = Pyramid(((16000, 16000), (8000, 8000), (4000, 4000), (1000, 1000)), (0.25, 0.25))
    assert pyramid.level_for((1, 1)) == 0
    assert pyramid.level_for((2, 2)) == 1
    assert pyramid.level_for((3.9, 3.9)) == 1
    assert pyramid.level_for((4, 4), spare=2) == 1
    assert pyramid.level_for((100, 100)) == 3
    assert pyramid.level_for((100, 3)) == 1  # the finer axis decides


@pytest.mark.parametrize(
    ("scan", "asked", "factor"),
    [
        (0.5036, 0.5, 1.0),  # a little coarser than asked: used as it is
        (0.62, 0.5, 1.0),
        (0.2523, 0.5, 2.0),  # near a whole factor
        (0.2456, 0.5, 2.0),
        (0.265, 0.5, 0.5 / 0.265),  # not near one: not treated as 40x
        (0.25, 0.5, 2.0),
        (0.5, 0.53, 1.06),  # a little finer than asked: reduced to it
        (0.5, 8.0, 16.0),
    ],
)
def test_scale_follows_the_mpp_and_says_the_true_one(scan: Any, asked: Any, factor: Any) -> None:
    scale = Pyramid(((1000, 1000),), (scan, scan)).scale_to(asked)
    assert scale.factor == (factor, factor)
    assert scale.mpp == (scan * factor, scan * factor)


def test_a_scan_too_coarse_is_refused_with_the_ways_out() -> None:
    pyramid = Pyramid(((1000, 1000),), (1.0, 1.0))
    with pytest.raises(TooCoarseError, match=r"scanned at 1 mpp.*--mpp 1 .*--allow-upsample"):
        pyramid.scale_to(0.5)
    assert pyramid.scale_to(0.5, allow_upsample=True).factor == (0.5, 0.5)
    with pytest.raises(TooCoarseError):
        Pyramid(((1000, 1000),), (0.52, 0.52)).scale_to(0.5, tolerance=0.03)


def test_axes_are_scaled_each_by_its_own_mpp() -> None:
    scale = Pyramid(((1000, 1000),), (0.25, 0.30)).scale_to(1.2)
    assert scale.factor == (4.8, 4.0)


@pytest.mark.parametrize(
    ("sizes", "mpp"),
    [
        ((), (1, 1)),
        (((0, 5),), (1, 1)),
        (((5, 5), (6, 5)), (1, 1)),
        (((5, 5),), (0, 1)),
        (((5, 5),), (1, float("nan"))),
    ],
)
def test_a_pyramid_checks_itself(sizes: Any, mpp: Any) -> None:
    with pytest.raises(ValueError, match=r"pyramid|level|mpp"):
        Pyramid(sizes, mpp)
