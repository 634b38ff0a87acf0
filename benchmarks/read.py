"""How fast tiles leave a slide: 256 x 256 pixels at 0.5 mpp from a 0.25-mpp scan, by every way there is.

OpenSlide with Pillow (what most tools do), OpenSlide with area means, TiffSlide, libvips and cuCIM without its GPU; and
ours, tile by tile and as the stream that ``wsi-extract`` reads. On a plain grid, and on one whose tiles overlap by half.
What every way returns is first compared with OpenSlide's pixels at full resolution, since filters differ in reducing them;
the stream, which gives reduced tiles alone, with area means of OpenSlide's. Ours must be equal for JPEG, and within one
grey level for JPEG 2000. All ways take turns in short runs, so a slow spell of the machine meets all; the best run counts.

    python benchmarks/read.py --quick
    python benchmarks/read.py --slides a.svs b.svs      # real ones; tiles of 512 level-0 pixels become 256

libvips and cuCIM are measured where they are installed (``benchmarks/requirements.txt``); what is missing is said.
"""

import importlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import count, cycle, islice, product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import tifffile
import tiffslide
from figures import Figure, parser, report
from PIL import Image
from slides import bits_per_pixel, write_dense

from wsi import Slide
from wsi.area import area_resize
from wsi.grid import TileGrid
from wsi.phantom import Codec
from wsi.readers import Pixels, open_reader
from wsi.stream import TileJob, TileStream, stream_jobs

TILE_PX = 256
SIDE_PX = 2 * TILE_PX  # 0.5 mpp from 0.25
BATCH, BATCHES = 16, 4  # small: what the stream has read ahead when a turn ends is lost to its rate
COMPARED = 32  # places; all of them for our own
SIZE = (SIDE_PX, SIDE_PX)

# Written as densely as scanners do: about two bits a pixel on tissue, for RGB with whole chroma two and a half.
QUALITY: dict[Codec, int] = {"jpeg": 78, "jpeg-rgb": 30, "jpeg2000": 50, "jpeg2000-rgb": 30}
# What the stream should do on one thread, times what OpenSlide with Pillow does.
REACH: dict[str, float] = {"jpeg": 6.0, "jpeg-rgb": 6.0, "jpeg2000": 2.0, "jpeg2000-rgb": 2.0}
STREAM, DIRECT, PILLOW, CUCIM = "ours, stream", "ours, tile by tile", "OpenSlide + Pillow", "cuCIM, CPU"

Place = tuple[int, int]
Read = Callable[[Place], Pixels]


@dataclass(frozen=True)
class Way:
    """One way of reading: ``full`` gives (512, 512, 3) at a place of level 0, ``tile`` the same reduced to 256 px."""

    name: str
    full: Read
    tile: Read


@dataclass(frozen=True)
class Turns:
    """How long every way reads at a time, and how often."""

    seconds: float
    rounds: int


class CannotReadError(Exception):
    """A library is there but not for this codec; the text says why."""


def by_area(name: str, full: Read) -> Way:
    return Way(name, full, lambda place: area_resize(full(place), (TILE_PX, TILE_PX)))


def with_pillow(path: Path) -> Way:
    slide = openslide.OpenSlide(path)

    def region(place: Place) -> Image.Image:
        return slide.read_region(place, 0, SIZE).convert("RGB")

    def tile(place: Place) -> Pixels:
        return np.asarray(region(place).resize((TILE_PX, TILE_PX), Image.Resampling.BILINEAR))

    return Way(PILLOW, lambda place: np.asarray(region(place)), tile)


def with_reader(name: str, reader: str) -> Callable[[Path], Way]:
    def way(path: Path) -> Way:
        opened = open_reader(path, reader)
        return by_area(name, lambda place: opened.read(0, *place, *SIZE))

    return way


def with_tiffslide(path: Path) -> Way:
    handle = each_thread(lambda: tiffslide.TiffSlide(path))

    def full(place: Place) -> Pixels:
        pixels: Pixels = handle().read_region(place, 0, SIZE, as_array=True)
        return pixels

    return by_area("TiffSlide", full)


def with_vips(path: Path) -> Way:
    """A libvips region of ``tiffload``. Its own threads are off: what is counted is the threads that read.

    Raises CannotReadError for JPEG 2000 where libvips is built without it, as the wheel of 8.18.7 is.
    """
    os.environ["VIPS_CONCURRENCY"] = "1"
    vips = importlib.import_module("pyvips")
    handle = each_thread(lambda: vips.Region.new(vips.Image.tiffload(str(path), page=0)))

    def full(place: Place) -> Pixels:
        return np.frombuffer(handle().fetch(*place, *SIZE), np.uint8).reshape(*SIZE, -1)[..., :3]

    try:
        full((0, 0))
    except vips.Error as error:
        raise CannotReadError(str(error).strip().replace("\n", "; ")) from error
    return by_area("libvips", full)


def with_cucim(path: Path) -> Way:
    image = importlib.import_module("cucim").CuImage
    handle = each_thread(lambda: image(str(path)))
    return by_area(CUCIM, lambda place: np.asarray(handle().read_region(place, SIZE, 0, device="cpu")))


