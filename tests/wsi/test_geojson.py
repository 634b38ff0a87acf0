"""GeoJSON: what is written imports in every QuPath where it belongs; what others write is read, or told why not.

Shapes are made to be nasty: on coarse lattices, so that points fall on edges; thinner than the grid; crossing,
overlapping, with holes anywhere; and far out, where 32-bit numbers are coarse.
"""

import gzip
import io
import json
import math
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wsi.qupath_model import VERSIONS, ImportFailedError, import_objects, in_full_frame
from wsi import geojson
from wsi._version import __version__
from wsi.annotation import Annotation, canonical_class_name, class_color
from wsi.errors import AnnotationError, UsageError
from wsi.geojson import Frame, GeoJsonContents, Rejection, read_geojson, write_geojson

FRAME = Frame("slide.mrxs", (200_000, 100_000), (0.25, 0.25), (1_000, 2_000))
PLAIN = Frame("slide.svs", (200_000, 100_000), (0.25, 0.25))
RING = [[0, 0], [20, 0], [20, 20], [0, 20], [0, 0]]
BOW_TIE = [[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the whole module, since hypothesis makes thousands of files; without waiting for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield tmp_path_factory.mktemp("geojson")


def _polygon(*rings: list[list[Any]]) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": list(rings)}


def _feature(geometry: Any = None, **properties: Any) -> dict[str, Any]:
    return {"type": "Feature", "geometry": geometry or _polygon(RING), "properties": properties}


def _collection(*features: Any, **members: Any) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": list(features), **members}


def _read(folder: Path, document: Any, **arguments: Any) -> GeoJsonContents:
    path = folder / "document.json"
    path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    return read_geojson(path, **arguments)


def _only(folder: Path, document: Any) -> Annotation:
    contents = _read(folder, document)
    assert (len(contents.annotations), contents.rejected) == (1, ())
    return contents.annotations[0]


def _short(value: Any) -> str:
    return str(sorted(value) if isinstance(value, set) else value)[:60]  # sets have no order, and workers must agree


# What is written

_numbers = st.one_of(
    st.integers(0, 12).map(float),
    st.integers(0, 60).map(lambda hundredths: hundredths / 100),
    st.floats(0, 300, allow_subnormal=False),
)
_slivers = st.builds(
    lambda points, slope: [(x, x * slope + offset) for x, offset in points],
    st.lists(st.tuples(st.floats(0, 500), st.floats(0, 0.03)), min_size=4, max_size=7),
    st.floats(-1, 1),
)
_rings = st.one_of(st.lists(st.tuples(_numbers, _numbers), min_size=3, max_size=9), _slivers)
_polygons = st.builds(shapely.Polygon, _rings, st.lists(_rings, max_size=2))
_areas = st.one_of(_polygons, st.lists(_polygons, min_size=1, max_size=3).map(shapely.MultiPolygon))
_places = st.sampled_from([0.0, 60_000.5, 131_072.0, 200_000.0, 1_000_000.0])
_origins = st.tuples(st.integers(-3_000, 50_000), st.integers(-3_000, 50_000))
_words = st.fixed_dictionaries(
    {
        "class_name": st.one_of(st.none(), st.text(max_size=12).map(canonical_class_name)),
        "color": st.one_of(st.none(), st.tuples(*[st.integers(0, 255)] * 3)),
        "measurements": st.dictionaries(st.text(min_size=1, max_size=5), st.floats(), max_size=3),
        "name": st.one_of(st.none(), st.text(max_size=8)),
        "object_type": st.sampled_from(["annotation", "detection", "tile", "cell", "tmaCore"]),
        "metadata": st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
        "is_locked": st.booleans(),
    }
)


def _moved(shape: Any, x: float, y: float) -> Any:
    return shapely.transform(shape, lambda xy: xy + (x, y))  # noqa: RUF005


def _finite(measurements: Any) -> dict[str, float]:
    return {name: value for name, value in measurements.items() if math.isfinite(value)}


@settings(max_examples=120, deadline=None)
@given(
    shapes=st.lists(st.tuples(_areas, _places), min_size=1, max_size=6),
    words=_words,
    origin=_origins,
)
def test_what_is_written_imports_in_every_qupath_where_it_belongs_and_again_gives_the_same_bytes(
    folder: Path, shapes: list[tuple[Any, float]], words: dict[str, Any], origin: tuple[int, int]
) -> None:
    first, second = folder / "first.geojson", folder / "second.geojson"
    frame = Frame("slide", (200_000, 100_000), (0.25, 0.25), origin)
    annotations = [Annotation(_moved(shape, place, place), **words) for shape, place in shapes]
    report = write_geojson(first, annotations, frame)
    contents = read_geojson(first)
    assert report.n_written + len(report.dropped) == len(shapes)
    assert (len(contents.annotations), contents.rejected, contents.repaired) == (report.n_written, (), ())
    for version in VERSIONS:
        objects = import_objects(first.read_bytes(), version)
        assert len({found.uid for found in objects}) == len(objects) == report.n_written
        for found, annotation in zip(objects, contents.annotations, strict=True):
            there = in_full_frame(found.shape, origin)
            assert there.is_valid
            assert shapely.hausdorff_distance(there, annotation.geometry) < _coarseness(found.shape)
            if np.abs(found.shape.bounds).max() < 65_536:  # 32-bit numbers are finer than the grid: nothing may move
                assert shapely.get_num_coordinates(there) == shapely.get_num_coordinates(annotation.geometry)
            assert ": ".join(found.class_names) == (words["class_name"] or "")
            painted = words["color"] or (class_color(words["class_name"]) if words["class_name"] else None)
            assert (found.class_color if words["class_name"] else found.color) == painted
            assert (found.object_type, found.name) == (words["object_type"], words["name"])
            assert (found.is_locked, found.metadata) == (words["is_locked"], words["metadata"])
            assert found.measurements == _finite(words["measurements"])
    again = write_geojson(second, contents.annotations, frame)
    assert second.read_bytes() == first.read_bytes()
    assert (again.repaired, again.dropped, contents.frame) == ((), (), frame)


def _coarseness(shape: Any) -> float:
    """How far QuPath may move a point: half a step of a 32-bit number and then of its grid, along both axes."""
    return (0.005 + float(np.spacing(np.float32(np.abs(shape.bounds).max()))) / 2) * math.sqrt(2) + 1e-6


# Holes only in what surrounds them all: the rule for a hole beside its shell is to become a shell, and one for a hole
# that touches it another, so that there a hundredth of a pixel decides over the whole hole.
_plain_areas = st.one_of(
    _rings.map(shapely.Polygon),
    st.lists(_rings.map(shapely.Polygon), min_size=1, max_size=3).map(shapely.MultiPolygon),
    st.lists(_rings, max_size=3).map(lambda holes: shapely.Polygon(shapely.box(-600, -600, 600, 600).exterior, holes)),
)


@settings(max_examples=120, deadline=None)
@given(shape=_plain_areas, place=_places)
def test_a_repaired_shape_covers_what_its_rings_went_around(folder: Path, shape: Any, place: float) -> None:
    """Except near its outline: within a few steps of the grid, of the coarse grid where only that ends the repair."""
    path = folder / "cover.geojson"
    write_geojson(path, [Annotation(_moved(shape, place, place))], PLAIN)
    written = read_geojson(path).annotations
    found = _moved(written[0].geometry, -place, -place) if written else shapely.Polygon()
    steps = 1.0 if (shapely.get_coordinates(found) % 0.25 == 0).all() else 0.04
    points = _points_across(shape)
    outline = shapely.multilinestrings(shapely.get_rings(shape))
    with np.errstate(all="ignore"):
        points = points[shapely.distance(shapely.points(points), outline) > steps]
    assert (shapely.contains_xy(found, points) == _gone_around(shape, points)).all()


def _points_across(shape: Any) -> Any:
    x0, y0, x1, y1 = shape.bounds
    across = np.linspace(-0.0137, 1.0071, 24)
    return np.stack(np.meshgrid(x0 + across * (x1 - x0), y0 + across * (y1 - y0)), axis=-1).reshape(-1, 2)


def _gone_around(shape: Any, points: Any) -> Any:
    """Whether the shell of a polygon, but none of its holes, winds around each point; an area without any geometry."""
    inside = np.zeros(len(points), dtype=bool)
    for polygon in shapely.get_parts(shape):
        shell, *holes = (_winds_around(ring, points) for ring in shapely.get_rings(polygon))
        inside |= shell & ~np.any([np.zeros_like(shell), *holes], axis=0)
    return inside


def _winds_around(ring: Any, points: Any) -> Any:
    xy = shapely.get_coordinates(ring)
    (ax, ay), (bx, by) = xy[:-1, :, None].transpose(1, 0, 2), xy[1:, :, None].transpose(1, 0, 2)  # (N, 1) each
    x, y = points.T
    turn = (bx - ax) * (y - ay) - (x - ax) * (by - ay)
    up, down = (ay <= y) & (by > y) & (turn > 0), (by <= y) & (ay > y) & (turn < 0)
    return up.sum(axis=0) != down.sum(axis=0)


_stars = st.builds(
    lambda x, y, radii: shapely.Polygon(
        [
            (x + radius * math.cos(turn), y + radius * math.sin(turn))
            for radius, turn in zip(radii, np.linspace(0, 2 * math.pi, len(radii), endpoint=False), strict=True)
        ]
    ),
    st.floats(0, 120_000),
    st.floats(0, 120_000),
    st.lists(st.floats(5, 200), min_size=5, max_size=12),
)


@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(_stars, min_size=1, max_size=5), words=_words, origin=_origins)
def test_what_is_read_back_is_what_was_written_to_a_hundredth_of_a_pixel(
    folder: Path, shapes: list[Any], words: dict[str, Any], origin: tuple[int, int]
) -> None:
    path = folder / "round.json"
    nucleus = shapely.box(50, 60, 70, 80) if words["object_type"] == "cell" else None
    if words["class_name"] and words["color"] == class_color(words["class_name"]):
        words = words | {"color": None}
    annotations = [Annotation(shape, nucleus=nucleus, **words) for shape in shapes]
    report = write_geojson(path, annotations, Frame("slide", (200_000, 100_000), (0.25, 0.25), origin))
    contents = read_geojson(path)
    assert (report.repaired, report.dropped, contents.origin_source) == ((), (), "file")
    for annotation, found in zip(annotations, contents.annotations, strict=True):
        assert shapely.get_num_coordinates(found.geometry) == shapely.get_num_coordinates(annotation.geometry)
        assert shapely.hausdorff_distance(found.geometry, annotation.geometry) < 0.01
        assert found.geometry.area == pytest.approx(annotation.geometry.area, abs=0.01 * annotation.geometry.length)
        assert (found.nucleus is None) if nucleus is None else shapely.equals(found.nucleus, nucleus)
        for field in ("class_name", "color", "name", "object_type", "metadata", "is_locked"):
            assert getattr(found, field) == getattr(annotation, field)
        assert found.measurements == _finite(annotation.measurements)


def test_the_file_holds_what_qupath_documents_and_no_more(folder: Path) -> None:
    path = folder / "golden.geojson"
    annotations = [
        Annotation(
            _moved(shapely.Polygon(RING, [[(5, 5), (5, 9.125), (9, 9), (9, 5)]]), 1_000, 2_000),
            "Tumor: Positive",
            color=(200, 0, 0),
            name="tumeur n° 1",
            measurements={"score": 0.5, "missing": math.nan, "endless": math.inf},
            metadata={"reader": "AB"},
            is_locked=True,
        ),
        Annotation(shapely.Point(1_000.126, 1_999.999), "Mitosis", object_type="detection"),
        Annotation(shapely.Point(1_002, 1_999.9), color=(1, 2, 3)),
        Annotation(
            shapely.box(1_000, 2_000, 1_004, 2_004), object_type="cell", nucleus=shapely.box(1_001, 2_001, 1_002, 2_002)
        ),
    ]
    write_geojson(path, annotations, FRAME)
    uids = [annotation.id for annotation in read_geojson(path).annotations]
    head, *features, tail = path.read_text(encoding="ascii").splitlines()
    assert head == (
        '{"type":"FeatureCollection","wsi":{"version":1,"generator":"wsi-engine ' + __version__ + '",'
        '"slide":"slide.mrxs","size":[200000,100000],"mpp":[0.25,0.25],"origin":[1000,2000]},"features":['
    )
    assert features[0] == (
        f'{{"type":"Feature","id":"{uids[0]}","geometry":{{"type":"Polygon","coordinates":'
        "[[[0,0],[20,0],[20,20],[0,20],[0,0]],[[5,5],[5,9.12],[9,9],[9,5],[5,5]]]},"
        '"properties":{"objectType":"annotation","classification":{"names":["Tumor","Positive"],"color":[200,0,0]},'
        '"name":"tumeur n\\u00b0 1","isLocked":true,"measurements":{"score":0.5},"metadata":{"reader":"AB"}}},'
    )
    assert features[1] == (
        f'{{"type":"Feature","id":"{uids[1]}","geometry":{{"type":"Point","coordinates":[0.13,0]}},"properties":'
        '{"objectType":"detection","classification":{"name":"Mitosis","color":[229,178,187]}}},'
    )
    assert features[2] == (
        f'{{"type":"Feature","id":"{uids[2]}","geometry":{{"type":"Point","coordinates":[2,-0.1]}},"properties":'
        '{"objectType":"annotation","color":[1,2,3]}},'
    )
    assert features[3] == (
        f'{{"type":"Feature","id":"{uids[3]}","geometry":{{"type":"Polygon","coordinates":'
        '[[[0,0],[4,0],[4,4],[0,4],[0,0]]]},"nucleusGeometry":{"type":"Polygon","coordinates":'
        '[[[1,1],[2,1],[2,2],[1,2],[1,1]]]},"properties":{"objectType":"cell"}}'
    )
    assert tail == "]}"


@pytest.mark.parametrize(
    ("shape", "expected", "reason"),
    [
        (
            shapely.Polygon(BOW_TIE),
            "MULTIPOLYGON (((0 0, 5 5, 0 10, 0 0)), ((5 5, 10 0, 10 10, 5 5)))",
            "Self-intersection",
        ),
        (
            shapely.Polygon(RING, [[(10, 5), (30, 5), (30, 15), (10, 15)]]),
            "POLYGON ((0 0, 20 0, 20 5, 10 5, 10 15, 20 15, 20 20, 0 20, 0 0))",
            "Self-intersection",
        ),
        (
            shapely.MultiPolygon([shapely.box(0, 0, 10, 10), shapely.box(5, 0, 15, 10)]),
            "POLYGON ((0 0, 15 0, 15 10, 0 10, 0 0))",
            "Self-intersection",
        ),
        (
            shapely.from_wkt("MULTIPOLYGON (((0 0, 10 0, 10 10, 0 10, 0 0)), EMPTY)"),
            "MULTIPOLYGON (((0 0, 10 0, 10 10, 0 10, 0 0)))",
            "1 parts with too few points",
        ),
        (
            shapely.GeometryCollection([shapely.Point(1, 1), shapely.box(0, 0, 10, 10)]),
            "POLYGON ((0 0, 10 0, 10 10, 0 10, 0 0))",
            "GeometryCollection",
        ),
        (
            shapely.Polygon([(0, 0), (1_000, 700), (1_000, 0), (333.33, 233.33)]),
            "POLYGON ((333.33 233.33, 1000 700, 1000 0, 333.33 233.33))",
            "too narrow",
        ),
        (
            shapely.MultiLineString([[(0, 0), (0.001, 0)], [(0, 0), (5, 5)]]),
            "LINESTRING (0 0, 5 5)",
            "Too few points",
        ),
    ],
    ids=["bow-tie", "hole crosses shell", "overlapping parts", "empty part", "mixed", "spike", "a line of no length"],
)
def test_a_shape_qupath_would_stumble_over_is_repaired_and_told(
    folder: Path, shape: Any, expected: str, reason: str
) -> None:
    path = folder / "repaired.geojson"
    report = write_geojson(path, [Annotation(shapely.box(0, 0, 1, 1)), Annotation(shape)], PLAIN)
    assert (report.n_written, report.dropped, [repair.index for repair in report.repaired]) == (2, (), [1])
    assert reason in report.repaired[0].reason
    found = read_geojson(path).annotations[1].geometry
    wanted = shapely.from_wkt(expected)
    assert found.geom_type == wanted.geom_type
    assert shapely.symmetric_difference(found, wanted).is_empty
    for version in VERSIONS:
        assert len(import_objects(path.read_bytes(), version)) == 2


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (shapely.box(0, 0, 0.004, 0.004), "nothing is left"),
        (shapely.Polygon([(0, 0), (1_000, 700), (500, 350.001)]), "nothing is left"),
        (shapely.Polygon([(0, 0), (10, 10), (0, 0), (10, 10)]), "nothing is left"),
        (shapely.LineString([(5, 5), (5, 5.001)]), "nothing is left"),
        (shapely.LineString([(5, 1_000_000), (5, 1_000_000.02)]), "nothing is left"),
        (shapely.box(0, 0, 1e7, 10), "farther than any slide"),
        (shapely.LineString([(5, 5), (math.inf, 5)]), "too few points; 1 points that are not finite were left out"),
        (shapely.GeometryCollection([shapely.GeometryCollection(), shapely.box(0, 0, 1e7, 1)]), "farther than any"),
    ],
    ids=["dot", "sliver", "back and forth", "short line", "short line far out", "far", "line to infinity", "nested"],
)
def test_a_shape_of_which_nothing_is_left_is_dropped_and_told(folder: Path, shape: Any, reason: str) -> None:
    path = folder / "dropped.geojson"
    report = write_geojson(path, [Annotation(shape), Annotation(shapely.Point(1, 1))], PLAIN)
    assert (report.n_written, report.repaired, [rejection.index for rejection in report.dropped]) == (1, (), [0])
    assert reason in report.dropped[0].reason
    assert [annotation.geometry for annotation in read_geojson(path).annotations] == [shapely.Point(1, 1)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_points_that_are_not_finite_are_left_out_and_told(folder: Path, value: float) -> None:
    path = folder / "finite.geojson"
    with np.errstate(invalid="ignore"):
        shape = shapely.Polygon(
            [*RING[:2], (value, 20), *RING[2:4], (0, value)], [[(5, 5), (9, 5), (value, value), (9, 9)]]
        )
    report = write_geojson(path, [Annotation(shape)], PLAIN)
    assert [repair.reason for repair in report.repaired] == [
        "2 points that are not finite were left out; 1 points that are not finite were left out"
    ]
    assert read_geojson(path).annotations[0].geometry.equals(shapely.Polygon(RING, [[(5, 5), (9, 5), (9, 9)]]))


@pytest.mark.parametrize(
    "shape",
    [
        shapely.Point(3, 4),
        shapely.MultiPoint([(3, 4), (1, 2)]),
        shapely.LineString([(9, 9), (0, 0), (9, 0), (0, 9)]),
        shapely.MultiLineString([[(0, 0), (1, 1)], [(5, 5), (6, 7)]]),
        shapely.LinearRing([(0, 0), (5, 0), (5, 5)]),
        shapely.Point(3, 4, 5),
    ],
    ids=lambda shape: f"{shape.geom_type} {shapely.get_coordinate_dimension(shape)}-D",
)
def test_points_and_lines_are_written_as_they_are(folder: Path, shape: Any) -> None:
    path = folder / "lines.geojson"
    report = write_geojson(path, [Annotation(shape)], FRAME)
    assert (report.repaired, report.dropped) == ((), ())
    found = read_geojson(path).annotations[0].geometry
    assert shapely.get_coordinates(found).tolist() == shapely.get_coordinates(shape).tolist()
    for version in VERSIONS:
        imported = import_objects(path.read_bytes(), version)[0].shape
        assert imported.geom_type == shape.geom_type.replace("LinearRing", "LineString")


def test_a_nucleus_is_repaired_like_a_cell_and_left_out_if_nothing_of_it_is_left(folder: Path) -> None:
    path = folder / "cells.geojson"
    cell = shapely.box(0, 0, 30, 30)
    nuclei = [shapely.Polygon(BOW_TIE), shapely.box(1, 1, 1.001, 1.001)]
    report = write_geojson(path, [Annotation(cell, object_type="cell", nucleus=nucleus) for nucleus in nuclei], PLAIN)
    assert [repair.reason.partition(":")[0] for repair in report.repaired] == ["nucleus", "nucleus"]
    crossed, tiny = read_geojson(path).annotations
    assert (shapely.is_valid(crossed.nucleus), shapely.area(crossed.nucleus), tiny.nucleus) == (True, 50, None)
    for version in VERSIONS:
        assert [found.nucleus is None for found in import_objects(path.read_bytes(), version)] == [False, True]


def test_equal_annotations_get_ids_of_their_own_which_stay_the_same(folder: Path) -> None:
    path = folder / "equal.geojson"
    write_geojson(path, [Annotation(shapely.Point(1, 1))] * 3, PLAIN)
    before = path.read_bytes()
    uids = [found.uid for found in import_objects(before, "0.7")]
    assert len(set(uids)) == 3
    assert uids[0] == Annotation(shapely.Point(1, 1)).id
    write_geojson(path, read_geojson(path).annotations, PLAIN)
    assert path.read_bytes() == before


def test_rings_turn_as_rfc_7946_asks(folder: Path) -> None:
    path = folder / "turn.geojson"
    holed = shapely.Polygon(RING[::-1], [[(5, 5), (9, 5), (9, 9)]])
    write_geojson(path, [Annotation(holed), Annotation(holed.reverse())], PLAIN)
    for found in json.loads(path.read_bytes())["features"]:
        shell, hole = (shapely.LinearRing(ring) for ring in found["geometry"]["coordinates"])
        assert (shell.is_ccw, hole.is_ccw) == (True, False)


def test_compressed_files_hold_the_same_and_do_not_depend_on_time_or_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotations = [Annotation(shapely.box(i, i, i + 224, i + 224), object_type="tile") for i in range(5)]
    for name in ("a.json", "a.json.gz", "other.GeoJSON.GZ"):
        write_geojson(folder / name, iter(annotations), PLAIN)
        later = time.time() + 1e6
        monkeypatch.setattr("time.time", lambda later=later: later)
    assert (folder / "a.json.gz").read_bytes() == (folder / "other.GeoJSON.GZ").read_bytes()
    assert gzip.decompress((folder / "a.json.gz").read_bytes()) == (folder / "a.json").read_bytes()


def test_how_many_are_handled_at_once_does_not_show(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [
        shapely.Polygon(BOW_TIE),
        shapely.Point(1, 1),
        shapely.Point(1, 1),
        shapely.box(0, 0, 0.001, 1),
        shapely.Point(2, 2),
    ]
    whole = write_geojson(folder / "whole.json", map(Annotation, shapes), PLAIN)
    monkeypatch.setattr(geojson, "_CHUNK", 2)
    assert write_geojson(folder / "chunks.json", map(Annotation, shapes), PLAIN) == whole
    assert (folder / "chunks.json").read_bytes() == (folder / "whole.json").read_bytes()


def test_nothing_at_all_is_a_collection_without_features(folder: Path) -> None:
    path = folder / "none.geojson"
    assert write_geojson(path, [], PLAIN).n_written == 0
    assert read_geojson(path).annotations == ()
    assert import_objects(path.read_bytes(), "0.4") == []


def test_a_writer_that_is_interrupted_leaves_the_old_file(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Annotation]:
        yield Annotation(shapely.Point(1, 1))
        raise KeyboardInterrupt

    path = tmp_path / "a.geojson"
    write_geojson(path, [Annotation(shapely.Point(2, 2))], PLAIN)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_geojson(path, interrupted(), PLAIN)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a.txt", "a.geojson.zip", "a", "geojson", "a.gz"])
def test_a_name_that_qupath_would_not_open_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"QuPath opens \.geojson and \.json"):
        write_geojson(folder / name, [], PLAIN)
    assert not (folder / name).exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("slide", None),
        ("size", (0, 10)),
        ("size", (10.5, 10)),
        ("size", 10),
        ("mpp", (0.25, 0)),
        ("mpp", (0.25, math.nan)),
        ("mpp", None),
        ("origin", (math.inf, 0)),
        ("origin", (0, 0, 0)),
        ("origin", ("left", "top")),
        ("origin", (1e9, 0)),
    ],
)
def test_a_frame_refuses_what_is_no_place(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=field):
        Frame(**{"slide": "s", "size": (10, 10), "mpp": (0.25, 0.25), "origin": (0, 0)} | {field: value})


