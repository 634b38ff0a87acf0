"""Evaluation of folders: results find the truth, and the numbers are those of the shapes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import shapely
from click.testing import CliRunner
from PIL import Image

from cli.main import wsi
from segmentation.evaluate import EvaluateOptions, evaluate, evaluate_slide
from segmentation.place import MapPlace
from segmentation.polygons import PolygonOptions
from segmentation.results import ResultOptions, outlines_of, write_results
from segmentation.segmenter import Found
from tests.segmentation.label_maps import nasty_map
from wsi.annotation import Annotation
from wsi.asap import write_asap
from wsi.errors import UsageError
from wsi.geojson import Frame, write_geojson
from wsi.slide import Slide

FRAME = Frame("case-1.svs", (4000, 2000), (0.5, 0.5), (100, 0))
EXACT = EvaluateOptions(mpp=0.5)


def _box(x: float, y: float, size: float, name: str | None = "Tumor") -> Annotation:
    return Annotation(shapely.box(x, y, x + size, y + size), name)


def test_a_slide_is_compared_class_by_class_in_its_own_pixels() -> None:
    truth = [_box(400, 400, 400), _box(1000, 1000, 100, "Stroma"), _box(2000, 400, 200)]
    found = [_box(600, 400, 400), _box(2000, 400, 200)]
    stroma, tumor = evaluate_slide(found, truth, FRAME, EXACT)
    shared, area = 200 * 400 + 200**2, 400**2 + 200**2
    assert (tumor.class_name, tumor.n_found, tumor.n_true) == ("Tumor", 2, 2)
    assert tumor.dice == tumor.precision == tumor.recall == shared / area
    assert tumor.hd95_um == 100
    assert tumor.object_f1 == 1  # half of the first is covered
    assert (stroma.dice, stroma.recall, stroma.object_f1) == (0, 0, 0)
    assert np.isnan([stroma.precision, stroma.hd95_um]).all()


def test_what_is_to_be_ignored_counts_neither_as_area_nor_as_object() -> None:
    truth = [_box(400, 400, 400), _box(1000, 0, 1000, "Ignore*")]
    found = [_box(400, 400, 400), _box(1200, 200, 300)]
    (tumor,) = evaluate_slide(found, truth, FRAME, EXACT)
    assert (tumor.dice, tumor.object_f1, tumor.n_found) == (1, 1, 1)


def test_what_lies_outside_of_regions_counts_for_nothing_and_a_region_is_no_class() -> None:
    frame = Frame("a", (200, 100), (1.0, 1.0))
    truth = [Annotation(shapely.box(10, 10, 50, 50), "gland"), Annotation(shapely.box(0, 0, 100, 100), "Region*")]
    found = [Annotation(shapely.box(10, 10, 50, 50), "gland"), Annotation(shapely.box(120, 10, 160, 50), "gland")]
    (score,) = evaluate_slide(found, truth, frame)
    assert (score.class_name, score.dice, score.object_f1, score.n_found) == ("gland", 1.0, 1.0, 1)
    (score,) = evaluate_slide(found, truth[:1], frame)
    assert score.dice == pytest.approx(2 / 3)


def test_resolution_changes_numbers_little() -> None:
    labels = nasty_map(3) > 0
    shapes = [
        Annotation(shapely.box(x * 40, y * 25, x * 40 + 40, y * 25 + 25), "Tumor")
        for y, x in zip(*np.nonzero(labels), strict=True)
    ]
    moved = [Annotation(shapely.transform(s.geometry, lambda xy: xy + 6), "Tumor") for s in shapes]
    fine, coarse = (
        evaluate_slide(moved, shapes, FRAME, EvaluateOptions(mpp=mpp, objects=False))[0].dice for mpp in (0.5, 2.0)
    )
    assert 0.5 < fine < 0.95
    assert coarse == pytest.approx(fine, abs=0.03)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Results of three slides, and their truth as GeoJSON, ASAP XML and a mask."""
    out, truth = tmp_path / "out", tmp_path / "truth"
    truth.mkdir()
    for number in (1, 2, 3):
        frame = Frame(f"case-{number}.svs", (4000, 2000), (0.5, 0.5), (100, 0))
        write_geojson(out / f"case-{number}.geojson.gz", [_box(400, 400, 100 * number)], frame)
    write_geojson(truth / "case-1.geojson", [_box(400, 400, 100)], FRAME)
    write_asap(truth / "case-2.xml", [_box(400, 400, 400)])
    mask = np.zeros((200, 400), np.uint8)
    mask[40:70, 40:70] = 255
    Image.fromarray(mask).save(truth / "case-3_mask.png")
    return out, truth


