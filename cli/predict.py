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

    Writes predictions.csv (one for each of several targets), and for each slide a heatmap as GeoJSON for QuPath and as a
    picture. Slides that RUN was trained on are answered only by the models that never saw them.

    \b
    wsi predict runs/subtype OUT --out predictions/
    """
    console = PatientConsole()
    with console.status("loading …"):  # torch alone takes seconds
        from features.keys import safe_name, slide_path
        from features.store import FeatureStore
        from mil.predict import Predictor, overview_of, read_patients
        from mil.predictions import file_name

        predictor = Predictor.load(run, device=device)
    opened = FeatureStore(store)
    patients = None if table is None else read_patients(table, opened)
    several = len(predictor.tasks) > 1
    for task, answers in predictor.predict_tasks(store, patients=patients).items():
        speaker = predictor.tasks[task]
        rows = answers.predictions
        answers.write(out / file_name(rows.target, len(predictor.tasks)))
        for i, name in enumerate(rows.names):
            numbers = ", ".join(
                f"{column} {value:.3f}" for column, value in zip(rows.columns, rows.answers[i], strict=True)
            )
            words = f"{name}: {f'{task} ' if several else ''}{answers.answer(i)} ({numbers})"
            console.print(words, markup=False, highlight=False, soft_wrap=True)
        if kind != "none":
            source = speaker.source(opened)
            gone = {left.slide for left in answers.left_out}
            keys = [key for key in opened.keys if key not in gone]
            folder = out / "heatmaps" / (safe_name(task) if several else "")
            for key in track(keys, "heatmaps", console=console, transient=True, disable=not console.is_terminal):
                heat = speaker.heatmap(source, key, kind=kind)
                heat.save(folder / f"{key}.geojson")
                heat.save(folder / f"{key}.png", view=overview_of(opened.slide(key)))
    for left in answers.left_out:
        console.print(
            f"{slide_path(left.slide)}: left out, {left.reason}", markup=False, highlight=False, soft_wrap=True
        )
    console.print(f"results: {out}", markup=False, highlight=False, soft_wrap=True)
    return 0