def test_a_shape_that_geos_cannot_snap_is_dropped_and_the_others_are_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snap = shapely.set_precision

    def failing(shapes: Any, *arguments: Any, **options: Any) -> Any:
        if not options and 13 in shapely.get_coordinates(shapes):
            raise shapely.GEOSException("TopologyException: side location conflict")
        return snap(shapes, *arguments, **options)

    monkeypatch.setattr(shapely, "set_precision", failing)
    path = folder / "snap.geojson"
    report = write_geojson(path, [Annotation(shapely.box(0, 0, edge, 9)) for edge in (11, 12, 13, 14, 15)], PLAIN)
    assert (report.n_written, [rejection.index for rejection in report.dropped], report.repaired) == (4, [2], ())
    assert [found.geometry.bounds[2] for found in read_geojson(path).annotations] == [11, 12, 14, 15]


def test_where_geos_fails_by_structure_it_repairs_by_linework_or_rejects(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(shape: Any) -> Any:
        raise shapely.GEOSException("TopologyException: side location conflict")

    monkeypatch.setattr(geojson, "_by_structure", failing)
    document = [_feature(_polygon(BOW_TIE)), _feature()]
    assert [found.geometry.area for found in _read(folder, document).annotations] == [50, 400]
    monkeypatch.setattr(geojson, "_by_linework", failing)
    contents = _read(folder, document)
    assert [found.geometry.area for found in contents.annotations] == [400]
    assert contents.rejected == (Rejection(0, "not valid (Self-intersection[5 5])"),)


# What QuPath does with what others write: the model of it is only worth something if it fails where QuPath fails.

ALL, FROM_06, ONLY_04 = set(VERSIONS), {"0.6", "0.7"}, {"0.4"}
_TWO_PARTS = {"type": "MultiPolygon", "coordinates": [[RING], [[[5, 5], [30, 5], [30, 9], [5, 9], [5, 5]]]]}
_MIXED = {"type": "GeometryCollection", "geometries": [_polygon(RING), {"type": "Point", "coordinates": [1, 1]}]}


@pytest.mark.parametrize(
    ("document", "failing"),
    [
        (_collection(_feature()), set()),
        ([_feature(), [_feature()]], set()),
        (_feature(), set()),
        (_polygon(RING), set()),
        (_feature(classification="Tumor"), set()),
        (_feature(classification={}), set()),
        (_feature(classification={"name": "Tumor", "colorRGB": -3670016}), set()),
        (_feature(classification={"names": ["Tumor", "Positive"], "color": [1, 2, 3]}), set()),
        (_feature(classification={"name": "Tumor"}), ALL),
        (_feature(classification={"color": [1, 2, 3]}), ALL),
        (_feature(classification={"name": "Tumor", "color": [1, 2]}), ALL),
        (_feature(classification={"name": " ", "color": [1, 2, 3]}), ALL),
        (_feature(classification=7), ALL),
        (_feature(name=None), ALL),
        (_feature() | {"id": None}, ALL),
        (_feature() | {"id": "no UUID"}, set()),
        (_feature() | {"geometry": None}, ALL),
        (_feature({"type": "Polygon"}), ALL),
        (_feature({"coordinates": [RING]}), ALL),
        (_feature({"type": "Circle", "coordinates": [1, 1]}), ALL),
        (_feature(_MIXED), FROM_06),
        (_feature(_polygon(BOW_TIE)), FROM_06),
        (_feature(_polygon(RING, [[10, 5], [30, 5], [30, 15], [10, 15], [10, 5]])), FROM_06),
        (_feature(_TWO_PARTS), FROM_06),
        (_feature(_polygon([[0, 0], [0.004, 0], [0, 0.004], [0, 0]])), FROM_06),
        (_feature(_polygon([[0, 0], [1000, 700], [500, 350.001], [0, 0]])), FROM_06),
        (_feature(_polygon(RING[:-1])), ALL),
        (_feature(_polygon([[0, 0], [1, 1], [0, 0]])), ALL),
        (_feature(_polygon([[0, 0], [math.nan, 5], [5, 5], [0, 0]])), ALL),
        (_feature(_polygon([[0, 0], [None, 5], [5, 5], [0, 0]])), ALL),
        (_feature(_polygon(RING) | {"plane": {"c": -1, "z": 2, "t": 0}}), set()),
        (_feature(_polygon(RING) | {"plane": {"z": 2, "name": "top"}}), ALL),
        (_feature(measurements={"a": 1, "b": 2.5}), set()),
        (_feature(measurements=[{"name": "a", "value": 1}]), set()),
        (_feature(measurements={"a": "NaN"}), ONLY_04),
        (_feature(measurements={"a": None}), ALL),
        (_feature(measurements=[{"value": 1}]), ALL),
        (_feature(childObjects=[_feature(name=None)]), ALL),
        (_feature(color="#ff0000"), ALL),
    ],
    ids=_short,
)
def test_qupath_fails_on_the_whole_file_and_this_reads_it_and_writes_what_qupath_takes(
    folder: Path, document: Any, failing: set[str]
) -> None:
    """The rows of the reference's table: which version throws; after one reading and writing here none does."""
    data = json.dumps(
        _collection(_feature(name="before"), document) if isinstance(document, dict) else document
    ).encode()
    if isinstance(document, dict) and document["type"] != "Feature":
        data = json.dumps([_feature(name="before"), document]).encode()
    for version in VERSIONS:
        if version in failing:
            with pytest.raises(ImportFailedError):
                import_objects(data, version)
        else:
            assert len(import_objects(data, version)) == 2
    contents = _read(folder, data)
    path = folder / "healed.geojson"
    report = write_geojson(path, contents.annotations, PLAIN)
    n_children = data.count(b"childObjects")
    assert report.n_written + len(report.dropped) + len(contents.rejected) == 2 + n_children
    for version in VERSIONS:
        assert len(import_objects(path.read_bytes(), version)) == report.n_written >= 1


# What is read


def _gz(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def _zip(entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return packed.getvalue()


ONE = json.dumps(_feature(name="one")).encode()
TWO = json.dumps([_feature(name="two"), _polygon(BOW_TIE), 7]).encode()


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (ONE, ["one"]),
        (b"\xef\xbb\xbf" + ONE, ["one"]),
        (ONE.decode().encode("utf-16"), ["one"]),
        (_gz(ONE), ["one"]),
        (_zip({"a.geojson": ONE}), ["one"]),
        (_zip({"a.geojson": ONE}, zipfile.ZIP_STORED), ["one"]),
        (
            _zip({"in/b.JSON": ONE, "in/c.geojson.gz": _gz(TWO), "readme.txt": b"", "__MACOSX/._b.json": b"\0"}),
            ["one", "two", None],
        ),
        (_zip({"../../up.geojson": ONE, "/abs.json": ONE}), ["one", "one"]),
    ],
    ids=["plain", "BOM", "UTF-16", "gzip", "zip", "stored zip", "many entries", "names that climb"],
)
def test_a_file_is_unpacked_by_what_it_is_and_nothing_else_is_touched(
    tmp_path: Path, data: bytes, names: list[str | None]
) -> None:
    path = tmp_path / "whatever"
    path.write_bytes(data)
    assert [found.name for found in read_geojson(path).annotations] == names
    assert list(tmp_path.iterdir()) == [path]


def test_features_are_counted_through_all_entries_of_a_zip(folder: Path) -> None:
    contents = _read(folder, _zip({"a.json": TWO, "b.json": TWO}))
    assert [rejection.index for rejection in contents.rejected] == [2, 5]
    assert [repair.index for repair in contents.repaired] == [1, 4]


def _encrypted() -> bytes:
    data = bytearray(_zip({"a.json": ONE}))
    for signature, offset in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        data[data.index(signature) + offset] |= 1
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not JSON"),
        (b"\x89PNG\r\n", "not JSON"),
        (b'{"type": "FeatureCollection", "features": [', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b"[" + b"9" * 5_000 + b"]", "not JSON"),
        (b'<?xml version="1.0"?><ASAP_Annotations/>', "is XML; export the annotations as GeoJSON"),
        (b"7", "not GeoJSON"),
        (b"null", "not GeoJSON"),
        (b'"Feature"', "not GeoJSON"),
        (b"{}", "not GeoJSON"),
        (b'{"type": "Topology"}', "its type is 'Topology'"),
        (b'{"type": ["Feature"]}', "not GeoJSON"),
        (b'{"type": "FeatureCollection", "features": null}', "not GeoJSON"),
        (_gz(ONE)[:-9], "cannot be read"),
        (_gz(ONE)[:12] + b"\xff" * 30, "cannot be read"),
        (_zip({"a.json": ONE})[:-9], "cannot be read"),
        (_zip({"a.json": ONE * 50}).replace(b"a.json", b"b.json", 1), "cannot be read"),
        (_zip({"a.txt": ONE}), r"holds no \.geojson or \.json"),
        (_zip({}), r"holds no \.geojson or \.json"),
        (_zip({"a.json": ONE}, zipfile.ZIP_BZIP2), "packed in a rare way"),
        (_encrypted(), "encrypted"),
        (_zip({"a.json": ONE, "b.json": b"<html>"}), r"b\.json: is XML"),
        (
            _zip({"a.json": ONE, "b.json": json.dumps(_collection(wsi=geojson._wsi_member(FRAME))).encode()}),
            "belong to different slides",
        ),
        (
            json.dumps(_collection(wsi={"version": 2, "origin": [0, 0]})).encode(),
            "version 2, this release knows 1; update",
        ),
        (json.dumps(_collection(wsi={"version": 1, "origin": [0, 0]})).encode(), "'wsi' is damaged"),
        (json.dumps(_collection(wsi=geojson._wsi_member(FRAME) | {"origin": [0, None]})).encode(), "'wsi' is damaged"),
    ],
)
def test_a_file_that_cannot_be_understood_is_named_with_a_way_out(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "broken.geojson"
    path.write_bytes(data)
    with pytest.raises(AnnotationError, match=reason) as caught:
        read_geojson(path)
    assert str(caught.value).startswith(str(path))
    assert ";" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="there is no such file"):
        read_geojson(tmp_path / "a.geojson")
    with pytest.raises(AnnotationError, match="cannot be read"):
        read_geojson(tmp_path)


