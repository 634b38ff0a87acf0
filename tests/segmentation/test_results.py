"""Results: every format says the same areas at the same places, in the slide's own frame."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import shapely
import tifffile
from PIL import Image

from segmentation import results as module
from segmentation.dense import CONTOUR
from segmentation.heat import ProbabilityMap
from segmentation.instances import InstanceOptions
from segmentation.place import MapPlace
from segmentation.polygons import PolygonOptions
from segmentation.results import FORMATS, ResultOptions, outlines_of, tissue_area_mm2, write_results
from segmentation.segmenter import Found
from wsi.annotation import Annotation
from wsi.annotations import read_annotations
from wsi.errors import UsageError
from wsi.geojson import Frame, read_geojson
from wsi.grid import Box
from wsi.readers import ArrayReader
from wsi.slide import Slide

SIZE = (320, 240)
TRUTH = shapely.box(80, 40, 240, 160)  # a whole number of the map's pixels


def slide(bounds: Box | None = None) -> Slide:
    pixels = np.full((SIZE[1], SIZE[0], 3), 240, np.uint8)
    reader = ArrayReader([pixels])
    reader.bounds = bounds
    opened = Slide.from_array(pixels, mpp=0.5)
    opened.reader = reader
    return opened


def found() -> Found:
    labels = np.zeros((24, 32), np.uint8)
    labels[4:16, 8:24] = 1
    probabilities = np.where(labels, [[[0.1]], [[0.9]]], [[[0.8]], [[0.2]]]).astype(np.float32)
    return Found(probabilities, MapPlace((10.0, 10.0), (0.5, 0.5)), {1: "tumour"})


def written(folder: Path, opened: Slide, options: ResultOptions | None = None) -> module.Results:
    options = options or ResultOptions(PolygonOptions(tolerance_um=0), FORMATS)
    outlines = outlines_of(found(), options.polygons)
    return write_results(folder / "sub" / "a.b", opened, found(), outlines, options, tissue_mm2=0.016)


def test_outlines_lie_where_the_map_lies_and_are_measured() -> None:
    (outline,) = outlines_of(found(), PolygonOptions(tolerance_um=0))
    assert outline.geometry.equals(TRUTH)
    assert outline.class_name == "tumour"
    assert any(value == pytest.approx(0.9, abs=1e-6) for value in outline.measurements.values())
    assert any(value == pytest.approx(TRUTH.area / 4) for value in outline.measurements.values())


def test_every_format_says_the_same(tmp_path: Path) -> None:
    got = written(tmp_path, slide())
    folder = tmp_path / "sub"
    assert set(got.files) == {path.name for path in folder.iterdir()}
    assert all(name.startswith("a.b.") for name in got.files)
    assert read_geojson(folder / "a.b.geojson").annotations[0].geometry.equals(TRUTH)
    assert read_annotations(folder / "a.b.xml").annotations[0].geometry.equals(TRUTH)
    mask = tifffile.imread(folder / "a.b.ome.tif", level=0)
    assert np.argwhere(mask == 1).min(0).tolist() == [4, 8]
    assert np.count_nonzero(mask) == 12 * 16
    with (folder / "a.b.objects.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["class"], float(row["x"]), float(row["y"])) == ("tumour", 160, 100)
    picture = np.asarray(Image.open(folder / "a.b.jpg")).astype(int)
    assert picture.shape == (240, 320, 3)
    veiled = np.abs(picture - 240).sum(-1) > 15
    assert veiled[60:140, 100:220].all()
    assert not veiled[:30].any()
    (area,) = got.areas
    assert (area.name, area.count, got.n_objects) == ("tumour", 1, 1)
    assert area.area_mm2 == pytest.approx(TRUTH.area * 0.25 / 1e6)
    assert area.tissue_share == pytest.approx(area.area_mm2 / 0.016)


def test_a_slide_with_a_border_of_nothing_is_written_in_the_frame_that_viewers_show(tmp_path: Path) -> None:
    written(tmp_path, slide(Box(30, 20, 260, 200)))
    contents = read_geojson(tmp_path / "sub" / "a.b.geojson")
    assert contents.origin == (30, 20)
    assert contents.annotations[0].geometry.equals(TRUTH)  # read back in the full frame
    feature = json.loads((tmp_path / "sub" / "a.b.geojson").read_text(encoding="utf-8"))["features"][0]
    assert np.array(feature["geometry"]["coordinates"][0]).min(0).tolist() == [80 - 30, 40 - 20]


def test_results_replace_those_of_an_earlier_run_in_every_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "_MANY", 1)
        assert "a.b.geojson.gz" in written(tmp_path, slide()).files
    got = written(tmp_path, slide())
    assert {path.name for path in (tmp_path / "sub").iterdir()} == set(got.files)
    assert "a.b.geojson" in got.files


def test_probabilities_come_back_as_they_were_and_where_they_lay(tmp_path: Path) -> None:
    written(tmp_path, slide())
    heat = ProbabilityMap.open(tmp_path / "sub" / "a.b.probability.zarr")
    assert heat.classes == ("background", "tumour")
    assert heat.place == found().place
    np.testing.assert_allclose(np.asarray(heat.array[:]), found().probabilities, atol=1e-3)


def test_the_probability_of_a_rim_is_that_of_the_object_it_is_of(tmp_path: Path) -> None:
    # Background, benign, malignant, rim; one pixel each: inside, on a rim, beside.
    values = np.array([[0.1, 0.8, 0.05, 0.05], [0.1, 0.1, 0.2, 0.6], [0.9, 0.05, 0.03, 0.02]], np.float32)
    probabilities = np.repeat(values.T[:, None, :], 300, axis=1)
    names = {1: "benign", 2: "malignant", 3: CONTOUR}
    rimmed = Found(probabilities, MapPlace.covering(slide().frame, (300, 3)), names, InstanceOptions())
    write_results(tmp_path / "a", slide(), rimmed, [], ResultOptions(formats=("probability",)))
    heat = ProbabilityMap.open(tmp_path / "a.probability.zarr")
    assert heat.classes == ("background", "benign", "malignant")
    expected = [[0.1, 0.1, 0.9], [0.85, 0.1, 0.07], [0.05, 0.8, 0.03]]
    np.testing.assert_allclose(np.asarray(heat.array[:, 299]), expected, atol=1e-3)
    assert rimmed.labels[298:300].tolist() == [[1, 2, 0]] * 2


def test_only_what_is_asked_for_is_written(tmp_path: Path) -> None:
    for name in FORMATS:
        got = written(tmp_path / name, slide(), ResultOptions(formats=(name,)))
        assert [path.name for path in (tmp_path / name / "sub").iterdir()] == list(got.files)
        assert len(got.files) == 1


def test_nothing_found_has_no_areas_and_files_all_the_same(tmp_path: Path) -> None:
    empty = Found(np.stack([np.ones((24, 32)), np.zeros((24, 32))]), found().place, {1: "tumour"})
    got = write_results(tmp_path / "a", slide(), empty, [], ResultOptions(formats=FORMATS), tissue_mm2=0.0)
    assert (got.areas, got.n_objects) == ((), 0)
    assert read_geojson(tmp_path / "a.geojson").annotations == ()
    assert {path.name for path in tmp_path.iterdir()} == set(got.files)


@pytest.mark.parametrize("formats", [(), ("geojson", "svg")])
def test_formats_that_are_none_are_refused(formats: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="formats are of geojson, mask"):
        ResultOptions(formats=formats)


def test_tissue_is_measured_without_its_holes_and_with_pixels_that_are_not_square() -> None:
    ring = shapely.Polygon([(0, 0), (1000, 0), (1000, 1000), (0, 1000)], [[(0, 0), (500, 0), (500, 500), (0, 500)]])
    frame = Frame(slide="a", origin=(0, 0), mpp=(0.5, 2.0), size=(2000, 2000))
    pieces = [Annotation(ring, "Tissue"), Annotation(shapely.box(1000, 1000, 1100, 1100), "Tissue")]
    assert tissue_area_mm2(pieces, frame) == pytest.approx((750_000 + 10_000) / 1e6)
