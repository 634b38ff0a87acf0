"""What a slide embedding costs: time against the formula in plain numpy, error against float64, memory of a huge slide.

    python benchmarks/prototypes.py            # a slide of 1,000,000 tiles in a store of 2 GB, in the folder for temporary files

Tiles are made up: 16 kinds at distances as an encoder of 1024 features puts them, in half precision as stores keep them.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import Figure, parser, report
from numpy.typing import NDArray

from features.keys import slide_key
from features.store import FeatureStore
from features.writing import FeatureWriter, write_slide
from mil.prototypes import EMBEDDERS, Panther, Prototypes
from mil.prototypes.kmeans import kmeans
from wsi.grid import TileGrid, Tiling

ROOT = Path(__file__).resolve().parents[1]
DIM, K, TILES = 1024, 16, 10_000
EM = Panther()
RUN = """
import resource, sys, time
from mil.prototypes import Embeddings, Prototypes, embed_slides
prototypes = Prototypes.load(sys.argv[2])
embed_slides(sys.argv[3], prototypes)  # whatever is loaded once, is
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
embed_slides(sys.argv[1], prototypes)
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def made_up(n: int, seed: int = 0) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """(n, DIM) tiles and the (K, DIM) centres of their kinds."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(K, DIM)).astype(np.float32) + rng.normal(size=DIM).astype(np.float32)
    noise = rng.standard_normal((n, DIM), dtype=np.float32)
    return (centres[rng.integers(0, K, n)] + noise).astype(np.float16), centres


def as_it_stands(x: NDArray[Any], m: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """PANTHER's expectation and maximisation, equation by equation, a prototype at a time."""
    pi, mu, sigma = np.full(K, 1 / K, x.dtype), m, np.full(m.shape, EM.eps, x.dtype)
    for _ in range(EM.em_iter):
        density = np.stack(
            [
                -0.5 * (np.log(2 * np.pi * sigma[c]) + (x - mu[c]) ** 2 / sigma[c]).sum(1) + np.log(pi[c])
                for c in range(K)
            ],
            axis=1,
        )
        q = np.exp(density - density.max(1, keepdims=True))
        q /= q.sum(1, keepdims=True)
        weight = q.sum(0) + EM.tau
        pi = weight / weight.sum()
        mu = np.stack([((q[:, [c]] * x).sum(0) + EM.tau * m[c]) / weight[c] for c in range(K)])
        squares = [((q[:, [c]] * x**2).sum(0) + EM.tau * (EM.eps + m[c] ** 2)) / weight[c] for c in range(K)]
        sigma = np.stack(squares) - mu**2
    return pi, mu, sigma


