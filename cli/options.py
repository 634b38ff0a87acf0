"""Options that several verbs share, defined once; each becomes a value of the library."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from wsi.grid import Tiling
from wsi.readers import READER_NAMES
from wsi.resolution import parse_mpp

__all__ = [
    "encoder_options",
    "machine_options",
    "slide_options",
    "stack",
    "tiling_of",
    "tiling_options",
    "tissue_option",
    "words_of",
]

Command = TypeVar("Command", bound=Callable[..., Any])


class MppType(click.ParamType[tuple[float, float]]):
    """``0.25`` or ``0.25,0.26``."""

    name = "mpp"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        if isinstance(value, tuple):
            return value
        try:
            return parse_mpp(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def stack(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several options as one decorator, in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_DEFAULT = Tiling()

tiling_options = stack(
    click.option(
        "--mpp",
        type=click.FloatRange(min=0, min_open=True),
        default=_DEFAULT.mpp,
        show_default=True,
        help="Resolution of the tiles in microns per pixel; 0.5 is what is called 20x, 0.25 is 40x.",
    ),
    click.option(
        "--tile", "tile_px", type=click.IntRange(min=1), default=_DEFAULT.tile_px, show_default=True,
        help="Width and height of a tile in pixels at that resolution.",
    ),
    click.option(
        "--overlap", "overlap_px", type=click.IntRange(min=0), default=_DEFAULT.overlap_px, show_default=True,
        help="Pixels that neighbouring tiles share, at that resolution.",
    ),
    click.option(
        "--min-tissue", type=click.FloatRange(0, 1), default=_DEFAULT.min_tissue, show_default=True,
        help="Keep a tile when at least this fraction of it is tissue; 0 keeps all that touch tissue.",
    ),
    click.option(
        "--edge", type=click.Choice(["drop", "pad"]), default=_DEFAULT.edge, show_default=True,
        help="Tiles that stick out of the slide: leave them out, or fill them with background colour.",
    ),
    click.option(
        "--holes", type=click.Choice(["drop", "keep"]), default=_DEFAULT.holes, show_default=True,
        help="Whether holes in the tissue count as tissue.",
    ),
    click.option(
        "--mpp-tolerance", type=click.FloatRange(min=0), default=_DEFAULT.mpp_tolerance, show_default=True,
        help="Use a scan that is coarser than asked by at most this fraction at its own resolution.",
    ),
    click.option(
        "--allow-upsample", is_flag=True, help="Enlarge scans that are coarser still, instead of refusing them.",
    ),
    click.option(
        "--spare", type=click.FloatRange(min=1), default=_DEFAULT.spare, show_default=True,
        help="Pixels that a level must have per tile pixel for tiles to be read from it; 1 reads a level of the wanted "
        "resolution as it stands, which is faster, and at its own compression.",
    ),
    click.option(
        "--select", metavar="HOW",
        help="A few dozen tiles that stand for a slide, in place of all: mosaic takes some of each kind of tissue (also "
        "mosaic:k=9,share=0.1,seed=0), fps some that lie far apart (also fps:patch_um=500,tissue=0.9,n=30,seed=0).",
    ),
)  # fmt: skip

tissue_option = click.option(
    "--tissue", "tissue_dir", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of GeoJSON outlines to use instead of finding tissue: OUT/tissue of wsi-extract, edited in QuPath, or copies "
    "of it.",
)  # fmt: skip

slide_options = stack(
    click.option(
        "--slides", "table", type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="CSV that says which slides of the folder to take: column slide, optionally mpp, others are kept.",
    ),
    click.option("--pattern", help="Only slides whose path or name matches, such as '*.svs'."),
    click.option(
        "--slide-mpp", type=MppType(),
        help="Microns per pixel of the slides' sharpest level, where files are silent or wrong; x,y if they differ.",
    ),
    click.option(
        "--reader", type=click.Choice(READER_NAMES), default="auto", show_default=True, help="How slides are read.",
    ),
    tissue_option,
    click.option(
        "--roi", type=click.Path(exists=True, path_type=Path),
        help="GeoJSON of regions of interest, or a folder with one file a slide: only tiles inside are taken.",
    ),
)  # fmt: skip

encoder_options = stack(
    click.option(
        "--encoder",
        help="Name of a published encoder (see: wsi encoders), timm:MODEL, colour-stats, or FILE.py:FUNCTION of your own. "
        "Several with commas between them share one pass over the pixels.",
    ),
    click.option(
        "--weights", type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Weights from this file (safetensors, or a torch file without code) and not from the hub.",
    ),
    click.option(
        "--random-weights", "random_seed", type=int, metavar="SEED",
        help="Random weights from this seed. For trials only; the store says so.",
    ),
    click.option("--revision", help="Revision of the weights on the hub."),
    click.option("--name", help="Name for these features in the store, where the encoder's own is taken."),
    click.option("--offline", is_flag=True, help="Never ask the hub; what is missing is named. As HF_HUB_OFFLINE=1."),
)  # fmt: skip

machine_options = stack(
    click.option(
        "--device", default="auto", show_default=True,
        help="auto, cpu, mps, cuda for all GPUs (each takes the next slide from one queue), cuda:1, or cuda:0,cuda:2.",
    ),
    click.option("--compile", "compiled", is_flag=True, help="Have PyTorch compile the network: a minute once, then faster."),
    click.option(
        "--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", show_default=True,
        help="Arithmetic of the encoder; auto is fp32 on a CPU and bf16 or fp16 on a GPU.",
    ),
    click.option(
        "--dtype", type=click.Choice(["auto", "float16", "float32"]), default="auto", show_default=True,
        help="How features are stored; auto is float32 after fp32, else float16.",
    ),
    click.option(
        "--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Tiles per forward pass.",
    ),
    click.option("--read-threads", type=click.IntRange(min=1), help="Threads that read tiles.  [default: one a core, at most 8]"),
    click.option(
        "--max-unreadable", type=click.FloatRange(0, 1), default=0.01, show_default=True,
        help="A slide of which a larger share of tiles cannot be read fails.",
    ),
)  # fmt: skip


def words_of(text: str) -> tuple[str, ...]:
    """``"a, b"`` as its words."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def tiling_of(values: dict[str, Any]) -> Tiling:
    """The tiling that the tiling options say; a UsageError where they contradict each other."""
    try:
        return Tiling(**{key: values[key] for key in Tiling.__dataclass_fields__})
    except ValueError as error:
        raise click.UsageError(str(error)) from error
