"""The cohort runner: everything that can be done is done, everything else is written down, nothing is done twice."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import shapely
import torch

import features.writing
from features import ExtractOptions, FeatureStore, PrepareOptions, encode_slide, extract_slides, load_encoder
from features.cohort import extract_cohort
from features.encoder import EncoderRequest
from features.extract import prefetch
from features.keys import slide_key
from features.lease import Lease
from features.plan import plan_cohort
from features.prepare import prepare_slide
from features.runner import EncoderRunner
from tests.wsi.test_readers import corrupt_one_tile, write_tiff
from wsi import Annotation, Slide, Tiling, read_geojson, write_geojson
from wsi.discover import SlideSource, discover
from wsi.errors import DeviceError, DiskFullError, UsageError
from wsi.geojson import Frame
from wsi.readers._tiles import Coding

ROOT = Path(__file__).parents[2]
ENCODER = "colour-stats"
OPTIONS = ExtractOptions(prepare=PrepareOptions(tiling=Tiling(mpp=1.0, tile_px=64, min_tissue=0.2)), batch_size=16)


def stained(width: Any = 1600, height: Any = 1200, pieces: Any = 1, seed: Any = 0) -> Any:
    """Pink ellipses with purple dots on glass."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 244, np.uint8)
    for piece in range(pieces):
        centre = (round(width * (piece + 0.5) / pieces), height // 2)
        axes = (round(width * 0.4 / pieces), round(height * 0.35))
        cv2.ellipse(image, centre, axes, 0, 0, 360, (222, 150, 190), -1)
    mask = image[..., 1] == 150
    for y, x in rng.integers(0, (height, width), (width * height // 400, 2)):
        if mask[y, x]:
            cv2.circle(image, (int(x), int(y)), 3, (110, 60, 140), -1)
    noise = rng.integers(-3, 4, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def slide_file(path: Any, **options: Any) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    write = {key: options.pop(key) for key in ("mpp", "compression", "levels") if key in options}
    return write_tiff(path, stained(**options), **({"mpp": 1.0} | write))


@pytest.fixture
def cohort(tmp_path: Path) -> Any:
    """Three slides in two folders, two of one name, a slide of glass, and four files that are no slides."""
    folder = tmp_path / "slides"
    slide_file(folder / "a.tif")
    slide_file(folder / "x" / "b.tif", seed=1, pieces=2)
    slide_file(folder / "y" / "b.tif", seed=2)
    glass = np.random.default_rng(0).integers(240, 247, (800, 800, 3)).astype(np.uint8)
    write_tiff(folder / "glass.tif", glass, mpp=1.0)
    (folder / "broken.svs").write_text("<html>")
    (folder / "empty.svs").touch()
    (folder / "cut.tif").write_bytes((folder / "a.tif").read_bytes()[:-20_000])
    write_tiff(folder / "silent.tif", stained(), mpp=1e7)
    (folder / "notes.txt").write_text("notes")
    return folder


def codes(report: Any) -> Any:
    return {outcome.slide: (outcome.status, outcome.code) for outcome in report.outcomes}


def everything(root: Any) -> Any:
    """All arrays of a store by name, for comparing two stores."""
    found: dict[tuple[str, ...], Any] = {}
    for slide in FeatureStore(root):
        found[slide.key, "coords"] = slide.grid.xy
        found[slide.key, "tissue"] = slide.grid.tissue
        for encoder in slide.encoders:
            found[slide.key, encoder] = slide.features(encoder).numpy()
            found[slide.key, encoder, "status"] = slide.features(encoder).status
    return found


def assert_equal_stores(one: Any, other: Any) -> None:
    a, b = everything(one), everything(other)
    assert a.keys() == b.keys()
    for name, array in a.items():
        np.testing.assert_array_equal(array, b[name], err_msg=str(name))


def test_a_folder_ends_by_itself_with_every_slide_accounted_for(cohort: Any, tmp_path: Path) -> None:
    report = extract_slides(cohort, tmp_path / "out", ENCODER, OPTIONS)
    assert codes(report) == {
        "a.tif": ("done", "OK"),
        "x/b.tif": ("done", "OK"),
        "y/b.tif": ("done", "OK"),
        "glass.tif": ("empty", "EMPTY"),
        "broken.svs": ("failed", "NOT_A_SLIDE"),
        "empty.svs": ("failed", "EMPTY_FILE"),
        "cut.tif": ("failed", "TRUNCATED"),
        "silent.tif": ("failed", "MPP_IMPLAUSIBLE"),
        "notes.txt": ("ignored", "IGNORED"),
    }
    assert report.exit_code == 3
    *lines, run = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    assert (run["status"], run["slide"]) == ("run", "")
    assert {line["slide"]: (line["status"], line["code"]) for line in lines} == codes(report)
    for line in lines:
        if line["status"] == "failed":
            assert str(cohort / line["slide"]) in line["message"]
            assert "\n" not in line["message"]
    store = FeatureStore(tmp_path / "out")
    assert len(store) == 4
    assert store.verify(deep=True) == []
    assert store.slide("glass").features(ENCODER).numpy().shape == (0, 9)
    assert list((tmp_path / "out" / ".locks").iterdir()) == []
    assert list((tmp_path / "out" / ".staging").iterdir()) == []


def test_running_again_encodes_nothing_and_opens_no_slide(
    cohort: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract_slides(cohort, tmp_path / "out", ENCODER, OPTIONS)
    before = everything(tmp_path / "out")
    opened = []
    really = Slide.open

    def noting(*args: Any, **options: Any) -> Slide:
        opened.append(Path(args[0]).name)
        return really(*args, **options)

    monkeypatch.setattr(Slide, "open", noting)
    monkeypatch.setattr(EncoderRunner, "start", lambda *_: pytest.fail("encoded again"))
    report = extract_slides(cohort, tmp_path / "out", ENCODER, OPTIONS)
    assert report.count("skipped") == 4
    assert report.count("done", "empty") == 0
    assert sorted(opened) == ["broken.svs", "cut.tif", "empty.svs", "silent.tif"]
    after = everything(tmp_path / "out")
    assert all(np.array_equal(after[name], array) for name, array in before.items())


def test_a_new_slide_is_all_that_a_later_run_does(cohort: Any, tmp_path: Path) -> None:
    extract_slides(cohort, tmp_path / "out", ENCODER, OPTIONS)
    slide_file(cohort / "new.tif", seed=9)
    report = extract_slides(cohort, tmp_path / "out", ENCODER, OPTIONS)
    assert [o.slide for o in report.outcomes if o.status == "done"] == ["new.tif"]


def test_vectors_are_those_of_the_slides_own_pixels(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "a.tif")
    extract_slides(path, tmp_path / "out", ENCODER, OPTIONS)
    slide = FeatureStore(tmp_path / "out").slide("a")
    image = stained()
    for (x, y), vector in zip(slide.grid.xy, slide.features(ENCODER).numpy(), strict=True):
        tile = image[y : y + 64, x : x + 64].reshape(-1, 3) / 255
        np.testing.assert_allclose(vector[:3], tile.mean(axis=0), atol=2e-6)
        np.testing.assert_allclose(vector[3:6], tile.std(axis=0), atol=2e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 500])
@pytest.mark.parametrize("threads", [1, 4])
def test_results_depend_on_neither_batch_threads_nor_the_other_slides(
    cohort: Any, tmp_path: Path, batch_size: Any, threads: Any
) -> None:
    extract_slides(cohort, tmp_path / "one", ENCODER, OPTIONS)
    other = ExtractOptions(prepare=OPTIONS.prepare, batch_size=batch_size, read_threads=threads)
    extract_slides(cohort, tmp_path / "two", ENCODER, other, pattern="x/*")
    one, two = everything(tmp_path / "one"), everything(tmp_path / "two")
    assert two
    for name, array in two.items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(array, one[name], rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(array, one[name])


def test_a_notebook_gets_the_same_vectors_in_memory(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "a.tif")
    extract_slides(path, tmp_path / "out", ENCODER, OPTIONS)
    encoder = load_encoder(EncoderRequest(ENCODER))
    with Slide.open(path) as slide:
        vectors = encode_slide(slide, slide.grid(OPTIONS.prepare.tiling), encoder, batch_size=16)
    np.testing.assert_array_equal(vectors, FeatureStore(tmp_path / "out").slide("a").features(ENCODER).numpy())


def test_what_a_person_looks_at_is_there_and_right(tmp_path: Path) -> None:
    extract_slides(slide_file(tmp_path / "a.tif", pieces=2), tmp_path / "out", ENCODER, OPTIONS)
    key = FeatureStore(tmp_path / "out").slide("a").key
    contents = read_geojson(tmp_path / "out" / "tissue" / f"{key}.geojson")
    assert len(contents.annotations) == 2
    assert {a.class_name for a in contents.annotations} == {"Tissue"}
    outline = shapely.union_all([a.geometry for a in contents.annotations])
    truth = stained(pieces=2)[..., 1] < 200
    drawn = np.zeros(truth.shape, np.uint8)
    for part in shapely.get_parts(outline):
        cv2.fillPoly(drawn, [np.round(np.array(part.exterior.coords)).astype(np.int32)], 1)
    assert (truth & (drawn > 0)).sum() / (truth | (drawn > 0)).sum() > 0.9
    picture: Any = cv2.imread(str(tmp_path / "out" / "thumbnails" / f"{key}.jpg"))
    assert picture.shape == (1200, 1600, 3)
    green = (picture[..., 1].astype(int) - picture[..., 2] > 60) & (picture[..., 1].astype(int) - picture[..., 0] > 30)
    assert 2000 < green.sum() < 40_000  # an outline, not a filling


def test_unreadable_tiles_are_marked_and_too_many_fail_the_slide(tmp_path: Path) -> None:
    path = corrupt_one_tile(slide_file(tmp_path / "a.tif", compression="jpeg"))
    strict = extract_slides(path, tmp_path / "strict", ENCODER, OPTIONS)
    assert codes(strict) == {"a.tif": ("failed", "TOO_MANY_BAD_TILES")}
    assert strict.exit_code == 4
    assert FeatureStore(tmp_path / "strict").slide("a").encoders == ()
    share = strict.outcomes[0].message.split(": ")[1].split(" tiles")[0].split(" of ")
    patient = ExtractOptions(prepare=OPTIONS.prepare, max_unreadable=int(share[0]) / int(share[1]))  # exactly as many
    report = extract_slides(path, tmp_path / "patient", ENCODER, patient)
    features = FeatureStore(tmp_path / "patient").slide("a").features(ENCODER)
    assert report.outcomes[0].facts["n_unreadable"] == (features.status == 1).sum() > 0
    assert np.isnan(features.numpy()[features.status == 1]).all()
    assert np.isfinite(features.numpy()[features.status == 0]).all()


def plugin(folder: Any, body: Any) -> Any:
    path = folder / "plugin.py"
    path.write_text("import torch, time, os\n" + textwrap.dedent(body))
    return f"{path}:build"


def test_non_finite_vectors_are_flagged_not_hidden(tmp_path: Path) -> None:
    name = plugin(
        tmp_path,
        """
        class Odd(torch.nn.Module):
            def forward(self, pixels):
                x = pixels.float().mean((1, 2))
                x[x[:, 1] < 170] = float("nan")
                return x
        def build():
            return Odd()
        """,
    )
    report = extract_slides(slide_file(tmp_path / "a.tif"), tmp_path / "out", name, OPTIONS)
    features = FeatureStore(tmp_path / "out").slide("a").features("plugin.py:build")
    bad = features.status == 2
    assert report.outcomes[0].facts["encoders"]["plugin.py:build"]["n_nonfinite"] == bad.sum() > 0
    assert (~bad).sum() > 0
    assert np.array_equal(np.isnan(features.numpy()).all(axis=1), bad)
    assert FeatureStore(tmp_path / "out").verify(deep=True) == []


def test_a_failing_encoder_fails_its_slide_and_the_next_goes_on(tmp_path: Path) -> None:
    name = plugin(
        tmp_path,
        """
        class Moody(torch.nn.Module):
            def forward(self, pixels):
                if 100 < pixels.float().std() < 1e9 and len(pixels) > 1 and os.path.exists(os.environ["MOOD"]):
                    raise ArithmeticError("bad day")
                return pixels.float().mean((1, 2))
        def build():
            return Moody()
        """,
    )
    slide_file(tmp_path / "slides" / "a.tif")
    slide_file(tmp_path / "slides" / "b.tif", seed=1)
    encoder = load_encoder(EncoderRequest(name))
    calls = []
    forward = encoder.backbone.forward

    def moody(pixels: Any) -> Any:
        calls.append(len(pixels))
        if len(calls) == 2:
            raise ArithmeticError("bad day")
        return forward(pixels)

    encoder.backbone.forward = moody
    os.environ["MOOD"] = str(tmp_path / "never")
    report = extract_slides(tmp_path / "slides", tmp_path / "out", encoder, OPTIONS)
    assert codes(report) == {"a.tif": ("failed", "UNEXPECTED"), "b.tif": ("done", "OK")}
    assert "ArithmeticError: bad day" in report.outcomes[0].message
    assert "Traceback" in report.outcomes[0].facts["traceback"]
    again = extract_slides(tmp_path / "slides", tmp_path / "out", encoder, OPTIONS)
    assert codes(again) == {"a.tif": ("done", "OK"), "b.tif": ("skipped", "OK")}


def test_a_fault_of_the_machine_stops_the_run_and_leaves_no_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide_file(tmp_path / "slides" / "a.tif")
    slide_file(tmp_path / "slides" / "b.tif", seed=1)
    slide_file(tmp_path / "slides" / "c.tif", seed=2)

    def lost(*_: Any) -> None:
        raise DeviceError("the GPU went away")

    monkeypatch.setattr(EncoderRunner, "start", lost)
    with pytest.raises(DeviceError):
        extract_slides(tmp_path / "slides", tmp_path / "out", ENCODER, OPTIONS)
    assert list((tmp_path / "out" / ".locks").iterdir()) == []
    assert (tmp_path / "out" / "report.jsonl").exists()
    monkeypatch.undo()
    assert extract_slides(tmp_path / "slides", tmp_path / "out", ENCODER, OPTIONS).count("done") == 3


def test_a_disk_that_fills_while_a_slide_is_prepared_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = slide_file(tmp_path / "a.tif")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("features.prepare.write_geojson", full)
    with pytest.raises(DiskFullError, match="nothing finished is lost"):
        extract_slides(path, tmp_path / "out", ENCODER, OPTIONS)
    monkeypatch.undo()
    assert extract_slides(path, tmp_path / "out", ENCODER, OPTIONS).count("done") == 1


def test_a_slide_that_another_process_holds_is_left_to_it(tmp_path: Path) -> None:
    slide_file(tmp_path / "slides" / "a.tif")
    slide_file(tmp_path / "slides" / "b.tif", seed=1)
    FeatureStore.create(tmp_path / "out", OPTIONS.prepare.tiling)
    with Lease(tmp_path / "out" / ".locks", slide_key("a.tif")):
        report = extract_slides(tmp_path / "slides", tmp_path / "out", ENCODER, OPTIONS)
    assert codes(report) == {"a.tif": ("busy", "BUSY"), "b.tif": ("done", "OK")}
    assert report.exit_code == 0


class TestTissueAndRegions:
    def edited(self, folder: Any, slide: Any, *geometries: Any, classes: Any = ("Tissue", "Ignore*")) -> Any:
        folder.mkdir(exist_ok=True)
        shapes = [Annotation(g, c) for g, c in zip(geometries, classes, strict=False)]
        frame = Frame(slide=slide.name, size=(1600, 1200), mpp=(1.0, 1.0), origin=(0, 0))
        write_geojson(folder / f"{slide.name}.geojson", shapes, frame)
        return folder

    def run(self, source: Any, out: Any, **prepare: Any) -> Any:
        options = PrepareOptions(tiling=OPTIONS.prepare.tiling, **prepare)
        return extract_slides(source, out, ENCODER, ExtractOptions(prepare=options))

    def test_corrected_outlines_are_used_and_replace_what_was_found(self, tmp_path: Path) -> None:
        path = slide_file(tmp_path / "a.tif")
        self.run(path, tmp_path / "out")
        before = len(FeatureStore(tmp_path / "out").slide("a").grid)
        tissue = self.edited(
            tmp_path / "edited", path, shapely.box(320, 320, 640, 640), shapely.box(448, 448, 512, 512)
        )
        report = self.run(path, tmp_path / "out", tissue_dir=tissue)
        slide = FeatureStore(tmp_path / "out").slide("a")
        assert before > len(slide.grid) == 24  # five by five tiles, less the ignored one
        assert slide.manifest["tissue"]["source"] == "given"
        assert any(".replaced" in note for note in report.outcomes[0].facts["notes"])
        (aside,) = (tmp_path / "out" / ".replaced").iterdir()
        assert (aside / "encoders").is_dir()
        assert self.run(path, tmp_path / "out", tissue_dir=tissue).count("skipped") == 1
        assert self.run(path, tmp_path / "out").count("skipped") == 1  # a correction stays in force

    def test_outlines_may_be_edited_where_they_are(self, tmp_path: Path) -> None:
        path = slide_file(tmp_path / "a.tif")
        out = tmp_path / "out"
        self.run(path, out)
        assert self.run(path, out, tissue_dir=out / "tissue").count("skipped") == 1  # nobody edited anything
        (file,) = (out / "tissue").iterdir()
        frame = Frame(slide="a.tif", size=(1600, 1200), mpp=(1.0, 1.0), origin=(0, 0))
        write_geojson(file, [Annotation(shapely.box(320, 320, 640, 640), "Tissue", name="mine")], frame)
        edited = file.read_bytes()
        spelt_otherwise = out / ".." / out.name / "tissue"
        assert self.run(path, out, tissue_dir=spelt_otherwise).count("done") == 1
        assert len(FeatureStore(out).slide("a").grid) == 25
        assert file.read_bytes() == edited  # it is theirs
        assert self.run(path, out, tissue_dir=out / "tissue").count("skipped") == 1

    def test_whatever_fails_costs_nothing_that_is_done(self, tmp_path: Path) -> None:
        path = slide_file(tmp_path / "a.tif")
        self.run(path, tmp_path / "out")
        before = everything(tmp_path / "out")
        for folder, content in (("bad", "{not json"), ("none", None)):
            (tmp_path / folder).mkdir()
            if content:
                (tmp_path / folder / "a.geojson").write_text(content)
        assert self.run(path, tmp_path / "out", tissue_dir=tmp_path / "bad").count("failed") == 1
        report = self.run(path, tmp_path / "out", roi=tmp_path / "none")
        assert codes(report) == {"a.tif": ("failed", "USAGE")}
        assert everything(tmp_path / "out").keys() == before.keys()
        assert not (tmp_path / "out" / ".replaced").exists()

    def test_outlines_that_fit_no_slide_or_hold_no_area_are_remarked(self, tmp_path: Path) -> None:
        path = slide_file(tmp_path / "a.tif")
        (tmp_path / "other").mkdir()
        report = self.run(path, tmp_path / "out", tissue_dir=tmp_path / "other")
        assert any("no outlines for it" in note for note in report.outcomes[0].facts["notes"])
        lines = self.edited(tmp_path / "lines", path, shapely.LineString([(0, 0), (900, 900)]))
        report = self.run(path, tmp_path / "two", tissue_dir=lines)
        assert any("none of its 1 shapes has an area" in note for note in report.outcomes[0].facts["notes"])

    def test_a_region_of_interest_restricts_the_tiles(self, tmp_path: Path) -> None:
        path = slide_file(tmp_path / "a.tif")
        roi = self.edited(tmp_path / "roi", path, shapely.box(640, 512, 832, 640))
        self.run(path, tmp_path / "out", roi=roi)
        xy = FeatureStore(tmp_path / "out").slide("a").grid.xy
        assert sorted(map(tuple, xy.tolist())) == [(x, y) for x in (640, 704, 768) for y in (512, 576)]

    def test_a_slide_without_a_region_is_named(self, tmp_path: Path) -> None:
        path = slide_file(tmp_path / "a.tif")
        (tmp_path / "roi").mkdir()
        report = self.run(path, tmp_path / "out", roi=tmp_path / "roi")
        assert report.outcomes[0].code == "USAGE"
        assert "a.tif.geojson" in report.outcomes[0].message

    def test_a_damaged_outline_file_fails_its_slide_only(self, tmp_path: Path) -> None:
        slide_file(tmp_path / "slides" / "a.tif")
        slide_file(tmp_path / "slides" / "b.tif")
        (tmp_path / "edited").mkdir()
        (tmp_path / "edited" / "a.geojson").write_text("{not json")
        report = self.run(tmp_path / "slides", tmp_path / "out", tissue_dir=tmp_path / "edited")
        assert codes(report) == {"a.tif": ("failed", "BAD_ANNOTATION"), "b.tif": ("done", "OK")}


def test_a_slide_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "a.tif")
    extract_slides(path, tmp_path / "out", ENCODER, OPTIONS)
    os.utime(path)  # a new date alone is not a change
    assert codes(extract_slides(path, tmp_path / "out", ENCODER, OPTIONS)) == {"a.tif": ("skipped", "OK")}
    slide_file(path, seed=5)
    report = extract_slides(path, tmp_path / "out", ENCODER, OPTIONS)
    assert codes(report) == {"a.tif": ("failed", "SOURCE_CHANGED")}


def test_a_store_that_lost_a_file_is_reported_not_skipped(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "a.tif")
    extract_slides(path, tmp_path / "out", ENCODER, OPTIONS)
    shard = next((tmp_path / "out" / "slides").rglob("features/c/0/0"))
    shard.unlink()
    report = extract_slides(path, tmp_path / "out", ENCODER, OPTIONS)
    assert codes(report) == {"a.tif": ("failed", "STORE_CORRUPT")}
    assert "wsi remove" in report.outcomes[0].message


def test_mpp_from_a_table_and_from_the_flag(tmp_path: Path) -> None:
    slide_file(tmp_path / "a.tif", mpp=1e6)
    slide_file(tmp_path / "b.tif", mpp=1e6)
    (tmp_path / "list.csv").write_text("slide,mpp,label\na.tif,1.0,tumour\nb.tif,,normal\n")
    report = extract_slides(tmp_path / "list.csv", tmp_path / "out", ENCODER, OPTIONS)
    assert codes(report) == {"a.tif": ("done", "OK"), "b.tif": ("failed", "MPP_IMPLAUSIBLE")}
    about = FeatureStore(tmp_path / "out").slide("a").manifest["slide"]
    assert (about["mpp"], about["mpp_source"], about["table"]) == ([1.0, 1.0], "csv", {"label": "tumour"})
    flagged = ExtractOptions(prepare=PrepareOptions(tiling=OPTIONS.prepare.tiling, slide_mpp=(0.5, 0.5)))
    report = extract_slides(tmp_path / "list.csv", tmp_path / "two", ENCODER, flagged)
    assert FeatureStore(tmp_path / "two").slide("b").manifest["slide"]["mpp_source"] == "flag"


def test_a_scan_too_coarse_is_refused_before_a_pixel_is_read(tmp_path: Path) -> None:
    report = extract_slides(slide_file(tmp_path / "a.tif", mpp=2.0), tmp_path / "out", ENCODER, OPTIONS)
    assert codes(report) == {"a.tif": ("failed", "MPP_TOO_COARSE")}
    assert report.outcomes[0].message.startswith(str(tmp_path / "a.tif"))
    assert not (tmp_path / "out" / "tissue").exists()


def test_the_plan_is_what_the_run_does_and_writes_nothing(cohort: Any, tmp_path: Path) -> None:
    runner = EncoderRunner(load_encoder(EncoderRequest(ENCODER)))
    told: list[Any] = []
    plan = plan_cohort(discover(cohort), tmp_path / "out", runner, OPTIONS, told.append)
    assert tuple(told) == plan.slides
    assert not (tmp_path / "out").exists()
    report = extract_slides(cohort, tmp_path / "out", ENCODER, OPTIONS)
    assert {s.slide: s.n_tiles for s in plan.slides if s.code == "OK"} == {
        o.slide: o.facts["n_tiles"] for o in report.outcomes if o.status in ("done", "empty")
    }
    assert {s.slide: s.code for s in plan.slides if s.code != "OK"} == {
        o.slide: o.code for o in report.outcomes if o.status == "failed"
    }
    assert plan.tiles == sum(o.facts["n_tiles"] for o in report.outcomes if o.status == "done")
    assert plan.bytes == plan.tiles * 9 * 4
    assert plan.seconds is not None
    assert plan_cohort(discover(cohort), tmp_path / "out", runner, OPTIONS).tiles == 0
    with pytest.raises(UsageError):
        plan_cohort(discover(cohort), tmp_path / "out", runner, ExtractOptions())


class TestPrefetch:
    def test_items_come_in_order_and_errors_come_through(self) -> None:
        def source() -> Any:
            yield from range(5)
            raise KeyError("end")

        got = []
        with pytest.raises(KeyError, match="end"):
            for item in prefetch(source, 2):
                got.append(item)  # noqa: PERF402 - what came before the error is the point
        assert got == [0, 1, 2, 3, 4]

    def test_it_runs_ahead_but_not_further_than_told_and_stops(self) -> None:
        made, closed = [], []

        def source() -> Any:
            try:
                for number in range(100):
                    made.append(number)
                    yield number
            finally:
                closed.append(True)

        items = prefetch(source, 3)
        assert next(items) == 0
        deadline = time.monotonic() + 10
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(made) == 5  # one taken, three waiting, one at the door
        items.close()
        assert closed == [True]


RUN = textwrap.dedent("""
    import sys, time
    import features.arrays, features.writing
    features.arrays.CHUNK_ROWS, features.arrays.SHARD_ROWS, features.writing.SHARD_ROWS = 8, 16, 16
    from features import ExtractOptions, PrepareOptions, extract_slides, load_encoder
    from features.encoder import EncoderRequest
    from wsi import Tiling
    encoder = load_encoder(EncoderRequest("colour-stats"))
    forward = encoder.backbone.forward
    def slow(pixels):
        time.sleep(float(sys.argv[3]))
        return forward(pixels)
    encoder.backbone.forward = slow
    options = ExtractOptions(prepare=PrepareOptions(tiling=Tiling(mpp=1.0, tile_px=64, min_tissue=0.2)), batch_size=4)
    print("ready", flush=True)
    report = extract_slides(sys.argv[1], sys.argv[2], encoder, options)
    sys.exit(report.exit_code)
""")


def start(slides: Any, out: Any, pause: Any) -> Any:
    command = [sys.executable, "-c", RUN, str(slides), str(out), str(pause)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_killed_at_twenty_random_moments_the_store_equals_an_uninterrupted_runs(tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    for seed in range(3):
        slide_file(slides / f"{seed}.tif", seed=seed, pieces=1 + seed % 2)
    with start(slides, tmp_path / "whole", 0) as run:
        assert run.wait() == 0
    rng = random.Random(20)
    kills = resumed = 0
    while kills < 20:
        with start(slides, tmp_path / "killed", 0.1) as run:
            time.sleep(rng.uniform(0.0, 1.5))
            run.send_signal(signal.SIGKILL)
            run.wait()
        kills += 1
        store = FeatureStore(tmp_path / "killed") if (tmp_path / "killed" / "wsi-store.json").exists() else None
        if store is not None:
            assert store.verify(deep=True) == []  # whatever is there is whole
            resumed += any((folder / "journal.json").exists() for folder in (store.root / ".staging").glob("*"))
            if len([1 for slide in store for _ in slide.encoders]) == 3:
                features.writing.replace_slide(store, store.keys[rng.randrange(3)])  # all done: kill some more
    assert resumed > 5
    with start(slides, tmp_path / "killed", 0) as run:
        assert run.wait() == 0
    assert_equal_stores(tmp_path / "whole", tmp_path / "killed")
    assert FeatureStore(tmp_path / "killed").verify(deep=True) == []


def test_two_processes_share_a_folder_and_neither_does_the_others_work(tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    for seed in range(4):
        slide_file(slides / f"{seed}.tif", seed=seed)
    with start(slides, tmp_path / "out", 0.01) as one, start(slides, tmp_path / "out", 0.01) as two:
        assert (one.wait(), two.wait()) == (0, 0)
    store = FeatureStore(tmp_path / "out")
    assert store.verify(deep=True) == []
    assert [slide.encoders for slide in store] == [(ENCODER,)] * 4
    with start(slides, tmp_path / "alone", 0) as alone:
        assert alone.wait() == 0
    assert_equal_stores(tmp_path / "out", tmp_path / "alone")
    assert list((tmp_path / "out" / ".locks").iterdir()) == []


def test_sigterm_ends_the_command_with_its_code_and_what_is_done_stays(tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    for seed in range(4):
        slide_file(slides / f"{seed}.tif", seed=seed, width=2400, height=2000)
    name = plugin(
        tmp_path,
        """
        class Slow(torch.nn.Module):
            def forward(self, pixels):
                time.sleep(0.05)
                return pixels.float().mean((1, 2))
        def build():
            return Slow()
        """,
    )
    command = [sys.executable, "-c", "from cli.extract import main; main()", str(slides), str(tmp_path / "out"),
               "--encoder", name, "--mpp", "1.0", "--tile", "64", "--batch-size", "8"]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if "done" in line:
                break
        run.send_signal(signal.SIGTERM)
        _, err = run.communicate(timeout=60)
    assert run.returncode == 143
    assert "run the same command again" in err
    assert "Traceback" not in err
    store = FeatureStore(tmp_path / "out")
    assert 1 <= sum(bool(slide.encoders) for slide in store) < 4
    assert store.verify(deep=True) == []
    assert list((tmp_path / "out" / ".locks").iterdir()) == []


def test_why_the_direct_reader_was_passed_over_stands_in_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SlideSource(slide_file(tmp_path / "a.tif"), "a.tif")
    options = PrepareOptions(Tiling(mpp=1.0, tile_px=64))
    store = FeatureStore.create(tmp_path / "out", options.tiling)
    with prepare_slide(source, "before", store, options).slide:
        pass
    right = Coding.decode
    monkeypatch.setattr(Coding, "decode", lambda *args: right(*args) ^ 1)
    with prepare_slide(source, "after", store, options).slide:
        pass
    facts = {slide.key: slide.manifest["slide"] for slide in store}
    assert (facts["before"]["reader"], facts["before"]["reader_reason"]) == ("tiff", None)
    assert facts["after"]["reader"] == "openslide"
    assert "differs from OpenSlide's by 1 grey" in facts["after"]["reader_reason"]


def test_a_remote_slide_is_read_where_it_is(tmp_path: Path) -> None:
    import fsspec

    path = slide_file(tmp_path / "a.tif")
    address = f"memory://{tmp_path.name}/a.tif"
    with fsspec.open(address, "wb") as file:
        file.write(path.read_bytes())
    extract_slides(address, tmp_path / "remote", ENCODER, OPTIONS)
    extract_slides(path, tmp_path / "local", ENCODER, OPTIONS)
    (remote,), (local,) = FeatureStore(tmp_path / "remote"), FeatureStore(tmp_path / "local")
    assert remote.manifest["slide"]["reader"] == "tiffslide"
    np.testing.assert_array_equal(remote.features(ENCODER).numpy(), local.features(ENCODER).numpy())
    assert extract_slides(address, tmp_path / "remote", ENCODER, OPTIONS).count("skipped") == 1


def test_a_slide_smaller_than_a_tile_says_what_helps(tmp_path: Path) -> None:
    large = ExtractOptions(prepare=PrepareOptions(tiling=Tiling(mpp=1.0, tile_px=4096)))
    (outcome,) = extract_slides(slide_file(tmp_path / "a.tif"), tmp_path / "out", ENCODER, large).outcomes
    assert outcome.code == "EMPTY"
    assert any("--edge pad" in note for note in outcome.facts["notes"])


def test_another_dtype_than_the_stored_one_is_not_passed_over(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "a.tif")
    extract_slides(path, tmp_path / "out", ENCODER, OPTIONS)
    half = ExtractOptions(prepare=OPTIONS.prepare, dtype="float16")
    assert codes(extract_slides(path, tmp_path / "out", ENCODER, half)) == {"a.tif": ("failed", "ENCODER_CHANGED")}


def test_a_slide_that_another_process_finishes_meanwhile_is_not_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = slide_file(tmp_path / "a.tif")
    acquire = Lease.acquire

    def late(lease: Lease) -> None:
        monkeypatch.setattr(Lease, "acquire", acquire)
        extract_slides(path, tmp_path / "out", ENCODER, OPTIONS)  # the other process, between our look and our lease
        acquire(lease)

    monkeypatch.setattr(Lease, "acquire", late)
    assert codes(extract_slides(path, tmp_path / "out", ENCODER, OPTIONS)) == {"a.tif": ("skipped", "OK")}


def test_a_slide_that_is_replaced_while_staged_is_not_continued(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "a.tif")
    stopped = load_encoder(EncoderRequest(ENCODER))
    forward = stopped.backbone.forward

    def dies(pixels: Any) -> Any:
        raise DeviceError("gone")

    stopped.backbone.forward = dies
    with pytest.raises(DeviceError):
        extract_slides(path, tmp_path / "out", stopped, OPTIONS)
    stopped.backbone.forward = forward
    slide_file(path, seed=7)
    assert codes(extract_slides(path, tmp_path / "out", ENCODER, OPTIONS)) == {"a.tif": ("failed", "SOURCE_CHANGED")}
    features.writing.replace_slide(FeatureStore(tmp_path / "out"), slide_key("a.tif"))
    assert codes(extract_slides(path, tmp_path / "out", ENCODER, OPTIONS)) == {"a.tif": ("done", "OK")}
    extract_slides(path, tmp_path / "fresh", ENCODER, OPTIONS)
    assert_equal_stores(tmp_path / "out", tmp_path / "fresh")


def test_a_float16_store_is_asked_for_or_follows_the_precision(tmp_path: Path) -> None:
    half = ExtractOptions(prepare=OPTIONS.prepare, dtype="float16")
    extract_slides(slide_file(tmp_path / "a.tif"), tmp_path / "out", ENCODER, half)
    assert FeatureStore(tmp_path / "out").slide("a").features(ENCODER).numpy().dtype == np.float16


def test_features_may_be_named(tmp_path: Path) -> None:
    named = ExtractOptions(prepare=OPTIONS.prepare, name="colours v2")
    extract_slides(slide_file(tmp_path / "a.tif"), tmp_path / "out", ENCODER, named)
    assert FeatureStore(tmp_path / "out").slide("a").encoders == ("colours v2",)


def test_a_damaged_source_list_does_not_stop_the_rest(tmp_path: Path) -> None:
    slide_file(tmp_path / "a.tif")
    store = FeatureStore.create(tmp_path / "out", OPTIONS.prepare.tiling)
    runner = EncoderRunner(load_encoder(EncoderRequest(ENCODER)))
    found = type(discover(tmp_path))(
        (SlideSource(tmp_path / "gone.tif", "gone.tif"), SlideSource(tmp_path / "a.tif", "a.tif"))
    )
    assert codes(extract_cohort(found, store, runner, OPTIONS)) == {
        "a.tif": ("done", "OK"),
        "gone.tif": ("failed", "NOT_FOUND"),
    }


def test_torch_threads_do_not_change_vectors(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "a.tif")
    extract_slides(path, tmp_path / "one", ENCODER, OPTIONS)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        extract_slides(path, tmp_path / "two", ENCODER, OPTIONS)
    finally:
        torch.set_num_threads(before)
    for name, array in everything(tmp_path / "one").items():
        np.testing.assert_allclose(array, everything(tmp_path / "two")[name], atol=1e-6)
