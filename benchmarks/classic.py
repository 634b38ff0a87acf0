"""The classic benchmark of multiple-instance learning: MUSK1, MUSK2, Fox, Tiger, Elephant; 10 folds, five times.

ABMIL and gated ABMIL by ``cross_validate``, with one configuration for all five sets, against the accuracies that Ilse et
al. published for them (ICML 2018, tables 1 and 2). Each of the five runs has folds and weights of its own seed; nobody
stops or chooses anything by looking at a test fold. The reach is the published mean less its ±.

    python benchmarks/classic.py FOLDER      # with musk1.npz, musk2.npz, fox.npz, tiger.npz, elephant.npz
"""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from figures import Figure, parser, report
from real_bags import CLASSIC, classic
from rich.console import Console

from mil import TrainConfig, cross_validate

PUBLISHED = {
    "abmil": {"musk1": (0.892, 0.040), "musk2": (0.858, 0.048), "fox": (0.615, 0.043), "tiger": (0.839, 0.022),
              "elephant": (0.868, 0.022)},
    "abmil-gated": {"musk1": (0.900, 0.050), "musk2": (0.863, 0.042), "fox": (0.603, 0.029), "tiger": (0.845, 0.018),
                    "elephant": (0.857, 0.027)},
}  # fmt: skip
# Bags of some ten instances want a smaller model than slides, and no instance left out.
CONFIG = TrainConfig(
    folds=10, members=1, epochs=30, batch_size=4, weight_decay=2.0, tile_dropout=0.0, calibrate=False,
    hyper={"embed_dim": 128, "attention_dim": 64},
)  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--sets", default=",".join(CLASSIC))
    options.add_argument("--runs", type=int, default=5)
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    sets, runs, models = chosen.sets.split(","), chosen.runs, tuple(PUBLISHED)
    if chosen.quick:
        sets, runs, models = ["musk1"], 1, ("abmil-gated",)
    console, figures = Console(), []
    for name in sets:
        cohort = classic(chosen.folder, name)
        for model in models:
            start, accuracies, aurocs = time.perf_counter(), [], []
            for seed in range(runs):
                folds = cross_validate(cohort, replace(CONFIG, model=model, seed=seed)).metrics().values()
                accuracies.append(np.mean([metrics["accuracy"] for metrics in folds]))
                aurocs.append(np.mean([metrics["auroc"] for metrics in folds]))
            mean, spread = PUBLISHED[model][name]
            console.print(
                f"{name}, {model}: accuracy {np.mean(accuracies):.3f} ± {np.std(accuracies):.3f} over runs (published {mean:.3f} "
                f"± {spread:.3f}), AUROC {np.mean(aurocs):.3f}, {(time.perf_counter() - start) / runs:.0f} s a run"
            )
            figures += [
                Figure(f"{name}, {model}: accuracy", float(np.mean(accuracies)), "", round(mean - spread, 3)),
                Figure(f"{name}, {model}: deviation over runs", float(np.std(accuracies)), ""),
                Figure(f"{name}, {model}: AUROC", float(np.mean(aurocs)), ""),
            ]
    report("Classic bags", figures, chosen.json)


if __name__ == "__main__":
    main()
