"""wsi-extract: a folder of slides into verified feature stores."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.filesize import decimal
from rich.table import Table

from cli.console import PatientConsole
from cli.options import encoder_options, machine_options, slide_options, tiling_of, tiling_options
from cli.progress import CohortProgress
from cli.run import EXIT_CODES, run
from wsi.discover import Discovery, discover
from wsi.phantom import demo_specs, write_svs

__all__ = ["extract", "main"]

_DEMO_ENCODER = "colour-stats"


@click.command(epilog=f"Exit codes: {EXIT_CODES}", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("slides", required=False)
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option(
    "--demo", type=click.Path(path_type=Path), metavar="OUT",
    help="Make four small slides in OUT, run everything on them, and say what to look at.",
)  # fmt: skip
@encoder_options
@tiling_options
@slide_options
@machine_options
@click.option("--dry-run", is_flag=True, help="Say how many tiles, gigabytes and minutes it would be; write nothing.")
@click.pass_context
def extract(context: click.Context, /, slides: str | None, out: Path | None, demo: Path | None, **values: Any) -> int:
    """Turn the slides in SLIDES into feature stores in OUT.

    SLIDES is a folder (searched with all folders below it), one slide, an address such as s3://bucket/a.svs, or a CSV with
    a column "slide". For each slide OUT gets a Zarr group with tile places and features, a GeoJSON of its tissue that
    QuPath opens, and a picture with outline and tiles.

    Run the same command again after an interruption, or with new slides in the folder: only what is missing is done.
    Several machines may work on one OUT at once.

    \b
    wsi-extract slides/ out/ --encoder uni2-h
    wsi-extract slides/ out/ --encoder timm:vit_small_patch16_224 --mpp 1.0 --dry-run
    wsi-extract --demo demo/
    """
    if demo is not None:
        if slides is not None:
            raise click.UsageError("--demo makes its own slides: give --demo OUT alone")
        return _demo(demo, values)
    if slides is None or out is None:
        if context.args or slides is not None:
            raise click.UsageError("two arguments are needed: SLIDES and OUT; or try --demo OUT")
        click.echo(context.get_help())
        return 2
    if not values["encoder"]:
        raise click.UsageError("which encoder? Give --encoder NAME; 'wsi encoders' lists them")
    # Before torch is loaded: its threads spin while they wait, on the cores that the reading threads need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    found = discover(slides, table=values["table"], pattern=values["pattern"], out=out)
    return _dry_run(found, out, values) if values["dry_run"] else _extract(found, out, values, PatientConsole())


def main() -> None:
    """Entry point of ``wsi-extract``."""
    run(extract, "wsi-extract")


def _extract(found: Discovery, out: Path, values: dict[str, Any], console: PatientConsole) -> int:
    with console.status("loading the encoder …"):  # torch alone takes seconds
        from features.cohort import extract_found
        from features.devices import devices_of
        from features.encoder import load_encoder
        from features.outcome import Report

        requests, options = _encoders(values), _options(values)
        here = len(devices_of(requests)) == 1  # else each process loads its own
        encoders = [load_encoder(request) for request in requests] if here else requests
    with CohortProgress(console) as progress:
        report: Report = extract_found(found, out, encoders, options, progress)
    _summary(report, out, console)
    return report.exit_code


def _summary(report: Any, out: Path, console: PatientConsole) -> None:
    """The table at the end: how many of what, and every failure with its code."""
    table = Table(title=None, show_header=False, box=None, pad_edge=False)
    done = [outcome for outcome in report.outcomes if outcome.status == "done"]
    tiles = sum(outcome.facts["n_tiles"] for outcome in done)
    timing = report.timing
    memory = f"{timing.peak_bytes / 1e9:.1f} GB of memory" if timing.peak_bytes else ""
    rows = (
        (
            "done",
            f"{len(done)} slides, {tiles:,} tiles in {report.seconds:.0f} s, {tiles / max(report.seconds, 1e-6):.0f} tiles/s",
        ),
        ("there already", f"{report.count('skipped')} slides" if report.count("skipped") else ""),
        ("without tiles", f"{report.count('empty')} slides: complete, with no tiles" if report.count("empty") else ""),
        (
            "busy elsewhere",
            f"{report.count('busy')} slides: another process works on them" if report.count("busy") else "",
        ),
        ("no slides", f"{report.count('ignored')} other files, passed over" if report.count("ignored") else ""),
        ("failed", f"{report.count('failed')} slides" if report.count("failed") else ""),
        (
            "time",
            f"{report.sentence}; waited {timing.waited_s:.0f} s for pixels, encoded {timing.encoder_busy_s:.0f} s; "
            f"{timing.decode_ratio:.2f} decoded / needed; {memory}"
            if timing.tiles
            else "",
        ),
        ("results", f"{out}  (report.jsonl has a line for each slide)"),
    )
    for name, value in rows:
        if value:
            table.add_row(name, value)
    console.print(table, highlight=False)
    if any("+random" in name for o in report.outcomes for name in o.facts.get("encoders", ())):
        console.print(
            "these features come from RANDOM weights: good for trying the machinery, worthless as results",
            style="bold red",
        )
    notes = [(o.slide, note) for o in report.outcomes for note in o.facts.get("notes", ())]
    for title, lines in (
        ("notes", notes),
        ("failures", [(o.slide, f"{o.code}: {o.message}") for o in report.outcomes if o.status == "failed"]),
    ):
        if lines:
            console.print(f"\n{title}:", highlight=False)
        for slide, line in lines:
            console.print(f"  {slide}: {line}", markup=False, highlight=False, soft_wrap=True)


def _dry_run(found: Discovery, out: Path, values: dict[str, Any]) -> int:
    from features.devices import devices_of
    from features.encoder import load_encoder
    from features.plan import PlannedSlide, plan_cohort
    from features.runner import EncoderRunner

    console = PatientConsole()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def judged(slide: PlannedSlide) -> None:
        what = f"{slide.n_tiles} tiles" if slide.code == "OK" else f"{slide.code}: {slide.message}"
        say(f"{slide.slide}: {what}{' (there already)' if slide.done else ''}")

    requests = _encoders(values)
    if len(requests) > 1:
        raise click.UsageError("--dry-run judges one encoder at a time")
    request = replace(requests[0], device=devices_of(requests)[0])  # one is enough to tell how fast it is
    plan = plan_cohort(found, out, EncoderRunner(load_encoder(request)), _options(values), judged)
    failed = sum(slide.code != "OK" for slide in plan.slides)
    done = sum(slide.done for slide in plan.slides)
    time_here = f", about {_span(plan.seconds)} here" if plan.seconds is not None else ""
    say(
        f"{len(plan.slides)} slides: {done} there already, {failed} would fail; {plan.tiles:,} tiles to encode, "
        f"about {decimal(plan.bytes)}{time_here}"
    )
    return 0 if not failed else 4 if failed == len(plan.slides) else 3


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _demo(out: Path, values: dict[str, Any]) -> int:
    console = PatientConsole()
    console.print("making slides …", highlight=False)
    for name, spec in demo_specs():
        path = out / "slides" / f"{name}.svs"
        if not path.exists():
            write_svs(path, spec)
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    values["encoder"] = values["encoder"] or _DEMO_ENCODER
    results = out / "results"
    code = _extract(discover(out / "slides"), results, values, console)
    console.print(
        f"\nLook at:\n"
        f"  {results / 'thumbnails'}{os.sep}*.jpg      each slide with its tissue (green) and tiles (blue)\n"
        f"  {results / 'tissue'}{os.sep}*.geojson      drag one onto its slide in QuPath: the outlines are annotations\n"
        f"  {results / 'report.jsonl'}      what became of each slide\n"
        f"  wsi verify {results} --deep      every byte is what was written\n"
        f"In Python:\n"
        f"  from features import FeatureStore\n"
        f"  for slide in FeatureStore({str(results)!r}): print(slide, slide.features({values['encoder']!r}).numpy().shape)",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    return code


def _encoders(values: dict[str, Any]) -> list[Any]:
    from features.encoder import EncoderRequest

    names = [name.strip() for name in values["encoder"].split(",")]
    for key, flag in (("weights", "--weights"), ("revision", "--revision"), ("name", "--name")):
        if len(names) > 1 and values[key] is not None:
            raise click.UsageError(f"{flag} is for one encoder; run the command once for each")
    keys = ("weights", "random_seed", "revision", "offline", "device", "precision", "compiled")
    return [EncoderRequest(name=name, **{key: values[key] for key in keys}) for name in names]


def _options(values: dict[str, Any]) -> Any:
    from features.pipeline import ExtractOptions
    from features.prepare import PrepareOptions
    from features.selection import parse_selection
    from wsi.stream import default_read_threads

    prepare = PrepareOptions(
        tiling=tiling_of(values),
        reader=values["reader"],
        slide_mpp=values["slide_mpp"],
        tissue_dir=values["tissue_dir"],
        roi=values["roi"],
        select=None if values["select"] is None else parse_selection(values["select"]),
    )
    return ExtractOptions(
        prepare=prepare,
        batch_size=values["batch_size"],
        read_threads=values["read_threads"] or default_read_threads(),
        dtype=values["dtype"],
        max_unreadable=values["max_unreadable"],
        name=values["name"],
    )
