"""Training speed: epochs a second of ABMIL and TransMIL against torchmil, on the same bags, with the same settings.

Each library trains its own way: torchmil by its Trainer over a DataLoader with its collate function, ours by
``train_member``, which every cross-validation uses. Bags are float32 in memory, AdamW takes one bag a step, nothing is
left out by chance and nothing is scaled, and neither side looks at a validation part (torchmil's Trainer wants one; it
gets a single bag). Widths are those of torchmil's own ABMIL (attention 128 on the features themselves) and of the
TransMIL paper (512, 8 heads). The two take turns, and the median of the ratios counts.

    pip install torchmil==1.0.2
    python benchmarks/mil.py            # 500 bags of 2,000 x 1024
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from figures import Figure, parser, report

from mil import Bag, Cohort, TrainConfig
from mil.config import Precision
from mil.member import Member
from mil.objective import fit_joint
from mil.train import Examples, train_member

MODELS = {
    "ABMIL": ("abmil", {"embed_dim": None, "attention_dim": 128, "dropout": 0.0}),
    "gated ABMIL": ("abmil-gated", {"embed_dim": None, "attention_dim": 128, "dropout": 0.0}),
    "TransMIL": ("transmil", {"dropout": 0.0}),
}
LR = 1e-4


def made_up_bags(n_bags: int, n_tiles: int, dim: int) -> tuple[list[torch.Tensor], np.ndarray]:
    """Bags of noise; in those of class 1 a tenth of the tiles is shifted."""
    generator = torch.Generator().manual_seed(0)
    y = np.arange(n_bags) % 2
    bags = [torch.randn((n_tiles, dim), generator=generator) for _ in y]
    for bag, label in zip(bags, y, strict=True):
        bag[: n_tiles // 10] += 0.5 * float(label)
    return bags, y


def ours(name: str, bags: list[torch.Tensor], y: np.ndarray, precision: Precision = "fp32") -> Callable[[], float]:
    """A function that trains for an epoch and returns its loss."""
    model, hyper = MODELS[name]
    config = TrainConfig(
        model=model, hyper=hyper, scale="none", epochs=1, warmup_epochs=0, members=1, batch_size=1, lr=LR, weight_decay=0.01,
        tile_dropout=0.0, feature_dropout=0.0, average=0.0, max_tiles=1 << 30, calibrate=False, precision=precision,
    )  # fmt: skip
    cohort = Cohort.from_arrays([Bag(bag) for bag in bags], y)
    cases = cohort.cases("none")
    dim = bags[0].shape[1]
    torch.manual_seed(0)
    facts = {"model": model, "hyper": hyper, "dim": dim, "features": {}}
    member = Member(facts, fit_joint(cases.tasks, config), None)

    def epoch() -> float:
        everybody, nobody = cases.bags_of(range(len(cases))), cases.bags_of([])
        rng = np.random.default_rng(0)
        return next(train_member(member, Examples(cohort, cases), everybody, nobody, config, rng)).loss

    return epoch


def torchmil(name: str, bags: list[torch.Tensor], y: np.ndarray) -> Callable[[], float]:
    """The same with torchmil's Trainer."""
    from torch.utils.data import DataLoader
    from torchmil.data import collate_fn
    from torchmil.models import ABMIL, TransMIL
    from torchmil.utils.trainer import Trainer

    dim = bags[0].shape[1]
    torch.manual_seed(0)
    model = (
        TransMIL((dim,), att_dim=512, n_heads=8, dropout=0.0)
        if name == "TransMIL"
        else ABMIL((dim,), att_dim=128, gated=name.startswith("gated"))
    )
    data = [{"X": bag, "Y": torch.tensor(float(label))} for bag, label in zip(bags, y, strict=True)]
    loader = DataLoader(data, batch_size=1, shuffle=True, collate_fn=collate_fn)
    one_bag = DataLoader(data[:1], batch_size=1, collate_fn=collate_fn)
    losses: list[dict[str, float]] = []

    class Log:
        log = staticmethod(losses.append)

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    trainer = Trainer(model, optimizer, device="cpu", logger=Log(), disable_pbar=True, verbose=False)

    def epoch() -> float:
        trainer.train(1, loader, one_bag)
        return losses[-2]["train/loss"]

    return epoch


def all_sides(name: str, bags: list[torch.Tensor], y: np.ndarray) -> dict[str, Callable[[], float]]:
    return {
        "ours": ours(name, bags, y),
        "ours, bf16": ours(name, bags, y, "bf16"),
        "torchmil": torchmil(name, bags, y),
    }


def seconds(epoch: Callable[[], float]) -> tuple[float, float]:
    start = time.perf_counter()
    loss = epoch()
    return time.perf_counter() - start, loss


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--threads", type=int, default=None, help="of torch; all cores by default")
    options.add_argument("--rounds", type=int, default=3)
    chosen = options.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    sizes = {"ABMIL": 500, "gated ABMIL": 500, "TransMIL": 500}
    if chosen.quick:
        sizes = {"ABMIL": 100, "gated ABMIL": 100, "TransMIL": 12}
    bags, y = made_up_bags(max(sizes.values()), 2000, 1024)
    figures = [Figure("threads", torch.get_num_threads(), "")]
    for name, n_bags in sizes.items():
        sides = all_sides(name, bags[:n_bags], y[:n_bags])
        for epoch in all_sides(name, bags[:4], y[:4]).values():
            epoch()  # whatever happens once
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(1 if name == "TransMIL" else chosen.rounds):
            for side, epoch in sides.items():
                taken, loss = seconds(epoch)
                times[side].append(taken)
                if not np.isfinite(loss):
                    raise SystemExit(f"{name}: {side} diverged")
        what = f"{name}, {n_bags} bags of 2,000 x 1024"
        figures += [Figure(f"{what}: {side}", 1 / statistics.median(times[side]), "epochs/s") for side in sides]
        for side, reach in (("ours", None), ("ours, bf16", 2)):
            ratio = statistics.median(b / a for a, b in zip(times[side], times["torchmil"], strict=True))
            figures.append(Figure(f"{what}: {side} over torchmil", ratio, "x", reach))
    report("Training speed", figures, chosen.json)


if __name__ == "__main__":
    main()