@pytest.mark.parametrize("pack", [bytes, _gz, lambda data: _zip({"a.json": data[:60_000], "b.json": data[60_000:]})])
def test_what_unpacks_to_more_than_the_limit_in_all_is_refused(folder: Path, pack: Callable[[bytes], bytes]) -> None:
    bomb = pack(b" " * 100_001)
    with pytest.raises(AnnotationError, match="unpacks to more than the limit"):
        _read(folder, bomb, max_bytes=100_000)
    with pytest.raises(AnnotationError, match="not JSON"):
        _read(folder, bomb, max_bytes=100_001)


def test_a_frame_in_the_file_goes_before_the_callers_and_this_before_none(folder: Path) -> None:
    bare, stated = _collection(_feature()), _collection(_feature(), wsi=geojson._wsi_member(FRAME))
    foreign = _collection(_feature(), wsi="a member of somebody else")
    for document, origin, expected in (
        (stated, (5, 5), ((1_000, 2_000), "file", FRAME)),
        (stated, None, ((1_000, 2_000), "file", FRAME)),
        (bare, (5, 6), ((5, 6), "argument", None)),
        (foreign, (5, 6), ((5, 6), "argument", None)),
        (bare, None, ((0, 0), "default", None)),
    ):
        contents = _read(folder, document, origin=origin)
        assert (contents.origin, contents.origin_source, contents.frame) == expected
        x, y = expected[0]
        assert contents.annotations[0].geometry.bounds == (x, y, x + 20, y + 20)
    with pytest.raises(UsageError, match="origin"):
        _read(folder, bare, origin=(math.nan, 0))


