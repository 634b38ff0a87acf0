"""Our own store as plain arrays. What fills it is ``wsi-extract`` itself.

with_ours.py export OUT FILE.npz
"""

import sys
from pathlib import Path

from means import save

from features import FeatureStore


def export(out: Path, file: Path) -> None:
    slides = {}
    for slide in FeatureStore(out):
        (name,) = slide.encoders
        slides[Path(slide.relpath).stem] = (slide.grid.xy, slide.features(name).numpy())
    save(file, slides)


if __name__ == "__main__":
    export(Path(sys.argv[2]), Path(sys.argv[3]))
