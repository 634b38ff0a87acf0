"""The stream gives what reading the whole file gives, however the file is laid out and cut into blocks."""

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from wsi import geojson_stream
from wsi.annotation import Annotation
from wsi.errors import AnnotationError
from wsi.geojson import Frame, read_geojson, write_geojson
from wsi.geojson_stream import GeoJsonStream

FRAME = Frame("slide.mrxs", (200_000, 100_000), (0.25, 0.25), (1_000, 2_000))
SQUARE = {"type": "Polygon", "coordinates": [[[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]]}
BOW_TIE = {"type": "Polygon", "coordinates": [[[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]]}


def _feature(geometry: Any, **properties: Any) -> dict[str, Any]:
    return {"type": "Feature", "geometry": geometry, "properties": properties}


FEATURES = [
    _feature(SQUARE, name='ä \\ " ] } , 1'),
    _feature(None),
    _feature(BOW_TIE, classification="Tumor"),
    _feature(SQUARE, childObjects=[_feature(SQUARE), _feature(None)]),
    7,
    _feature(SQUARE, measurements={"a": 1.5}),
]
WSI = {"version": 1, "slide": "s", "size": [100, 100], "mpp": [1, 1], "origin": [5, 6]}
DOCUMENTS = [
    {"type": "FeatureCollection", "wsi": WSI, "features": FEATURES},
    {"features": FEATURES, "type": "FeatureCollection", "wsi": WSI},
    {"type": "FeatureCollection", "other": [1, {"features": []}, -12.5e3], "features": FEATURES},
    FEATURES,
    {"type": "FeatureCollection", "features": []},
    [],
]


@given(
    document=st.sampled_from(DOCUMENTS),
    block=st.integers(1, 90),
    chunk=st.integers(1, 4),
    indent=st.sampled_from([None, 1]),
)
def test_a_stream_gives_what_the_whole_file_gives(
    tmp_path_factory: pytest.TempPathFactory, document: Any, block: int, chunk: int, indent: int | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "stream.json.gz"
    path.write_bytes(gzip.compress(json.dumps(document, indent=indent, ensure_ascii=False).encode("utf-8")))
    whole = read_geojson(path, (3, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geojson_stream, "_BLOCK", block)
        patch.setattr(geojson_stream, "_CHUNK", chunk)
        stream = GeoJsonStream(path, (3, 4))
        assert list(stream) == list(stream) == list(whole.annotations)
    assert (stream.frame, stream.origin) == (whole.frame, whole.origin)
    assert (tuple(stream.rejected), tuple(stream.repaired)) == (whole.rejected, whole.repaired)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'[{"type": "Feature"', "not JSON"),
        (b"[1, 2", "ends early"),
        (b"", "ends early"),
        (b"<xml/>", "no collection or array"),
        (b'{"features": [1 2]}', "'2' where ','"),
        (b"\x1f\x8b\x08\x00garbage", "cannot be read"),
        (b'["\xff"]', "cannot be read"),
        (b'{"wsi": {"version": 99, "origin": [0, 0]}}', "version 99"),
        (b"[" + b"[" * 100_000, "not JSON"),
    ],
)
def test_a_file_that_breaks_off_or_is_none_is_named_with_a_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "odd.geojson"
    path.write_bytes(data)
    with pytest.raises(AnnotationError, match=f"odd.geojson: .*{reason}"):
        list(GeoJsonStream(path))
    with pytest.raises(AnnotationError, match="there is no such file"):
        GeoJsonStream(tmp_path / "no.geojson")


def test_memory_does_not_grow_with_the_number_of_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geojson_stream, "_CHUNK", 128)
    monkeypatch.setattr(geojson_stream, "_BLOCK", 1 << 16)
    square = shapely.segmentize(shapely.box(0, 0, 10, 10), 1.0)
    peaks = []
    for n in (500, 2_000):
        made = (Annotation(shapely.transform(square, lambda xy, i=i: xy + 20 * i), "Tumor") for i in range(n))
        write_geojson(tmp_path / "many.geojson.gz", made, FRAME)
        tracemalloc.start()
        assert sum(1 for _ in GeoJsonStream(tmp_path / "many.geojson.gz")) == n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
