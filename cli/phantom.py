"""wsi phantom: a made-up slide whose truth is known."""

from pathlib import Path
from typing import get_args

import click

from wsi.phantom import Codec, PhantomSpec, write_svs

__all__ = ["phantom"]


@click.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--width", type=click.IntRange(min=256), default=20_000, show_default=True, help="Level-0 pixels.")
@click.option("--height", type=click.IntRange(min=256), default=16_000, show_default=True, help="Level-0 pixels.")
@click.option(
    "--mpp", type=click.FloatRange(min=0.2, max=2), default=0.25, show_default=True, help="Microns per pixel."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed is another slide.")
@click.option(
    "--codec",
    type=click.Choice(get_args(Codec)),
    default="jpeg",
    show_default=True,
    help="Compression, as Aperio has it.",
)
@click.option("--force", is_flag=True, help="Write over a file that is there.")
def phantom(path: Path, force: bool, width: int, height: int, mpp: float, seed: int, codec: Codec) -> int:
    """Make a slide that looks like H&E, in Aperio's format, at PATH; for trials where no slides are at hand."""
    if path.exists() and not force:
        raise click.UsageError(f"{path} is there already; choose another name, or --force")
    write_svs(path, PhantomSpec(width=width, height=height, mpp=mpp, seed=seed), codec=codec)
    click.echo(f"{path}: {width} x {height} px, {path.stat().st_size / 1e6:.1f} MB")
    return 0
