"""Does memory grow with the slide? Peak memory of an extraction on a large slide, and on one of four times the area.

What Python, torch and the encoder take before the slide is opened is not counted. The slides are mosaics of one phantom,
see ``slides.write_mosaic``; the larger takes five gigabytes of the folder for temporary files.

    python benchmarks/memory.py            # 102,400 x 81,920 and 204,800 x 163,840 level-0 pixels
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from figures import Figure, parser, report
from slides import write_mosaic, write_slides

ROOT = Path(__file__).resolve().parents[1]
ENCODER = ROOT / "benchmarks" / "peer_runs" / "means.py"
RUN = """
import resource, sys
from features import EncoderRequest, extract_slides, load_encoder
encoder = load_encoder(EncoderRequest(sys.argv[3], device="cpu"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
done = extract_slides(sys.argv[1], sys.argv[2], encoder).outcomes[0]
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, done.facts["n_tiles"], done.facts["loop_s"])
"""


def extract(slide: Path, out: Path) -> tuple[float, int, float]:
    """Peak memory above that before the slide, in MB; the slide's tiles; seconds."""
    command = [sys.executable, "-c", RUN, str(slide), str(out), f"{ENCODER}:build"]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    before, after, tiles, seconds = run.stdout.split()[-4:]
    return (int(after) - int(before)) / 1024, int(tiles), float(seconds)  # Linux counts in KiB


def main() -> None:
    chosen = parser(__doc__).parse_args()
    size, times = ((4096, 4096), 2) if chosen.quick else ((20480, 16384), 5)
    figures, peaks = [], []
    with tempfile.TemporaryDirectory() as folder:
        (painted,) = write_slides(Path(folder) / "painted", 1, size)
        for each in (times, 2 * times):
            slide = Path(folder) / f"{each}.svs"
            write_mosaic(slide, [painted], each, each)
            peak, tiles, seconds = extract(slide, Path(folder) / f"out{each}")
            slide.unlink()
            peaks.append(peak)
            name = f"{size[0] * each:,} x {size[1] * each:,} px, {tiles:,} tiles"
            figures += [
                Figure(f"peak memory above torch and the encoder, {name}", peak, "MB", 1000, False),
                Figure(f"{name}", tiles / seconds, "tiles/s"),
            ]
    figures.append(
        Figure("four times the area, times the memory", peaks[1] / peaks[0], "×", None if chosen.quick else 1.5, False)
    )
    report("Memory of an extraction", figures, chosen.json)


if __name__ == "__main__":
    main()
