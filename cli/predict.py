"""wsi predict: a trained run applied to a store."""

from pathlib import Path

import click
from rich.progress import track

from cli.console import PatientConsole

__all__ = ["predict"]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("store", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the answers; is made.")
@click.option("--patients", "table", type=click.Path(path_type=Path), help="CSV that says whose each slide is.")
@click.option(
    "--explain", "kind", type=click.Choice(["attention", "importance", "gradients", "none"]), default="attention",
    show_default=True, help="What the heatmaps show.",
)  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1.")
def predict(run: Path, store: Path, out: Path, table: Path | None, kind: str, device: str) -> int:
    """Apply the models of RUN to the slides in OUT.

    Writes predictions.csv, and for each slide a heatmap as GeoJSON for QuPath and as a picture. Slides that RUN was
    trained on are answered only by the models that never saw them.

    \b
    wsi predict runs/subtype OUT --out predictions/
    """
    console = PatientConsole()
    with console.status("loading …"):  # torch alone takes seconds
        from features.store import FeatureStore
        from mil.predict import Predictor, overview_of, read_patients

        predictor = Predictor.load(run, device=device)
    opened = FeatureStore(store)
    patients = None if table is None else read_patients(table, opened)
    answers = predictor.predict(store, patients=patients)
    answers.write(out / "predictions.csv")
    for i, name in enumerate(answers.predictions.names):
        numbers = ", ".join(
            f"{column} {value:.3f}"
            for column, value in zip(answers.predictions.columns, answers.predictions.answers[i], strict=True)
        )
        console.print(f"{name}: {answers.answer(i)} ({numbers})", markup=False, highlight=False, soft_wrap=True)
    for left in answers.left_out:
        console.print(f"{left.slide}: left out, {left.reason}", markup=False, highlight=False, soft_wrap=True)
    if kind != "none":
        source = predictor.source(opened)
        gone = {left.slide for left in answers.left_out}
        keys = [key for key in opened.keys if key not in gone]
        for key in track(keys, "heatmaps", console=console, transient=True, disable=not console.is_terminal):
            heat = predictor.heatmap(source, key, kind=kind)
            heat.save(out / "heatmaps" / f"{key}.geojson")
            heat.save(out / "heatmaps" / f"{key}.png", view=overview_of(opened.slide(key)))
    console.print(f"results: {out}", markup=False, highlight=False, soft_wrap=True)
    return 0
