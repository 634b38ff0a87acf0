"""Do features from wsi-extract carry what the encoder knows? Benign against malignant GlaS cores, by a linear probe.

A network trained on prostate tissue tells benign from malignant colon; the same network with random weights hardly
does. A pipeline that reads, scales or normalises wrongly would lose the difference. Needs a folder with the GlaS
composites (``slides/glas_composite_*.tif`` and ``.json``) and the network's weights.

    python benchmarks/glas_probe.py --shared ../shared
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from figures import Figure, parser, report
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from features import FeatureStore

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "weights/gleason-mobilenet/MobileNet_Gleason_weights.h5"
COHORTS = ("train", "testB")
TILE_PX = 224


def extract(shared: Path, out: Path, weights: Path | None, overlap_px: int) -> None:
    """Run the command as a user would, on both composites, at their own resolution."""
    environment = {key: value for key, value in os.environ.items() if key != "GLEASON_WEIGHTS"}
    if weights is not None:
        environment["GLEASON_WEIGHTS"] = str(weights)
    command = [sys.executable, "-c", "from cli.extract import main; main()", str(shared / "slides"), str(out)]
    command += ["--pattern", "glas_composite_*.tif", "--encoder", f"{ROOT / 'examples' / 'gleason_mobilenet.py'}:build"]
    command += ["--mpp", "0.62", "--tile", str(TILE_PX), "--overlap", str(overlap_px), "--min-tissue", "0.6"]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def cores(shared: Path, out: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(cores, D) mean vector of the tiles whose centre lies in a core, and 1 for malignant."""
    vectors, labels = [], []
    for name in COHORTS:
        slide = FeatureStore(out).slide(f"glas_composite_{name}.tif")
        (encoder,) = slide.encoders
        features = slide.features(encoder).numpy()
        centres = slide.grid.xy + np.array(slide.grid.side) / 2
        for core in json.loads((shared / "slides" / f"glas_composite_{name}.json").read_text()):
            low = np.array([core["x"], core["y"]])
            inside = ((centres >= low) & (centres < low + np.array([core["w"], core["h"]]))).all(axis=1)
            if inside.any():
                vectors.append(features[inside].mean(axis=0))
                labels.append(int(core["grade"] == "malignant"))
    return np.stack(vectors), np.array(labels)


def probe_auc(vectors: NDArray[np.float32], labels: NDArray[np.int64], repeats: int) -> float:
    """Mean AUROC of a logistic regression, five folds over cores, scaling fitted inside the folds."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    aucs = []
    for seed in range(repeats):
        folds = StratifiedKFold(5, shuffle=True, random_state=seed)
        scores = cross_val_predict(model, vectors, labels, cv=folds, method="decision_function")
        aucs.append(float(roc_auc_score(labels, scores)))
    return float(np.mean(aucs))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with slides/ and weights/")
    chosen = options.parse_args()
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for name, weights, reach in (("trained", chosen.shared / WEIGHTS, 0.9), ("random", None, None)):
            out = Path(folder) / name
            extract(chosen.shared, out, weights, 0 if chosen.quick else TILE_PX // 2)
            vectors, labels = cores(chosen.shared, out)
            auc = probe_auc(vectors, labels, 2 if chosen.quick else 20)
            figures.append(Figure(f"AUROC benign against malignant, {name} weights", auc, "", reach))
    figures.append(Figure("cores", len(labels), "cores"))
    report("GlaS cores from the features wsi-extract wrote", figures, chosen.json)


if __name__ == "__main__":
    main()