@pytest.mark.parametrize(
    ("classification", "class_name", "color"),
    [
        ("Tumor", "Tumor", None),
        ("Tumor:Positive", "Tumor: Positive", None),
        ({"name": "Tumor", "color": [200, 0, 0]}, "Tumor", (200, 0, 0)),
        ({"name": "Tumor", "color": [200, 0, 0, 128]}, "Tumor", (200, 0, 0)),
        ({"name": "Tumor", "color": [-3670016]}, "Tumor", (200, 0, 0)),
        ({"name": "Tumor", "color": []}, "Tumor", None),
        ({"name": "Tumor", "color": [200, 0]}, "Tumor", None),
        ({"name": "Tumor", "color": [200, 0, 300]}, "Tumor", None),
        ({"name": "Tumor", "color": [200, 0, "0"]}, "Tumor", None),
        ({"name": "Tumor", "color": list(class_color("Tumor"))}, "Tumor", None),
        ({"name": "Tumor", "colorRGB": -3670016}, "Tumor", (200, 0, 0)),
        ({"name": "Tumor", "colorRGB": 13107200}, "Tumor", (200, 0, 0)),
        ({"name": "Tumor"}, "Tumor", None),
        ({"names": ["Tumor", "Positive"], "color": [1, 2, 3]}, "Tumor: Positive", (1, 2, 3)),
        ({"names": ["Tumor", None, " "]}, "Tumor", None),
        ({"name": "1+", "colorRGB": 1, "parentClass": {"name": "Tumor", "colorRGB": 2}}, "Tumor: 1+", (0, 0, 1)),
        ({"name": 3}, "3", None),
        ({"name": ""}, None, None),
        ({"name": None, "color": [1, 2, 3]}, None, None),
        ({}, None, None),
        (None, None, None),
        ("", None, None),
    ],
    ids=_short,
)
def test_a_class_is_read_from_all_forms_it_ever_had(
    folder: Path, classification: Any, class_name: str | None, color: Any
) -> None:
    found = _only(folder, _feature(classification=classification))
    assert (found.class_name, found.color) == (class_name, color)