def written_out(x: NDArray[Any], m: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """The same with the square written out, so that products of matrices do the work, as in the published code."""
    pi, mu, sigma = np.full(K, 1 / K, x.dtype), m, np.full(m.shape, EM.eps, x.dtype)
    for _ in range(EM.em_iter):
        constant = np.log(2 * np.pi * sigma).sum(1) + (mu**2 / sigma).sum(1)
        density = -0.5 * (x**2 @ (1 / sigma).T - 2 * x @ (mu / sigma).T + constant) + np.log(pi)
        q = np.exp(density - density.max(1, keepdims=True))
        q /= q.sum(1, keepdims=True)
        weight = (q.sum(0) + EM.tau)[:, None]
        pi = weight[:, 0] / weight.sum()
        mu = (q.T @ x + EM.tau * m) / weight
        sigma = (q.T @ x**2 + EM.tau * (EM.eps + m**2)) / weight - mu**2
    return pi, mu, sigma


def seconds(function: Callable[[], Any], times: int) -> float:
    """The fastest of several calls: what others do on the machine only ever adds."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        took.append(time.perf_counter() - began)
    return min(took)


def error(found: tuple[Any, ...], exact: tuple[Any, ...]) -> list[float]:
    return [float(np.abs(np.asarray(a, np.float64) - b).max()) for a, b in zip(found, exact, strict=True)]


def write_store(root: Path, n: int) -> Path:
    """A store with one slide of ``n`` tiles, written a part at a time."""
    store = FeatureStore.create(root, Tiling())
    side = int(np.ceil(np.sqrt(n)))
    xy = np.stack([np.arange(n) % side, np.arange(n) // side], axis=1) * 256
    grid = TileGrid(xy=xy, tile_px=256, side=(256, 256), stride=(256, 256), mpp=(0.5, 0.5))
    key = slide_key("huge.svs")
    about = {"key": key, "relpath": "huge.svs", "location": "huge.svs", "size": [side * 256] * 2, "mpp": [0.5, 0.5]}
    slide = write_slide(store, key, grid, {"slide": about, "tissue": {}})
    writer = FeatureWriter(store, slide, {"name": "made-up", "dim": DIM}, {"precision": "fp32"}, dtype="float16")
    for start in range(0, n, 4096):
        rows = made_up(min(4096, n - start), seed=start)[0].astype(np.float32)
        writer.write(rows, np.zeros(len(rows), np.uint8))
    writer.finish({})
    return root


def huge_slide(folder: Path, n: int) -> tuple[float, float]:
    """Seconds and MB above what is loaded once, to embed a slide of ``n`` tiles from a store."""
    centres = made_up(1)[1]
    Prototypes(centres, np.full(K, 1 / K), {"encoder": ["made-up"]}, {}).save(folder / "prototypes.zarr")
    huge, small = write_store(folder / "huge", n), write_store(folder / "small", 4096)
    command = [sys.executable, "-c", RUN, str(huge), str(folder / "prototypes.zarr"), str(small)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    took, grown = run.stdout.split()
    return float(took), int(grown) / 1024  # Linux counts in KiB


def main() -> None:
    chosen = parser(__doc__).parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    times, huge, pool = (2, 20_000, 5_000) if chosen.quick else (7, 1_000_000, 100_000)
    half, centres = made_up(TILES)
    single = half.astype(np.float32)
    x, prototypes = torch.from_numpy(half), torch.from_numpy(centres)
    ours = seconds(lambda: EM.embed(x, prototypes), times + 1)
    stands, matmul = (seconds(lambda f=f: f(single, centres), times) for f in (as_it_stands, written_out))  # type: ignore[misc]
    exact = as_it_stands(half.astype(np.float64), centres.astype(np.float64))
    mixture = tuple(part[0].numpy() for part in EM.mixture(x, prototypes))
    errors, others = error(mixture, exact), error(written_out(single, centres), exact)
    figures = [
        Figure(f"panther of {TILES:,} × {DIM} tiles, k = {K}", ours, "s", 0.15, False),
        Figure("the formula as it stands, numpy float32", stands / ours, "× our time", 5),
        Figure("the formula written out for matmuls, numpy float32", matmul / ours, "× our time"),
        *(
            Figure(f"error of {name} against float64, ours (numpy float32: {other:.1e})", mine, "", 1e-4, False)
            for name, mine, other in zip(("π", "μ", "Σ"), errors, others, strict=True)
        ),
    ]
    for name, kind in EMBEDDERS.items():
        if name != "panther":
            method = kind()
            took = seconds(lambda m=method: m.embed(x, prototypes), 1 if chosen.quick else 3)  # type: ignore[misc]
            figures.append(Figure(f"{name} of the same tiles", took, "s"))
    took = seconds(lambda: kmeans(made_up(pool)[0].astype(np.float32), K, seed=0, restarts=1), 1)
    figures.append(Figure(f"k-means of {pool:,} × {DIM} tiles, one start, one thread", took, "s"))
    with tempfile.TemporaryDirectory() as folder:
        took, grown = huge_slide(Path(folder), huge)
    figures += [
        Figure(f"wsi prototypes embed: a slide of {huge:,} × {DIM} tiles", took, "s"),
        Figure(
            f"its memory above a small slide's ({huge * DIM * 2 / 2**20:,.0f} MB of features)", grown, "MB", 100, False
        ),
    ]
    report("Slide embeddings", figures, chosen.json)


if __name__ == "__main__":
    main()
