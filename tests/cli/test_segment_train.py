"""wsi segment train, as a user runs it: the main job, and one clear line for what cannot be learned from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shapely

from segmentation.config import SegmentationConfig
from tests.segmentation.trained import save_picture, tumour, write_truth

FAST = [
    "--slide-mpp", 1.0, "--mpp", 1.0, "--patch", 16, "--trunk", "colour-stats", "--frozen", "--folds", 2,
    "--epochs", 8, "--steps", 20, "--side", 64, "--device", "cpu", "--seed", 3,
    "--set", "network.hidden=0", "--set", "network.dropout=0", "--set", "classifier.lr=0.1",
    "--set", "classifier.patches=192", "--set", "classifier.validation_patches=64",
    "--set", 'refinement.hyper={"filters": [4, 8], "norm": "batch"}', "--set", "fit.batch_size=2",
    "--set", "fit.accumulate=1", "--set", "fit.learning_rate=0.02", "--set", "fit.validate_every=10",
    "--set", "patches.tiling.min_tissue=0.5", "--set", "patches.min_coverage=0.5",
]  # fmt: skip


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Five slides and what was drawn on them."""
    for seed in range(5):
        save_picture(tmp_path / "slides" / f"{seed}.png", seed)
        write_truth(tmp_path / "truth" / f"{seed}.geojson", seed)
    return tmp_path


def train(command: Any, cohort: Path, *words: Any, classes: str = "tumour", out: str = "model") -> tuple[int, str, str]:
    code, said, error = command(
        "wsi", "segment", "train", "--slides", cohort / "slides", "--annotations", cohort / "truth",
        "--classes", classes, "--out", cohort / out, *FAST, *words,
    )  # fmt: skip
    return code, said, error


def test_the_main_job(command: Any, cohort: Path) -> None:
    code, said, error = train(command, cohort)
    assert (code, error) == (0, "")
    assert "5 slides to learn tumour from" in said
    for stage in ("fold 1 of 2: patch classifier: epoch", "patch classifier: epoch", "refinement: step"):
        assert stage in said
    assert "on slides held out" in said
    assert "refined dice 0.9" in said
    assert f"next: wsi segment run SLIDES OUT --model {cohort / 'model'}" in said
    config = json.loads((cohort / "model" / "model.json").read_text(encoding="utf-8"))["config"]
    assert (config["folds"], config["fit"]["steps"], config["refinement"]["side_px"]) == (2, 20, 64)
    assert (config["patches"]["tiling"]["mpp"], config["patches"]["tiling"]["tile_px"]) == (1.0, 16)
    assert config["network"]["frozen"] is True
    assert {config["seed"], *(config[name]["seed"] for name in ("patches", "classifier", "fit"))} == {3}
    code, _, error = train(command, cohort)
    assert code == 2
    assert error.startswith("USAGE: ")
    assert "holds a trained model already" in error


@pytest.mark.parametrize("method", ["patches", "picture"])
def test_one_network_alone(method: str, command: Any, cohort: Path) -> None:
    code, said, _ = train(command, cohort, "--method", method)
    assert code == 0
    assert "fold" not in said
    files = {path.name for path in (cohort / "model").iterdir()}
    assert ("classifier.safetensors" in files) == (method == "patches")
    assert ("refinement.safetensors" in files) == (method == "picture")
    assert json.loads((cohort / "model" / "model.json").read_text(encoding="utf-8"))["method"] == method


def test_a_table_names_slides_and_their_patients(command: Any, cohort: Path) -> None:
    rows = "".join(f"slides/{seed}.png,p{seed // 2}\n" for seed in range(4))
    (cohort / "slides.csv").write_text(f"slide,patient\n{rows}", encoding="utf-8")
    words = ("wsi", "segment", "train", "--slides", cohort / "slides.csv", "--annotations", cohort / "truth",
             "--classes", "tumour", "--out", cohort / "model", *FAST)  # fmt: skip
    code, said, error = command(*words, "--folds", 3)
    assert code == 2
    assert "3 folds need slides of as many patients; there are 2" in error
    assert "4 slides to learn" in said


def test_a_file_of_settings_lies_under_words_and_words_under_flags(command: Any, cohort: Path) -> None:
    values = {"fit": {"steps": 3, "patience": 7, "validate_every": 9}, "classifier": {"patience": 6}}
    (cohort / "c.json").write_text(json.dumps(values), encoding="utf-8")
    code, _, _ = train(
        command, cohort, "--config", cohort / "c.json", "--set", "fit.validate_every=5", "--method", "picture"
    )
    assert code == 0
    config = json.loads((cohort / "model" / "model.json").read_text(encoding="utf-8"))["config"]
    assert [config["fit"][name] for name in ("steps", "patience", "validate_every")] == [20, 7, 5]
    assert config["classifier"]["patience"] == 6


def _swap(path: Path) -> None:
    feature = json.loads(path.read_text(encoding="utf-8"))
    ring = feature["features"][0]["geometry"]["coordinates"][0]
    feature["features"][0]["geometry"]["coordinates"] = [[[y, x] for x, y in ring]]
    path.write_text(json.dumps(feature), encoding="utf-8")


def _shift(path: Path, shape: shapely.Polygon, by: float) -> None:
    feature = json.loads(path.read_text(encoding="utf-8"))
    moved = json.loads(shapely.to_geojson(shapely.affinity.translate(shape, by, 0)))
    feature["features"][0]["geometry"] = moved
    path.write_text(json.dumps(feature), encoding="utf-8")


