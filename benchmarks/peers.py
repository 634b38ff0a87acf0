"""A folder of slides through this engine and its peers: tiles per second of whole commands, all with one free encoder.

Everybody finds tissue, cuts 256-px tiles at 0.5 mpp, averages the colours of each, and writes a store, with two readers
and batches of 64: ``wsi-extract``; slide2vec and LazySlide as the package index has them, each in an environment of its
own under ``--envs``, in the fastest way they offer on two cores; and the loop of TRIDENT and CLAM, written anew.

Two rates are given. One is tiles over the seconds of the whole command. The other leaves out what a run costs before its
first tile: a run on a slide of a few tiles is taken off, tiles and seconds. The second is the fair one, as start-up weighs
nothing in a cohort, and the one compared; it needs the large slides of a full run, so ``--quick`` compares whole commands.
Features are checked against the full-resolution pixels that OpenSlide shows at the same places.

    python benchmarks/peers.py                      # 10,000 tiles, about a quarter of an hour
    python benchmarks/peers.py --quick              # under a minute once the environments are there
    python benchmarks/peers.py --slides FOLDER      # your own slides; the folder holds nothing else
"""

import argparse
import hashlib
import os
import resource
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
from slides import bits_per_pixel, write_large_slides, write_slides

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
    """One finished run; ``cpu_s`` is the processor time of all its processes."""

    seconds: float
    cpu_s: float
    tiles: int


def ours() -> Engine:
    options = ["--encoder", f"{RUNS / 'means.py'}:build", "--mpp", str(MPP), "--tile", str(TILE_PX)]
    options += ["--min-tissue", MIN_TISSUE, "--read-threads", READERS, "--batch-size", BATCH, "--device", "cpu"]
    command = (sys.executable, "-c", "from cli.extract import main; main()")
    return Engine(OURS, command, (sys.executable, str(RUNS / "with_ours.py"), "export"), tuple(options))


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
    start, cpu = time.perf_counter(), _children_cpu_s()
    _call((*engine.run, str(slides), str(out), *engine.after))
    seconds, cpu_s = time.perf_counter() - start, _children_cpu_s() - cpu
    _call((*engine.export, str(out), str(file)))
    with np.load(file) as stored:
        tiles = sum(len(stored[key]) for key in stored.files if key.endswith("/means"))
    return Run(seconds, cpu_s, tiles), file


def _call(command: Sequence[str]) -> None:
    """Run a command; a peer's interpreter does not see what this one was told to import from."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" or command[0] == sys.executable}
    variables.setdefault("CUFILE_LOGFILE_PATH", os.devnull)  # else cuCIM leaves a cufile.log where this is run
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"it ended with {done.returncode}:\n{_end(done.stderr or done.stdout)}")


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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


class Bench:
    """All engines in turn, round after round, so that a slow spell of the machine meets all; the best run counts."""

    def __init__(self, chosen: Sequence[Engine], work: Path) -> None:
        self.engines = list(chosen)
        self.apart: dict[str, float] = {}
        self._work = work
        self._runs: dict[tuple[str, Path], list[Run]] = {}

    def round(self, slides: Path) -> None:
        """Run every engine once. One that fails is named, and left out from then on."""
        for engine in list(self.engines):
            try:
                one, file = run(engine, slides, self._work)
            except RuntimeError as error:
                if engine.name == OURS:
                    raise
                print(f"{engine.name} is left out: {error}", file=sys.stderr)
                self.engines.remove(engine)
                continue
            print(f"{engine.name}: {one.tiles} tiles in {one.seconds:.1f} s", flush=True)
            self._runs.setdefault((engine.name, slides), []).append(one)
            self.apart[engine.name] = max(self.apart.get(engine.name, 0.0), largest_difference(file, slides))

    def best(self, engine: Engine, slides: Path) -> Run:
        return min(self._runs[engine.name, slides], key=lambda one: one.seconds)

    def figures(self, slides: Path, few: Path | None) -> list[Figure]:
        figures, compared, what = [], {}, "whole command" if few is None else "without start-up"
        for engine in self.engines:
            whole = self.best(engine, slides)
            name, rate = engine.name, whole.tiles / whole.seconds
            figures.append(Figure(f"{name}: whole command, {whole.tiles:,} tiles", rate, "tiles/s"))
            if few is not None:
                least = self.best(engine, few)
                rate = (whole.tiles - least.tiles) / (whole.seconds - least.seconds)
                figures.append(Figure(f"{name}: start-up, with {least.tiles} tiles", least.seconds, "s"))
                figures.append(Figure(f"{name}: {what}", rate, "tiles/s"))
                cpu_ms = (whole.cpu_s - least.cpu_s) / (whole.tiles - least.tiles) * 1000
                figures.append(Figure(f"{name}: {what}, processor", cpu_ms, "ms/tile"))
            figures.append(Figure(f"{name}: largest error of a mean colour", self.apart[name], "grey levels"))
            compared[name] = rate
        mine = compared.pop(OURS)
        return figures + [Figure(f"{OURS} over {name}, {what}", mine / rate, "x", 5) for name, rate in compared.items()]


def options() -> argparse.Namespace:
    given = parser(__doc__)
    given.add_argument(
        "--slides", type=Path, metavar="FOLDER", help="real slides instead of phantoms; nothing else in it"
    )
    given.add_argument(
        "--envs",
        type=Path,
        metavar="FOLDER",
        default=Path.home() / ".cache" / "wsi-benchmarks",
        help="where the peers' environments are kept",
    )
    given.add_argument("--rounds", type=int, help="runs of each engine, of which the best counts; 2, or 1 with --quick")
    return given.parse_args()


def main() -> None:
    chosen = options()
    every = list(engines(chosen.envs.absolute()))
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        few, slides = Path(folder) / "few", Path(folder) / "slides"
        if chosen.slides is not None:
            slides = chosen.slides.absolute()
        else:
            made = write_large_slides(slides, *((1, 2, (4096, 8192)) if chosen.quick else (4, 2)))
            bits = float(np.mean([bits_per_pixel(path) for path in made]))
            figures.append(Figure(f"tissue of the phantoms ({len(made)})", bits, "bits/pixel"))
        bench = Bench(every, Path(folder))
        if not chosen.quick:
            write_slides(few, 1, (4096, 4096), tissue_fraction=0.4)
        for _ in range(chosen.rounds or (1 if chosen.quick else 2)):
            if not chosen.quick:
                bench.round(few)
            bench.round(slides)
        figures += bench.figures(slides, None if chosen.quick else few)
    report("A folder of slides, from tissue to store, with an encoder that costs nothing", figures, chosen.json)


if __name__ == "__main__":
    main()
