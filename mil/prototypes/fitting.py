"""Fitting: a cohort, or tiles drawn from it, into prototypes."""

from collections.abc import Callable
from importlib.metadata import version
from typing import get_args

import numpy as np
import torch

from mil.prototypes.kmeans import MINIBATCH_TILES, Scale, kmeans, kmeans_torch, scale_of
from mil.prototypes.prototypes import Prototypes
from mil.prototypes.tiles import Balance, HasSlides, TilePool, draw_tiles
from mil.train import pick_device
from wsi.errors import UsageError

__all__ = ["N_TILES", "RESTARTS", "fit_prototypes"]

N_TILES = 100_000
RESTARTS = 3


def fit_prototypes(
    slides: HasSlides | TilePool,
    k: int = 16,
    *,
    seed: int = 0,
    restarts: int = RESTARTS,
    n_tiles: int = N_TILES,
    balance: Balance = "slides",
    scale: Scale = "none",
    device: str = "auto",
    done: Callable[[str], None] | None = None,
) -> Prototypes:
    """Prototypes of a cohort: k-means on tiles drawn from all of its slides alike.

    The same slides, arguments and versions of scikit-learn and NumPy give the same bits on a CPU of one kind, whatever its
    number of threads. A GPU gives the same prototypes to rounding.

    Args:
        slides: a ``Cohort`` or ``SlideSet``; or a pool that has been drawn already, with its own ``n_tiles`` and ``balance``.
        k: how many prototypes.
        seed: of the draw of tiles and of the starts of k-means.
        restarts: starts of k-means, of which the best is kept.
        n_tiles, balance, done: as for ``draw_tiles``.
        scale: ``"standard"`` divides each feature by its deviation before distances are taken, here and wherever the prototypes
            are used; ``"none"``, as published, takes the features as they are.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``: a GPU, where there is one, for pools that a CPU would take in mini-batches.

    Raises:
        UsageError: fewer different tiles than prototypes.
    """
    for name, value, least in (("k", k, 1), ("seed", seed, 0), ("restarts", restarts, 1)):
        if value < least:
            raise UsageError(f"{name} is a whole number from {least}, not {value}")
    pool = (
        slides if isinstance(slides, TilePool) else draw_tiles(slides, n_tiles, seed=seed, balance=balance, done=done)
    )
    if not _differ(pool.x, k):
        raise UsageError(
            f"{len(pool)} tiles of {len(pool.slides)} slides are too few, or too alike, for {k} prototypes"
        )
    if scale not in get_args(Scale):
        raise UsageError(f"scale is one of {', '.join(get_args(Scale))}, not {scale!r}")
    divisor = scale_of(pool.x, scale)
    x = pool.x if divisor is None else pool.x / divisor
    chosen = pick_device(device)
    if device == "auto" and len(pool) <= MINIBATCH_TILES:
        chosen = torch.device("cpu")  # exact there, and the same bits every time
    if chosen.type == "cpu":
        found = kmeans(x, k, seed=seed, restarts=restarts)
    else:
        found = kmeans_torch(torch.from_numpy(x).to(chosen), k, seed=seed, restarts=restarts)
    provenance = {
        "k": k,
        "seed": seed,
        "restarts": restarts,
        "scale": scale,
        **pool.provenance,
        "method": found.method,
        "inertia": found.inertia,
        "software": {name: version(name) for name in ("numpy", "scikit-learn", "torch")},
    }
    centres = found.centres if divisor is None else found.centres * divisor
    return Prototypes(centres, found.counts / len(pool), pool.features, provenance, divisor)


def _differ(x: np.ndarray, k: int) -> bool:
    """Whether there are at least k different rows; a look at a few is enough most of the time."""
    return any(len(np.unique(rows, axis=0)) >= k for rows in (x[: 64 * k], x))
