"""wsi info: what a slide, or a store, holds."""

from pathlib import Path

import click
from rich.table import Table

from cli.console import PatientConsole
from cli.options import MppType

__all__ = ["info"]


@click.command()
@click.argument("path")
@click.option("--slide-mpp", type=MppType(), help="Microns per pixel, where the file is silent or wrong.")
@click.option("--properties", is_flag=True, help="Everything the file says of itself.")
def info(path: str, slide_mpp: tuple[float, float] | None, properties: bool) -> int:
    """Say what PATH is: a slide's size, resolution and format, or the slides, features and slide embeddings of a
    store."""
    console = PatientConsole()
    if (Path(path) / "wsi-store.json").is_file():
        _store(Path(path), console)
    else:
        _slide(path, slide_mpp, console, properties)
    return 0


def _slide(path: str, slide_mpp: tuple[float, float] | None, console: PatientConsole, properties: bool) -> None:
    from wsi.slide import Slide

    with Slide.open(path, mpp=slide_mpp) as slide:
        width, height = slide.size
        estimated = ", estimated" if slide.mpp.estimated else ""
        bounds = slide.reader.bounds
        rows = {
            "slide": slide.name,
            "size": f"{width} x {height} px, {width * slide.mpp.x / 1000:.2f} x {height * slide.mpp.y / 1000:.2f} mm",
            "resolution": f"{slide.mpp.x:.6g} x {slide.mpp.y:.6g} mpp (from {slide.mpp.source}{estimated})",
            "levels": ", ".join(
                f"{w} x {h} (1/{slide.pyramid.downsample(i)[0]:g})" for i, (w, h) in enumerate(slide.reader.sizes)
            ),
            "format": f"{slide.vendor}, read by {slide.reader.name}",
            "scanned part": "all of it"
            if bounds is None
            else f"{bounds.w} x {bounds.h} px at ({bounds.x}, {bounds.y})",
        }
        _print(rows, console)
        if properties:
            _print(dict(sorted(slide.properties.items())), console)


def _store(root: Path, console: PatientConsole) -> None:
    from features.store import FeatureStore

    store = FeatureStore(root)
    _print({key: str(value) for key, value in vars(store.tiling).items()}, console)
    table = Table(box=None, pad_edge=False)
    for column in ("slide", "tiles", "encoders"):
        table.add_column(column, overflow="fold")
    for slide in store:
        table.add_row(slide.relpath, str(slide.manifest["grid"]["n_tiles"]), ", ".join(slide.encoders) or "none yet")
    console.print(table, highlight=False, markup=False)
    if store.embeddings:
        vectors = Table(box=None, pad_edge=False)
        for column in ("slide embedding", "made by", "of features of", "numbers", "slides"):
            vectors.add_column(column, overflow="fold")
        for each in store.embeddings:
            vectors.add_row(each.name, each.made_by, " and ".join(each.encoders), str(each.size), str(each.n_slides))
        console.print()
        console.print(vectors, highlight=False, markup=False)


def _print(rows: dict[str, str], console: PatientConsole) -> None:
    width = max(len(key) for key in rows)
    for key, value in rows.items():
        console.print(f"{key:{width}}  {value}", markup=False, highlight=False, soft_wrap=True)