WAYS: dict[str, Callable[[Path], Way]] = {
    PILLOW: with_pillow,
    "OpenSlide + area": with_reader("OpenSlide + area", "openslide"),
    "TiffSlide": with_tiffslide,
    "libvips": with_vips,
    CUCIM: with_cucim,
    DIRECT: with_reader(DIRECT, "tiff"),
}
MODULES = {"libvips": "pyvips", CUCIM: "cucim"}  # what has to be importable beyond our own dependencies


def each_thread(make: Callable[[], Any]) -> Callable[[], Any]:
    """A function that gives every thread a handle of its own: not every library shares one safely."""
    local = threading.local()

    def get() -> Any:
        if not hasattr(local, "handle"):
            local.handle = make()
        return local.handle

    return get


def importable_ways() -> list[str]:
    """The names of all ways but those whose library is missing, which are said."""
    names = []
    for name in WAYS:
        try:
            importlib.import_module(MODULES.get(name, "wsi"))
        except ImportError as error:
            print(f"{name} is left out: {error}; see benchmarks/requirements.txt", file=sys.stderr)
            continue
        names.append(name)
    return names


def opened_ways(names: list[str], path: Path, codec: str) -> list[Way]:
    """The ways that read this file; those that cannot are said."""
    ways = []
    for name in names:
        try:
            ways.append(WAYS[name](path))
        except CannotReadError as error:
            print(f"{codec}: {name} is left out: {error}", file=sys.stderr)
    return ways


def lattice(size: tuple[int, int], stride: int) -> TileGrid:
    """All whole tiles of a slide, in rows."""
    rows, columns = (range(0, side - SIDE_PX + 1, stride) for side in (size[1], size[0]))
    xy = np.array([(x, y) for y, x in product(rows, columns)])
    return TileGrid(xy=xy, tile_px=TILE_PX, side=SIZE, stride=(stride, stride), mpp=(0.5, 0.5))


# --- checks -----------------------------------------------------------------------------------------------------------


