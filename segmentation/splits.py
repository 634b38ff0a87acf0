"""Split: which slides are held out for what, patient by patient."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import numpy as np

from wsi.errors import CohortError

__all__ = ["Split", "split_slides"]


class Split(NamedTuple):
    """Numbers of slides. No patient is on two sides of any of it.

    Attributes:
        validation: decide when training stops; nothing else is learned from them.
        folds: parts of all slides.
    """

    validation: tuple[int, ...]
    folds: tuple[tuple[int, ...], ...]


def split_slides(
    patients: Sequence[str], classes: Sequence[AbstractSet[str]], *, folds: int, validation: float, seed: int
) -> Split:
    """Deal patients out by chance, those with the same classes on their slides evenly.

    Args:
        patients: (N,) whose each slide is.
        classes: (N,) what is drawn on each.
        validation: share of the patients.

    Raises:
        CohortError: there are fewer patients than folds, or so few that nothing is left to learn from.
    """
    names = sorted(set(patients))
    if len(names) < folds:
        raise CohortError(f"{folds} folds need slides of as many patients; there are {len(names)}; set folds lower")
    slides_of = {name: [i for i, whose in enumerate(patients) if whose == name] for name in names}
    kind_of = {name: sorted(set().union(*(classes[i] for i in slides_of[name]))) for name in names}
    rng = np.random.default_rng(seed)

    def dealt() -> list[str]:
        chance = dict(zip(names, rng.random(len(names)).tolist(), strict=True))
        return sorted(names, key=lambda name: (kind_of[name], chance[name]))

    def slides(some: Sequence[str]) -> tuple[int, ...]:
        return tuple(sorted(i for name in some for i in slides_of[name]))

    order = dealt()
    parts = tuple(slides(order[fold::folds]) for fold in range(folds))
    n_held = max(1, round(validation * len(names))) if validation else 0
    order = dealt()
    held = [order[int((i + 0.5) * len(order) / n_held)] for i in range(n_held)]
    split = Split(slides(held), parts)
    for part in parts if folds > 1 else ((),):
        if len({*part, *split.validation}) == len(patients):
            raise CohortError(
                f"{len(names)} patients with {n_held} held out for validation leave nothing to learn from"
                + (f" beside a fold of {folds}" if folds > 1 else "")
                + "; add slides of other patients, or set validation to 0"
            )
    return split
