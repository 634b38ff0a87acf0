"""A folder from tissue to store: tiles per second, how busy the encoder is, and many small slides against a large one.

With an encoder that costs nothing, what is left is reading and writing; with a real one, the encoder should never wait.
Where there is a GPU, ViT-L and ViT-H run on it in bf16 and are compared with their bare forward pass on a batch that
already lies in its memory. All weights are random: speed does not depend on them.

    python benchmarks/extract.py --quick
"""

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from figures import Figure, parser, report
from one_run import FREE, extraction
from slides import write_mosaic, write_slides

BIOPSIES, DIFFERENT = 40, 8  # so many slides; so many of them are painted, the others are copies


@dataclass(frozen=True)
class Load:
    """What is measured with one encoder, and what is hoped for.

    Attributes:
        encoder: options of the run.
        slides, times: so many slides, each a phantom laid out so many times in x and in y.
        busy: at least this share of time the encoder computes.
        over_bare: at least this part of the bare forward pass's rate from end to end.
    """

    name: str
    encoder: tuple[str, ...]
    slides: int
    times: int
    busy: float | None = None
    over_bare: float | None = None


BARE = ("--bare-seconds", "4")


def vit(model: str, device: str) -> tuple[str, ...]:
    return ("--encoder", f"timm:{model}", "--random-weights", "0", "--device", device, *BARE)


CPU = (
    Load("free encoder", ("--encoder", FREE, "--device", "cpu"), 2, 2),
    Load("colour-stats", ("--encoder", "colour-stats", "--device", "cpu"), 1, 1),
    Load("ViT-S", vit("vit_small_patch16_224", "cpu"), 1, 1, busy=0.97),
)
GPU = (
    Load("ViT-L on a GPU", vit("vit_large_patch16_224", "cuda"), 12, 4, busy=0.95, over_bare=0.93),
    Load("ViT-H on a GPU", vit("vit_huge_patch14_224", "cuda"), 12, 4),
)


def encoder_figures(load: Load, painted: list[Path], work: Path) -> list[Figure]:
    slides = work / f"{load.slides}-slides-{load.times}"
    if not slides.exists():
        slides.mkdir()
        for index in range(load.slides):
            source = painted[index % len(painted)]
            write_mosaic(slides / f"slide-{index:02}.svs", [source], load.times, load.times)
    done = extraction(slides, work / f"out-{load.name}", *load.encoder)
    figures = [Figure(f"{load.name}: {done.tiles:,} tiles of {load.slides} slides", done.tiles_per_s, "tiles/s")]
    figures.append(Figure(f"{load.name}: the encoder is busy", done.busy, "of the time", load.busy))
    figures.append(Figure(f"{load.name}: decode ratio", done.decode_ratio, "x", 1.02, False))
    figures.append(
        Figure(f"{load.name}: peak memory above the model's own", done.peak_mb - done.before_mb, "MB", 1000, False)
    )
    if done.bare is not None:
        over = done.tiles_per_s / done.bare
        figures.append(Figure(f"{load.name}: the bare forward pass", done.bare, "tiles/s"))
        figures.append(Figure(f"{load.name}: end to end over bare", over, "x", load.over_bare))
    return figures


def biopsy_figures(load: Load, work: Path, hoped: float | None) -> list[Figure]:
    """The same tiles as many small slides and as one large one."""
    few, one = work / "biopsies", work / "one"
    encoder = [option for option in load.encoder if option not in BARE]
    done = [extraction(slides, work / f"out-{slides.name}-{load.name}", *encoder) for slides in (one, few)]
    figures = []
    for what, each in zip(("large slide", "biopsies"), done, strict=True):
        figures.append(
            Figure(f"{load.name}, {len(each.slides)} {what}: {each.tiles:,} tiles", each.tiles_per_s, "tiles/s")
        )
        figures.append(Figure(f"{load.name}, {what}: the encoder is busy", each.busy, "of the time"))
    figures.append(
        Figure(f"{load.name}: biopsies over one slide", done[1].tiles_per_s / done[0].tiles_per_s, "x", hoped)
    )
    return figures


def write_biopsies(work: Path, count: int, size: tuple[int, int], different: int) -> None:
    """``biopsies/`` with ``count`` slides, and ``one/`` with a slide of the same tiles."""
    painted = write_slides(work / "painted-biopsies", different, size, tissue_fraction=0.3)
    (work / "biopsies").mkdir()
    (work / "one").mkdir()
    for index in range(count):
        shutil.copyfile(painted[index % len(painted)], work / "biopsies" / f"biopsy-{index:02}.svs")
    write_mosaic(work / "one" / "one.svs", painted, count // 4, 4)


def main() -> None:
    chosen = parser(__doc__).parse_args()
    import torch

    figures: list[Figure] = []
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        painted = write_slides(work / "painted", *((1, (8192, 4096)) if chosen.quick else (2, (20480, 16384))))
        loads = (CPU[0], CPU[-1]) if chosen.quick else (*CPU, *(GPU if gpu else ()))
        for load in loads:
            figures += encoder_figures(load, painted, work)
        size = (
            (4096, 4096) if chosen.quick else (20480, 12288) if gpu else (8192, 4096)
        )  # as long as the encoder is quick
        write_biopsies(work, *((4, size, 1) if chosen.quick else (BIOPSIES, size, DIFFERENT)))
        real = GPU[0] if gpu else CPU[-1]
        for load, hoped in ((real, 0.9),) if chosen.quick else ((CPU[0], 0.9), (real, 0.9)):
            figures += biopsy_figures(load, work, hoped)
    report("A folder of slides, from tissue to store", figures, chosen.json)
    if not gpu:
        print("no GPU here: ViT-L and ViT-H were not measured", file=sys.stderr)


if __name__ == "__main__":
    main()
