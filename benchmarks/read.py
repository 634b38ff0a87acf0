"""How fast tiles leave a slide: 256 x 256 pixels at 0.5 mpp from a 0.25-mpp scan, and the same pixels from every way.

Three ways: what most tools do (OpenSlide, then Pillow), OpenSlide through our reader, and tiles decoded directly.
Every tile of the two readers is compared first: equal for JPEG, one grey level at most for JPEG 2000.

    python benchmarks/read.py --quick
"""

import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice, product
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import openslide
from figures import Figure, parser, report
from PIL import Image

from wsi.area import area_resize
from wsi.phantom import Codec, Phantom, PhantomSpec, write_svs
from wsi.readers import Pixels, Reader, open_reader

TILE_PX = 256
SIDE_PX = 2 * TILE_PX  # 0.5 mpp from 0.25
# Times what OpenSlide and Pillow give, on one thread: what we aim at.
REACH = {"jpeg": 6.0, "jpeg-rgb": 6.0, "jpeg2000": 2.0}

Place = tuple[int, int]
Read = Callable[[Place], Pixels]


def with_pillow(slide: openslide.OpenSlide) -> Read:
    """What most tools do."""

    def read(place: Place) -> Pixels:
        region = slide.read_region(place, 0, (SIDE_PX, SIDE_PX)).convert("RGB")
        return np.asarray(region.resize((TILE_PX, TILE_PX), Image.Resampling.BILINEAR))

    return read


def with_reader(reader: Reader) -> Read:
    def read(place: Place) -> Pixels:
        return area_resize(reader.read(0, *place, SIDE_PX, SIDE_PX), (TILE_PX, TILE_PX))

    return read


def tiles_per_second(read: Read, places: list[Place], threads: int, seconds: float) -> float:
    """The places in turn, over and over until the time is up; the best of three such runs."""
    best, around = 0.0, cycle(places)
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):
            start, done = time.perf_counter(), 0
            while time.perf_counter() - start < seconds / 3:
                done += sum(1 for _ in pool.map(read, islice(around, 24)))
            best = max(best, done / (time.perf_counter() - start))
    return best


def largest_difference(reads: Iterable[Read], places: list[Place]) -> int:
    """Grey levels between the two ways, over all places."""
    one, other = reads
    return max(int(cv2.absdiff(one(place), other(place)).max()) for place in places)


def measure(path: Path, codec: str, seconds: float) -> list[Figure]:
    direct, through = open_reader(path, "tiff"), open_reader(path, "openslide")
    with openslide.OpenSlide(path) as slide:
        width, height = slide.dimensions
        steps = (range(0, size - SIDE_PX + 1, SIDE_PX) for size in (height, width))
        places = [(x, y) for y, x in product(*steps)]
        ways = {
            "OpenSlide, Pillow": with_pillow(slide),
            "OpenSlide, area": with_reader(through),
            "direct, area": with_reader(direct),
        }
        difference = largest_difference(list(ways.values())[1:], places)
        if difference > int("jpeg2000" in codec):
            raise SystemExit(f"{codec}: the readers differ by {difference} grey levels")
        figures = [Figure(f"{codec}: largest difference between the readers", difference, "grey levels")]
        for threads in (1, 2):
            rates = {name: tiles_per_second(read, places, threads, seconds) for name, read in ways.items()}
            figures += [Figure(f"{codec}: {name}, {threads}-threaded", rate, "tiles/s") for name, rate in rates.items()]
            pillow, area, own = rates.values()
            reach = REACH.get(codec) if threads == 1 else None
            figures.append(
                Figure(f"{codec}: direct over OpenSlide, Pillow, {threads}-threaded", own / pillow, "x", reach)
            )
            figures.append(Figure(f"{codec}: direct over OpenSlide, area, {threads}-threaded", own / area, "x"))
    direct.close()
    through.close()
    return figures


def opening(path: Path, codec: str) -> Figure:
    """What the comparison with OpenSlide costs, all of opening included; the codecs are loaded already."""
    start = time.perf_counter()
    for _ in range(5):
        open_reader(path, "tiff").close()
    return Figure(f"{codec}: opening, with the comparison", (time.perf_counter() - start) / 5 * 1000, "ms")


def main() -> None:
    chosen = parser(__doc__).parse_args()
    cv2.setNumThreads(1)  # what is counted is the threads that read
    side = (
        6144 if chosen.quick else 16384
    )  # more than any reader's cache holds: no tile is there when it comes round again
    phantom = Phantom(PhantomSpec(side, side, mpp=0.25, seed=5, tissue_fraction=0.6, tumour=0.3))
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        for codec in get_args(Codec):
            if codec == "jpeg2000-rgb" and chosen.quick:
                continue
            path = Path(folder) / f"{codec}.svs"
            write_svs(path, phantom, codec=codec, quality=70)
            figures += [*measure(path, codec, 1.5 if chosen.quick else 20.0), opening(path, codec)]
    report("256-px tiles at 0.5 mpp from a 0.25-mpp slide", figures, chosen.json)


if __name__ == "__main__":
    main()
