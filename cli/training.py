"""Flags that say what is learned from whom and how, shared by wsi train and wsi tune; and how its going is told."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from cli.console import PatientConsole, WithBars, say
from cli.options import stack
from wsi.settings import pairs_of_words

if TYPE_CHECKING:
    from mil import Labels
    from mil.config import TrainConfig  # would load torch for every --help
    from mil.splits import Fold
    from mil.train import Epoch

__all__ = ["Progress", "cohort_options", "config_of", "config_options", "labels_of", "say"]

_KINDS = ("auto", "binary", "multiclass", "ordinal", "regression", "survival")


cohort_options = stack(
    click.argument("store", metavar="OUT", type=click.Path(path_type=Path)),
    click.option("--labels", "table", required=True, type=click.Path(path_type=Path), help="CSV with a row a slide."),
    click.option(
        "--target", "targets", multiple=True, required=True,
        help="Column to predict; for survival the one of times. Given again, one model learns several.",
    ),
    click.option("--encoder", multiple=True, help="Whose features; given twice, they are put side by side."),
    click.option(
        "--kind", "kinds", multiple=True, type=click.Choice(_KINDS),
        help="What the target is; of several, one each.  [default: auto]",
    ),
    click.option(
        "--classes", multiple=True,
        help="Classes in order, with commas; the last of two is the positive one. Of several targets, one each, or ''.",
    ),
    click.option("--event-column", "event", help="Survival: column that is 1 where the event was seen."),
    click.option("--censored-column", "censored", help="Survival: column that is 1 where it was not."),
    click.option("--slide-column", "slide", help="Column of slides.  [default: slide, slide_id, filename or file]"),
    click.option(
        "--patient-column", "patient", help="Column of patients.  [default: patient, patient_id, case or case_id]"
    ),
    click.option("--site-column", "site", help="Column of centres, for --split-by site."),
    click.option("--split-column", "split", help="Column of your own folds, for --split-by column."),
)  # fmt: skip

config_options = stack(
    click.option(
        "--split-by", type=click.Choice(["random", "site", "column"]), help="How folds are made.  [default: random]"
    ),
    click.option("--model", help="abmil, abmil-gated, clam-sb, …  [default: abmil-gated]"),
    click.option("--folds", type=click.IntRange(min=2), help="Random folds.  [default: 5]"),
    click.option("--members", type=click.IntRange(min=1), help="Models a fold, whose answers are averaged.  [default: 3]"),
    click.option("--epochs", type=click.IntRange(min=1), help="Of a model, at most.  [default: 15, more with few slides]"),
    click.option(
        "--fusion", type=click.Choice(["late", "early", "none"]), help="Several slides of a patient.  [default: late]"
    ),
    click.option("--seed", type=click.IntRange(min=0), help="Of everything that is drawn.  [default: 0]"),
    click.option("--device", help="auto, cpu, cuda or cuda:1.  [default: auto]"),
    click.option("--config", type=click.Path(path_type=Path), help="JSON file of settings; flags go before it."),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any other setting, such as lr=1e-3 or hyper.dropout=0.5.",
    ),
)  # fmt: skip


def labels_of(values: dict[str, Any]) -> "list[Labels]":
    """What the flags say of each target; the columns of slides, patients, sites and folds are common to all."""
    from mil import Labels

    targets = values["targets"]
    for flag in ("kinds", "classes"):
        if values[flag] and len(values[flag]) != len(targets):
            word = flag.replace("kinds", "kind")
            raise click.UsageError(
                f"--{word} is given {len(values[flag])} times for {len(targets)} targets; give one each"
            )
    kinds = values["kinds"] or ("auto",) * len(targets)
    classes = [
        tuple(name.strip() for name in words.split(",") if words) for words in values["classes"] or ("",) * len(targets)
    ]
    common = {name: values[name] for name in ("slide", "patient", "site", "split")}
    timed = {name: values[name] for name in ("event", "censored")}
    if len(targets) > 1 and any(timed.values()) and kinds.count("survival") != 1:
        raise click.UsageError(
            "say which of the targets the events are of: --kind once for each, survival for that one"
        )
    return [
        Labels(target, kind=kind, classes=named, **common, **(timed if kind == "survival" or len(targets) == 1 else {}))
        for target, kind, named in zip(targets, kinds, classes, strict=True)
    ]


def config_of(values: dict[str, Any]) -> "TrainConfig":
    """Settings of the file, under those of --set, under those of flags."""
    from mil import TrainConfig

    base = TrainConfig() if values["config"] is None else TrainConfig.read(values["config"])
    settings = asdict(base)
    for key, value in pairs_of_words(values["settings"], where="--set"):
        if key.startswith("hyper."):
            settings["hyper"][key.removeprefix("hyper.")] = value
        else:
            settings[key] = value
    flags = ("model", "folds", "members", "epochs", "fusion", "seed", "device", "split_by")
    settings |= {key: values[key] for key in flags if values[key] is not None}
    return TrainConfig.of_values(settings, where="--set")


class Progress(WithBars):
    """A line a fold with its first metrics, and on a terminal a bar of the epochs; an ``Observer`` of ``mil.train``."""

    def __init__(self, console: PatientConsole, config: "TrainConfig", *, n_metrics: int) -> None:
        super().__init__(
            console, TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"),
            TextColumn("{task.fields[loss]}"), TimeElapsedColumn(),
        )  # fmt: skip
        self._n_metrics = n_metrics
        self._members = config.members
        self._prefix = ""
        self._began = time.monotonic()

    def fold_started(self, fold: "Fold", number: int, total: int) -> None:
        self._prefix = f"[{number + 1}/{total}] fold {fold.name}"
        self._began = time.monotonic()
        self.clear()
        self.bars.add_task(self._prefix, total=None, loss="")

    def epoch_done(self, fold: "Fold", epoch: "Epoch") -> None:
        done = epoch.member * epoch.planned + epoch.epoch  # a model that stopped early has none left
        loss = f"loss {epoch.loss:.3f}, validation {epoch.stop_loss:.3f}"
        self.bars.update(self.bars.task_ids[-1], completed=done, total=epoch.planned * self._members, loss=loss)

    def fold_finished(self, fold: "Fold", metrics: dict[str, float], *, resumed: bool) -> None:
        words = ", ".join(f"{name} {value:.3f}" for name, value in list(metrics.items())[: self._n_metrics])
        when = "there already" if resumed else f"{time.monotonic() - self._began:.0f} s"
        say(self._console, f"{self._prefix}: {words} ({len(fold.train)} trained on, {len(fold.test)} tested, {when})")
