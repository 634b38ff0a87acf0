"""Polygons: a label map in, valid polygons out whose shared borders stay shared.

Outlines run along pixel edges and part into arcs: lines between places where three or more pieces meet, and closed lines
where only two do. Each arc is simplified once (Ramer 1972, Douglas and Peucker 1973) and used by the pieces on both of
its sides, so that no gap and no overlap can open between them. Where simplified arcs would cross, or a piece would
vanish, those arcs alone are simplified less, at last not at all; pixel edges never cross.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count

import numpy as np
import shapely
from numpy.typing import NDArray

from segmentation.components import Components, PixelRows, find_components, next_corners
from segmentation.place import MapPlace
from wsi.annotation import Annotation, ObjectType
from wsi.errors import UsageError

__all__ = ["PolygonOptions", "find_polygons"]

_DECIMALS = 2  # of a level-0 pixel: what GeoJSON keeps
_HALVINGS = 2  # of the tolerance of arcs that cross, before they are left as they are
_LEAST_STEP_PX = 0.7  # no corner of a pixel-exact outline is nearer to the line past it: half a pixel's diagonal
_OPPOSITE = 2
_BEHIND_RIGHT = np.array(
    [2, 0, 1, 3]
)  # around a corner reached going right, down, left, up: the piece on the right hand,
_AHEAD_LEFT = np.array([1, 3, 2, 0])  # and the piece diagonally across from it
_RIGHT_HAND = np.array([3, 2, 0, 1])  # the piece on the right hand on leaving a corner

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PolygonOptions:
    """How a label map becomes polygons; saved with what was found.

    Attributes:
        tolerance_um: no point of a pixel-exact outline is farther than this from the simplified one; 0 keeps pixel edges.
        min_area_um2: smaller pieces are left out.
        min_hole_um2: smaller holes, and smaller gaps between pieces, are filled.
        object_type: what QuPath makes of a piece: ``"annotation"``, or ``"detection"`` for thousands.
    """

    tolerance_um: float = 1.0
    min_area_um2: float = 0.0
    min_hole_um2: float = 0.0
    object_type: ObjectType = "annotation"

    def __post_init__(self) -> None:
        for name in ("tolerance_um", "min_area_um2", "min_hole_um2"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a number from 0, got {getattr(self, name)}")


def find_polygons(
    labels: PixelRows,
    place: MapPlace,
    classes: Mapping[int, str],
    options: PolygonOptions | None = None,
    *,
    probabilities: PixelRows | None = None,
) -> Iterator[Annotation]:
    """The pieces of a label map as annotations with measurements, in the order of their first pixels.

    Pixels of one label that share a side are one piece; pixels that touch at a corner are two. Polygons are valid, with
    holes, and lie on the grid of 0.01 level-0 pixels that GeoJSON keeps. The map is read in strips of rows; memory grows
    with the length of its outlines.

    Args:
        labels: (H, W) whole numbers, 0 background. Numbers may stand for classes or for single objects.
        place: where the map lies on the slide.
        classes: the class name of each label that is to be outlined.
        probabilities: (H, W) numbers whose mean over each piece is measured.

    Raises:
        UsageError: a label of the map has no class.
    """
    options = options or PolygonOptions()
    pieces = find_components(labels, probabilities).without(
        options.min_area_um2 / place.pixel_um2, options.min_hole_um2 / place.pixel_um2
    )
    unknown = sorted(set(pieces.labels.tolist()) - {0, *classes})
    if unknown:
        raise UsageError(f"the label map holds {unknown[:5]}, for which no class is given; there are {dict(classes)}")
    owners, shapes = outline(pieces, place, options.tolerance_um)
    to_um = np.array(place.mpp)
    in_um = shapely.transform(shapes, lambda xy: xy * to_um)
    area, perimeter = shapely.area(in_um).tolist(), shapely.length(in_um).tolist()
    means = None if pieces.sums is None else (pieces.sums / np.maximum(pieces.pixels, 1))[owners].tolist()
    for i, label in enumerate(pieces.labels[owners].tolist()):
        measured = {"Area µm^2": area[i], "Perimeter µm": perimeter[i]}
        if means is not None:
            measured["Mean probability"] = means[i]
        yield Annotation(shapes[i], classes[label], measurements=measured, object_type=options.object_type)


def outline(pieces: Components, place: MapPlace, tolerance_um: float) -> tuple[_Ints, NDArray[np.object_]]:
    """Which piece each polygon outlines, and the polygons in level-0 pixels; background has none."""
    rings = _trace(pieces)
    if not len(rings.owners):
        return np.empty(0, np.int64), np.empty(0, object)
    arcs = _cut(rings, pieces.xy * np.array(place.pixel_um))
    return _simplified(rings, arcs, place, tolerance_um)


# Rings


@dataclass(frozen=True, eq=False)
class _Rings:
    """The outlines of pieces, each a closed walk with its piece on the right hand: shells clockwise as one sees them.

    A step is the way from a corner to the next, numbered ``4 * corner + direction``: right, down, left, up.
    """

    steps: _Ints  # of all rings, one after another
    offsets: _Ints  # (R + 1,) where each begins
    owners: _Ints  # (R,) the piece of each
    twin: _Ints  # of every step, the same way back
    junction: NDArray[np.bool_]  # (N,) corners where more than two outlines meet


def _trace(pieces: Components) -> _Rings:
    n = len(pieces.xy)
    target = np.full((n, 4), -1, np.int64)
    target[:, 0], target[:, 1] = next_corners(pieces)
    for forth in (0, 1):
        there = np.flatnonzero(target[:, forth] >= 0)
        target[target[there, forth], forth + _OPPOSITE] = there
    leaves = target >= 0
    steps = np.flatnonzero(leaves)
    start, heading = np.divmod(steps, 4)
    end = target.ravel()[steps]
    owner = pieces.around[start, _RIGHT_HAND[heading]]
    # Turn right wherever an outline does: pixels that touch at a point only part. But where the piece itself is across the
    # corner, turn left: its shell and the hole inside then touch at a point, and neither meets itself.
    across = pieces.around[end, _AHEAD_LEFT[heading]] == pieces.around[end, _BEHIND_RIGHT[heading]]
    right, ahead, left = ((heading + turn) % 4 for turn in (1, 0, 3))
    hugs = leaves[end, right] & ~(across & leaves[end, left] & leaves[end, ahead])
    out = np.where(hugs, right, np.where(leaves[end, ahead] & ~leaves[end, right], ahead, left))
    twin = np.zeros(4 * n, np.int64)
    twin[steps] = 4 * end + (heading + _OPPOSITE) % 4
    walked = pieces.labels[owner] > 0
    number = np.cumsum(walked) - 1  # of a step among those walked
    after = number[np.searchsorted(steps, (4 * end + out)[walked])]
    order, offsets = _walks(after)
    ordered = steps[walked][order]
    first = ordered[offsets[:-1]]
    owners = pieces.around[first // 4, _RIGHT_HAND[first % 4]].astype(np.int64)
    return _Rings(ordered, offsets, owners, twin, leaves.sum(axis=1) > 2)


def _walks(after: _Ints) -> tuple[_Ints, _Ints]:
    """Follow steps, each leading to the next, until all have been gone: all walks, and where each begins."""
    following = after.tolist()
    gone = bytearray(len(following))
    ordered = np.empty(len(following), np.int64)
    offsets = [0]
    for start in range(len(following)):
        if gone[start]:
            continue
        walk = []
        step = start
        while not gone[step]:
            gone[step] = 1
            walk.append(step)
            step = following[step]
        offsets.append(offsets[-1] + len(walk))
        ordered[offsets[-2] : offsets[-1]] = walk
    return ordered, np.array(offsets, np.int64)


# Arcs


@dataclass(frozen=True, eq=False)
class _Arcs:
    """Lines that rings are made of, each once however many rings use it."""

    xy_um: _Floats  # points of all arcs, one after another
    offsets: _Ints  # (A + 1,) where each begins
    of_use: _Ints  # (U,) the arc of each piece of a ring, ring by ring
    forward: NDArray[np.bool_]  # (U,) whether the ring goes along it
    ring_of_use: _Ints  # (U,)


def _cut(rings: _Rings, corners_um: _Floats) -> _Arcs:
    lengths = np.diff(rings.offsets)
    ring_of = np.repeat(np.arange(len(lengths)), lengths)
    corner = rings.steps // 4
    cuts = rings.junction[corner]
    # A ring without junctions is cut at its first corner, which is the same for the pieces on both of its sides.
    lowest = np.minimum.reduceat(corner, rings.offsets[:-1])
    cuts |= ~np.logical_or.reduceat(cuts, rings.offsets[:-1])[ring_of] & (corner == lowest[ring_of])
    # Every ring is turned so that it begins with a cut.
    position = np.arange(len(corner)) - rings.offsets[ring_of]
    first_cut = np.minimum.reduceat(np.where(cuts, position, len(corner)), rings.offsets[:-1])
    source = rings.offsets[ring_of] + (position + first_cut[ring_of]) % lengths[ring_of]
    steps, corner, cuts = rings.steps[source], corner[source], cuts[source]
    cuts |= _farthest(corner, cuts, rings, corners_um)
    begin = np.flatnonzero(cuts)
    end = np.append(begin[1:], len(steps))
    key = np.minimum(steps[begin], rings.twin[steps[end - 1]])
    _, chosen, of_use = np.unique(key, return_index=True, return_inverse=True)
    forward = steps[begin] == steps[begin[chosen]][of_use]
    sizes = (end - begin)[chosen]
    offsets = np.concatenate([[0], np.cumsum(sizes + 1)])
    points = np.empty(offsets[-1], np.int64)
    inner = _ranges(begin[chosen], sizes)
    is_last = np.zeros(len(points), bool)
    is_last[offsets[1:] - 1] = True
    points[~is_last] = corner[inner]
    points[is_last] = rings.twin[steps[end[chosen] - 1]] // 4
    return _Arcs(corners_um[points], offsets, of_use.ravel(), forward, ring_of[begin])


def _farthest(corner: _Ints, cuts: NDArray[np.bool_], rings: _Rings, xy: _Floats) -> NDArray[np.bool_]:
    """Where arcs that end where they begin are cut once more: at their corner farthest from there."""
    begin = np.flatnonzero(cuts)
    arc_of = np.cumsum(cuts) - 1
    end = np.append(begin[1:], len(corner))
    ring_end = rings.offsets[1:][np.searchsorted(rings.offsets, begin, side="right") - 1]
    ring_begin = rings.offsets[:-1][np.searchsorted(rings.offsets, begin, side="right") - 1]
    ends_at = np.where(end == ring_end, corner[ring_begin], corner[np.minimum(end, len(corner) - 1)])
    closed = ends_at == corner[begin]
    distance = ((xy[corner] - xy[corner[begin]][arc_of]) ** 2).sum(axis=1)
    most = np.maximum.reduceat(distance, begin)
    candidate = np.where(distance == most[arc_of], corner, -1)
    chosen = np.maximum.reduceat(candidate, begin)
    return np.asarray(closed[arc_of] & (corner == chosen[arc_of]))


def _ranges(begin: _Ints, sizes: _Ints) -> _Ints:
    """``begin[0], begin[0] + 1, …`` for each of several stretches, one after another."""
    shift = begin - np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return np.asarray(np.arange(sizes.sum()) + np.repeat(shift, sizes))


# Polygons


@np.errstate(all="ignore")  # GEOS leaves floating-point flags behind, which numpy would report as warnings
def _simplified(rings: _Rings, arcs: _Arcs, place: MapPlace, tolerance_um: float) -> tuple[_Ints, NDArray[np.object_]]:
    sizes = np.diff(arcs.offsets)
    lines = shapely.linestrings(arcs.xy_um, indices=np.repeat(np.arange(len(sizes)), sizes))
    is_shell = _doubled_areas(*_ring_points(rings, arcs, lines)) > 0
    tolerance = np.where(sizes > 2, tolerance_um, 0.0)
    drawn = lines.copy()
    changed = tolerance > 0
    for attempt in count():
        drawn[changed] = shapely.simplify(lines[changed], tolerance[changed], preserve_topology=False)
        shapes, owners, polygon_of, collapsed = _assembled(rings, arcs, drawn, place, is_shell)
        changed[:] = False
        changed[_arcs_at_fault(arcs, drawn, shapes, collapsed, polygon_of)] = True
        changed &= tolerance > 0
        if not changed.any():
            return owners, shapes
        finer = tolerance[changed] / 2 if attempt < _HALVINGS else np.zeros(np.count_nonzero(changed))
        tolerance[changed] = np.where(finer < _LEAST_STEP_PX * min(place.pixel_um), 0, finer)
    raise AssertionError("unreachable: every pass leaves fewer arcs to simplify")


def _ring_points(rings: _Rings, arcs: _Arcs, drawn: NDArray[np.object_]) -> tuple[_Floats, _Ints]:
    """(P, 2) points of all rings, each without its last, and (R + 1,) where each ring begins."""
    points = shapely.get_coordinates(drawn)
    sizes = shapely.get_num_coordinates(drawn).astype(np.int64)
    begin = np.concatenate([[0], np.cumsum(sizes)])[arcs.of_use]
    inner = sizes[arcs.of_use] - 1  # the last point is the next arc's first
    within = _ranges(np.zeros_like(inner), inner)
    use = np.repeat(np.arange(len(inner)), inner)
    at = begin[use] + np.where(arcs.forward[use], within, inner[use] - within)
    counts = np.bincount(arcs.ring_of_use[use], minlength=len(rings.owners))
    return points[at], np.concatenate([[0], np.cumsum(counts)])


def _assembled(
    rings: _Rings, arcs: _Arcs, drawn: NDArray[np.object_], place: MapPlace, is_shell: NDArray[np.bool_]
) -> tuple[NDArray[np.object_], _Ints, _Ints, NDArray[np.bool_]]:
    """Put rings together from arcs and polygons from rings.

    Returns:
        The polygons and the piece of each; the polygon of each ring; and which rings collapsed.
    """
    xy, starts = _ring_points(rings, arcs, drawn)
    xy = np.round(place.to_level0(xy / place.pixel_um), _DECIMALS) + 0.0  # + 0.0: no negative zero
    counts = np.diff(starts)
    area = _doubled_areas(xy, starts)
    collapsed = (counts < 3) | (area == 0) | ((area > 0) != is_shell)
    # A ring of too few points stands as one without area until its arcs are drawn better.
    missing = np.maximum(3 - counts, 0)
    xy = np.insert(xy, np.repeat(starts[1:], missing), np.repeat(xy[starts[:-1]], missing, axis=0), axis=0)
    lines = shapely.linearrings(xy, indices=np.repeat(np.arange(len(counts)), counts + missing))
    order = np.lexsort((~is_shell, rings.owners))
    owners, polygon_of = np.unique(rings.owners, return_inverse=True)
    shapes = shapely.polygons(lines[order], indices=polygon_of[order])
    return shapes, owners, polygon_of, collapsed


def _doubled_areas(xy: _Floats, starts: _Ints) -> _Floats:
    """Twice the signed area of each ring of points, positive where it goes clockwise with y pointing down."""
    xy = xy - np.repeat(xy[starts[:-1]], np.diff(starts), axis=0)  # small numbers: far out, products would lose digits
    following = np.arange(1, len(xy) + 1)
    following[starts[1:] - 1] = starts[:-1]
    x, y = xy.T
    return np.asarray(np.add.reduceat(x * y[following] - x[following] * y, starts[:-1]))


def _arcs_at_fault(
    arcs: _Arcs,
    drawn: NDArray[np.object_],
    shapes: NDArray[np.object_],
    collapsed: NDArray[np.bool_],
    polygon_of: _Ints,
) -> _Ints:
    """The arcs to draw more exactly: those of rings that collapsed, and those that cross others."""
    whole = np.ones(len(shapes), bool)
    whole[polygon_of[collapsed]] = False
    invalid = ~shapely.is_valid(shapes)
    checked = np.where(invalid | ~whole, shapely.Polygon(), shapes)
    overlapping = np.flatnonzero(~shapely.is_empty(shapely.coverage_invalid_edges(checked)))
    # Of a piece that another swallowed, only the one inside is told: take in whatever it meets.
    invalid[shapely.STRtree(checked).query(checked[overlapping], predicate="intersects")[1]] = True
    suspects = np.unique(arcs.of_use[(whole & invalid)[polygon_of[arcs.ring_of_use]]])
    crossing = suspects[_meeting(drawn[suspects])]
    return np.concatenate([arcs.of_use[collapsed[arcs.ring_of_use]], crossing if len(crossing) else suspects])


def _meeting(lines: NDArray[np.object_]) -> _Ints:
    """Which of several lines meet others, or themselves, anywhere but at their ends."""
    first, second = shapely.STRtree(lines).query(lines, predicate="intersects")
    first, second = first[first < second], second[first < second]
    at_fault = np.zeros(len(first), bool)
    for pattern in ("T********", "*T*******", "***T*****"):  # inner points on inner points, ends on inner points
        at_fault |= shapely.relate_pattern(lines[first], lines[second], pattern)
    return np.unique(np.concatenate([first[at_fault], second[at_fault], np.flatnonzero(~shapely.is_simple(lines))]))