def differences(codec: str, ways: list[Way], slide: Slide, grid: TileGrid) -> list[Figure]:
    """The largest difference of each way from OpenSlide. Ends the program where ours is too large."""
    allowed = int("jpeg2000" in codec)
    true, *others = ways
    assert true.name == PILLOW
    places = places_of(grid)
    some = places[:: max(1, len(places) // COMPARED)]
    figures = []
    for way in others:
        compared = places if way.name == DIRECT else some
        difference = max(int(cv2.absdiff(true.full(place), way.full(place)).max()) for place in compared)
        figures.append(_difference(codec, way.name, difference, allowed if way.name == DIRECT else None))
    worst = 0
    for batch in TileStream(slide, grid, batch_size=BATCH, threads=2):
        if not batch.readable.all():
            raise SystemExit(f"{codec}: the stream could not read a tile of the batch at {batch.start}")
        for tile, place in zip(batch.pixels, places[batch.start :], strict=False):
            mean = area_resize(true.full(place), (TILE_PX, TILE_PX))
            worst = max(worst, int(cv2.absdiff(tile, mean).max()))
    return [*figures, _difference(codec, STREAM, worst, allowed)]


def _difference(codec: str, name: str, difference: int, allowed: int | None) -> Figure:
    if allowed is not None and difference > allowed:
        raise SystemExit(f"{codec}: {name}: differs from OpenSlide by {difference} grey levels, {allowed} are allowed")
    return Figure(f"{codec}: {name}: largest difference", difference, "grey levels", allowed, False)


def places_of(grid: TileGrid) -> list[Place]:
    return [(x, y) for x, y in grid.xy.tolist()]


# --- speed ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """What one turn came to: tiles per second, and milliseconds of processor time for a tile, whatever the machine did."""

    tiles_per_s: float
    cpu_ms: float


def rate_of(steps: Iterator[int], seconds: float) -> Rate:
    """Take steps for so many seconds; each says how many tiles it was."""
    start, cpu, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        done += next(steps)
    return Rate(done / (time.perf_counter() - start), (time.process_time() - cpu) / done * 1000)


def tile_by_tile(read: Read, grid: TileGrid, threads: int) -> Callable[[float], Rate]:
    """A function that reads for some seconds; the next call goes on where the last stopped, so no tile is warm.

    Tiles are put into batches in turn, as an encoder takes them, and as the stream delivers them.
    """
    around, pool = enumerate(cycle(places_of(grid))), ThreadPoolExecutor(threads)
    batches = np.zeros((BATCHES * BATCH, TILE_PX, TILE_PX, 3), np.uint8)

    def put(numbered: tuple[int, Place]) -> None:
        batches[numbered[0] % len(batches)] = read(numbered[1])

    def steps() -> Iterator[int]:
        while True:
            yield sum(1 for _ in pool.map(put, islice(around, 8 * threads)))

    return lambda seconds: rate_of(steps(), seconds)


def streamed(slide: Slide, grid: TileGrid, threads: int) -> Callable[[float], Rate]:
    """The same for the stream, which begins anew with every call: what it read ahead meanwhile would come for nothing."""

    def steps() -> Generator[int, None, None]:
        again = (TileJob(slide, grid) for _ in count())
        with closing(stream_jobs(again, batch_size=BATCH, threads=threads)) as batches:
            for batch in batches:
                yield len(batch)
                batch.release()

    def run(seconds: float) -> Rate:
        with closing(steps()) as batches:
            return rate_of(batches, seconds)

    return run


def rates(ways: list[Way], slide: Slide, grid: TileGrid, threads: int, turns: Turns) -> dict[str, Rate]:
    """The best turn of each way."""
    runs = {way.name: tile_by_tile(way.tile, grid, threads) for way in ways}
    runs[STREAM] = streamed(slide, grid, threads)
    taken: dict[str, list[Rate]] = {name: [] for name in runs}
    for _ in range(turns.rounds):
        for name, run in runs.items():
            taken[name].append(run(turns.seconds))
    return {name: max(each, key=lambda rate: rate.tiles_per_s) for name, each in taken.items()}


def measure(path: Path, codec: str, names: list[str], turns: Turns) -> list[Figure]:
    """``codec`` is how the figures are named; one grey level is allowed where that speaks of jpeg2000."""
    ways = opened_ways(names, path, codec)
    figures = [Figure(f"{codec}: tissue", bits_per_pixel(path), "bits/pixel")]
    with Slide.open(path, reader="tiff", mpp=0.25) as slide:
        plain, half = lattice(slide.size, SIDE_PX), lattice(slide.size, SIDE_PX // 2)
        figures += differences(codec, ways, slide, plain)
        one, two = (rates(ways, slide, plain, threads, turns) for threads in (1, 2))
        figures += speeds(f"{codec}, 1 thread", one) + ratios(f"{codec}, 1 thread", one, REACH.get(codec))
        figures += [Figure(f"{codec}: {name}, processor", rate.cpu_ms, "ms/tile") for name, rate in one.items()]
        figures += speeds(f"{codec}, 2 threads", two) + ratios(f"{codec}, 2 threads", two, None)
        gain = two[STREAM].tiles_per_s / one[STREAM].tiles_per_s
        figures.append(Figure(f"{codec}: {STREAM}, 2 threads over 1", gain, "x", 1.8))
        few = [way for way in ways if way.name in (PILLOW, DIRECT)]
        overlapping = rates(few, slide, half, 1, turns)
        what = f"{codec}, 1 thread, overlap of half"
        figures += speeds(what, overlapping) + ratios(what, overlapping, None)
    return figures


def speeds(what: str, found: dict[str, Rate]) -> list[Figure]:
    return [Figure(f"{what}: {name}", rate.tiles_per_s, "tiles/s") for name, rate in found.items()]


def ratios(what: str, found: dict[str, Rate], reach: float | None) -> list[Figure]:
    """Our stream over everybody else's ways."""
    hoped = {PILLOW: reach, CUCIM: 1.0}
    mine = found[STREAM].tiles_per_s
    return [
        Figure(f"{what}: {STREAM} over {name}", mine / rate.tiles_per_s, "x", hoped.get(name))
        for name, rate in found.items()
        if name not in (STREAM, DIRECT)
    ]


def opening(path: Path, codec: str) -> Figure:
    """What opening costs, the comparison with OpenSlide included; the codecs are loaded already."""
    start = time.perf_counter()
    for _ in range(5):
        open_reader(path, "tiff").close()
    return Figure(f"{codec}: opening, with the comparison", (time.perf_counter() - start) / 5 * 1000, "ms")


def codec_of(path: Path) -> str:
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        return "jpeg2000" if page.compression in (33003, 33005) else "jpeg"


def main() -> None:
    given = parser(__doc__)
    given.add_argument("--slides", type=Path, nargs="+", metavar="FILE", help="real slides in place of phantoms")
    chosen = given.parse_args()
    cv2.setNumThreads(1)  # what is counted is the threads that read
    side = 6144 if chosen.quick else 16384  # more than any reader's cache holds when a tile's turn comes again
    turns = Turns(0.2, 2) if chosen.quick else Turns(2.0, 5)
    os.environ.setdefault("CUFILE_LOGFILE_PATH", os.devnull)  # else cuCIM leaves a cufile.log where this is run
    names = importable_ways()
    figures: list[Figure] = []
    for path in chosen.slides or ():
        what = f"{path.name}, {codec_of(path)}"
        figures += [*measure(path, what, names, turns), opening(path, what)]
    with tempfile.TemporaryDirectory() as folder:
        for codec, quality in () if chosen.slides else QUALITY.items():
            if codec == "jpeg2000-rgb" and chosen.quick:
                continue
            path = Path(folder) / f"{codec}.svs"
            write_dense(path, side, codec, quality)
            figures += [*measure(path, codec, names, turns), opening(path, codec)]
    report("256-px tiles at 0.5 mpp from a 0.25-mpp slide", figures, chosen.json)


if __name__ == "__main__":
    main()
