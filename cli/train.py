"""wsi train: a store and a table of labels into a cross-validated model."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from cli.console import PatientConsole, say
from cli.training import Progress, cohort_options, config_of, config_options, labels_of

__all__ = ["train"]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@cohort_options
@click.option("--out", "run", required=True, type=click.Path(path_type=Path), help="Folder of the run; is made.")
@click.option("--tensorboard", is_flag=True, help="Write curves for tensorboard --logdir RUN/tensorboard.")
@config_options
def train(store: Path, table: Path, run: Path, encoder: tuple[str, ...], tensorboard: bool, **values: Any) -> int:
    """Train and cross-validate a slide model on the features in OUT.

    Patients are never split. The run's folder holds settings, folds, models, predictions and metrics; run the same
    command again after an interruption and only folds that are missing are trained.

    \b
    wsi train OUT --encoder uni2-h --labels cohort.csv --target subtype --out runs/subtype
    wsi train OUT --labels cohort.csv --target months --event-column died --out runs/survival
    wsi train OUT --labels cohort.csv --target subtype --target grade --out runs/both
    """
    console = PatientConsole()
    with console.status("loading …"):  # torch alone takes seconds
        from mil import Cohort, cross_validate
        from mil.scalars import Scalars
        from mil.train import Observer, Observers

        config = config_of(values)
        cohort = Cohort.from_store(store, table, labels_of(values), encoder=encoder or None)
    say(console, cohort.describe())
    with ExitStack() as opened:
        observers: list[Observer] = [
            opened.enter_context(Progress(console, config, n_metrics=max(2, len(cohort.tasks))))
        ]
        if tensorboard:
            observers.append(opened.enter_context(Scalars(run / "tensorboard")))
        result = cross_validate(cohort, config, out=run, observer=Observers(observers))
    say(console, result.summary())
    answers = "predictions.csv" if len(cohort.tasks) == 1 else "a predictions-….csv for each target"
    say(console, f"results: {run}  (metrics.json, {answers}; wsi predict {run} {store} applies it)")
    return 0