@pytest.mark.parametrize(
    ("color", "expected"),
    [
        ([1, 2, 3], (1, 2, 3)),
        (-16744320, (0, 128, 128)),
        ("#ff0080", (255, 0, 128)),
        ("#ff0080cc", (255, 0, 128)),
        ("rgb(255, 0,128)", (255, 0, 128)),
        ("rgba(255,0,128,0.5)", (255, 0, 128)),
        ("rgb(256,0,128)", None),
        ("red", None),
        (None, None),
        ({"r": 1}, None),
        (1.5, None),
    ],
    ids=_short,
)
def test_the_colour_of_a_shape_without_class_is_read(folder: Path, color: Any, expected: Any) -> None:
    assert _only(folder, _feature(color=color)).color == expected
    assert _only(folder, _feature(color=color, classification="Tumor")).color is None


@pytest.mark.parametrize(
    ("members", "properties", "expected"),
    [
        ({}, {}, "annotation"),
        ({}, {"objectType": "tile"}, "tile"),
        ({}, {"object_type": "detection"}, "detection"),
        ({}, {"type": "cell"}, "cell"),
        ({}, {"objectType": "tmaCore", "object_type": "tile", "type": "cell"}, "tmaCore"),
        ({}, {"objectType": "tma_core"}, "tmaCore"),
        ({}, {"objectType": "polygon"}, "annotation"),
        ({}, {"objectType": None}, "annotation"),
        ({"id": "PathTileObject"}, {}, "tile"),
        ({"id": "PathCellObject"}, {"objectType": "detection"}, "detection"),
        ({"id": "6423a977-ffff-48db-affc-cd11632010f0"}, {}, "annotation"),
        ({"id": None}, {}, "annotation"),
        ({"id": ["PathTileObject"]}, {}, "annotation"),
    ],
    ids=_short,
)
def test_the_kind_of_object_is_read_from_all_places_it_ever_had(
    folder: Path, members: Any, properties: Any, expected: str
) -> None:
    assert _only(folder, _feature(**properties) | members).object_type == expected