def _reaching_right() -> int:
    """A slide whose tumour lies off it with x and y swapped."""
    return next(seed for seed in range(5) if tumour(seed).bounds[2] > 193)


def _without(cohort: Path) -> str:
    (cohort / "truth" / "3.geojson").unlink()
    return "3.png: no annotations; left out"


def _swapped(cohort: Path) -> str:
    _swap(cohort / "truth" / f"{_reaching_right()}.geojson")
    return f"{_reaching_right()}.png: x and y seem swapped"


def _outside(cohort: Path) -> str:
    _shift(cohort / "truth" / "3.geojson", tumour(3), 4000)
    return "3.png: "


def _of_another_name(cohort: Path) -> str:
    write_truth(cohort / "truth" / "3.geojson", 3, "Tumor")
    return "3.png: 1 shape of the class 'Tumor', which is none of tumour; did you mean 'tumour'?"


def _damaged(cohort: Path) -> str:
    (cohort / "truth" / "3.geojson").write_text('{"type": ', encoding="utf-8")
    return "3.geojson: "


def _no_slide(cohort: Path) -> str:
    (cohort / "slides" / "3.png").write_bytes((cohort / "slides" / "3.png").read_bytes()[:2000])
    return "3.png: "


@pytest.mark.parametrize("spoil", [_without, _swapped, _outside, _of_another_name, _damaged, _no_slide])
def test_a_slide_that_cannot_be_learned_from_is_named_and_left_out(
    spoil: Callable[[Path], str], command: Any, cohort: Path
) -> None:
    expected = spoil(cohort)
    code, said, _ = train(command, cohort, "--method", "picture", "--set", "fit.steps=1")
    assert code == 0
    assert "4 slides to learn tumour from" in said
    assert expected in said
    assert "left out" in said


def test_annotations_of_no_slide_of_the_wanted_class_are_one_line_and_exit_code_2(command: Any, cohort: Path) -> None:
    code, _, error = train(command, cohort, classes="tumor")
    assert code == 2
    assert error.startswith("BAD_COHORT: ")
    assert error.count("\n") == 1
    assert "did you mean 'tumor'?" in error
    assert not (cohort / "model").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "fit.step=3"], "--set: fit: unknown setting 'step'; did you mean 'steps'?"),
        (["--set", "fit.patience"], "--set fit.patience: write KEY=VALUE"),
        (["--set", "fit.patience=0"], "patience is at least 1, got 0"),
        (["--set", "fit.patience=long"], "--set: fit: "),
        (["--set", "refinement.network=u-nett"], "u-nett"),
        (["--set", "heat.steps=3"], "cannot be laid in 3 equal steps"),
        (["--set", "method=picture"], "sees a probability map in a cascade alone"),
        (["--method", "all"], "'all' is not one of"),
        (["--folds", "1"], "--folds"),
        (["--trunk", "colour-stat"], "colour-stats"),
        (["--slide-mpp", "wide"], "--slide-mpp"),
    ],
)
def test_settings_that_make_no_sense_are_exit_code_2_and_say_what_to_do(
    words: list[str], message: str, command: Any, cohort: Path
) -> None:
    code, said, error = train(command, cohort, *words)
    assert code == 2, error
    assert message in error
    assert "epoch" not in said  # nobody waits for the first stage to be told of a slip in the second


def test_after_a_slip_the_right_command_may_have_the_same_folder(command: Any, cohort: Path) -> None:
    assert train(command, cohort, "--trunk", "colour-stat")[0] == 2
    assert train(command, cohort, "--method", "picture", "--set", "fit.steps=1")[0] == 0


@pytest.mark.parametrize("classes", ["", "tumour,tumour", "background", "Ignore*"])
def test_classes_that_are_no_names_are_refused(classes: str, command: Any, cohort: Path) -> None:
    code, _, error = train(command, cohort, classes=classes)
    assert (code, error.count("\n")) == (2, 1)
    assert "classes are different names" in error


def test_slides_too_coarse_for_the_patches_are_said_so(command: Any, cohort: Path) -> None:
    code, _, error = train(command, cohort, "--slide-mpp", 4.0)
    assert code == 2
    assert error.startswith("MPP_TOO_COARSE: ")
    assert "leave the slide out, or train with a larger --mpp" in error
    assert "upsample" not in error
    assert error.count("\n") == 1


def test_slides_without_a_resolution_are_named_with_the_flag_that_helps(command: Any, cohort: Path) -> None:
    words = ("wsi", "segment", "train", "--slides", cohort / "slides", "--annotations", cohort / "truth",
             "--classes", "tumour", "--out", cohort / "model")  # fmt: skip
    code, _, error = command(*words)
    assert code == 2
    assert "mpp" in error


def test_help_names_every_flag_and_what_the_exit_codes_mean(command: Any) -> None:
    code, said, _ = command("wsi", "segment", "train", "--help")
    assert code == 0
    for flag in ("--slides", "--annotations", "--classes", "--method", "--set", "--config", "--weights", "--folds"):
        assert flag in said
    assert "Exit codes: 0 all well" in said
    said = " ".join(said.split())
    defaults = SegmentationConfig.of_classes(("a",))
    dense = SegmentationConfig.of_classes(("a",), "dense")
    assert f"[default: {defaults.fit.steps}, dense: {dense.fit.steps}]" in said
    assert f"[default: {defaults.classifier.epochs}]" in said
    assert f"[default: {defaults.folds}]" in said
    assert f"[default: {defaults.refinement.side_px}]" in said
    assert f"[default: {defaults.patches.tiling.tile_px}, dense: {dense.dense.tile_px}]" in said
    assert f"[default: {defaults.network.trunk}]" in said
