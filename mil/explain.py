"""Explanation: which tiles an answer rests on, and whether that is true.

Attention says what a model looked at, not what it used. Importance (what the answer loses without a tile) and integrated
gradients ask the model itself; the deletion test says whether the tiles an explanation names matter at all.

Sources: Sundararajan, Taly, Yan: Axiomatic Attribution for Deep Networks, ICML 2017, equation 1 (integrated gradients);
Samek et al., Evaluating the Visualization of What a Deep Neural Network Has Learned, TNNLS 2017 (deletion).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mil.bag import Bag, Batch, collate
from mil.member import Member
from mil.sources import BagSource
from wsi.errors import UsageError
from wsi.heatmap import Heatmap

if TYPE_CHECKING:
    from wsi.readers.base import Pixels
    from wsi.slide import Slide

__all__ = [
    "Deletion",
    "Kind",
    "attention",
    "contact_sheet",
    "deletion_test",
    "heatmap",
    "importance",
    "integrated_gradients",
    "top_tiles",
]

Kind = Literal["attention", "importance", "gradients"]

_STEPS = 32  # of the integral; Sundararajan et al. use 20 to 300
_BATCH_TILES = 1 << 16  # tiles of bags that are judged at once


def heatmap(members: Sequence[Member], source: BagSource, slide: str, *, kind: str = "attention") -> Heatmap:
    """An explanation of a slide's answer as one number a tile; NaN where a tile has no features.

    Args:
        kind: ``"attention"``, ``"importance"`` or ``"gradients"``.
    """
    explain: dict[str, Callable[[Sequence[Member], Bag], NDArray[np.float32]]] = {
        "attention": attention,
        "importance": importance,
        "gradients": integrated_gradients,
    }
    if kind not in explain:
        raise UsageError(f"an explanation is one of {', '.join(get_args(Kind))}, not {kind!r}")
    place = source.place(slide)
    values = np.full(len(place.grid), np.nan, np.float32)
    values[place.rows] = explain[kind](members, source.read(slide))
    return Heatmap(place.grid, values, place.frame, kind)


def attention(members: Sequence[Member], bag: Bag, *, branch: int | None = None) -> NDArray[np.float32]:
    """(N,) attention times N, the mean over the members: 1 is what every tile would have if all were alike.

    Args:
        branch: which of the model's attention rows; by default that of the class it answers, or the only one.
    """
    rows = []
    for member in members:
        found = member.attention(bag)  # (K, N)
        if branch is None:
            picked = int(_answers(member, collate([bag]))[0].argmax()) if len(found) > 1 else 0
            rows.append(found[min(picked, len(found) - 1)])
        else:
            rows.append(found[branch])
    return (torch.stack(rows).mean(0) * len(bag)).numpy().astype(np.float32)


def importance(members: Sequence[Member], bag: Bag, *, output: int | None = None) -> NDArray[np.float32]:
    """(N,) what the answer loses when a tile is left out: positive where the tile speaks for it.

    N further passes over the bag; meant for slides of a few thousand tiles. A bag of one tile has nothing to leave: NaN.

    Args:
        output: which answer; by default the likeliest class (of a value or a survival curve, the score).
    """
    n = len(bag)
    if n == 1:
        return np.full(1, np.nan, np.float32)
    output = _output(members, bag) if output is None else output
    whole = _score(members, collate([bag]), output)
    lost = []
    at_once = max(1, _BATCH_TILES // n)
    for start in range(0, n, at_once):
        left = [_without(bag, [i]) for i in range(start, min(n, start + at_once))]
        lost.append(whole - _score(members, collate(left), output))
    return torch.cat(lost).numpy().astype(np.float32)


def integrated_gradients(
    members: Sequence[Member], bag: Bag, *, output: int | None = None, steps: int = _STEPS
) -> NDArray[np.float32]:
    """(N,) each tile's share of the difference between the answer and that to a bag of mean tiles.

    The shares sum to the difference of the class's logit, up to the error of ``steps`` midpoints (the paper's
    completeness); of grades and survival, whose logits are steps of one scale, to that of their sum. The baseline is the
    training tiles' mean, which is zero after scaling.

    Raises:
        UsageError: the model cuts gradients between answer and tiles, as DTFD does.
    """
    output = _output(members, bag) if output is None else output
    total = np.zeros(len(bag), np.float64)
    for member in members:
        member.eval()
        with torch.enable_grad():
            batch = member.scaling(collate([bag]).to(member.device))
            features = batch.features.detach()
            gradient = torch.zeros_like(features)
            for step in range(steps):
                x = (features * ((step + 0.5) / steps)).requires_grad_()
                logits = member.narrow(member.model(Batch(x, batch.mask, batch.xy))).logits[0]  # (n_outputs,)
                explained = logits[output] if member.objective.is_classes else logits.sum()
                (slope,) = torch.autograd.grad(explained, x, allow_unused=True)
                if slope is None:
                    model = member.facts["model"]
                    raise UsageError(
                        f"{model} passes no gradients from its answer to the tiles; ask for importance instead"
                    )
                gradient += slope / steps
        total += (gradient * features).sum(-1)[0].double().cpu().numpy()
    return (total / len(members)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Deletion:
    """How an answer changes as tiles are taken away: the highlighted first, and, to compare, any.

    Attributes:
        shares: (S,) share of the tiles taken away.
        highlighted: (S,) the answer without those the explanation ranks first.
        random: (S, R) the answer without as many drawn by chance, R times.
    """

    shares: NDArray[np.float64]
    highlighted: NDArray[np.float64]
    random: NDArray[np.float64]

    @property
    def effect(self) -> float:
        """Mean drop of the answer beyond that of chance; positive where the highlighted tiles matter."""
        return float((self.random.mean(axis=1) - self.highlighted).mean())

    @property
    def p(self) -> float:
        """The share of draws (with one added) that harm the answer as much as taking the highlighted tiles does."""
        harm = self.random.mean(axis=0)
        return float((np.count_nonzero(harm <= self.highlighted.mean()) + 1) / (len(harm) + 1))

    @property
    def matters(self) -> bool:
        """Whether highlighted tiles matter more than any, at the 5% level."""
        return self.p <= 0.05


def deletion_test(
    members: Sequence[Member],
    bag: Bag,
    values: NDArray[np.float32],
    *,
    shares: Sequence[float] = (0.05, 0.1, 0.2, 0.4),
    draws: int = 40,
    seed: int = 0,
) -> Deletion:
    """Whether the tiles an explanation highlights are those the answer rests on.

    Args:
        values: (N,) the explanation; NaN counts as lowest.
        shares: of the tiles to take away, each from 0 to below 1.
        draws: how many random choices of as many tiles to compare with.
    """
    if len(values) != len(bag):
        raise ValueError(f"{len(bag)} tiles need as many values, got {len(values)}")
    if len(bag) < 2:
        raise UsageError(f"{bag.key}: a bag of one tile has nothing to take away")
    rng = np.random.default_rng(seed)
    output = _output(members, bag)
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")
    shuffles = [rng.permutation(len(bag)) for _ in range(draws)]
    highlighted, random = [], []
    for share in shares:
        n = min(len(bag) - 1, max(1, round(share * len(bag))))
        highlighted.append(float(_score(members, collate([_without(bag, order[:n])]), output)[0]))
        random.append([float(_score(members, collate([_without(bag, each[:n])]), output)[0]) for each in shuffles])
    return Deletion(np.array(shares), np.array(highlighted), np.array(random))


def top_tiles(heat: Heatmap, k: int, *, apart: bool = True) -> NDArray[np.int64]:
    """Indices of the k tiles with the highest values, highest first.

    Args:
        apart: never two that overlap.
    """
    order = np.argsort(-np.nan_to_num(heat.values, nan=-np.inf), kind="stable")
    order = order[heat.scored[order]]
    if not apart:
        return order[:k]
    kept: list[int] = []
    side = np.array(heat.grid.side)
    for i in order:
        if len(kept) == k:
            break
        if not kept or (np.abs(heat.grid.xy[kept] - heat.grid.xy[i]) >= side).any(axis=1).all():
            kept.append(int(i))
    return np.array(kept, np.int64)


def contact_sheet(slide: "Slide", heat: Heatmap, *, k: int = 16, columns: int = 4) -> "Pixels":
    """(H, W, 3) uint8 picture of the k highest tiles, row by row, their values written below each.

    Raises:
        ReadError: a tile cannot be read.
    """
    import cv2

    chosen = top_tiles(heat, k)
    side, gap = heat.grid.tile_px, max(4, heat.grid.tile_px // 16)
    text = max(14, side // 10)
    rows = max(1, -(-len(chosen) // columns))
    sheet = np.full((rows * (side + text + gap) + gap, columns * (side + gap) + gap, 3), 255, np.uint8)
    for place, index in enumerate(chosen):
        y, x = gap + place // columns * (side + text + gap), gap + place % columns * (side + gap)
        sheet[y : y + side, x : x + side] = slide.read_tile(heat.grid, int(index))
        words = f"{place + 1}. {heat.values[index]:.3g}"
        cv2.putText(
            sheet, words, (x, y + side + text - 4), cv2.FONT_HERSHEY_SIMPLEX, text / 28, (0, 0, 0), 1, cv2.LINE_AA
        )
    return sheet


def _without(bag: Bag, tiles: Sequence[int] | NDArray[np.int64]) -> Bag:
    keep = torch.ones(len(bag), dtype=torch.bool)
    keep[torch.as_tensor(np.asarray(tiles))] = False
    return Bag(bag.features[keep], None if bag.xy is None else bag.xy[keep], bag.key)


@torch.no_grad()
def _answers(member: Member, batch: Batch) -> Tensor:
    """(B, P) answers."""
    return member.answer(member.eval()(batch.to(member.device)).logits.float().cpu())


def _output(members: Sequence[Member], bag: Bag) -> int:
    """The likeliest class; 0 where the answer is no class."""
    batch = collate([bag])
    mean = torch.stack([_answers(member, batch)[0] for member in members]).mean(0)
    return int(mean.argmax()) if len(mean) > 1 and members[0].objective.loss != "nll" else 0


def _score(members: Sequence[Member], batch: Batch, output: int) -> Tensor:
    """(B,) the answer to be explained, the mean over the members: a probability, a value, or a risk."""
    answers = torch.stack([_answers(member, batch) for member in members]).mean(0)  # (B, P)
    return -answers.sum(1) if members[0].objective.loss == "nll" else answers[:, output]
