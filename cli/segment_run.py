"""wsi segment run: a model over a folder of slides."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.console import PatientConsole, say
from cli.options import MppType, tissue_option, words_of
from cli.progress import CohortProgress
from cli.run import EXIT_CODES
from wsi.discover import discover
from wsi.readers import READER_NAMES

if TYPE_CHECKING:
    from features.outcome import Report, Status  # would load torch for every --help

__all__ = ["run_model"]


@click.command(name="run", epilog=f"Exit codes: {EXIT_CODES}")
@click.argument("slides")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--model",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of wsi segment train.",
)
@click.option(
    "--slides", "table", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV that says which slides of the folder to take: column slide, optionally mpp.",
)  # fmt: skip
@click.option("--pattern", help="Only slides whose path or name matches, such as '*.svs'.")
@click.option(
    "--slide-mpp", type=MppType(), help="Microns per pixel of the slides' sharpest level, where files are silent."
)
@click.option(
    "--reader", type=click.Choice(READER_NAMES), default="auto", show_default=True, help="How slides are read."
)
@tissue_option
@click.option(
    "--formats", default="geojson,mask,picture", show_default=True,
    help="What is written of a slide: geojson, mask (OME-TIFF), picture, asap, ome-zarr, objects (CSV), probability (Zarr).",
)  # fmt: skip
@click.option(
    "--tolerance", "tolerance_um", type=click.FloatRange(min=0), default=1.0, show_default=True,
    help="Microns by which outlines may be simplified; 0 keeps every corner of the map's pixels.",
)  # fmt: skip
@click.option(
    "--min-area",
    "min_area_um2",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Smaller pieces are left out, µm².",
)
@click.option(
    "--min-hole",
    "min_hole_um2",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Smaller holes are filled, µm².",
)
@click.option(
    "--max-unreadable",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="A slide of which a larger share of patches cannot be read fails.",
)
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Weights of a frozen trunk from this file.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, mps or cuda.")
@click.option(
    "--runtime", type=click.Choice(["auto", "torch"]), default="auto", show_default=True,
    help="auto takes ONNX Runtime on a CPU where it is installed, says the same and is faster.",
)  # fmt: skip
def run_model(slides: str, out: Path, model: Path, **values: Any) -> int:
    """Find on the slides in SLIDES what a model has learned, and write it to OUT.

    For each slide OUT gets a GeoJSON that QuPath opens at the right place and in the right colours, a mask as pyramidal
    OME-TIFF, and a picture; areas.csv has square millimetres for all slides. The same command goes on after a kill.

    \b
    wsi segment run slides/ out/ --model model/
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    found = discover(slides, table=values["table"], pattern=values["pattern"], out=out)
    console = PatientConsole()
    with console.status("loading the model …"):
        from segmentation.polygons import PolygonOptions
        from segmentation.results import ResultOptions
        from segmentation.run import RunOptions, give_memory_back, segment_found
        from segmentation.segmenter import Segmenter, is_exported

        if values["runtime"] == "auto" and is_exported(model):
            give_memory_back()
        try:
            polygons = PolygonOptions(*(values[key] for key in ("tolerance_um", "min_area_um2", "min_hole_um2")))
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        results = ResultOptions(polygons, words_of(values["formats"]))
        options = RunOptions(
            results, values["slide_mpp"], values["reader"], values["tissue_dir"], values["max_unreadable"]
        )
        segmenter = Segmenter.load(
            model, device=values["device"], runtime=values["runtime"], trunk_weights=values["weights"]
        )
    for line in segmenter.said:
        say(console, line)
    with CohortProgress(console) as progress:
        report = segment_found(found, out, segmenter, options, progress)
    _tell(report, out, console)
    return report.exit_code


def _tell(report: "Report", out: Path, console: PatientConsole) -> None:
    """What came of it: counts, areas of each class, and every failure with its code."""
    done = [outcome for outcome in report.outcomes if outcome.status in ("done", "empty", "skipped")]
    counts = [f"{report.count('done', 'empty')} slides in {report.seconds:.0f} s"]
    others: tuple[tuple[Status, str], ...] = (
        ("skipped", "there already"), ("busy", "busy elsewhere"), ("failed", "failed"), ("ignored", "other files"),
    )  # fmt: skip
    counts += [f"{report.count(status)} {words}" for status, words in others if report.count(status)]
    say(console, ", ".join(counts))
    areas: dict[str, list[float]] = {}
    for outcome in done:
        for area in outcome.facts.get("areas", ()):
            areas.setdefault(area["name"], []).append(area["area_mm2"])
    for name, found in areas.items():
        say(console, f"{name}: {sum(found):.2f} mm² on {len(found)} of {len(done)} slides")
    for outcome in report.outcomes:
        if outcome.status == "failed":
            say(console, f"{outcome.slide}: FAILED, {outcome.code}: {outcome.message}")
        for note in outcome.facts.get("notes", ()):
            say(console, f"{outcome.slide}: {note}")
        if outcome.status != "failed" and outcome.facts.get("unreadable"):
            say(
                console, f"{outcome.slide}: {outcome.facts['unreadable']} patches cannot be read, and count for nothing"
            )
    say(console, f"results: {out}  (areas.csv; report.jsonl has a line for each slide)")
