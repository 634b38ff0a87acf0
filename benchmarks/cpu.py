"""How many tiles should go through a network together on a CPU? All of a batch, and as few as the engine takes.

Networks have random weights, which do not matter to the time. Both ways take turns on the same batches, vectors are compared.

    python benchmarks/cpu.py
"""

import statistics
import time

import numpy as np
import torch
from figures import Figure, parser, report
from numpy.typing import NDArray

from features.encoder import EncoderRequest, load_encoder
from features.runner import EncoderRunner

MODELS = ("mobilenetv2_100", "resnet18", "resnet50", "vit_small_patch16_224")
BATCH = 64


def all_at_once(runner: EncoderRunner, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Vectors of a batch that goes through the network together."""
    with torch.inference_mode():
        return np.asarray(runner.encoder(torch.from_numpy(pixels)).numpy())


def few_at_once(runner: EncoderRunner, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """As the engine has it."""
    return runner.encode(pixels).vectors


WAYS = {"all at once": all_at_once, "few at once": few_at_once}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    rounds = 1 if chosen.quick else 5
    figures: list[Figure] = []
    for name in MODELS:
        request = EncoderRequest(f"timm:{name}", random_seed=0, device="cpu", precision="fp32")
        runner = EncoderRunner(load_encoder(request))
        side = runner.encoder.spec.input_px or 224
        pixels = np.random.default_rng(0).integers(0, 256, (BATCH, side, side, 3), np.uint8)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        vectors = {}
        for _ in range(rounds):
            for way, run in WAYS.items():
                began = time.perf_counter()
                vectors[way] = run(runner, pixels)
                seconds[way].append(time.perf_counter() - began)
        rates = {way: BATCH / statistics.median(each) for way, each in seconds.items()}
        figures += [Figure(f"{name}, {way}", rate, "tiles/s") for way, rate in rates.items()]
        figures.append(Figure(f"{name}: few against all", rates["few at once"] / rates["all at once"], "x", 1.0))
        apart = float(np.abs(vectors["few at once"] - vectors["all at once"]).max())
        figures.append(Figure(f"{name}: largest difference", apart, "", 1e-4, False))
    report(f"Tiles at once on a CPU, batches of {BATCH}, {chosen.threads} threads", figures, chosen.json)


if __name__ == "__main__":
    main()
