"""TileGrid: the lattice against brute force, exact fractions, and what it refuses."""

from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import assume, given
from hypothesis import strategies as st

from wsi.grid import Box, TileGrid, Tiling, cover, tissue_fractions
from wsi.pyramid import Pyramid

SIZES = st.integers(1, 400)
TILINGS = st.builds(
    lambda mpp, tile, overlap, edge: Tiling(mpp=mpp, tile_px=tile, overlap_px=min(overlap, tile - 1), edge=edge),
    st.floats(0.5, 8),
    st.integers(1, 60),
    st.integers(0, 40),
    st.sampled_from(["drop", "pad"]),
)


@given(SIZES, SIZES, TILINGS)
def test_the_lattice_is_every_whole_tile_once_in_rows_from_the_origin(width: Any, height: Any, tiling: Any) -> None:
    grid = cover(Pyramid(((width, height),), (0.5, 0.5)), tiling)
    (sw, sh), (dx, dy) = grid.side, grid.stride
    pad = tiling.edge == "pad"

    def starts(length: Any, side: Any, step: Any) -> Any:
        found, at = [], 0
        while at + side <= length:
            found.append(at)
            at += step
        if pad and (not found or found[-1] + side < length):
            found.append(at)
        return found

    expected = [(x, y) for y in starts(height, sh, dy) for x in starts(width, sw, dx)]
    assert grid.xy.tolist() == [list(p) for p in expected]


@given(SIZES, SIZES, TILINGS)
def test_padding_covers_every_pixel_and_dropping_never_leaves_the_slide(width: Any, height: Any, tiling: Any) -> None:
    grid = cover(Pyramid(((width, height),), (0.5, 0.5)), tiling)
    seen = np.zeros((height, width), int)
    for x, y in grid.xy:
        seen[y : y + grid.side[1], x : x + grid.side[0]] += 1
        if tiling.edge == "drop":
            assert x + grid.side[0] <= width
            assert y + grid.side[1] <= height
    if tiling.edge == "pad":
        assert seen.min() >= 1
    if tiling.overlap_px == 0:
        assert seen.max(initial=0) <= 1


@given(st.floats(0.2, 2.0), st.floats(0.2, 2.0), st.floats(0.2, 20.0), st.integers(32, 512))
def test_the_stated_mpp_is_the_true_one_and_near_the_wanted_one(
    mpp_x: Any, mpp_y: Any, wanted: Any, tile_px: Any
) -> None:
    assume(wanted >= max(mpp_x, mpp_y))
    pyramid = Pyramid(((4_800, 3_200), (1_200, 800), (300, 200)), (mpp_x, mpp_y))
    grid = cover(pyramid, Tiling(mpp=wanted, tile_px=tile_px))
    for axis, scan in enumerate((mpp_x, mpp_y)):
        assert grid.mpp[axis] * tile_px == pytest.approx(grid.side[axis] * scan, rel=1e-12)
        half_a_pixel = scan / 2 / (wanted * tile_px)
        assert (
            abs(grid.mpp[axis] / wanted - 1) <= 0.0412 + half_a_pixel
        )  # twice two per cent: whole factor, whole level pixel


@given(st.floats(0.5, 40.0), st.integers(32, 512), st.integers(0, 15))
def test_tiles_are_whole_pixels_of_the_level_they_are_read_from(wanted: Any, tile_px: Any, overlap: Any) -> None:
    pyramid = Pyramid(((4_800, 4_800), (1_200, 1_200), (300, 300)), (0.25, 0.25))
    grid = cover(pyramid, Tiling(mpp=wanted, tile_px=tile_px, overlap_px=overlap))
    step = int(pyramid.downsample(grid.level)[0])
    assert grid.downsample == (step, step)
    assert not np.any(grid.xy % step)
    assert grid.side[0] % step == grid.stride[0] % step == 0
    if grid.level:
        assert 2 * step <= wanted / 0.25 * 1.0201  # a whole factor may be two per cent above


def test_a_reduced_level_is_used_only_where_its_pixels_can_be_addressed() -> None:
    sizes = ((64_000, 64_000), (16_000, 16_000))
    assert cover(Pyramid(sizes, (0.25, 0.25)), Tiling(mpp=2.0)).level == 1
    assert cover(Pyramid(sizes, (0.25, 0.25), (True, False)), Tiling(mpp=2.0)).level == 0
    assert cover(Pyramid(sizes, (0.25, 0.25)), Tiling(mpp=1.0)).level == 0  # would leave one pixel per pixel


