"""Plots: the curves are those of the predictions, and pyplot is left alone."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mil import cross_validate, plots
from mil.target import Target
from tests.mil.made_up import QUICK, cohort
from tests.mil.test_metrics import predictions
from wsi.errors import UsageError

THREE = Target("t", "multiclass", ("a", "b", "c"))


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_the_roc_of_a_perfect_and_of_a_reversed_model() -> None:
    y = [0, 0, 1, 1]
    for answers, label in (([0.1, 0.2, 0.8, 0.9], "AUROC 1.000"), ([0.9, 0.8, 0.2, 0.1], "AUROC 0.000")):
        assert label in legend(plots.roc(predictions(y, np.array(answers))))[0]


def test_every_class_has_a_curve_of_its_own_and_one_that_never_occurs_has_none() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1, 1, 1], 20)
    assert len(legend(plots.roc(predictions(np.arange(20) % 3, p, THREE)))) == 3
    assert len(legend(plots.precision_recall(predictions(np.arange(20) % 2, p, THREE)))) == 2


def test_the_confusion_counts_are_written_in_true_rows() -> None:
    p = np.eye(3)[[0, 1, 1, 2, 2, 2]]
    axes = plots.confusion(predictions([0, 0, 1, 2, 2, 2], p, THREE)).axes[0]
    counts = {tuple(int(v) for v in text.get_position()): text.get_text() for text in axes.texts}
    assert (counts[(1, 0)], counts[(0, 0)], counts[(2, 2)]) == ("1", "1", "3")


def test_survival_curves_part_at_the_median_risk() -> None:
    rng = np.random.default_rng(0)
    risk = rng.normal(size=60)
    time = np.exp(-2 * risk)
    figure = plots.kaplan_meier(predictions(time, risk[:, None], Target("t", "survival")))
    axes = figure.axes[0]
    assert legend(figure) == [
        "lower risk (n = 30)",
        "higher risk (n = 30)",
    ]
    assert "c-index 1.000" in axes.get_title()
    assert float(axes.get_title().split("=")[1].split(",")[0]) < 1e-5


def test_plots_for_another_kind_of_target_are_refused() -> None:
    for plot in (plots.roc, plots.confusion, plots.calibration):
        with pytest.raises(UsageError, match="for classes"):
            plot(predictions([1.0], [[1.0]], Target("t", "regression")))
    with pytest.raises(UsageError, match="for survival"):
        plots.kaplan_meier(predictions([1], [0.5]))


def test_a_result_draws_all_of_its_plots(tmp_path: Path) -> None:
    result = cross_validate(cohort(24), replace(QUICK, epochs=2))
    for name in ("roc", "pr", "confusion", "calibration", "curves"):
        figure: Any = getattr(result, f"plot_{name}")()
        figure.savefig(tmp_path / f"{name}.png", dpi=40)
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_importing_mil_loads_nothing_heavy() -> None:
    code = "import mil, sys; print([m for m in ('torch', 'sklearn', 'matplotlib', 'lifelines', 'pandas') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"
    )
