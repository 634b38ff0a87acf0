"""Real bags as cohorts: the classic benchmark of multiple-instance learning, and lung slides of TCGA."""

import csv
from pathlib import Path

import numpy as np

from mil import Bag, Cohort

CLASSIC = ("musk1", "musk2", "fox", "tiger", "elephant")


def classic(folder: Path, name: str) -> Cohort:
    """One of ``CLASSIC``: ``name``.npz with arrays X (instances, D), bag (instances,) and y (bags,)."""
    data = np.load(folder / f"{name}.npz")
    numbers = np.unique(data["bag"])
    return Cohort.from_arrays([data["X"][data["bag"] == each].astype(np.float32) for each in numbers], data["y"])


def lung(folder: Path) -> Cohort:
    """Adenocarcinoma or squamous-cell carcinoma: 958 slides of 862 patients, regions of 192 features without places."""
    rows, bags = _lung(folder)
    return Cohort.from_arrays(bags, [row["oncotree_code"] for row in rows], [row["case_id"] for row in rows])


def lung_clinic(folder: Path) -> dict[str, dict[str, str]]:
    """What is known of each patient of ``lung``: age, is_female, survival_months, censorship (1 = alive when last seen)."""
    return {row["case_id"]: row for row in _lung_table(folder)}


def _lung(folder: Path) -> tuple[list[dict[str, str]], list[Bag]]:
    data = np.load(folder / "tcga-nsclc-hipt192.npz")
    by_slide = {row["slide_id"]: row for row in _lung_table(folder)}
    slides, ends = [str(each) for each in data["slide_id"]], data["offsets"]
    features = data["features"].astype(np.float32)
    bags = [Bag(features[ends[i] : ends[i + 1]], None, slide) for i, slide in enumerate(slides)]
    return [by_slide[slide] for slide in slides], bags


def _lung_table(folder: Path) -> list[dict[str, str]]:
    with (folder / "tcga-nsclc.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
