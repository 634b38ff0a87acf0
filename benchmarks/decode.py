"""What limits reading: the stream's time for a tile, and the decoder's alone; and what decoding at half size would save.

256-px tiles at 0.5 mpp from 0.25 mpp, one thread, on phantoms of about two bits per pixel. Decoding at half size leaves
out half of each block's cosines (``cv2.IMREAD_REDUCED_COLOR_2``); its pixels are compared with the area mean of the whole
ones, which is what the stream delivers.

    python benchmarks/decode.py --quick
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from figures import Figure, parser, report
from read import QUALITY, SIDE_PX, lattice
from slides import write_dense

from wsi import Slide, TileStream
from wsi.area import area_resize
from wsi.grid import TileGrid
from wsi.phantom import Codec
from wsi.readers._tiles import JPEG, TileLevel, find_levels
from wsi.readers.base import Pixels, tile_memory

ROUNDS = 5


def best_ms(run: Callable[[], object], tiles: int) -> float:
    """Milliseconds for one of so many tiles, in the best of some rounds."""
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken) / tiles * 1000


def half_size(level: TileLevel, data: bytes) -> Pixels:
    whole = (level.tables or b"").removesuffix(b"\xff\xd9") + data.removeprefix(b"\xff\xd8")
    bgr = np.asarray(cv2.imdecode(np.frombuffer(whole, np.uint8), cv2.IMREAD_REDUCED_COLOR_2), np.uint8)
    return bgr[..., ::-1]


def stream_all(slide: Slide, grid: TileGrid) -> None:
    for batch in TileStream(slide, grid, threads=1):
        batch.release()


def measure(path: Path, codec: str) -> list[Figure]:
    with Slide.open(path, reader="tiff") as slide:
        grid = lattice(slide.size, SIDE_PX)
        (level,) = find_levels(path, slide.reader.sizes[:1])
        content = path.read_bytes()
        coded: Sequence[bytes] = [content[o : o + n] for o, n in zip(level.offsets, level.counts, strict=True)]
        out = tile_memory(*level.tile)
        alone = best_ms(lambda: [level.coding.decode(d, *level.tile, level.tables, out) for d in coded], len(grid))
        stream = best_ms(lambda: stream_all(slide, grid), len(grid))
    figures = [
        Figure(f"{codec}: the stream", stream, "ms/tile"),
        Figure(f"{codec}: the decoder alone", alone, "ms/tile"),
        Figure(f"{codec}: the decoder's part", alone / stream, "of the time"),
    ]
    if level.coding.compression == JPEG:
        half = best_ms(lambda: [half_size(level, d) for d in coded], len(grid))
        size = (level.tile[0] // 2, level.tile[1] // 2)
        apart = 0
        for data in coded:
            mean = area_resize(level.coding.decode(data, *level.tile, level.tables), size)
            apart = max(apart, int(cv2.absdiff(half_size(level, data), mean).max()))
        figures += [
            Figure(f"{codec}: decoded at half size", half, "ms/tile"),
            Figure(f"{codec}: half size, largest difference from the mean", apart, "grey levels"),
        ]
    return figures


def main() -> None:
    chosen = parser(__doc__).parse_args()
    cv2.setNumThreads(1)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        codecs: tuple[Codec, ...] = ("jpeg", "jpeg2000")
        for codec in codecs:
            path = Path(folder) / f"{codec}.svs"
            write_dense(path, 4096 if chosen.quick else 8192, codec, QUALITY[codec])
            figures += measure(path, codec)
    report("What limits reading", figures, chosen.json)


if __name__ == "__main__":
    main()
