"""wsi segment run, as a user runs it: areas and files, exit codes, and one clear line for a model that cannot be used."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shapely

from tests.segmentation.trained import save_picture, tumour
from wsi.annotation import Annotation
from wsi.geojson import Frame, read_geojson, write_geojson

SEEDS = (21, 22)


@pytest.fixture
def model(trained_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(trained_model, tmp_path / "model"))


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    for seed in SEEDS:
        save_picture(tmp_path / "slides" / f"{seed}.png", seed)
    return tmp_path / "slides"


def run(command: Any, slides: Path, model: Path, *words: Any, out: str = "out") -> tuple[int, str, str]:
    words = ("--slide-mpp", 1.0, "--device", "cpu", *words)
    code, said, error = command("wsi", "segment", "run", slides, slides.parent / out, "--model", model, *words)
    return code, said, error


def test_the_main_job(command: Any, slides: Path, trained_model: Path) -> None:
    code, said, error = run(command, slides, trained_model)
    assert (code, error) == (0, "")
    out = slides.parent / "out"
    assert "2 slides in " in said
    assert "tumour: 0.01 mm² on 2 of 2 slides" in said
    for seed in SEEDS:
        assert {path.name for path in out.glob(f"{seed}.*")} == {
            f"{seed}{suffix}" for suffix in (".geojson", ".ome.tif", ".jpg", ".result.json")
        }
        (found,) = read_geojson(out / f"{seed}.geojson").annotations
        assert found.geometry.intersection(tumour(seed)).area > 0.9 * tumour(seed).area
    code, said, _ = run(command, slides, trained_model)
    assert code == 0
    assert "2 there already" in said
    assert "tumour: 0.01 mm² on 2 of 2 slides" in said


def test_formats_and_outlines_are_as_asked(command: Any, slides: Path, trained_model: Path) -> None:
    words = ("--formats", "geojson, objects", "--tolerance", 0, "--pattern", "21*")
    assert run(command, slides, trained_model, *words)[0] == 0
    out = slides.parent / "out"
    assert {path.name for path in out.glob("2*")} == {"21.geojson", "21.objects.csv", "21.result.json"}
    (exact,) = read_geojson(out / "21.geojson").annotations
    assert run(command, slides, trained_model, *words[:2], "--tolerance", 12, "--pattern", "21*", out="rough")[0] == 0
    (rough,) = read_geojson(slides.parent / "rough" / "21.geojson").annotations
    assert len(rough.geometry.exterior.coords) < len(exact.geometry.exterior.coords)
    assert run(command, slides, trained_model, "--min-area", 1e6, out="large")[0] == 0
    with (slides.parent / "large" / "areas.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == []


def test_a_slide_that_fails_is_named_with_its_code_and_the_exit_code_is_3(
    command: Any, slides: Path, trained_model: Path
) -> None:
    (slides / "bad.svs").touch()
    code, said, _ = run(command, slides, trained_model)
    assert code == 3
    assert "bad.svs: FAILED, EMPTY_FILE: " in said
    assert "2 slides in " in said
    assert "1 failed" in said


def test_slides_too_coarse_for_the_model_are_one_clear_line_each_and_exit_code_4(
    command: Any, slides: Path, trained_model: Path
) -> None:
    code, said, _ = run(command, slides, trained_model, "--slide-mpp", 4.0)
    assert code == 4
    for seed in SEEDS:
        (line,) = [line for line in said.splitlines() if line.startswith(f"{seed}.png")]
        assert "FAILED, MPP_TOO_COARSE: " in line
        assert "this model needs a sharper scan" in line
        assert "upsample" not in line
        assert "4" in line


def test_a_slide_without_a_resolution_is_told_which_flag_helps(command: Any, slides: Path, trained_model: Path) -> None:
    code, said, _ = command("wsi", "segment", "run", slides, slides.parent / "out", "--model", trained_model)
    assert code == 4
    assert "21.png: FAILED, MPP_MISSING: " in said
    assert "mpp" in said


def _not_whole(model: Path) -> str:
    (model / "model.json").unlink()
    return "holds no whole model (model.json is missing); give the folder that wsi segment train wrote"


def _no_json(model: Path) -> str:
    (model / "model.json").write_text("{", encoding="utf-8")
    return "model.json: cannot be read as a model"


def _other_release(model: Path) -> str:
    about = json.loads((model / "model.json").read_text(encoding="utf-8"))
    (model / "model.json").write_text(json.dumps({**about, "version": 9}), encoding="utf-8")
    return "holds wsi-segmentation-model 9, this release reads wsi-segmentation-model 1"


def _missing(model: Path) -> str:
    (model / "refinement.safetensors").unlink()
    return "refinement.safetensors: is missing or damaged; copy the model again, or train it again"


def _damaged(model: Path) -> str:
    data = bytearray((model / "classifier.safetensors").read_bytes())
    data[-5] ^= 1
    (model / "classifier.safetensors").write_bytes(data)
    return "classifier.safetensors: is missing or damaged"


@pytest.mark.parametrize("spoil", [_not_whole, _no_json, _other_release, _missing, _damaged])
def test_a_model_that_cannot_be_used_is_one_line_and_exit_code_5(
    spoil: Callable[[Path], str], command: Any, slides: Path, model: Path
) -> None:
    expected = spoil(model)
    code, _, error = run(command, slides, model)
    assert code == 5
    assert error.startswith("MODEL_MISMATCH: ")
    assert expected in error
    assert error.count("\n") == 1
    assert not (slides.parent / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--formats", "geojson,svg"], "formats are of geojson, mask, picture"),
        (["--formats", ","], "one at least"),
        (["--tolerance", "-1"], "--tolerance"),
        (["--tolerance", "nan"], "tolerance"),
        (["--slide-mpp", "wide"], "--slide-mpp"),
        (["--pattern", "*.svs"], "no slides found"),
        (["--runtime", "tensorrt"], "--runtime"),
        (["--out", "x"], "No such option"),
    ],
)
def test_a_command_that_makes_no_sense_is_exit_code_2_and_touches_nothing(
    words: list[str], message: str, command: Any, slides: Path, trained_model: Path
) -> None:
    code, _, error = run(command, slides, trained_model, *words)
    assert code == 2
    assert message in error
    assert not (slides.parent / "out").exists()


def test_out_must_be_another_folder_and_slides_must_be_there(command: Any, slides: Path, trained_model: Path) -> None:
    code, _, error = run(command, slides, trained_model, out="slides")
    assert (code, "OUT must be another folder" in error) == (2, True)
    code, _, error = run(command, slides.parent / "nowhere", trained_model)
    assert (code, error.startswith("NOT_FOUND: ")) == (2, True)


def test_results_of_other_settings_are_not_mixed(command: Any, slides: Path, trained_model: Path) -> None:
    assert run(command, slides, trained_model, "--pattern", "21*")[0] == 0
    code, _, error = run(command, slides, trained_model, "--tolerance", 3)
    assert code == 2
    assert error.startswith("RUN_MISMATCH: ")
    assert "other settings of outlines or files" in error


def test_help_names_every_flag_and_what_the_exit_codes_mean(command: Any) -> None:
    code, said, _ = command("wsi", "segment", "run", "--help")
    assert code == 0
    for flag in ("--model", "--formats", "--tolerance", "--min-area", "--min-hole", "--runtime", "--max-unreadable"):
        assert flag in said
    assert "Exit codes: 0 all well" in said
    code, said, _ = command("wsi", "segment", "--help")
    assert [verb in said for verb in ("train", "run", "evaluate", "export")] == [True] * 4


def test_tissue_that_somebody_outlined_is_used_and_a_change_of_it_makes_the_slide_anew(
    command: Any, slides: Path, trained_model: Path, tmp_path: Path
) -> None:
    frame = Frame("21.png", (256, 192), (1.0, 1.0))
    whole = tumour(21)
    x0, y0, x1, y1 = whole.bounds
    half = shapely.box(x0 - 8, y0 - 8, (x0 + x1) / 2, y1 + 8)
    write_geojson(tmp_path / "tissue" / "21.geojson", [Annotation(half, "Tissue")], frame)
    words = ("--tissue", tmp_path / "tissue", "--formats", "geojson")
    code, said, _ = run(command, slides, trained_model, *words)
    assert code == 0
    out = slides.parent / "out"
    with (out / "areas.csv").open(encoding="utf-8", newline="") as file:
        share = {row["slide"]: float(row["tissue_share"]) for row in csv.DictReader(file)}
    assert share["21.png"] > 0.5  # of the outline; of all tissue it is less than a fifth
    assert share["22.png"] < 0.2
    assert "2 there already" in run(command, slides, trained_model, *words)[1]
    write_geojson(tmp_path / "tissue" / "21.geojson", [Annotation(shapely.box(8, 8, 248, 184), "Tissue")], frame)
    code, said, _ = run(command, slides, trained_model, *words)
    assert "1 slides in" in said
    assert "1 there already" in said
    with (out / "areas.csv").open(encoding="utf-8", newline="") as file:
        share = {row["slide"]: float(row["tissue_share"]) for row in csv.DictReader(file)}
    assert share["21.png"] < 0.2


def test_outlines_that_lie_outside_their_slide_are_said_so(
    command: Any, slides: Path, trained_model: Path, tmp_path: Path
) -> None:
    frame = Frame("21.png", (256, 192), (1.0, 1.0))
    far = shapely.box(5000, 5000, 5100, 5100)
    write_geojson(tmp_path / "tissue" / "21.geojson", [Annotation(far, "Tissue")], frame)
    code, said, _ = run(command, slides, trained_model, "--tissue", tmp_path / "tissue")
    assert code == 0
    assert "21.png: 21.geojson: " in said
    assert "outside" in said


def test_a_zarr_image_is_refused_with_what_helps(command: Any, slides: Path, trained_model: Path) -> None:
    (slides / "a.ome.zarr").mkdir()
    (slides / "a.ome.zarr" / "zarr.json").write_text("{}", encoding="utf-8")
    code, said, _ = run(command, slides, trained_model)
    assert code == 3
    assert "a.ome.zarr: FAILED, NOT_A_SLIDE: " in said
    assert "convert it to OME-TIFF" in said
