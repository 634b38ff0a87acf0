"""Do prototypes find the kinds of tissue? Phantom slides, whose kinds are known, and k-means, which is not told of them.

Six kinds: mucosa, submucosa, muscle, fat, lymphoid follicles and, on every other slide, tumour. As many prototypes are fitted
on all tiles, with features as they are and in standard scale. Agreement is the adjusted Rand index between the nearest
prototype and the kind that most of a tile is: over tiles of which three quarters or more are one kind, where there is one
right answer, and over all tiles. It is the mean over five seeds, with the lowest and the highest.

    python benchmarks/phantom_prototypes.py                                         # offline, no weights
    python benchmarks/phantom_prototypes.py --encoder examples/gleason_mobilenet.py:build    # GLEASON_WEIGHTS names its file
    python benchmarks/phantom_prototypes.py --encoder timm:resnet18                 # random weights, which promise nothing
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import shapely
from figures import Figure, parser, report
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score

from features import EncoderRequest, ExtractOptions, FeatureStore, extract_slides
from features.keys import safe_name
from features.prepare import PrepareOptions
from mil.prototypes import SlideSet, draw_tiles, fit_prototypes, report_k
from mil.prototypes.kmeans import Scale
from mil.prototypes.survey import assigned_tiles
from wsi.grid import TileGrid, Tiling
from wsi.phantom import Phantom, PhantomSpec, write_svs

ROOT = Path(__file__).resolve().parents[1]
ENCODER = f"{ROOT / 'examples' / 'texture_statistics.py'}:build"
KINDS = ("submucosa", "muscle", "fat", "mucosa", "lymphoid", "tumour")
SIDE_PX, MPP = 5120, 0.5  # a piece thick enough for all layers
SCALES: tuple[Scale, ...] = ("none", "standard")
SEEDS = range(5)
PURE = 0.75  # of a tile


def specs_of(n_slides: int, seed: int) -> dict[str, PhantomSpec]:
    """Slides by file name; every other one has a tumour on 10 to 35% of its tissue."""
    shares = np.random.default_rng(seed).uniform(0.1, 0.35, n_slides)
    return {
        f"s{i:02}.svs": PhantomSpec(
            SIDE_PX,
            SIDE_PX,
            mpp=MPP,
            seed=1000 * seed + i,
            tissue_fraction=0.5,
            tumour=float(shares[i]) if i % 2 else 0.0,
        )
        for i in range(n_slides)
    }


def kinds_of(grid: TileGrid, phantom: Phantom) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The kind that most of each tile is (N,), an index into KINDS, and the share of the tile that is of it (N,)."""
    low = grid.xy.astype(np.float64)
    boxes = shapely.box(*low.T, *(low + grid.side).T)
    nowhere = shapely.MultiPolygon()
    areas = [shapely.area(shapely.intersection(boxes, phantom.kinds.get(kind, nowhere))) for kind in KINDS]
    shares = np.stack(areas, axis=1) / shapely.area(boxes)[:, None]
    return shares.argmax(axis=1), shares.max(axis=1)


def judge(out: Path, encoder: str, label: str, phantoms: dict[str, Phantom]) -> list[Figure]:
    """Agreement of prototypes with kinds, for each scale."""
    store = FeatureStore(out)
    slides = SlideSet.from_store(out, encoder)
    found = [kinds_of(store.slide(key).grid, phantoms[store.slide(key).relpath]) for key in slides.slides]
    kind, share = (np.concatenate(each) for each in zip(*found, strict=True))
    pure = share >= PURE
    k = len(np.unique(kind[pure]))
    pool = draw_tiles(slides)
    figures = []
    for scale in SCALES:
        index = []
        for seed in SEEDS:
            fitted = fit_prototypes(pool, k, seed=seed, restarts=5, scale=scale, device="cpu")
            own = np.concatenate([assigned_tiles(slides.source, key, fitted)[0] for key in slides.slides])
            index.append([adjusted_rand_score(kind[which], own[which]) for which in (pure, np.ones_like(pure))])
        values = np.array(index)
        reach = 0.8 if scale == "standard" and not label.startswith("timm:") else None  # random weights promise nothing
        for column, words in enumerate((f"tiles ≥ {PURE:.0%} of a kind", "all tiles")):
            mean, low, high = values[:, column].mean(), values[:, column].min(), values[:, column].max()
            name = f"{label}, scale {scale}, {words}: adjusted Rand"
            figures.append(Figure(name, float(mean), "", None if column else reach, True, (float(low), float(high))))
    rows = report_k(pool, range(3, 11), repeats=2, scale="standard").rows
    best = max(rows, key=lambda row: row.silhouette)
    figures.append(Figure(f"{label}, scale standard: k of the highest silhouette, of 3 to 10", best.k, ""))
    figures.append(Figure(f"{label}: tiles", len(kind), ""))
    figures.append(Figure(f"{label}: tiles ≥ {PURE:.0%} of a kind", int(pure.sum()), ""))
    return figures


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--encoder", action="append", help="as for wsi extract; may be given several times")
    options.add_argument("--seed", type=int, default=0, help="of the slides")
    options.add_argument("--work", type=Path, metavar="FOLDER", help="keep slides and features here, and use them")
    chosen = options.parse_args()
    figures: list[Figure] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.work or Path(temporary)
        specs = specs_of(6 if chosen.quick else 16, chosen.seed)
        phantoms = {name: Phantom(spec) for name, spec in specs.items()}
        (folder / "slides").mkdir(parents=True, exist_ok=True)
        for name, phantom in phantoms.items():
            if not (folder / "slides" / name).exists():
                write_svs(folder / "slides" / name, phantom)
        for asked in chosen.encoder or [ENCODER]:
            label = asked.rsplit("/", 1)[-1].partition(".py:")[0]
            out = folder / safe_name(label)
            request = EncoderRequest(asked, random_seed=0 if asked.startswith("timm:") else None)
            tiling = PrepareOptions(tiling=Tiling(mpp=MPP, tile_px=256))
            done = extract_slides(folder / "slides", out, request, ExtractOptions(prepare=tiling, batch_size=32))
            if done.count("failed"):
                raise SystemExit(f"{done.count('failed')} slides failed; see {out / 'report.jsonl'}")
            figures += judge(out, next(iter(FeatureStore(out))).encoders[0], label, phantoms)
    figures.append(Figure("the whole run", (time.monotonic() - started) / 60, "minutes"))
    report("Phantom prototypes: kinds of tissue", figures, chosen.json)


if __name__ == "__main__":
    main()