def test_names_locks_and_metadata_are_read(folder: Path) -> None:
    found = _only(folder, _feature(name=7, isLocked=True, metadata={"a": 1, "b": True, "c": None, "d": [], "e": "f"}))
    assert (found.name, found.is_locked, found.metadata) == ("7", True, {"a": "1", "b": "true", "e": "f"})
    empty = _only(folder, _feature(name=None, isLocked="no", metadata=[1], measurements=3) | {"properties": None})
    assert (empty.name, empty.is_locked, empty.metadata, empty.measurements) == (None, False, {}, {})


def test_of_a_key_that_stands_twice_the_last_counts(folder: Path) -> None:
    document = b'{"type":"Feature","geometry":{"type":"Point","coordinates":[1,1],"coordinates":[2,2]},'
    document += b'"properties":{"metadata":{"a":"1"},"name":"first","metadata":{"b":"2"},"name":"last"}}'
    found = _only(folder, document)
    assert (found.geometry, found.name, found.metadata) == (shapely.Point(2, 2), "last", {"b": "2"})


@pytest.mark.parametrize(
    ("measurements", "expected", "n_left_out"),
    [
        ({"a": 1, "b": 0.5}, {"a": 1.0, "b": 0.5}, 0),
        ([{"name": "a", "value": 1}, {"name": "b", "value": "0.5"}], {"a": 1.0, "b": 0.5}, 0),
        ({"a": "Infinity", "b": "-Infinity", "c": math.inf}, {"a": math.inf, "b": -math.inf, "c": math.inf}, 0),
        ({"a": None, "b": "high", "c": {}, "": 1, "d": 2}, {"d": 2.0}, 4),
        ([{"value": 1}, {"name": "a"}, 7, {"name": "d", "value": 2}], {"d": 2.0}, 3),
        ({"a": 10**400}, {}, 1),
        (None, {}, 0),
        ("none", {}, 0),
    ],
    ids=_short,
)
def test_measurements_are_read_from_maps_and_lists_and_what_is_no_number_is_told(
    folder: Path, measurements: Any, expected: dict[str, float], n_left_out: int
) -> None:
    contents = _read(folder, _feature(measurements=measurements))
    assert contents.annotations[0].measurements == expected
    assert [repair.reason for repair in contents.repaired] == [
        f"{n_left_out} measurements without a name or a number were left out"
    ] * (n_left_out > 0)


@pytest.mark.parametrize("text", [b'"NaN"', b"NaN"])
def test_a_measurement_that_is_not_a_number_is_kept_as_such(folder: Path, text: bytes) -> None:
    document = json.dumps(_feature(measurements={"a": 7})).encode().replace(b"7", text)
    assert math.isnan(_only(folder, document).measurements["a"])


