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
from one_run import FREE, Extraction, extraction
from slides import write_mosaic, write_slides

BIOPSIES, DIFFERENT = 40, 8  # so many slides; so many of them are painted, the others are copies


@dataclass(frozen=True)
class Load:
    """What is measured with one encoder, and what is hoped for.

    Attributes:
        encoder: options of the run.
        times: the slide is its phantom laid out so many times in x and in y.
        busy: at least this share of time the encoder computes.
        over_bare: at least this part of the bare forward pass's rate from end to end.
    """

    name: str
    encoder: tuple[str, ...]
    times: int
    busy: float | None = None
    over_bare: float | None = None


CPU = (
    Load("free encoder", ("--encoder", FREE, "--device", "cpu"), 2),
    Load("colour-stats", ("--encoder", "colour-stats", "--device", "cpu"), 1),
    Load(
        "ViT-S",
        ("--encoder", "timm:vit_small_patch16_224", "--random-weights", "0", "--device", "cpu", "--bare-seconds", "5"),
        1,
        busy=0.97,
    ),
)
GPU = (
    Load(
        "ViT-L, GPU",
        ("--encoder", "timm:vit_large_patch16_224", "--random-weights", "0", "--device", "cuda", "--bare-seconds", "5"),
        8,
        over_bare=0.95,
    ),
    Load(
        "ViT-H, GPU",
        ("--encoder", "timm:vit_huge_patch14_224", "--random-weights", "0", "--device", "cuda", "--bare-seconds", "5"),
        8,
        over_bare=0.93,
    ),
)


class Missing:
    """What could not be measured, said at the end."""

    def __init__(self) -> None:
        self.words: dict[str, None] = {}

    def busy(self, name: str, done: Extraction, hoped: float | None) -> list[Figure]:
        try:
            return [Figure(f"{name}: the encoder is busy", done.busy_share, "of the time", hoped)]
        except LookupError as error:
            self.words[str(error)] = None
            return []


def encoder_figures(load: Load, painted: list[Path], work: Path, missing: Missing) -> list[Figure]:
    slides = work / f"slides-{load.times}"
    if not slides.exists():
        slides.mkdir()
        for path in painted:
            write_mosaic(slides / path.name, [path], load.times, load.times)
    done = extraction(slides, work / f"out-{load.name}", *load.encoder)
    figures = [Figure(f"{load.name}: {done.tiles:,} tiles of {len(painted)} slides", done.tiles_per_s, "tiles/s")]
    figures += missing.busy(load.name, done, load.busy)
    figures.append(
        Figure(f"{load.name}: peak memory above the model's own", done.peak_mb - done.before_mb, "MB", 1000, False)
    )
    if done.bare is not None:
        over = done.tiles_per_s / done.bare
        figures.append(Figure(f"{load.name}: the bare forward pass", done.bare, "tiles/s"))
        figures.append(Figure(f"{load.name}: end to end over bare", over, "x", load.over_bare))
    return figures


def biopsy_figures(load: Load, work: Path, missing: Missing, hoped: float | None) -> list[Figure]:
    """The same tiles as many small slides and as one large one."""
    few, one = work / "biopsies", work / "one"
    done = [extraction(slides, work / f"out-{slides.name}-{load.name}", *load.encoder) for slides in (one, few)]
    figures = []
    for what, each in zip(("one large slide", "biopsies"), done, strict=True):
        figures.append(
            Figure(f"{load.name}, {len(each.slides)} {what}: {each.tiles:,} tiles", each.tiles_per_s, "tiles/s")
        )
        figures += missing.busy(f"{load.name}, {what}", each, None)
    figures.append(
        Figure(f"{load.name}: biopsies over one slide", done[1].tiles_per_s / done[0].tiles_per_s, "x", hoped)
    )
    return figures


def write_biopsies(work: Path, count: int, size: tuple[int, int]) -> None:
    """``biopsies/`` with ``count`` slides, and ``one/`` with a slide of the same tiles."""
    painted = write_slides(work / "painted-biopsies", min(count, DIFFERENT), size, tissue_fraction=0.3)
    (work / "biopsies").mkdir()
    (work / "one").mkdir()
    for index in range(count):
        shutil.copyfile(painted[index % len(painted)], work / "biopsies" / f"biopsy-{index:02}.svs")
    write_mosaic(work / "one" / "one.svs", painted, count // 4, 4)


def main() -> None:
    chosen = parser(__doc__).parse_args()
    import torch

    figures: list[Figure] = []
    missing = Missing()
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        painted = write_slides(work / "painted", *((1, (8192, 8192)) if chosen.quick else (2, (20480, 16384))))
        for load in (*CPU, *(GPU if gpu and not chosen.quick else ())):
            figures += encoder_figures(load, painted, work, missing)
        write_biopsies(work, 8 if chosen.quick else BIOPSIES, (4096, 4096) if chosen.quick else (8192, 4096))
        real = GPU[0] if gpu else CPU[-1]
        for load, hoped in ((CPU[0], None), (real, 0.9)):
            figures += biopsy_figures(load, work, missing, hoped)
    report("A folder of slides, from tissue to store", figures, chosen.json)
    if not gpu:
        print("no GPU here: ViT-L and ViT-H were not measured", file=sys.stderr)
    if missing.words:
        raise SystemExit("not measured: " + "; ".join(missing.words))


if __name__ == "__main__":
    main()