def test_a_reduced_level_that_would_move_the_mpp_is_not_used() -> None:
    pyramid = Pyramid(((64_000, 64_000), (16_000, 16_000)), (0.25, 0.25))
    assert cover(pyramid, Tiling(mpp=0.25 * 9.4, tile_px=1)).level == 0  # 9 level-0 pixels, where level 1 has 8 or 12
    assert cover(pyramid, Tiling(mpp=0.25 * 9.4, tile_px=64)).level == 1


def test_a_0_5036_slide_gives_its_own_pixels_for_0_5() -> None:
    grid = cover(Pyramid(((4096, 4096),), (0.5036, 0.5036)), Tiling(mpp=0.5))
    assert grid.side == (256, 256)
    assert grid.mpp == (0.5036, 0.5036)


def polygons(size: Any = 100) -> Any:
    points = st.lists(st.tuples(st.integers(-20, size + 20), st.integers(-20, size + 20)), min_size=3, max_size=7)
    return points.map(lambda p: shapely.make_valid(shapely.Polygon(p))).filter(lambda g: g.area > 0)


def clipped_area(polygon: Any, x: int, y: int, side: int) -> float:
    """Area of a polygon within a square, by Sutherland and Hodgman: no geometry library in the way."""

    def area(ring: Any) -> float:
        points = [tuple(point) for point in ring.coords[:-1]]
        for axis, bound, sign in ((0, x, 1), (0, x + side, -1), (1, y, 1), (1, y + side, -1)):
            kept = []
            for (a, b), inside_a, inside_b in (
                ((p, q), sign * (p[axis] - bound) >= 0, sign * (q[axis] - bound) >= 0)
                for p, q in zip(points, points[1:] + points[:1], strict=True)
            ):
                if inside_a:
                    kept.append(a)
                if inside_a != inside_b:
                    t = (bound - a[axis]) / (b[axis] - a[axis])
                    kept.append((a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])))
            points = kept
        following = points[1:] + points[:1]
        return float(abs(sum(p[0] * q[1] - q[0] * p[1] for p, q in zip(points, following, strict=True))) / 2)

    return float(area(polygon.exterior) - sum(area(hole) for hole in polygon.interiors))


@given(polygons(), polygons(), st.integers(3, 40), st.integers(7, 40))
def test_fractions_are_the_exact_areas(shape: Any, hole: Any, side: Any, stride: Any) -> None:
    region = shapely.difference(shape, hole)
    xy = [(x, y) for y in range(0, 100, stride) for x in range(0, 100, stride)]
    grid = TileGrid(xy=np.array(xy), tile_px=side, side=(side, side), stride=(stride, stride), mpp=(1, 1))
    parts = [part for part in shapely.get_parts(region) if part.geom_type == "Polygon"]
    brute = [sum(clipped_area(part, x, y, side) for part in parts) / side**2 for x, y in xy]
    np.testing.assert_allclose(tissue_fractions(grid, region), brute, atol=1e-5)


def test_fractions_of_many_pieces_with_holes_add_up_to_the_area_of_the_region() -> None:
    centres = [shapely.Point(x, y) for x in range(100, 4000, 250) for y in range(110, 3000, 210)]
    rings = [centre.buffer(90.5).difference(centre.buffer(30)) for centre in centres]
    region = shapely.union_all(rings)
    lattice = cover(Pyramid(((4_100, 3_200),), (0.5, 0.5)), Tiling(mpp=0.5, tile_px=25, edge="pad"))
    fractions = tissue_fractions(lattice, region)
    assert fractions.astype(float).sum() * 25**2 == pytest.approx(region.area, rel=1e-6)
    inside = shapely.covers(region, shapely.box(*lattice.xy.T, *(lattice.xy + 25).T))
    outside = shapely.disjoint(region, shapely.box(*lattice.xy.T, *(lattice.xy + 25).T))
    assert inside.any()
    assert (fractions[inside] == 1).all()
    assert (fractions[outside] == 0).all()


def test_slivers_thinner_than_rounding_do_no_harm() -> None:
    shape = shapely.make_valid(shapely.Polygon([(0, 57), (-19, 24), (63, 104)]))
    hole = shapely.make_valid(shapely.Polygon([(7, 93), (-19, 24), (63, 104), (43, 26)]))
    lattice = cover(Pyramid(((100, 100),), (0.5, 0.5)), Tiling(mpp=0.5, tile_px=16, overlap_px=9))
    region = shapely.difference(shape, hole)  # holds a triangle of area 0
    fractions = tissue_fractions(lattice, region)
    solid = tissue_fractions(lattice, max(shapely.get_parts(region), key=lambda part: part.area))
    np.testing.assert_allclose(fractions, solid, atol=1e-5)


