"""K-means: centres of a pool of tiles, by scikit-learn on a CPU and by matmuls on a GPU.

Lloyd: Least Squares Quantization in PCM, IEEE TIT 1982; Arthur, Vassilvitskii: k-means++, SODA 2007; Sculley: Web-Scale
K-Means Clustering, WWW 2010 (mini-batches).
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

__all__ = ["MINIBATCH_TILES", "Clusters", "Scale", "kmeans", "kmeans_torch", "lloyd", "nearest", "scale_of"]

Scale = Literal["none", "standard"]

MINIBATCH_TILES = 400_000  # more than this, and a CPU takes mini-batches
_BATCH = 16_384
_MAX_STEPS = 100
_TOLERANCE = 1e-4  # movement of the centres, squared, by the features' mean variance; as scikit-learn's
_BLOCK_ROWS = 65_536


class Clusters(NamedTuple):
    """What k-means came to: (K, D) float32 centres, (K,) tiles of each, mean squared distance to the centre, how."""

    centres: NDArray[np.float32]
    counts: NDArray[np.int64]
    inertia: float
    method: str


def kmeans(x: NDArray[np.float32], k: int, *, seed: int, restarts: int) -> Clusters:
    """The best of ``restarts`` runs from k-means++ starts on the CPU; most common centre first.

    The same bits for the same seed, however many threads the machine has: sums over several threads depend on which is
    done first, so one computes all.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans

    small = len(x) <= MINIBATCH_TILES
    with threadpool_limits(1):
        if small:
            model = KMeans(
                k, n_init=restarts, max_iter=_MAX_STEPS, tol=_TOLERANCE, random_state=seed, algorithm="lloyd"
            )
        else:
            model = MiniBatchKMeans(k, n_init=restarts, batch_size=_BATCH, random_state=seed, reassignment_ratio=0.01)
        centres = model.fit(x).cluster_centers_.astype(np.float32)
        return _ordered(x, centres, "sklearn lloyd" if small else "sklearn mini-batch")


def kmeans_torch(x: Tensor, k: int, *, seed: int, restarts: int) -> Clusters:
    """As ``kmeans``, on the device of ``x`` (n, D), with Lloyd's full passes for a pool of any size."""
    rng = np.random.default_rng(seed)
    best: tuple[float, Tensor] | None = None
    for _ in range(restarts):
        centres, inertia = lloyd(x, _plus_plus(x, k, rng))
        if best is None or inertia < best[0]:
            best = (inertia, centres)
    assert best is not None
    with threadpool_limits(1):
        return _ordered(x.cpu().numpy(), best[1].cpu().numpy(), "torch lloyd")


def lloyd(x: Tensor, start: Tensor) -> tuple[Tensor, float]:
    """Lloyd's algorithm from ``start`` (K, D): centres (K, D) float32 and the mean squared distance.

    A centre that loses all tiles moves to the tile that is farthest from its own.
    """
    origin = x.mean(0)
    centres = (start.to(x.device) - origin).float()
    limit = _TOLERANCE * float(x.var(0, correction=0).mean())
    inertia = float("inf")
    labels: Tensor | None = None
    for _ in range(_MAX_STEPS):
        found, distance = _assign(x, origin, centres)
        inertia = float(distance.double().mean())
        if labels is not None and bool((found == labels).all()):
            break
        labels = found
        moved = _means(x, origin, found, distance, len(centres))
        shift = float((moved - centres).square().sum())
        centres = moved
        if shift <= limit:
            inertia = float(_assign(x, origin, centres)[1].double().mean())
            break
    return centres + origin, inertia


def nearest(x: NDArray[np.float32], centres: NDArray[np.float32]) -> NDArray[np.int64]:
    """(n,) index of the nearest of the (K, D) centres."""
    rows, points = torch.from_numpy(np.asarray(x, np.float32)), torch.from_numpy(np.array(centres, np.float32))
    origin = points.mean(0)
    return _assign(rows, origin, points - origin)[0].numpy()


def scale_of(x: NDArray[np.float32], scale: Scale) -> NDArray[np.float32] | None:
    """(D,) what to divide each feature of (n, D) tiles by: its deviation for ``"standard"`` (1 where it is constant); or None.

    A few features of great variance decide otherwise which prototype is the nearest, and those of an encoder that is
    not normalised differ a hundredfold.
    """
    if scale == "none":
        return None
    deviation = np.sqrt(_variance(x)).astype(np.float32)
    return np.where(deviation > 0, deviation, np.float32(1))


def _variance(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """(D,) summed about the first row's values, block by block, so that a large pool is never copied as a whole."""
    origin = x[0].astype(np.float64)
    total, squares = np.zeros_like(origin), np.zeros_like(origin)
    for start in range(0, len(x), _BLOCK_ROWS):
        y = x[start : start + _BLOCK_ROWS] - origin
        total += y.sum(0)
        squares += np.square(y).sum(0)
    mean = total / len(x)
    return np.asarray(np.maximum(squares / len(x) - mean**2, 0))


def _assign(x: Tensor, origin: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centre of each row and the squared distance to it; ``centres`` are less ``origin``, ``x`` is not."""
    square = centres.square().sum(1)
    labels, distances = [], []
    for start in range(0, len(x), _BLOCK_ROWS):
        y = x[start : start + _BLOCK_ROWS] - origin
        least = (square - 2 * y @ centres.T).min(1)
        labels.append(least.indices)
        distances.append((least.values + y.square().sum(1)).clamp(min=0))
    return torch.cat(labels), torch.cat(distances)


def _means(x: Tensor, origin: Tensor, labels: Tensor, distance: Tensor, k: int) -> Tensor:
    sums = torch.zeros(k, x.shape[1], dtype=torch.float64, device=x.device)
    for start in range(0, len(x), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        member = torch.nn.functional.one_hot(labels[part], k).float()  # a matmul adds in one order, a scatter does not
        sums += (member.T @ (x[part] - origin)).double()
    counts = torch.bincount(labels, minlength=k)
    means = sums / counts.clamp(min=1)[:, None]
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty):
        means[empty] = (x[distance.topk(len(empty)).indices] - origin).double()
    return means.float()


def _plus_plus(x: Tensor, k: int, rng: np.random.Generator) -> Tensor:
    """K rows, each drawn with a probability that grows with the squared distance to those drawn before."""
    chosen = [int(rng.integers(len(x)))]
    origin = x.mean(0)
    distance = _assign(x, origin, (x[chosen] - origin))[1].double()
    for _ in range(k - 1):
        total = distance.cumsum(0)
        place = torch.tensor(float(rng.random()), dtype=torch.float64, device=x.device) * total[-1]
        chosen.append(min(int(torch.searchsorted(total, place, right=True)), len(x) - 1))
        distance = torch.minimum(distance, _assign(x, origin, x[chosen[-1:]] - origin)[1].double())
    return x[chosen].float()


def _ordered(x: NDArray[np.float32], centres: NDArray[np.float32], method: str) -> Clusters:
    """Clusters with the most common first; equally common ones as they came."""
    labels = nearest(x, centres)
    counts = np.bincount(labels, minlength=len(centres))
    order = np.argsort(-counts, kind="stable")
    squares = sum(
        float(np.square(x[i : i + _BLOCK_ROWS] - centres[labels[i : i + _BLOCK_ROWS]]).sum(dtype=np.float64))
        for i in range(0, len(x), _BLOCK_ROWS)
    )
    return Clusters(centres[order], counts[order], squares / len(x), method)
