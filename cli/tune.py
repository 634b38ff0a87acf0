"""wsi tune: settings found by a search, and what a model of settings so found is worth."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.console import PatientConsole, say
from cli.training import Progress, cohort_options, config_of, config_options, labels_of

if TYPE_CHECKING:
    from mil.tune import Trial  # would load torch for every --help

__all__ = ["tune"]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@cohort_options
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the search; is made.")
@click.option(
    "--trials", type=click.IntRange(min=1), default=30, show_default=True, help="Settings tried by each search."
)
@click.option("--space", "ranges", type=click.Path(path_type=Path), help="JSON file of what is searched.")
@click.option(
    "--search-only", is_flag=True,
    help="Only find settings, in a sixth of the time with 5 folds; no figure of theirs on these patients can be reported.",
)  # fmt: skip
@config_options
def tune(store: Path, table: Path, out: Path, encoder: tuple[str, ...], **values: Any) -> int:
    """Find settings for the features in OUT, and what models of settings so found are worth.

    Each fold has a search of its own inside its training part, and is tested by what that found: these are the figures to
    report. A last search on everybody writes config.json, for wsi train --config or for models to be used; what
    cross-validation on the same patients says of it is too good. Run the same command again after an interruption.

    \b
    wsi tune OUT --labels cohort.csv --target subtype --out runs/tuned --trials 30
    wsi train OTHER --labels other.csv --target subtype --config runs/tuned/config.json --out runs/other

    --space is such as {"lr": {"low": 1e-4, "high": 1e-2, "log": true}, "model": ["abmil", "transmil"]}.
    """
    console = PatientConsole()
    with console.status("loading …"):  # torch alone takes seconds
        from mil import Cohort
        from mil import tune as tuning

        config = config_of(values)
        space = tuning.DEFAULT_SPACE if values["ranges"] is None else tuning.read_space(values["ranges"])
        cohort = Cohort.from_store(store, table, labels_of(values), encoder=encoder or None)
    say(console, cohort.describe())

    def told(trial: "Trial") -> None:
        words = ", ".join(f"{key} {_short(value)}" for key, value in trial.settings.items())
        say(console, f"{trial.search}: trial {trial.number + 1}/{values['trials']}: {trial.score:.3f} ({words})")

    searched: Any = {"trials": values["trials"], "space": space, "out": out, "told": told}
    if values["search_only"]:
        tuning.search(cohort, config, **searched)
        say(console, "settings found; test them on other patients, for these helped to choose them")
    else:
        with Progress(console, config, n_metrics=max(2, len(cohort.tasks))) as progress:
            found = tuning.tune(cohort, config, observer=progress, **searched)
        say(console, "settings searched anew in each fold, and tested on patients that neither search nor models saw:")
        say(console, found.result.summary())
    say(console, f"settings: {out / 'config.json'}  (wsi train --config; all trials: trials.csv)")
    return 0


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
