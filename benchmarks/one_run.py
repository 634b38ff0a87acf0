"""One extraction in a process of its own, for the other benchmarks: runs what ``wsi-extract`` runs, prints JSON.

    python benchmarks/one_run.py SLIDES OUT --encoder timm:vit_small_patch16_224 --random-weights 0 --bare-seconds 5

Prints, on the last line: ``seconds`` from the first slide to the last, after the encoder is loaded; ``busy``, the share of
its loop's time that the encoder was at work; ``decode_ratio``; ``before_mb`` and ``peak_mb`` of memory; ``bare`` tiles/s of
the encoder alone on one batch that lies on its device, None where not asked for; ``slides``, what ``report.jsonl`` says of
each.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FREE = str(ROOT / "benchmarks" / "peer_runs" / "means.py") + ":build"


@dataclass(frozen=True)
class Extraction:
    """What one run came to; see the words above."""

    seconds: float
    busy: float
    decode_ratio: float
    before_mb: float
    peak_mb: float
    bare: float | None
    slides: tuple[dict[str, Any], ...]

    @property
    def tiles(self) -> int:
        return int(sum(slide["n_tiles"] for slide in self.slides))

    @property
    def tiles_per_s(self) -> float:
        return self.tiles / self.seconds


def extraction(slides: Path, out: Path, *options: str) -> Extraction:
    """Run this file and return what it prints; every slide has to succeed."""
    command = [sys.executable, __file__, str(slides), str(out), *options]
    variables = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # as wsi-extract sets it
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=variables)
    printed = json.loads(done.stdout.splitlines()[-1])
    failed = [slide for slide in printed["slides"] if slide["status"] != "done"]
    if failed:
        raise SystemExit(f"{len(failed)} slides failed, the first with {failed[0]['code']}: {failed[0]['message']}")
    return Extraction(**printed | {"slides": tuple(printed["slides"])})


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("slides")
    options.add_argument("out", type=Path)
    options.add_argument("--encoder", default=FREE)
    options.add_argument("--random-weights", type=int, metavar="SEED")
    options.add_argument("--device", default="auto")
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument(
        "--bare-seconds", type=float, default=0, help="time the encoder alone for so long, before the run"
    )
    chosen = options.parse_args()

    from features import EncoderRequest, ExtractOptions, extract_slides, load_encoder

    encoder = load_encoder(EncoderRequest(chosen.encoder, random_seed=chosen.random_weights, device=chosen.device))
    bare = _bare(encoder, chosen.batch_size, chosen.bare_seconds) if chosen.bare_seconds else None
    before = _peak_mb()
    report = extract_slides(chosen.slides, chosen.out, encoder, ExtractOptions(batch_size=chosen.batch_size))
    printed = {
        "seconds": report.seconds,
        "busy": report.timing.busy_share,
        "decode_ratio": report.timing.decode_ratio,
        "before_mb": before,
        "peak_mb": _peak_mb(),
        "bare": bare,
        "slides": [json.loads(outcome.as_json()) for outcome in report.outcomes],
    }
    print(json.dumps(printed))


def _bare(encoder: Any, batch_size: int, seconds: float) -> float:
    """Tiles per second of the encoder alone, on a batch that lies on its device."""
    import torch

    on_gpu = encoder.device.type == "cuda"
    pixels = torch.randint(0, 256, (batch_size, 256, 256, 3), dtype=torch.uint8, device=encoder.device)

    def forwards(count: int) -> None:
        with torch.inference_mode():
            for _ in range(count):
                encoder(pixels)
        if on_gpu:
            torch.cuda.synchronize(encoder.device)

    forwards(3 if on_gpu else 1)  # kernels are chosen at the first
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        forwards(10 if on_gpu else 1)
        done += 10 if on_gpu else 1
    return done * batch_size / (time.perf_counter() - start)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


if __name__ == "__main__":
    main()
