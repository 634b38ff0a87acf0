"""All models on real lung slides: adenocarcinoma or squamous, 5 folds that split no patient, against mean pooling.

The baseline is scikit-learn's logistic regression on the mean of a slide's features, standardised and its strength chosen on
the training part, on the same folds; a patient's answer is the mean over the slides, as it is for the models. Differences
are paired over patients. Every model is trained with the defaults of TrainConfig, one model a fold, but
for what ``SETTINGS`` says. The encoder was trained on these very slides without labels, so the numbers
compare heads and are no claim about new patients.

    python benchmarks/nsclc.py FOLDER      # with tcga-nsclc-hipt192.npz and tcga-nsclc.csv
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import Figure, parser, report
from probes import probe
from real_bags import lung
from rich.console import Console
from rich.table import Table

from mil import MODELS, Cohort, Result, TrainConfig, compare, cross_validate
from mil.metrics import Interval, intervals, measure
from mil.predictions import Predictions, stack
from mil.splits import make_folds

DRAWS = 1000
# The features are 192 wide, too narrow for transformers of 512, and ILRA wants to be pulled to zero less; what is left out
# has the model's own settings.
SETTINGS: dict[str, dict[str, Any]] = {
    "transmil": {"hyper": {"width": 128, "heads": 4}},
    "transformer": {"hyper": {"width": 128, "heads": 4}},
    "stamp-vit": {"hyper": {"width": 128, "heads": 4, "mlp_dim": 128}},
    "rrt": {"hyper": {"width": 128, "heads": 4}},
    "wikg": {"hyper": {"width": 128}},
    "ilra": {"hyper": {"width": 64, "heads": 4, "depth": 1, "norm": True}, "lr": 5e-4, "weight_decay": 0.3},
}


def mean_pool(cohort: Cohort, config: TrainConfig) -> tuple[Predictions, list[float]]:
    """Predictions of the logistic regression, and its AUROC in each fold."""
    cases = cohort.cases(config.fusion)
    means = np.stack([cohort.read(bag).features.mean(0).numpy() for bag in cases.bags])
    folds = make_folds(cases, cohort.target, by=config.split_by, folds=config.folds, seed=config.seed)
    parts = [probe(cases, cohort.target, fold, means).predictions for fold in folds]
    return stack(parts), [measure(part)["auroc"] for part in parts]


def by_fold(result: Result) -> list[float]:
    return [metrics["auroc"] for metrics in result.metrics().values()]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--models", default=",".join(MODELS), help="names with commas; all by default")
    options.add_argument("--best", default="", help="name of the model that is trained five times a fold")
    options.add_argument(
        "--set", type=_setting, action="append", default=[], metavar="KEY=VALUE", help="of TrainConfig"
    )
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--work", type=Path, metavar="FOLDER", help="keep the runs here, and use those that are there")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    cohort = lung(chosen.folder)
    asked = dict(chosen.set)
    config = replace(TrainConfig(members=1), **asked)
    names = chosen.models.split(",")
    if chosen.quick:
        names = ["abmil-gated"]
        asked |= {"epochs": 3, "hyper": {"embed_dim": 64, "attention_dim": 32}}
    baseline, folds = mean_pool(cohort, config)
    console, table, figures = Console(), Table(title="Lung, 5 folds"), []
    for column in ("model", "AUROC, folds", "AUROC, pooled [95 %]", "more than mean-pool [95 %]", "p", "s/fold"):
        table.add_column(column, justify="left" if column == "model" else "right")
    pooled = intervals(baseline, draws=DRAWS)["auroc"]
    table.add_row("mean-pool + logistic regression", _spread(folds), str(pooled), "", "", "")
    figures.append(Figure("mean-pool + logistic regression: AUROC, mean of folds", float(np.mean(folds)), ""))
    runs = [(name, name, config) for name in names]
    if chosen.best and not chosen.quick:
        runs.append((f"{chosen.best}, five models", chosen.best, replace(config, members=5)))
    for title, name, each in runs:
        start = time.perf_counter()
        each = replace(each, model=name, **SETTINGS.get(name, {}) | asked)  # noqa: PLW2901 - the same, named
        result = cross_validate(cohort, each, out=chosen.work and chosen.work / title.replace(", ", "-"))
        seconds = (time.perf_counter() - start) / len(result.folds)
        found: Interval = result.intervals(draws=DRAWS)["auroc"]
        more = compare(result.predictions, baseline)
        aurocs = by_fold(result)
        difference = f"{more.value:+.3f} [{more.low:+.3f}, {more.high:+.3f}]"
        table.add_row(title, _spread(aurocs), str(found), difference, f"{more.p:.3f}", f"{seconds:.0f}")
        console.print(f"{title}: {_spread(aurocs)}, {seconds:.0f} s/fold")
        best = title != name
        figures += [
            Figure(f"{title}: AUROC, mean of folds", float(np.mean(aurocs)), "", 0.955 if best else None),
            Figure(f"{title}: AUROC, pooled", found.value, ""),
            Figure(f"{title}: more than mean-pool, mean of folds", float(np.mean(aurocs) - np.mean(folds)), "", 0),
            Figure(f"{title}: p of the difference", more.p, ""),
            Figure(f"{title}: time", seconds, "s/fold"),
        ]
    console.print(table)
    report("Lung", figures, chosen.json)


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.4f} ± {np.std(values):.4f}"


def _setting(text: str) -> tuple[str, Any]:
    import json

    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: KEY=JSON is needed ({error})") from error


if __name__ == "__main__":
    main()