@pytest.mark.parametrize(
    ("geometry", "wkt", "note"),
    [
        (_polygon([[0, 0, 9], [4, 0, 9], [4, 4, 9], [0, 0, 9]]), "POLYGON ((0 0, 4 0, 4 4, 0 0))", ""),
        (_polygon([[0, 0, 9], [4, 0], [4, 4, 1, 2], [0, 0]]), "POLYGON ((0 0, 4 0, 4 4, 0 0))", ""),
        (_polygon([["0", "0"], ["4", 0], [4, 4], [0, 0]]), "POLYGON ((0 0, 4 0, 4 4, 0 0))", ""),
        (_polygon([[0, 0], [4, 0], [4, 4]]), "POLYGON ((0 0, 4 0, 4 4, 0 0))", "was open was closed"),
        (
            _polygon([[0, 0], [4, 0], ["NaN", 1], [None, 1], [4, 4], [0, 0]]),
            "POLYGON ((0 0, 4 0, 4 4, 0 0))",
            "2 points",
        ),
        (_polygon([[0, 0], [4, 0], [4, 4], [0, 0]], [[1, 0]]), "POLYGON ((0 0, 4 0, 4 4, 0 0))", "fewer than three"),
        (
            _polygon(BOW_TIE),
            "MULTIPOLYGON (((0 0, 5 5, 0 10, 0 0)), ((5 5, 10 10, 10 0, 5 5)))",
            "Self-intersection[5 5]",
        ),
        (
            _polygon(RING) | {"isEllipse": True, "plane": {"c": -1, "z": 3, "t": 0}},
            "POLYGON ((0 0, 20 0, 20 20, 0 20, 0 0))",
            "",
        ),
        (
            {"type": "MultiPolygon", "coordinates": [[RING], [[[1, 1]]], []]},
            "MULTIPOLYGON (((0 0, 20 0, 20 20, 0 20, 0 0)))",
            "2 parts",
        ),
        (_MIXED, "POLYGON ((0 0, 20 0, 20 20, 0 20, 0 0))", "highest dimension"),
        (
            {"type": "GeometryCollection", "geometries": [{"type": "Point", "coordinates": [1, 2]}] * 2},
            "MULTIPOINT ((1 2), (1 2))",
            "highest dimension",
        ),
        (
            {"type": "GeometryCollection", "geometries": [_MIXED, _MIXED]},
            "POLYGON ((0 0, 20 0, 20 20, 0 20, 0 0))",
            "highest",
        ),
        (
            {"type": "MultiLineString", "coordinates": [[[0, 0], [1, 1]], [[5, 5], [5, 5]]]},
            "LINESTRING (0 0, 1 1)",
            "Too few points",
        ),
        ({"type": "LineString", "coordinates": [[0, 0], [1, 1]]}, "LINESTRING (0 0, 1 1)", ""),
        ({"type": "MultiPoint", "coordinates": [[0, 0], [1, 1]]}, "MULTIPOINT ((0 0), (1 1))", ""),
    ],
    ids=_short,
)
def test_shapes_are_read_leniently_and_what_was_changed_is_told(
    folder: Path, geometry: Any, wkt: str, note: str
) -> None:
    for document in (_feature(geometry), geometry):
        contents = _read(folder, [_feature(), document])
        found, wanted = contents.annotations[1].geometry, shapely.from_wkt(wkt)
        assert (found.geom_type, found.normalize()) == (wanted.geom_type, wanted.normalize())
        assert [repair.index for repair in contents.repaired] == [1] * bool(note)
        assert all(note in repair.reason for repair in contents.repaired)


@pytest.mark.parametrize(
    ("feature", "reason"),
    [
        (None, "neither a feature nor a geometry (its type is 'NoneType')"),
        (7, "neither a feature nor a geometry (its type is 'int')"),
        ({"type": "Polyline"}, "neither a feature nor a geometry (its type is 'Polyline')"),
        (_feature() | {"geometry": None}, "has no geometry"),
        ({"type": "Feature"}, "has no geometry"),
        (_feature([1]), "has no geometry"),
        (_feature({"type": "Circle"}), "has a geometry of unknown type 'Circle'"),
        (_feature({"type": ["Point"]}), "has a geometry of unknown type ['Point']"),
        (_feature({"type": "Polygon"}), "its Polygon has no coordinates"),
        (_feature({"type": "Polygon", "coordinates": 7}), "its Polygon has no coordinates"),
        (_feature({"type": "Polygon", "coordinates": []}), "its Polygon has too few points"),
        (_feature({"type": "Polygon", "coordinates": [7]}), "its coordinates are not nested as its type asks"),
        (_feature({"type": "Polygon", "coordinates": RING}), "its coordinates are not nested as its type asks"),
        (_feature({"type": "MultiPolygon", "coordinates": [RING]}), "its coordinates are not nested as its type asks"),
        (_feature({"type": "MultiPolygon", "coordinates": [[], 7]}), "its MultiPolygon has too few points"),
        (_feature({"type": "LineString", "coordinates": [[1, 1]]}), "its LineString has too few points"),
        (_feature({"type": "Point", "coordinates": []}), "its coordinates are not nested as its type asks"),
        (_feature({"type": "Point", "coordinates": [1]}), "its coordinates are not nested as its type asks"),
        (_feature({"type": "Point", "coordinates": {"x": 1}}), "its Point has no coordinates"),
        (_feature({"type": "Point", "coordinates": ["left", "top"]}), "a point is not two numbers"),
        (_feature({"type": "Point", "coordinates": [10**400, 1]}), "a point is not two numbers"),
        (_feature({"type": "Point", "coordinates": [1e300, 1]}), "farther than any slide reaches"),
        (_feature({"type": "Point", "coordinates": [math.inf, 1]}), "1 points that are not finite were left out"),
        (_feature({"type": "GeometryCollection"}), "its GeometryCollection is empty"),
        (_feature({"type": "GeometryCollection", "geometries": [7]}), "has no geometry"),
        (
            _feature(_polygon([[0, 0], [5, 5], [0, 0], [5, 5], [0, 0]])),
            "not valid (Self-intersection[5 5])",
        ),
        (_feature({"type": "LineString", "coordinates": [[1, 1], [1, 1]]}), "not valid (Too few points"),
        (_feature() | {"properties": [1]}, "its properties are no object but [1]"),
        (_feature(classification=7), "its classification is neither text nor an object but 7"),
        (_feature(classification=["Tumor"]), "its classification is neither text nor an object but ['Tumor']"),
    ],
    ids=_short,
)
def test_one_bad_feature_is_rejected_with_its_reason_and_the_others_are_read(
    folder: Path, feature: Any, reason: str
) -> None:
    contents = _read(folder, _collection(_feature(name="before"), feature, _feature(name="after")))
    assert [found.name for found in contents.annotations] == ["before", "after"]
    assert [rejection.index for rejection in contents.rejected] == [1]
    assert reason in contents.rejected[0].reason


def test_children_stand_behind_their_parents_and_the_root_is_none(folder: Path) -> None:
    leaf = _feature(name="leaf")
    parent = _feature(
        name="parent", childObjects=[leaf, {"type": "Feature", "geometry": None, "properties": {"children": [leaf]}}]
    )
    root = {"type": "Feature", "properties": {"objectType": "root", "childObjects": [parent]}}
    contents = _read(folder, [root, _feature(name="end")])
    assert [found.name for found in contents.annotations] == ["parent", "leaf", "leaf", "end"]
    assert contents.rejected == (Rejection(2, "has no geometry"),)


def test_collections_may_be_nested_in_arrays_and_each_other(folder: Path) -> None:
    document = [[_feature(name="a")], _collection(_collection(_feature(name="b")), [[_polygon(RING)]]), []]
    assert [found.name for found in _read(folder, document).annotations] == ["a", "b", None]


def test_a_nucleus_is_kept_with_its_cell_moved_and_repaired_or_left_out_with_a_note(folder: Path) -> None:
    cells = [
        _feature(objectType="cell") | {"nucleusGeometry": nucleus}
        for nucleus in (_polygon(BOW_TIE), None, {"type": "Polygon"}, _polygon([[0, 0], [1, 1], [0, 0], [0, 0]]))
    ]
    contents = _read(folder, [*cells, _feature() | {"nucleusGeometry": _polygon(RING)}], origin=(100, 200))
    first, *others = contents.annotations
    assert (shapely.area(first.nucleus), shapely.bounds(first.nucleus).tolist()) == (50, [100, 200, 110, 210])
    assert [found.nucleus for found in others] == [None] * 4
    assert [(repair.index, repair.reason.partition(" (")[0]) for repair in contents.repaired] == [
        (0, "nucleus: not valid"),
        (2, "nucleus left out: its Polygon has no coordinates"),
        (3, "nucleus: not valid"),
    ]


# Whatever stands in a file

