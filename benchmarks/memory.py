"""Does memory grow with the slide? Peak memory of wsi-extract on a phantom, and on one of four times the area.

python benchmarks/memory.py            # 20,000 x 16,000 and 40,000 x 32,000 level-0 pixels
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from figures import Figure, parser, report

from wsi.phantom import PhantomSpec, write_svs

ROOT = Path(__file__).resolve().parents[1]
RUN = """
import resource, sys
from features import ExtractOptions, extract_slides, load_encoder
from features.encoder import EncoderRequest
encoder = load_encoder(EncoderRequest("colour-stats"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
done = extract_slides(sys.argv[1], sys.argv[2], encoder).outcomes[0]
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, done.facts["n_tiles"])
"""


def peak_mb(slide: Path, out: Path) -> tuple[float, float, int]:
    """Peak memory before the slide, and after it, in MB; and the slide's tiles."""
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(slide), str(out)], check=True, capture_output=True, text=True, cwd=ROOT
    )
    before, after, tiles = (int(word) for word in run.stdout.split()[-3:])
    return before / 1024, after / 1024, tiles  # Linux counts in KiB


def main() -> None:
    chosen = parser(__doc__).parse_args()
    width, height = (6_000, 4_000) if chosen.quick else (20_000, 16_000)
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, 2):
            slide = Path(folder) / f"{times}.svs"
            write_svs(slide, PhantomSpec(width * times, height * times, seed=1, tumour=0.2))
            before, after, tiles = peak_mb(slide, Path(folder) / f"out{times}")
            name = f"{width * times:,} x {height * times:,} px, {tiles:,} tiles"
            figures.append(
                Figure(f"peak memory above torch and the encoder, {name}", after - before, "MB", 1000, False)
            )
    figures.append(
        Figure("four times the area, times the memory", figures[1].value / figures[0].value, "×", 1.5, False)
    )
    report("Memory of wsi-extract", figures, chosen.json)


if __name__ == "__main__":
    main()
