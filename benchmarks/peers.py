"""A folder of slides through this engine and its peers: tiles per second of whole commands, all with one free encoder.

Everybody finds tissue, cuts 256-px tiles at 0.5 mpp, averages the colours of each, and writes a store, with two readers
and batches of 64: ``wsi-extract``; slide2vec and LazySlide as the package index has them, each in an environment of its
own under ``--envs``, in the fastest way they offer on two cores; and the loop of TRIDENT and CLAM, written anew.

Two rates are given. One is tiles over the seconds of the whole command. The other leaves out what a run costs before its
first tile: a run on a slide of a few tiles is taken off, tiles and seconds. The second is the fair one for large folders
and the one compared here. Features are checked against the full-resolution pixels that OpenSlide shows at the same places.

    python benchmarks/peers.py --quick              # under a minute once the environments are there
    python benchmarks/peers.py --slides FOLDER      # your own slides; the folder holds nothing else
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide
from figures import Figure, parser, report
from slides import bits_per_pixel, write_slides

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "benchmarks" / "peer_runs"
READERS, BATCH, TILE_PX, MPP, MIN_TISSUE = "2", "64", 256, 0.5, "0.25"  # as in peer_runs/means.py
CHECKED_TILES = 48  # of each slide
OURS = "wsi-extract"


@dataclass(frozen=True)
class Engine:
    """How one engine is run: ``run`` is followed by SLIDES and OUT, ``export`` by OUT and FILE; ``after`` ends the run."""

    name: str
    run: tuple[str, ...]
    export: tuple[str, ...]
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One finished run."""

    seconds: float
    tiles: int


def ours() -> Engine:
    options = ("--encoder", f"{RUNS / 'means.py'}:build", "--mpp", str(MPP), "--tile", str(TILE_PX))
    options += ("--min-tissue", MIN_TISSUE, "--read-threads", READERS, "--batch-size", BATCH, "--device", "cpu")
    command = (sys.executable, "-c", "from cli.extract import main; main()")
    return Engine(OURS, command, (sys.executable, str(RUNS / "with_ours.py"), "export"), options)


def peer(name: str, python: Path | str, script: str) -> Engine:
    command = (str(python), str(RUNS / script))
    return Engine(name, (*command, "run"), (*command, "export"))


def environment(envs: Path, package: str) -> Path:
    """The interpreter of a virtual environment with ``package``, made by pip where it is not there yet.

    Raises RuntimeError where pip cannot install it, with what pip said.
    """
    wanted = RUNS / f"requirements-{package}.txt"
    home, python = envs / package, envs / package / "bin" / "python"
    stamp, digest = home / "complete.txt", hashlib.sha256(wanted.read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return python
    print(f"installing {wanted.read_text().strip()} into {home}: several gigabytes, once", flush=True)
    shutil.rmtree(home, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "-r", wanted], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"pip could not install it into {home}:\n{_end(done.stderr)}")
    stamp.write_text(digest)
    return python


def engines(envs: Path) -> Iterator[Engine]:
    """Ourselves and every peer that can be had; what cannot is said."""
    yield ours()
    for name, package in (("slide2vec", "slide2vec"), ("LazySlide", "lazyslide")):
        try:
            yield peer(name, environment(envs, package), f"with_{package}.py")
        except RuntimeError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    yield peer("TRIDENT-style loop", sys.executable, "as_trident.py")


def run(engine: Engine, slides: Path, work: Path) -> tuple[Run, Path]:
    """Run the whole command on a fresh store; the second value is a file of places and features by slide.

    Raises RuntimeError where the engine fails, with what it said.
    """
    out, file = work / "out", work / "features.npz"
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    _call((*engine.run, str(slides), str(out), *engine.after))
    seconds = time.perf_counter() - start
    _call((*engine.export, str(out), str(file)))
    with np.load(file) as stored:
        tiles = sum(len(stored[key]) for key in stored.files if key.endswith("/means"))
    return Run(seconds, tiles), file


