"""wsi segment: pixels into shapes."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from cli.console import PatientConsole, say
from cli.options import words_of
from cli.segment_run import run_model
from cli.segment_train import train

if TYPE_CHECKING:
    from wsi.geojson import Frame

__all__ = ["segment"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def segment() -> None:
    """Areas on slides: learned from what people drew, found, outlined, measured and compared."""


@segment.command()
@click.argument("out", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--truth", required=True, type=click.Path(exists=True, path_type=Path),
    help="Folder of annotations: GeoJSON, ASAP or ImageScope XML, or masks; named as the slides are.",
)  # fmt: skip
@click.option("--classes", help="What is compared, with commas.  [default: all that was drawn]")
@click.option(
    "--mpp", type=click.FloatRange(min=0, min_open=True), default=2.0, show_default=True,
    help="Microns per pixel that areas and borders are compared at.",
)  # fmt: skip
@click.option("--objects/--no-objects", default=True, help="Compare polygons one by one too, as glands are.")
@click.option(
    "--slides", type=click.Path(exists=True, path_type=Path),
    help="Folder of the slides, for results that do not say which slide they belong to.",
)  # fmt: skip
@click.option(
    "--out", "folder", type=click.Path(path_type=Path), help="Where the numbers go.  [default: OUT/evaluation]"
)
def evaluate(
    out: Path, truth: Path, classes: str | None, mpp: float, objects: bool, slides: Path | None, folder: Path | None
) -> int:
    """Compare the results in OUT with what people drew.

    Prints, for each class, means over slides with 95 % bootstrap intervals; writes scores.csv, a row a slide and class,
    and summary.json.

    \b
    wsi segment evaluate OUT --truth annotations/
    """
    from segmentation.evaluate import METRICS, EvaluateOptions
    from segmentation.evaluate import evaluate as compare

    wanted = words_of(classes) if classes else ()
    frame_of = None if slides is None else _frame_finder(slides)
    result = compare(out, truth, EvaluateOptions(mpp, wanted, objects), frame_of=frame_of)
    folder = folder or (out if out.is_dir() else out.parent) / "evaluation"
    result.write(folder)
    console = PatientConsole()
    for note in result.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    for name, row in result.summary().items():
        slides_of = {score.slide for score in result.scores if score.class_name == name}
        table = Table("metric", "mean", "95 % interval", "slides", box=None, pad_edge=False)
        for metric in METRICS:
            found = row[metric]
            if found.n:
                table.add_row(metric, f"{found.value:.3f}", f"{found.low:.3f} to {found.high:.3f}", str(found.n))
        console.print(f"{name}, {len(slides_of)} slides", markup=False, highlight=False)
        console.print(table, highlight=False, markup=False)
    console.print(f"numbers: {folder}", markup=False, highlight=False, soft_wrap=True)
    return 0


@segment.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("out", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--weights", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Weights of a frozen trunk from this file.",
)  # fmt: skip
def export(model: Path, out: Path | None, weights: Path | None) -> int:
    """Write a model's networks as ONNX, checked against PyTorch and timed on this machine.

    MODEL is the folder of wsi segment train: networks that ONNX Runtime runs faster are written into it, and wsi segment run
    then uses them on a CPU. Or it is the file of one network, which goes to OUT.

    Needs the extra: pip install 'wsi-engine[onnx]'.

    \b
    wsi segment export model/
    wsi segment export refinement.safetensors refinement.onnx
    """
    console = PatientConsole()
    if model.is_dir() != (out is None):
        raise click.UsageError("give the folder of a model alone, or the file of one network and OUT")
    if out is None:
        from segmentation.segmenter import export_model

        for line in export_model(model, trunk_weights=weights):
            say(console, line)
        return 0
    from segmentation.export import export_file

    say(console, export_file(model, out).why)
    say(console, f"ONNX: {out}")
    return 0


segment.add_command(train)
segment.add_command(run_model)


def _frame_finder(slides: Path) -> "Callable[[str], Frame | None]":
    """Finds a slide in a folder by its stem, and opens only that one."""
    from wsi.discover import discover
    from wsi.slide import Slide

    locations = {Path(source.relpath).stem: source.location for source in discover(slides).sources}

    def find(stem: str) -> "Frame | None":
        if stem not in locations:
            return None
        with Slide.open(locations[stem]) as slide:
            return slide.frame

    return find
