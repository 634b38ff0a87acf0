"""The commands, as a user runs them: words in, files, words and exit codes out."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cli.extract import extract
from cli.main import wsi
from cli.progress import CohortProgress
from features import FeatureStore
from features.outcome import Outcome
from tests.features.test_cohort import slide_file
from wsi.discover import SlideSource

ROOT = Path(__file__).parents[2]
SMALL = ["--encoder", "colour-stats", "--mpp", "1.0", "--tile", "64"]


def test_the_main_job(command: Any, tmp_path: Path) -> None:
    slide_file(tmp_path / "slides" / "a.tif")
    slide_file(tmp_path / "slides" / "b.tif", seed=1)
    code, out, err = command("wsi-extract", tmp_path / "slides", tmp_path / "out", *SMALL)
    assert (code, err) == (0, "")
    n = sum(len(slide.grid) for slide in FeatureStore(tmp_path / "out"))
    assert re.search(rf"done +2 slides, {n} tiles", out)
    assert "[2/2]" in out
    code, out, _ = command("wsi-extract", tmp_path / "slides", tmp_path / "out", *SMALL)
    assert code == 0
    assert re.search(r"there already +2 slides", out)
    assert command("wsi", "extract", tmp_path / "slides", tmp_path / "out", *SMALL)[0] == 0


def test_failures_are_named_with_codes_and_exit_code_3_or_4(command: Any, tmp_path: Path) -> None:
    slide_file(tmp_path / "slides" / "a.tif")
    (tmp_path / "slides" / "b.svs").write_text("no slide")
    code, out, _ = command("wsi-extract", tmp_path / "slides", tmp_path / "out", *SMALL)
    assert code == 3
    assert re.search(r"b\.svs: NOT_A_SLIDE: .*b\.svs", out)
    code, out, _ = command("wsi-extract", tmp_path / "slides" / "b.svs", tmp_path / "out2", *SMALL)
    assert code == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "out", *SMALL], "NOT_FOUND: nowhere: there is no such file or folder"),
        (["slides", "out"], "which encoder"),
        (["slides"], "two arguments are needed"),
        (["slides", "out", *SMALL, "--overlap", "64"], "overlap_px must be from 0 to 63"),
        (["slides", "out", *SMALL, "--slide-mpp", "wide"], "--slide-mpp"),
        (["slides", "out", *SMALL, "--pattren", "x"], "--pattern"),  # did you mean
        (["slides", "out", "--demo", "demo"], "--demo makes its own slides"),
        (["slides", "slides", *SMALL], "OUT must be another folder than SLIDES"),
        (["slides", "out", *SMALL, "--pattern", "*.svs"], "no slides found"),
        (["slides", "out", *SMALL, "--mpp-tolerance", "nan"], "mpp_tolerance"),
        (["slides", "out", "--encoder", "uni2h"], "did you mean uni2-h"),
    ],
)
def test_a_command_that_makes_no_sense_is_exit_code_2_and_touches_nothing(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Any, message: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    slide_file(tmp_path / "slides" / "a.tif")
    code, _, err = command("wsi-extract", *words)
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_another_tiling_in_the_same_store_is_exit_code_2(command: Any, tmp_path: Path) -> None:
    slide_file(tmp_path / "a.tif")
    assert command("wsi-extract", tmp_path / "a.tif", tmp_path / "out", *SMALL)[0] == 0
    code, _, err = command("wsi-extract", tmp_path / "a.tif", tmp_path / "out", *SMALL, "--overlap", "8")
    assert code == 2
    assert "overlap_px 0 there, 8 asked" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--encoder", "uni2-h", "--offline"], r"MODEL_MISSING: .*MahmoodLab/UNI2-h"),
        (["--encoder", "colour-stats", "--device", "cuda:7"], r"DEVICE: "),
    ],
)
def test_what_this_machine_cannot_do_is_exit_code_5_and_one_line(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Any, message: Any
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    slide_file(tmp_path / "a.tif")
    code, _, err = command("wsi-extract", tmp_path / "a.tif", tmp_path / "out", *words)
    assert code == 5
    assert re.match(message, err)
    assert err.count("\n") == 1


def test_an_output_that_cannot_be_written_is_exit_code_5(command: Any, tmp_path: Path) -> None:
    slide_file(tmp_path / "a.tif")
    (tmp_path / "out").write_text("a file")
    code, _, err = command("wsi-extract", tmp_path / "a.tif", tmp_path / "out", *SMALL)
    assert code == 5
    assert err.startswith("OUTPUT_NOT_WRITABLE: ")


def test_a_dry_run_judges_several_devices_by_one(command: Any, tmp_path: Path) -> None:
    slide_file(tmp_path / "slides" / "a.tif")
    arguments = ("wsi-extract", tmp_path / "slides", tmp_path / "out", *SMALL, "--dry-run")
    code, out, _ = command(*arguments, "--device", "cpu,cpu")
    assert (code, "tiles to encode" in out) == (0, True)


def test_a_dry_run_says_what_it_would_be_and_writes_nothing(command: Any, tmp_path: Path) -> None:
    slide_file(tmp_path / "slides" / "a.tif")
    (tmp_path / "slides" / "b.svs").touch()
    code, out, _ = command("wsi-extract", tmp_path / "slides", tmp_path / "out", *SMALL, "--dry-run")
    assert code == 3  # as the run would
    assert not (tmp_path / "out").exists()
    assert re.search(r"a\.tif: \d+ tiles", out)
    assert "b.svs: EMPTY_FILE" in out
    assert re.search(
        r"2 slides: 0 there already, 1 would fail; \d+ tiles to encode, about [0-9.]+ (bytes|kB), about \d+ s here", out
    )


def test_the_demo_makes_everything_itself_and_what_it_names_is_there(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wsi.phantom import PhantomSpec

    small = [
        ("tumour", PhantomSpec(3072, 2304, mpp=0.5, seed=1)),
        ("glass", PhantomSpec(1024, 1024, mpp=0.5, n_pieces=0)),
    ]
    monkeypatch.setattr("cli.extract.demo_specs", lambda: small)
    code, out, err = command("wsi-extract", "--demo", tmp_path / "demo")
    assert (code, err) == (0, "")
    named = [Path(word) for word in re.findall(r"^  (\S+)", out.split("Look at:")[1], re.MULTILINE) if "/" in word]
    assert len(named) >= 3
    for path in named:
        assert list(path.parent.glob(path.name)), path
    for picture in (tmp_path / "demo" / "results" / "thumbnails").glob("*.jpg"):
        assert np.asarray(Image.open(picture)).std() > 0
    snippet = out.split("In Python:\n")[1]
    code = "\n".join(line[2:] for line in snippet.splitlines())
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "tumour.svs" in run.stdout


def test_verify_finds_what_was_damaged(command: Any, tmp_path: Path) -> None:
    slide_file(tmp_path / "a.tif")
    command("wsi-extract", tmp_path / "a.tif", tmp_path / "out", *SMALL)
    code, out, _ = command("wsi", "verify", tmp_path / "out", "--deep")
    assert code == 0
    assert "1 slides checked (every byte): all as written" in out
    shard = next((tmp_path / "out" / "slides").rglob("features/c/0/0"))
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    assert command("wsi", "verify", tmp_path / "out")[0] == 0  # sizes are right: that is all it looks at
    code, out, _ = command("wsi", "verify", tmp_path / "out", "--deep")
    assert code == 3
    assert "features/c/0/0 has other content than was written" in out


def test_what_is_no_store_is_exit_code_2_and_a_damaged_one_3(command: Any, tmp_path: Path) -> None:
    assert command("wsi", "verify", tmp_path)[0] == 2
    slide_file(tmp_path / "a.tif")
    command("wsi-extract", tmp_path / "a.tif", tmp_path / "out", *SMALL)
    next((tmp_path / "out" / "slides").glob("*/zarr.json")).unlink()
    code, out, _ = command("wsi", "verify", tmp_path / "out")
    assert code == 3
    assert "zarr.json is missing" in out
    assert command("wsi", "info", tmp_path / "out")[0] == 3
    assert command("wsi-extract", tmp_path / "a.tif", tmp_path / "out", *SMALL)[0] == 4
    assert command("wsi", "remove", tmp_path / "out", "a.tif")[0] == 0
    assert command("wsi-extract", tmp_path / "a.tif", tmp_path / "out", *SMALL)[0] == 0
    (tmp_path / "out" / "slides").rename(tmp_path / "elsewhere")
    assert command("wsi", "verify", tmp_path / "out")[0] == 3


def test_a_reader_that_leaves_does_not_stop_the_run(tmp_path: Path) -> None:
    for seed in range(3):
        slide_file(tmp_path / "slides" / f"{seed}.tif", seed=seed)
    words = " ".join(["from cli.extract import main; main()"])
    command = f"{sys.executable} -c '{words}' {tmp_path / 'slides'} {tmp_path / 'out'} {' '.join(SMALL)} | head -1"
    run = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert [len(slide.encoders) for slide in FeatureStore(tmp_path / "out")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def build(:", r"plugin\.py line 1: the plug-in failed: SyntaxError"),
        ("import nothing_of_this_name", r"plugin\.py line 1: the plug-in failed: ModuleNotFoundError"),
        ("def build():\n    raise KeyError('weights')", r"plugin\.py line 2: the plug-in failed: KeyError"),
        ("import sys\nsys.exit(0)", r"plugin\.py line 2: the plug-in failed: SystemExit"),
    ],
)
def test_a_plug_in_that_fails_is_one_line_with_its_place(command: Any, tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "plugin.py").write_text(body)
    slide_file(tmp_path / "a.tif")
    code, _, err = command(
        "wsi-extract", tmp_path / "a.tif", tmp_path / "out", "--encoder", f"{tmp_path / 'plugin.py'}:build"
    )
    assert code == 5
    assert re.search(message, err)
    assert err.count("\n") == 1


def test_remove_and_gc(command: Any, tmp_path: Path) -> None:
    slide_file(tmp_path / "a.tif")
    command("wsi-extract", tmp_path / "a.tif", tmp_path / "out", *SMALL)
    code, out, _ = command("wsi", "remove", tmp_path / "out", "a.tif")
    assert code == 0
    assert ".replaced" in out
    assert FeatureStore(tmp_path / "out").keys == ()
    code, out, _ = command("wsi", "gc", tmp_path / "out")
    assert code == 0
    assert list((tmp_path / "out" / ".replaced").iterdir()) == []
    code, _, err = command("wsi", "remove", tmp_path / "out", "a.tif")
    assert code != 0
    assert "holds no slide 'a.tif'" in err


def test_info_describes_a_slide_and_a_store(command: Any, tmp_path: Path) -> None:
    path = slide_file(tmp_path / "a.tif", mpp=0.5)
    code, out, _ = command("wsi", "info", path)
    assert code == 0
    assert "1600 x 1200 px, 0.80 x 0.60 mm" in out
    assert "0.5 x 0.5 mpp (from openslide.mpp)" in out
    assert "tiff.XResolution" in command("wsi", "info", path, "--properties")[1]
    command("wsi-extract", path, tmp_path / "out", *SMALL)
    code, out, _ = command("wsi", "info", tmp_path / "out")
    assert re.search(r"a\.tif +\d+ +colour-stats", out)
    assert command("wsi", "info", tmp_path / "nothing")[0] == 2


def test_phantom_and_encoders(command: Any, tmp_path: Path) -> None:
    code, out, _ = command("wsi", "phantom", tmp_path / "p.svs", "--width", 1024, "--height", 768)
    assert code == 0
    assert "1024 x 768 px" in command("wsi", "info", tmp_path / "p.svs")[1]
    assert command("wsi", "phantom", tmp_path / "p.svs")[0] == 2  # it is there: never written over unasked
    code, out, _ = command("wsi", "encoders")
    assert code == 0
    for name in ("uni2-h", "virchow2", "h-optimus-0", "gigapath", "phikon-v2", "hibou-b", "colour-stats"):
        assert re.search(rf"^{name}\b", out, re.MULTILINE)


def all_commands() -> Any:
    return [("wsi-extract", [])] + [("wsi", [])] + [("wsi", [verb]) for verb in wsi.commands]


@pytest.mark.parametrize(("name", "verb"), all_commands())
def test_every_command_explains_itself_and_every_option(command: Any, name: Any, verb: Any) -> None:
    code, out, _ = command(name, *verb, "--help")
    assert code == 0
    assert len(out.splitlines()) > 4
    target: Any = extract if name == "wsi-extract" else wsi.commands.get(verb[0]) if verb else wsi
    for parameter in target.params:
        if parameter.param_type_name == "option":
            assert parameter.help, f"{name} {verb} {parameter.name} has no help"


def test_importing_wsi_is_quick_to_begin_with_and_needs_no_torch() -> None:
    code = "import sys, wsi, wsi.phantom; assert not {'torch', 'zarr', 'timm', 'imagecodecs'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    code = "import sys, features, features.store; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_help_needs_no_torch() -> None:
    code = """if True:
        import sys
        from cli.main import wsi
        wsi.main(["--help"], standalone_mode=False)
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_progress_on_a_terminal_and_off_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for terminal in (True, False):
        with Path(os.devnull).open("w") as sink:
            console = Console(file=sink, force_terminal=terminal, width=200, record=True)
            with CohortProgress(console) as progress:
                progress.started(3, 3000)
                source = SlideSource("a.svs", "a.svs", 1000)
                progress.slide_started(source, 100, 20)
                other = SlideSource("c.svs", "c.svs", 1000)  # on another device
                progress.slide_started(other, 500, 0)
                progress.tiles_done(other, 5)
                clock[0] += 40
                progress.tiles_done(source, 40)
                clock[0] += 10
                done = Outcome("a.svs", "k", "done", "OK", "", {"n_tiles": 100, "tiles_per_s": 2.0})
                progress.slide_finished(source, done)
                failed = Outcome("b.svs", "k", "failed", "TRUNCATED", "b.svs: the file ends")
                progress.slide_finished(SlideSource("b.svs", "b.svs", 1000), failed)
            text = console.export_text()
        assert "[1/3] a.svs: done, 100 tiles, 2 tiles/s" in text
        assert "[2/3] b.svs: FAILED, TRUNCATED: b.svs: the file ends" in text
        if not terminal:
            assert "a.svs: 60 of 100 tiles, 1 tiles/s, 40 s left" in text
            assert "(2 min left)" in text  # 50 s for the first of three equal slides
            assert "\x1b" not in text


def test_report_lines_are_json(command: Any, tmp_path: Path) -> None:
    slide_file(tmp_path / "a.tif")
    command("wsi-extract", tmp_path / "a.tif", tmp_path / "out", *SMALL)
    row, run = (json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines())
    assert row["status"] == "done"
    assert row["mpp"] == [1.0, 1.0]
    assert row["encoders"] == {"colour-stats": {"dim": 9, "n_nonfinite": 0}}
    assert run["status"] == "run"
    assert "the encoder was busy" in run["message"]
    for line in (row, run):
        assert line["n_tiles"] > 0
        assert line["decode_ratio"] == 1
        assert 0 <= line["waited_s"] + line["encoder_busy_s"] <= line["loop_s"] + 0.002
        assert line["tiles_per_s"] == pytest.approx(line["n_tiles"] / line["loop_s"], rel=0.1)
        assert line["peak_memory_mb"] > 50