def test_tiles_are_kept_by_their_fraction_and_keep_it() -> None:
    lattice = cover(Pyramid(((40, 20),), (0.5, 0.5)), Tiling(mpp=0.5, tile_px=10))
    region = shapely.box(0, 0, 15, 10)  # one whole tile and half of the next
    assert lattice.keep(region, 0.6).xy.tolist() == [[0, 0]]
    half = lattice.keep(region, 0.5)
    assert half.xy.tolist() == [[0, 0], [10, 0]]
    assert half.tissue.tolist() == [1.0, 0.5]
    assert len(lattice.keep(region, 0.0)) == 2  # nothing at all is never kept
    assert len(lattice.keep(shapely.Polygon(), 0.0)) == 0


def test_a_grid_on_the_first_pixel_and_of_one_tile() -> None:
    grid = cover(Pyramid(((10, 10),), (0.5, 0.5)), Tiling(mpp=0.5, tile_px=10))
    assert grid.xy.tolist() == [[0, 0]]
    assert len(cover(Pyramid(((9, 10),), (0.5, 0.5)), Tiling(mpp=0.5, tile_px=10))) == 0


def test_fingerprint_tells_apart_what_gives_other_pixels() -> None:
    base: dict[str, Any] = {
        "xy": np.array([[0, 0], [10, 0]]),
        "tile_px": 5,
        "side": (10, 10),
        "stride": (10, 10),
        "mpp": (1.0, 1.0),
    }
    prints = {
        TileGrid(**base).fingerprint,
        TileGrid(**base | {"xy": np.array([[0, 0], [0, 10]])}).fingerprint,
        TileGrid(**base | {"tile_px": 10}).fingerprint,
        TileGrid(**base | {"side": (20, 10)}).fingerprint,
        TileGrid(**base | {"level": 1, "downsample": (2, 2)}).fingerprint,
    }
    assert len(prints) == 5
    assert TileGrid(**base) == TileGrid(**base)


@pytest.mark.parametrize(
    "wrong",
    [{"tile_px": 0}, {"overlap_px": 256}, {"mpp": 0}, {"min_tissue": 1.5}, {"edge": "cut"}, {"mpp_tolerance": -1}],
)
def test_a_tiling_checks_itself(wrong: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
        Tiling(**wrong)


def test_values_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="at least one pixel"):
        Box(0, 0, 0, 5)
    with pytest.raises(ValueError, match="whole pixels of level 1"):
        TileGrid(np.array([[1, 0]]), 4, (8, 8), (8, 8), (1, 1), level=1, downsample=(2, 2))
    with pytest.raises(ValueError, match="tissue fractions"):
        TileGrid(np.array([[0, 0]]), 4, (8, 8), (8, 8), (1, 1), tissue=np.ones(2, np.float32))


def test_spare_decides_whether_a_level_of_the_wanted_resolution_is_read() -> None:
    pyramid = Pyramid(((64_000, 48_000), (16_000, 12_000), (4_000, 3_000)), (0.25, 0.25))

    def level(mpp: float, spare: float) -> int:
        return cover(pyramid, Tiling(mpp=mpp, spare=spare)).level

    assert [level(1.0, spare) for spare in (1, 2)] == [1, 0]
    assert [level(4.0, spare) for spare in (1, 2, 4, 5)] == [2, 1, 1, 0]
    assert level(0.98, 1) == 0  # a level that is too coarse is never read
    as_it_stands = cover(pyramid, Tiling(mpp=1.0, spare=1))
    assert (as_it_stands.side, as_it_stands.downsample) == (
        (1024, 1024),
        (4, 4),
    )  # a pixel of the level for each of a tile
    assert as_it_stands.mpp == (1.0, 1.0)
    assert np.array_equal(as_it_stands.xy, cover(pyramid, Tiling(mpp=1.0, spare=2)).xy)


@pytest.mark.parametrize("spare", [0.5, float("nan"), float("inf")])
def test_spare_is_a_number_from_1(spare: float) -> None:
    with pytest.raises(ValueError, match="spare must be a number from 1"):
        Tiling(spare=spare)