def _call(command: Sequence[str]) -> None:
    """Run a command with this tree importable, and nothing else of this environment."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"it ended with {done.returncode}:\n{_end(done.stderr or done.stdout)}")


def _end(text: str, lines: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def largest_difference(file: Path, slides: Path) -> float:
    """Grey levels between stored means and those of the pixels that OpenSlide shows there, at full resolution."""
    paths = {path.stem: path for path in slides.iterdir()}
    largest, choose = 0.0, np.random.default_rng(1)
    with np.load(file) as stored:
        for name in sorted({key.rpartition("/")[0] for key in stored.files}):
            xy, means = stored[f"{name}/xy"], stored[f"{name}/means"]
            with openslide.OpenSlide(paths[name]) as slide:
                side = round(TILE_PX * MPP / float(slide.properties[openslide.PROPERTY_NAME_MPP_X]))
                for row in choose.permutation(len(xy))[:CHECKED_TILES]:
                    region = slide.read_region((int(xy[row, 0]), int(xy[row, 1])), 0, (side, side))
                    true = np.asarray(region)[..., :3].mean((0, 1))
                    largest = max(largest, float(np.abs(means[row] * 255 - true).max()))
    return largest


def measure(chosen: Sequence[Engine], slides: Path, few: Path, rounds: int) -> list[Figure]:
    """All engines in turn, ``rounds`` times, so that a slow spell of the machine meets all; the best run of each counts."""
    empty: dict[str, list[Run]] = {}
    whole: dict[str, list[Run]] = {}
    apart: dict[str, float] = {}
    failed: set[str] = set()
    with tempfile.TemporaryDirectory() as work:
        for _ in range(rounds):
            for engine in chosen:
                if engine.name in failed:
                    continue
                try:
                    empty.setdefault(engine.name, []).append(run(engine, few, Path(work))[0])
                    one, file = run(engine, slides, Path(work))
                except RuntimeError as error:
                    print(f"{engine.name} is left out: {error}", file=sys.stderr)
                    failed.add(engine.name)
                    continue
                whole.setdefault(engine.name, []).append(one)
                print(f"{engine.name}: {one.tiles} tiles in {one.seconds:.1f} s", flush=True)
                if engine.name not in apart:
                    apart[engine.name] = largest_difference(file, slides)
    if OURS in failed:
        raise SystemExit(f"{OURS} failed, so there is nothing to compare")
    figures, steady = [], {}
    for engine in chosen:
        if engine.name in failed:
            continue
        best, least = (min(runs[engine.name], key=lambda one: one.seconds) for runs in (whole, empty))
        steady[engine.name] = (best.tiles - least.tiles) / (best.seconds - least.seconds)
        figures += [
            Figure(f"{engine.name}: whole command, {best.tiles} tiles", best.tiles / best.seconds, "tiles/s"),
            Figure(f"{engine.name}: a run of {least.tiles} tiles", least.seconds, "s"),
            Figure(f"{engine.name}: without start-up", steady[engine.name], "tiles/s"),
            Figure(f"{engine.name}: largest difference of a mean from OpenSlide", apart[engine.name], "grey levels"),
        ]
    mine = steady.pop(OURS)
    return figures + [Figure(f"{OURS} over {name}, without start-up", mine / rate, "x") for name, rate in steady.items()]


def options() -> argparse.Namespace:
    given = parser(__doc__)
    given.add_argument("--slides", type=Path, metavar="FOLDER", help="real slides instead of phantoms; nothing else in it")
    given.add_argument(
        "--envs",
        type=Path,
        metavar="FOLDER",
        default=Path.home() / ".cache" / "wsi-benchmarks",
        help="where the peers' environments are kept",
    )
    given.add_argument("--rounds", type=int, help="runs of each engine; the best counts")
    return given.parse_args()


def main() -> None:
    chosen = options()
    every = list(engines(chosen.envs.absolute()))
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        few, slides = Path(folder) / "few", Path(folder) / "slides"
        write_slides(few, 1, (4096, 4096), tissue_fraction=0.4)
        if chosen.slides is not None:
            slides = chosen.slides.absolute()
        else:
            made = write_slides(slides, *((2, (8192, 8192)) if chosen.quick else (8, (20480, 16384))))
            bits = float(np.mean([bits_per_pixel(path) for path in made]))
            figures.append(Figure(f"the {len(made)} phantoms, on tissue", bits, "bits/pixel"))
        figures += measure(every, slides, few, chosen.rounds or (1 if chosen.quick else 3))
    report("A folder of slides, tissue to store, with an encoder that costs nothing", figures, chosen.json)


if __name__ == "__main__":
    main()