def test_results_find_their_truth_whatever_kind_it_is(folders: tuple[Path, Path]) -> None:
    out, truth = folders
    one, two, three = evaluate(out, truth, EvaluateOptions(mpp=0.5, classes=("Tumor",))).scores
    assert (one.slide, one.dice, one.object_f1) == ("case-1.svs", 1, 1)  # the origin is added on both sides
    assert two.dice == pytest.approx(2 * 200**2 / (200**2 + 400**2))
    assert three.dice == 1  # 30 mask pixels are 300 of the slide's, and the only label is the only class


def test_lines_say_what_does_not_fit(folders: tuple[Path, Path]) -> None:
    out, truth = folders
    (truth / "case-1.geojson").unlink()
    (truth / "case-9.json").write_text("[]")
    notes = evaluate(out, truth, EvaluateOptions(classes=("tumor",))).notes
    assert "case-1: no annotations" in notes
    assert "case-2: case-2.xml: 1 shape of the class 'Tumor', which is none of tumor; did you mean 'tumor'?" in notes
    assert any(note.startswith("case-9.json: belongs to no slide") for note in notes)


def test_folders_without_results_or_truth_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out, truth = folders
    with pytest.raises(UsageError, match="holds no results"):
        evaluate(truth.parent / "empty", truth)
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="no annotations of the slides"):
        evaluate(out, tmp_path / "none")


def test_the_command_prints_intervals_and_writes_both_tables(folders: tuple[Path, Path]) -> None:
    out, truth = folders
    (truth / "case-3_mask.png").unlink()
    result = CliRunner().invoke(
        wsi,
        ["segment", "evaluate", str(out), "--truth", str(truth), "--classes", "Tumor", "--mpp", "0.5"],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    assert "Tumor, 2 slides" in result.output
    assert "case-3: no annotations" in result.output
    rows = list(csv.DictReader((out / "evaluation" / "scores.csv").read_text().splitlines()))
    assert [(row["slide"], row["class_name"]) for row in rows] == [("case-1.svs", "Tumor"), ("case-2.svs", "Tumor")]
    summary = json.loads((out / "evaluation" / "summary.json").read_text())
    dice = summary["classes"]["Tumor"]["dice"]
    assert dice["value"] == pytest.approx((1 + 0.4) / 2)
    assert (dice["low"], dice["high"], dice["n"]) == (pytest.approx(0.4), 1, 2)
    assert f"{dice['value']:.3f}" in result.output


def test_probabilities_beside_results_are_judged_where_nothing_is_ignored(tmp_path: Path) -> None:
    probabilities = np.empty((2, 10, 20), np.float32)
    probabilities[1] = 0.25
    probabilities[1, :, :10] = 0.75
    probabilities[0] = 1 - probabilities[1]
    with Slide.from_array(np.full((100, 200, 3), 240, np.uint8), mpp=1.0, name="a.png") as slide:
        found = Found(probabilities, MapPlace((10.0, 10.0), (1.0, 1.0)), {1: "tumour"})
        outlines = outlines_of(found, PolygonOptions(tolerance_um=0))
        options = ResultOptions(formats=("geojson", "probability"))
        write_results(tmp_path / "out" / "a", slide, found, outlines, options)
        # Of what is said with 0.75 nine tenths are so, of the rest a fifth of the half that counts.
        drawn = [
            Annotation(shapely.box(0, 0, 90, 100), "tumour"),
            Annotation(shapely.box(100, 0, 110, 100), "tumour"),
            Annotation(shapely.box(150, 0, 200, 100), "Ignore*"),
        ]
        write_geojson(tmp_path / "truth" / "a.geojson", drawn, slide.frame)
    evaluation = evaluate(tmp_path / "out", tmp_path / "truth", EvaluateOptions(objects=False))
    (score,) = evaluation.scores
    assert score.ece == pytest.approx((100 * (0.9 - 0.75) + 50 * (0.25 - 0.2)) / 150, abs=1e-6)
    squares = 90 * 0.25**2 + 10 * 0.75**2 + 10 * 0.75**2 + 40 * 0.25**2
    assert score.brier == pytest.approx(squares / 150, abs=1e-6)
    assert evaluation.summary()["tumour"]["ece"].n == 1
    plain = evaluate(tmp_path / "out" / "a.geojson", tmp_path / "truth", EvaluateOptions(objects=False)).scores
    assert plain[0].ece == score.ece


def test_results_of_slides_of_one_name_are_not_taken_for_each_other(folders: tuple[Path, Path]) -> None:
    out, truth = folders
    options = EvaluateOptions(mpp=0.5, classes=("Tumor",))
    before = evaluate(out, truth, options)
    (out / "other").mkdir()
    (out / "other" / "case-1.geojson.gz").write_bytes((out / "case-2.geojson.gz").read_bytes())
    evaluation = evaluate(out, truth, options)
    assert evaluation.scores == before.scores
    (line,) = set(evaluation.notes) - set(before.notes)
    assert "other/case-1.geojson.gz: left out" in line.replace("\\", "/")
    assert "judge them one by one" in line
