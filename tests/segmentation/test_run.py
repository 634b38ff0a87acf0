"""A model over a cohort: right areas at the right places, nothing done twice, nothing mixed up, and a kill costs one slide."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
import tifffile
from PIL import Image

import segmentation.run as module
from features.keys import slide_key
from features.lease import Lease
from features.outcome import NullObserver, Outcome, Report
from segmentation.polygons import PolygonOptions
from segmentation.results import FORMATS, ResultOptions
from segmentation.run import RunOptions, give_memory_back, segment_found
from segmentation.segmenter import Segmenter
from tests.segmentation.trained import picture, save_picture, tumour
from tests.wsi.test_readers import corrupt_one_tile, write_tiff
from wsi.discover import SlideSource, discover
from wsi.errors import DeviceError, RunMismatchError, StoreFormatError, UsageError
from wsi.geojson import read_geojson

SEEDS = (21, 22, 23)
OPTIONS = RunOptions(slide_mpp=(1.0, 1.0))


@pytest.fixture(scope="module")
def segmenter(trained_model: Path) -> Segmenter:
    return Segmenter.load(trained_model, device="cpu")


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    for seed in SEEDS:
        save_picture(tmp_path / "slides" / f"{seed}.png", seed)
    return tmp_path / "slides"


class Watching(NullObserver):
    """Notes what it is told, and calls ``at`` when tiles of a slide are done."""

    def __init__(self, at: Callable[[SlideSource], None] = lambda source: None) -> None:
        self.begun: list[tuple[str, int, int]] = []
        self.ended: list[tuple[str, str]] = []
        self._at = at

    def slide_started(self, source: SlideSource, tiles: int, first: int) -> None:
        self.begun.append((source.relpath, tiles, first))

    def tiles_done(self, source: SlideSource, count: int) -> None:
        self._at(source)

    def slide_finished(self, source: SlideSource, outcome: Outcome) -> None:
        self.ended.append((source.relpath, outcome.status))


def run(
    slides: Path, out: Path, segmenter: Segmenter, options: RunOptions = OPTIONS, observer: Watching | None = None
) -> Report:
    return segment_found(discover(slides, out=out), out, segmenter, options, observer)


def statuses(report: Report) -> dict[str, str]:
    return {outcome.slide: outcome.status for outcome in report.outcomes}


def codes(report: Report) -> dict[str, str]:
    return {outcome.slide: outcome.code for outcome in report.outcomes}


def areas_of(out: Path) -> list[dict[str, str]]:
    with (out / "areas.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def overlap(path: Path, seed: int) -> float:
    found = shapely.union_all([each.geometry for each in read_geojson(path).annotations])
    truth = tumour(seed)
    return float(found.intersection(truth).area / found.union(truth).area)


def test_every_slide_gets_its_files_its_area_and_its_place(cohort: Path, tmp_path: Path, segmenter: Segmenter) -> None:
    out = tmp_path / "out"
    watching = Watching()
    options = replace(OPTIONS, results=ResultOptions(formats=FORMATS))
    report = run(cohort, out, segmenter, options, watching)
    assert (report.exit_code, set(statuses(report).values())) == (0, {"done"})
    suffixes = {
        ".geojson",
        ".ome.tif",
        ".jpg",
        ".xml",
        ".ome.zarr",
        ".objects.csv",
        ".probability.zarr",
        ".result.json",
    }
    rows = {row["slide"]: row for row in areas_of(out)}
    assert set(rows) == {f"{seed}.png" for seed in SEEDS}
    for seed in SEEDS:
        assert {path.name.removeprefix(str(seed)) for path in out.glob(f"{seed}.*")} == suffixes
        assert overlap(out / f"{seed}.geojson", seed) > 0.85
        row = rows[f"{seed}.png"]
        assert (row["class"], row["count"]) == ("tumour", "1")
        assert float(row["area_mm2"]) == pytest.approx(90 * 70 / 1e6, rel=0.1)
        drawn = sum(each.geometry.area for each in read_geojson(out / f"{seed}.geojson").annotations)
        assert float(row["area_mm2"]) == pytest.approx(drawn / 1e6, rel=1e-3)
        assert 0.1 < float(row["tissue_share"]) < 0.2
        mask = tifffile.imread(out / f"{seed}.ome.tif", level=0)
        scale = mask.shape[1] / 256, mask.shape[0] / 192
        centre = np.argwhere(mask == 1).mean(0)[::-1] / scale
        np.testing.assert_allclose(centre, np.array(tumour(seed).centroid.coords[0]), atol=6)
    assert {name for name, _, _ in watching.begun} == set(rows)
    assert all(tiles > 50 and first == 0 for _, tiles, first in watching.begun)
    lines = [json.loads(line) for line in (out / "report.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["status"] for line in lines] == ["done"] * 3 + ["run"]
    assert all(line["areas"][0]["area_mm2"] > 0 for line in lines[:3])


def test_a_pixel_size_that_is_stated_makes_areas_square_millimetres(
    cohort: Path, tmp_path: Path, segmenter: Segmenter
) -> None:
    run(cohort, tmp_path / "a", segmenter)
    run(cohort, tmp_path / "b", segmenter, RunOptions(slide_mpp=(1.05, 1.05)))
    one, other = ([float(row["area_mm2"]) for row in areas_of(tmp_path / name)] for name in "ab")
    assert np.array(other) / np.array(one) == pytest.approx(np.full(3, 1.05**2), rel=0.06)


def test_the_second_run_does_nothing_and_says_the_same(cohort: Path, tmp_path: Path, segmenter: Segmenter) -> None:
    out = tmp_path / "out"
    run(cohort, out, segmenter)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".json", ".geojson", ".tif")}
    table = (out / "areas.csv").read_bytes()
    busy = segmenter.busy_s
    report = run(cohort, out, segmenter)
    assert set(statuses(report).values()) == {"skipped"}
    assert segmenter.busy_s == busy
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (out / "areas.csv").read_bytes() == table
    assert report.outcomes[0].facts["areas"][0]["name"] == "tumour"


def test_what_is_missing_or_of_another_file_is_done_again_and_nothing_else(
    cohort: Path, tmp_path: Path, segmenter: Segmenter
) -> None:
    out = tmp_path / "out"
    run(cohort, out, segmenter)
    (out / "21.geojson").unlink()
    save_picture(cohort / "22.png", 99)
    watching = Watching()
    report = run(cohort, out, segmenter, observer=watching)
    assert statuses(report) == {"21.png": "done", "22.png": "done", "23.png": "skipped"}
    begun = {name: first for name, _, first in watching.begun}
    assert begun["21.png"] > 0  # the first stage's map is still there
    assert begun["22.png"] == 0
    assert overlap(out / "22.geojson", 99) > 0.85
    assert overlap(out / "21.geojson", 21) > 0.85


def test_a_result_note_that_cannot_be_read_is_no_result(cohort: Path, tmp_path: Path, segmenter: Segmenter) -> None:
    out = tmp_path / "out"
    run(cohort, out, segmenter)
    for seed, text in zip(SEEDS, ("{", "[]", '{"files": []}'), strict=True):
        (out / f"{seed}.result.json").write_text(text, encoding="utf-8")
    assert set(statuses(run(cohort, out, segmenter)).values()) == {"done"}


def test_a_table_that_says_another_resolution_is_not_passed_over(tmp_path: Path, segmenter: Segmenter) -> None:
    save_picture(tmp_path / "slides" / "a.png", 21)
    table = tmp_path / "slides.csv"
    areas = []
    for mpp in ("1.0", "1.05"):
        table.write_text(f"slide,mpp\na.png,{mpp}\n", encoding="utf-8")
        found = discover(tmp_path / "slides", table=table)
        report = segment_found(found, tmp_path / "out", segmenter)
        assert statuses(report) == {"a.png": "done"}
        areas.append(float(areas_of(tmp_path / "out")[0]["area_mm2"]))
    assert areas[1] / areas[0] == pytest.approx(1.05**2, rel=0.06)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (RunOptions(ResultOptions(PolygonOptions(2.0)), (1.0, 1.0)), "other settings of outlines or files"),
        (RunOptions(ResultOptions(formats=("geojson",)), (1.0, 1.0)), "other settings of outlines or files"),
        (RunOptions(slide_mpp=(1.1, 1.1)), "another mpp"),
    ],
)
def test_other_options_in_the_same_folder_are_refused(
    other: RunOptions, said: str, cohort: Path, tmp_path: Path, segmenter: Segmenter
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    module._claim(out, segmenter, OPTIONS)
    with pytest.raises(RunMismatchError, match=f"holds results of {said}; choose another OUT"):
        run(cohort, out, segmenter, other)
    assert not list(out.glob("*.result.json"))


def test_another_model_in_the_same_folder_is_refused_and_so_is_a_note_that_cannot_be_read(
    cohort: Path, tmp_path: Path, segmenter: Segmenter
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    module._claim(out, segmenter, OPTIONS)
    other = Segmenter({**segmenter.about, "files": {"classifier.safetensors": "0"}}, None, None)
    with pytest.raises(RunMismatchError, match="holds results of another model"):
        run(cohort, out, other)
    for text in ("{", "[]"):
        (out / "run.json").write_text(text, encoding="utf-8")
        with pytest.raises(StoreFormatError, match=r"run\.json: cannot be read"):
            run(cohort, out, segmenter)


def test_a_damaged_slide_is_recorded_with_its_code_and_the_others_are_done(
    cohort: Path, tmp_path: Path, segmenter: Segmenter
) -> None:
    (cohort / "22.png").write_bytes((cohort / "22.png").read_bytes()[:3000])
    (cohort / "empty.svs").touch()
    (cohort / "notes.txt").write_text("not a slide", encoding="utf-8")
    report = run(cohort, tmp_path / "out", segmenter)
    expected = {"21.png": "done", "22.png": "failed", "23.png": "done", "empty.svs": "failed", "notes.txt": "ignored"}
    assert statuses(report) == expected
    assert report.exit_code == 3
    assert codes(report)["empty.svs"] == "EMPTY_FILE"
    assert codes(report)["22.png"] != "UNEXPECTED"
    assert {row["slide"] for row in areas_of(tmp_path / "out")} == {"21.png", "23.png"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["slide"]: line["code"] for line in lines if line["slide"] == "empty.svs"} == {
        "empty.svs": "EMPTY_FILE"
    }
    save_picture(cohort / "22.png", 22)
    assert statuses(run(cohort, tmp_path / "out", segmenter))["22.png"] == "done"


def test_a_slide_of_glass_has_no_areas_and_is_no_failure(tmp_path: Path, segmenter: Segmenter) -> None:
    (tmp_path / "slides").mkdir()
    Image.new("RGB", (256, 192), (244, 244, 244)).save(tmp_path / "slides" / "glass.png")
    report = run(tmp_path / "slides", tmp_path / "out", segmenter)
    assert statuses(report) == {"glass.png": "empty"}
    assert report.exit_code == 0
    assert statuses(run(tmp_path / "slides", tmp_path / "out", segmenter)) == {"glass.png": "skipped"}


def test_too_many_patches_that_cannot_be_read_fail_a_slide_every_time_until_more_are_allowed(
    tmp_path: Path, segmenter: Segmenter
) -> None:
    (tmp_path / "slides").mkdir()
    pixels = np.repeat(np.repeat(picture(21), 2, axis=0), 2, axis=1)
    corrupt_one_tile(write_tiff(tmp_path / "slides" / "a.tif", pixels, compression="jpeg"))
    out, options = tmp_path / "out", RunOptions(slide_mpp=(0.5, 0.5))
    for _ in range(2):
        assert codes(run(tmp_path / "slides", out, segmenter, options)) == {"a.tif": "TOO_MANY_BAD_TILES"}
    report = run(tmp_path / "slides", out, segmenter, replace(options, max_unreadable=1.0))
    assert statuses(report) == {"a.tif": "done"}
    assert report.outcomes[0].facts["unreadable"] > 0


def test_a_slide_that_another_process_works_on_is_busy_and_done_by_a_later_run(
    cohort: Path, tmp_path: Path, segmenter: Segmenter
) -> None:
    out = tmp_path / "out"
    with Lease(out / ".locks", slide_key("22.png")):
        report = run(cohort, out, segmenter)
    assert statuses(report) == {"21.png": "done", "22.png": "busy", "23.png": "done"}
    assert report.exit_code == 0
    assert statuses(run(cohort, out, segmenter))["22.png"] == "done"
    assert not list((out / ".locks").iterdir())


@pytest.mark.parametrize("fault", ["lost", "flipped", "no map"])
def test_a_damaged_map_of_an_earlier_run_is_made_again(
    fault: str, cohort: Path, tmp_path: Path, segmenter: Segmenter
) -> None:
    out = tmp_path / "out"
    run(cohort, out, segmenter)
    before = {path.name: path.read_bytes() for path in out.glob("*.geojson")}
    (heat,) = (out / "heat").glob("22-*.zarr")
    (chunk,) = (path for path in (heat / "probability" / "c").rglob("*") if path.is_file())
    if fault == "lost":
        chunk.unlink()
    elif fault == "flipped":
        data = bytearray(chunk.read_bytes())
        data[len(data) // 2] ^= 255
        chunk.write_bytes(data)
    else:
        (heat / "zarr.json").write_text("{}", encoding="utf-8")
    for path in out.glob("*.result.json"):
        path.unlink()
    watching = Watching()
    assert set(statuses(run(cohort, out, segmenter, observer=watching)).values()) == {"done"}
    assert [name for name, tiles, first in watching.begun if first < tiles] == ["22.png"]  # the others' maps are used
    assert {path.name: path.read_bytes() for path in out.glob("*.geojson")} == before


@pytest.mark.parametrize("error", [DeviceError("the device went away"), KeyboardInterrupt()])
def test_a_run_that_ends_early_holds_nothing_and_the_next_one_finishes(
    error: BaseException, cohort: Path, tmp_path: Path, segmenter: Segmenter
) -> None:
    def end(source: SlideSource) -> None:
        if source.relpath == "22.png":
            raise error

    out = tmp_path / "out"
    with pytest.raises(type(error)):
        run(cohort, out, segmenter, observer=Watching(end))
    assert not list((out / ".locks").iterdir())
    assert statuses(run(cohort, out, segmenter)) == {"21.png": "skipped", "22.png": "done", "23.png": "done"}


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.segmentation.test_run import OPTIONS, Watching, run
from segmentation.segmenter import Segmenter

def kill(source):
    if source.relpath == "22.png":
        os.kill(os.getpid(), signal.SIGKILL)

slides, out, model = map(Path, sys.argv[1:])
run(slides, out, Segmenter.load(model, device="cpu"), OPTIONS, Watching(kill))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_kill_costs_the_slide_at_work_and_the_same_call_completes_the_rest(
    cohort: Path, tmp_path: Path, trained_model: Path, segmenter: Segmenter
) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-c", KILLED, str(cohort), str(out), str(trained_model)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (out / "21.result.json").exists()
    assert not (out / "22.result.json").exists()
    assert list((out / ".locks").iterdir())
    assert statuses(run(cohort, out, segmenter)) == {"21.png": "skipped", "22.png": "done", "23.png": "done"}
    run(cohort, tmp_path / "whole", segmenter)
    assert (out / "areas.csv").read_bytes() == (tmp_path / "whole" / "areas.csv").read_bytes()
    for seed in SEEDS:
        assert (out / f"{seed}.geojson").read_bytes() == (tmp_path / "whole" / f"{seed}.geojson").read_bytes()


def test_slides_of_like_names_never_share_a_file(tmp_path: Path, segmenter: Segmenter) -> None:
    slides = tmp_path / "slides"
    names = {"a.png": 21, "a.jpg": 22, "sub/a.png": 23, "A.bmp": 24, "b.png": 25}
    for name, seed in names.items():
        save_picture(slides / name, seed)
    report = run(slides, tmp_path / "out", segmenter)
    assert statuses(report) == dict.fromkeys(names, "done")
    stems = {"a.png": "a.png", "a.jpg": "a.jpg", "sub/a.png": "sub/a", "A.bmp": "A.bmp", "b.png": "b"}
    for name, seed in names.items():
        assert overlap(tmp_path / "out" / f"{stems[name]}.geojson", seed) > 0.8
    assert sorted(row["slide"] for row in areas_of(tmp_path / "out")) == sorted(names)


@pytest.mark.parametrize(
    "relpaths",
    [
        ("a.svs", "a.tif"), ("a.svs", "a.tif", "a.svs.tif"), ("x/a.svs", "X/A.svs"), ("/one/a.svs", "../one/a.svs"),
        ("s3://bucket/one/a.svs", "s3://bucket/two/a.svs"), ("a", "a.svs"), ("a.b.svs", "a.c.svs"),
    ],
)  # fmt: skip
def test_names_differ_even_where_case_does_not_count_and_stay_below_the_folder(relpaths: tuple[str, ...]) -> None:
    names = module._names([SlideSource(name if "://" in name else Path(name), name) for name in relpaths])
    assert len({name.casefold() for name in names.values()}) == len(relpaths)
    for name in names.values():
        assert not name.startswith("/")
        assert ".." not in Path(name).parts


def test_a_slide_whose_name_became_ambiguous_counts_once(tmp_path: Path, segmenter: Segmenter) -> None:
    slides = tmp_path / "slides"
    save_picture(slides / "a.png", 21)
    run(slides, tmp_path / "out", segmenter)
    save_picture(slides / "a.bmp", 22)
    run(slides, tmp_path / "out", segmenter)
    assert sorted(row["slide"] for row in areas_of(tmp_path / "out")) == ["a.bmp", "a.png"]


def test_results_of_slides_that_are_gone_stay_in_the_table(cohort: Path, tmp_path: Path, segmenter: Segmenter) -> None:
    run(cohort, tmp_path / "out", segmenter)
    (cohort / "21.png").unlink()
    run(cohort, tmp_path / "out", segmenter)
    assert [row["slide"] for row in areas_of(tmp_path / "out")] == ["21.png", "22.png", "23.png"]


def test_results_below_the_folder_of_slides_are_no_slides(cohort: Path, segmenter: Segmenter) -> None:
    out = cohort / "results"
    run(cohort, out, segmenter)
    report = run(cohort, out, segmenter)
    assert statuses(report) == {"21.png": "skipped", "22.png": "skipped", "23.png": "skipped", "results": "ignored"}


def test_no_slides_at_all_are_refused(tmp_path: Path, segmenter: Segmenter) -> None:
    (tmp_path / "slides").mkdir()
    with pytest.raises(UsageError, match="no slides found"):
        run(tmp_path / "slides", tmp_path / "out", segmenter)
    assert not (tmp_path / "out").exists()


def test_giving_memory_back_does_no_harm() -> None:
    give_memory_back()
    assert np.ones(1 << 20).sum() == 1 << 20