_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
    max_leaves=12,
)
_positions = st.lists(st.one_of(st.floats(0, 9), st.integers(), _json), max_size=3)
_coordinates = st.one_of(
    _positions,
    st.lists(_positions, max_size=5),
    st.lists(st.lists(_positions, min_size=3, max_size=5), max_size=2),
    _json,
)
_kinds = st.sampled_from(["Point", "MultiPoint", "LineString", "MultiLineString", "Polygon", "MultiPolygon"])
_geometries = st.recursive(
    st.fixed_dictionaries({"type": _kinds, "coordinates": _coordinates}),
    lambda inner: st.fixed_dictionaries(
        {"type": st.just("GeometryCollection"), "geometries": st.lists(st.one_of(inner, _json), max_size=3)}
    ),
    max_leaves=3,
)
_properties = st.fixed_dictionaries(
    {},
    optional={
        "objectType": st.one_of(st.sampled_from(["cell", "root", "tile"]), _json),
        "classification": st.one_of(
            _json,
            st.fixed_dictionaries(
                {}, optional=dict.fromkeys(["name", "names", "color", "colorRGB", "parentClass"], _json)
            ),
        ),
        "color": _json,
        "name": _json,
        "measurements": st.one_of(_json, st.lists(st.fixed_dictionaries({"name": _json, "value": _json}), max_size=2)),
        "metadata": _json,
        "childObjects": _json,
    },
)
_features = st.fixed_dictionaries(
    {"type": st.just("Feature"), "geometry": st.one_of(_geometries, _json)},
    optional={
        "id": _json,
        "properties": st.one_of(_properties, _json),
        "nucleusGeometry": st.one_of(_geometries, _json),
    },
)
_documents = st.one_of(
    _json,
    _geometries,
    st.lists(st.one_of(_features, _json), max_size=3),
    st.fixed_dictionaries(
        {"type": st.just("FeatureCollection"), "features": st.lists(_features, max_size=3)},
        optional={"wsi": st.one_of(_json, st.fixed_dictionaries({"version": st.just(1), "origin": _json}))},
    ),
)


@settings(max_examples=400, deadline=None)
@given(document=_documents)
def test_no_json_makes_reading_fail_but_with_an_annotation_error_nor_writing_what_was_read(
    folder: Path, document: Any
) -> None:
    try:
        contents = _read(folder, document)
    except AnnotationError:
        return
    path = folder / "fuzzed.geojson"
    report = write_geojson(path, contents.annotations, PLAIN)
    for version in VERSIONS:
        assert len(import_objects(path.read_bytes(), version)) == report.n_written
    assert len(read_geojson(path).annotations) == report.n_written


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=60), start=st.sampled_from([b"", b"\x1f\x8b\x08", b"PK\3\4", b"PK\5\6"]))
def test_no_bytes_make_reading_fail_but_with_an_annotation_error(folder: Path, data: bytes, start: bytes) -> None:
    with pytest.raises(AnnotationError):
        _read(folder, start + data + b"}")


# What others wrote

SHARED = {
    "dlup/qupath05.geojson": (3, 0),
    "histoqc/geojson_example.json": (2, 0),
    "histoqc/holed.geojson": (1, 0),
    "luna/docker/luna_tutorial/vmount/dsa_input/region_annotation_results.geojson": (1, 0),
    "luna/docker/luna_tutorial/vmount/dsa_input/test_object_classification.geojson": (1, 0),
    "luna/tests/testdata/pathology/dsa_annots/1006844.annotation.geojson": (15, 0),
    "luna/tests/testdata/pathology/dsa_annots/123.annotation.geojson": (2, 0),
    "luna/tests/testdata/pathology/region_annotation_results.geojson": (1, 0),
    "luna/tests/testdata/pathology/test_cell_detections.geojson": (2, 0),
    "luna/tests/testdata/pathology/test_object_classification.geojson": (1, 0),
    "luna/tests/testdata/pathology/test_object_classification_NAN_modified.geojson": (1, 0),
    "qupath/polygon.geojson": (1, 0),
    "wsidicom/qupath_geojson/qupath-brush.json": (1, 0),
    "wsidicom/qupath_geojson/qupath-ellipse.json": (1, 0),
    "wsidicom/qupath_geojson/qupath-line.json": (1, 0),
    "wsidicom/qupath_geojson/qupath-multipoint.json": (1, 0),
    "wsidicom/qupath_geojson/qupath-point.json": (1, 0),
    "wsidicom/qupath_geojson/qupath-polygon.json": (1, 0),
    "wsidicom/qupath_geojson/qupath-polyline.json": (1, 0),
    "wsidicom/qupath_geojson/qupath-rectangle.json": (1, 0),
    "wsidicom/qupath_geojson/qupath-wand.json": (1, 0),
    "wsidicom/qupath_geojson_advanced/qupath-polygon-cell-classified.json": (4, 0),
    "wsidicom/sectra/pathologycore-polyline.json": (0, 1),  # a list, but of objects of Sectra's own
    "xopat/geojson.all.json": (10, 3),  # three presets: features without geometry
    "xopat/geojson.presets.json": (0, 3),
    "xopat/qupath.all.json": (10, 0),
}


SUFFIXES = {".json", ".geojson", ".xml"}


@pytest.mark.shared
@pytest.mark.parametrize("name", SHARED)
def test_a_real_file_is_read_and_written_so_that_every_qupath_takes_it(tmp_path: Path, shared: Path, name: str) -> None:
    contents = read_geojson(shared / "annotations" / name)
    n_read, n_rejected = SHARED[name]
    assert (len(contents.annotations), len(contents.rejected)) == (n_read, n_rejected)
    assert contents.repaired == ()
    assert {rejection.reason for rejection in contents.rejected} <= {
        "has no geometry",
        "is neither a feature nor a geometry (its type is 'Polyline')",
    }
    path = tmp_path / "again.geojson"
    report = write_geojson(path, contents.annotations, PLAIN)
    assert (report.n_written, report.dropped) == (n_read, ())
    for version in VERSIONS:
        assert len(import_objects(path.read_bytes(), version)) == n_read
    for before, after in zip(contents.annotations, read_geojson(path).annotations, strict=True):
        assert shapely.hausdorff_distance(before.geometry, after.geometry) < 0.01
        assert (before.class_name, before.name, before.color) == (after.class_name, after.name, after.color)


@pytest.mark.shared
def test_every_other_real_json_file_is_refused_as_a_whole_with_a_reason(shared: Path) -> None:
    root = shared / "annotations"
    files = {str(path.relative_to(root)) for path in root.rglob("*.*") if path.suffix in SUFFIXES}
    assert set(SHARED) <= files
    for name in files - set(SHARED):
        with pytest.raises(AnnotationError, match=r"not GeoJSON|is XML"):
            read_geojson(root / name)


@pytest.mark.shared
def test_real_cells_come_with_class_colour_nucleus_and_all_measurements(shared: Path) -> None:
    root = shared / "annotations" / "luna/tests/testdata/pathology"
    new = read_geojson(root / "test_cell_detections.geojson").annotations[0]
    old = read_geojson(root / "test_object_classification.geojson").annotations[0]
    for cell in (new, old):
        assert (cell.object_type, cell.class_name, cell.color) == ("cell", "Other", (0, 128, 128))
        assert cell.geometry.covers(cell.nucleus)
        assert len(cell.measurements) == 54
    assert new.measurements["Nucleus: Area µm^2"] == pytest.approx(6.382274627685547)
    assert old.measurements["Nucleus: Area µm^2"] == pytest.approx(371.4884948730469)
