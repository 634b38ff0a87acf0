"""Fit: the training loop of networks from pixels to classes, on examples that a callable draws."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.extract import prefetch
from features.training import cosine_schedule
from segmentation.augment import Augmentation, Lenses, augment
from segmentation.losses import IGNORE, SegmentationLoss
from segmentation.models import SegmentationModel
from wsi.errors import DivergedError

__all__ = ["Draw", "Example", "FitConfig", "Fitted", "Watch", "as_input", "dice_of_labels", "fit", "mean_dice"]

_AHEAD = 2  # batches drawn while the network learns from one
_RISE = 20  # the share of the steps, one in so many, over which the rate of a cosine schedule rises


@dataclass(frozen=True, eq=False)
class Example:
    """A picture, what is already known of it, and the truth.

    Attributes:
        image: (h, w, 3) uint8.
        heat: (C, h, w) float32, probability maps; C is 0 where there are none.
        mask: (h, w) uint8 labels, 0 background, ``IGNORE`` what counts for nothing.
    """

    image: NDArray[np.uint8]
    heat: NDArray[np.float32]
    mask: NDArray[np.uint8]

    def __post_init__(self) -> None:
        shape = self.mask.shape
        if len(shape) != 2 or self.image.shape != (*shape, 3) or self.heat.ndim != 3 or self.heat.shape[1:] != shape:
            raise ValueError(
                f"image, heat and mask are (h, w, 3), (C, h, w), (h, w); got {self.image.shape}, {self.heat.shape}, {shape}"
            )

    def turned(self, quarters: int, mirrored: bool) -> "Example":
        """The same, turned by quarters and then mirrored: picture, heat and truth alike."""
        side = slice(None, None, -1) if mirrored else slice(None)
        return Example(
            np.rot90(self.image, quarters)[:, side],
            np.rot90(self.heat, quarters, (1, 2))[:, :, side],
            np.rot90(self.mask, quarters)[:, side],
        )

    def through(self, lenses: Lenses) -> "Example":
        """The same, seen through lenses: picture, heat and truth through the same ones."""
        heat = [lenses.apply(channel) for channel in self.heat]
        return Example(lenses.apply(self.image), np.stack(heat) if heat else self.heat, lenses.apply(self.mask))


Draw = Callable[[np.random.Generator], Example]
Watch = Callable[[int, float, float | None], None]
"""Is told of a step, its loss, and the Dice of the validation examples where they were looked at."""


@dataclass(frozen=True)
class FitConfig:
    """How a network is trained; saved with it.

    Defaults are those of H2G-Net's second stage: Adam, 1e-4, 6 pictures at once and 4 times before a step; it trains for up
    to 1000 epochs, which is ``steps`` here, as there is no epoch where examples are drawn.

    Attributes:
        steps: of the optimiser.
        batch_size, accumulate: pictures at once, and how often before a step.
        schedule: ``"constant"``, or ``"cosine"``: the rate rises over the first twentieth of the steps and then falls to
            nothing with half a cosine.
        augmentation: what examples go through: turns (half turns, where they are not square) and lenses for picture, heat and
            truth alike, then, for half of them, colours of the picture.
        validate_every: steps between looks at the validation examples, if there are any; the best weights are kept.
        patience: looks without a better one after which training ends.
        seed: of everything that is drawn.
    """

    steps: int = 1000
    batch_size: int = 6
    accumulate: int = 4
    learning_rate: float = 1e-4
    augmentation: Augmentation = field(
        default_factory=lambda: Augmentation(stain="macenko", stain_sigma=0.1, hue=0, saturation=0)
    )
    validate_every: int = 50
    patience: int = 10
    seed: int = 0
    loss: SegmentationLoss = field(default_factory=SegmentationLoss)
    schedule: Literal["constant", "cosine"] = "constant"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "validate_every", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is positive, got {self.learning_rate}")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule is constant or cosine, got {self.schedule!r}")


class Fitted(NamedTuple):
    """How training went: the loss of each step, ``(step, Dice)`` of each look, and the step whose weights were kept."""

    losses: tuple[float, ...]
    scores: tuple[tuple[int, float], ...]
    best_step: int


def as_input(images: Sequence[NDArray[np.uint8]], heats: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """(B, 3 + C, h, w) float32 as networks take it: colours from 0 to 1, then probabilities, 0 where there is none."""
    colours = np.stack([image.transpose(2, 0, 1) for image in images]).astype(np.float32) / 255
    return np.concatenate([colours, np.nan_to_num(np.stack(heats).astype(np.float32))], axis=1)


def fit(
    network: SegmentationModel,
    draw: Draw,
    config: FitConfig | None = None,
    validation: Sequence[Example] = (),
    *,
    watch: Watch | None = None,
) -> Fitted:
    """Train ``network`` where it is, on the device it is on; it ends in eval mode with the best weights.

    The same seed, examples and machine give the same weights. The caller's random numbers are left alone.

    Args:
        draw: an example for a generator; those of one batch have one size. It is called by a thread of its own, ahead of
            the network.
        validation: what decides which weights are kept; without it the last ones are.
        watch: is called after each step.

    Raises:
        DivergedError: the loss is not finite.
        UsageError: a mask has labels that the network has not.
    """
    config = config or FitConfig()
    device = next(network.parameters()).device
    rng = np.random.default_rng(config.seed)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _rate_factor(config))
    losses: list[float] = []
    scores: list[tuple[int, float]] = []
    best: tuple[float, int, dict[str, Tensor]] | None = None
    network.to(memory_format=torch.channels_last)  # a third faster on a CPU

    def batches() -> Iterator[list[Example]]:
        for _ in range(config.steps * config.accumulate):
            yield [_augmented(draw(rng), config.augmentation, rng) for _ in range(config.batch_size)]

    with (
        closing(prefetch(batches, _AHEAD)) as ready,
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(config.seed)
        for step in range(1, config.steps + 1):
            network.train()
            total = 0.0
            for _ in range(config.accumulate):
                x, targets = _tensors(next(ready), device)
                loss = config.loss(network(x), targets) / config.accumulate
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.item()
            if not np.isfinite(total):
                raise DivergedError(f"the loss is {total} at step {step}: training diverged; lower learning_rate")
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            losses.append(total)
            looks = bool(validation) and (step % config.validate_every == 0 or step == config.steps)
            if looks:
                scores.append((step, mean_dice(network, validation)))
            if watch is not None:
                watch(step, total, scores[-1][1] if looks else None)
            if looks:
                if best is None or scores[-1][1] > best[0]:
                    best = (scores[-1][1], step, {k: v.clone() for k, v in network.state_dict().items()})
                elif len([s for s, _ in scores if s > best[1]]) >= config.patience:
                    break
    network.to(memory_format=torch.contiguous_format)  # as a saved one is read
    if best is not None:
        network.load_state_dict(best[2])
    network.eval()
    return Fitted(tuple(losses), tuple(scores), best[1] if best else len(losses))


@torch.inference_mode()
def mean_dice(network: SegmentationModel, examples: Sequence[Example]) -> float:
    """Dice of the likeliest classes, each over all pixels of all examples, the mean over classes but the first."""
    network.eval()
    device = next(network.parameters()).device

    def pairs() -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        for example in examples:
            x, _ = _tensors([example], device)
            yield network(x).logits.argmax(1)[0].cpu().numpy(), example.mask

    return dice_of_labels(pairs(), network.n_classes)


def dice_of_labels(pairs: Iterable[tuple[NDArray[Any], NDArray[Any]]], n_classes: int) -> float:
    """Dice of label maps (h, w), found and true, each class over all of them, the mean over classes but the first."""
    both, apart = (np.zeros(n_classes, np.int64) for _ in range(2))
    for found, truth in pairs:
        for label in range(1, n_classes):
            mine, true = (found == label) & (truth != IGNORE), truth == label
            both[label] += np.count_nonzero(mine & true)
            apart[label] += np.count_nonzero(mine) + np.count_nonzero(true)
    seen = apart > 0
    return float((2 * both[seen] / apart[seen]).mean()) if seen.any() else 1.0


def _rate_factor(config: FitConfig) -> Callable[[int], float]:
    if config.schedule == "constant":
        return lambda step: 1.0
    return cosine_schedule(max(1, config.steps // _RISE), config.steps)


def _augmented(example: Example, options: Augmentation, rng: np.random.Generator) -> Example:
    height, width = example.mask.shape
    if options.turns:
        quarters = int(rng.integers(4)) if height == width else 2 * int(rng.integers(2))
        example = example.turned(quarters, bool(rng.integers(2)))
    if options.lenses is not None:
        lenses = options.lenses.draw((height, width), rng)
        if rng.random() < 0.5:
            example = example.through(lenses)
    if rng.random() < 0.5:
        coloured = augment(example.image[None], replace(options, turns=False, lenses=None), rng)[0]
        example = replace(example, image=coloured)
    return example


def _tensors(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.from_numpy(as_input([e.image for e in examples], [e.heat for e in examples]))
    targets = torch.from_numpy(np.stack([e.mask for e in examples]).astype(np.int64))
    return x.to(device, memory_format=torch.channels_last), targets.to(device)
