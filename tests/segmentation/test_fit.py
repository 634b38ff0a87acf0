"""Fit: what networks are shown, and how fast they learn from it."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segmentation.augment import Augmentation, LensOptions
from segmentation.fit import Example, FitConfig, fit
from segmentation.losses import SegmentationLoss
from segmentation.models import SegmentationModel, SegmentationOutput

STILL = Augmentation(turns=False, stain="none", hue=0, saturation=0, brightness=(1.0, 1.0))


class Watching(SegmentationModel):
    """A network of one number a class that remembers what it saw."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.head = nn.Conv2d(4, 2, 1)
        self.seen: list[Tensor] = []

    @property
    def stride(self) -> int:
        return 1

    def whole(self, x: Tensor) -> SegmentationOutput:
        self.seen.append(x.detach().clone())
        return SegmentationOutput(self.head(x))


def example_of_a_disc(rng: np.random.Generator) -> Example:
    """Dark where the heat is one and the truth is 1."""
    y, x = np.mgrid[:64, :64]
    cy, cx = rng.integers(20, 44, 2)
    disc = (x - cx) ** 2 + (y - cy) ** 2 < 144
    image = np.where(disc[..., None], 60, 200).astype(np.uint8).repeat(3, axis=2)
    return Example(image, disc[None].astype(np.float32), disc.astype(np.uint8))


class Targets(SegmentationLoss):
    """Remembers the truth beside it."""

    seen: list[Tensor]

    def __call__(self, output: SegmentationOutput, targets: Tensor) -> Tensor:
        self.seen.append(targets.clone())
        return super().__call__(output, targets)


def shown(options: Augmentation, steps: int = 4) -> tuple[Tensor, Tensor]:
    """Pictures with heat (N, 4, 64, 64) and truth (N, 64, 64) as a network is shown them."""
    network, loss = Watching(), Targets()
    object.__setattr__(loss, "seen", [])
    fit(network, example_of_a_disc, FitConfig(steps, 2, 1, augmentation=options, loss=loss))
    return torch.cat(network.seen), torch.cat(loss.seen)


def test_lenses_move_picture_heat_and_truth_alike() -> None:
    lenses = LensOptions(n=3, radius_px=(20, 30), strength=(-0.6, 0.6))
    plain, _ = shown(STILL)
    bent, truth = shown(replace(STILL, lenses=lenses))
    dark = bent[:, 0] < 0.5  # of 60 and 200
    assert torch.equal(dark, truth == 1)
    assert torch.equal(bent[:, 3], truth.float())
    assert not torch.equal(plain, bent)


def test_colours_change_the_picture_and_neither_heat_nor_truth() -> None:
    coloured, truth = shown(Augmentation(stain_sigma=0.2))
    assert torch.equal(coloured[:, 3], truth.float())
    greys = {round(float(c), 3) for c in coloured[:, 0][truth == 1]}
    assert len(greys) > 2  # of one grey
    assert torch.equal((coloured[:, :3].mean(1) < 0.5), truth == 1)


def test_a_cosine_schedule_ends_in_standstill_and_a_constant_one_does_not() -> None:
    def last_step(schedule: str) -> float:
        network = Watching()
        torch.nn.init.zeros_(network.head.weight)
        weights = [network.head.weight.detach().clone()]

        def watch(step: int, loss: float, dice: float | None) -> None:
            weights.append(network.head.weight.detach().clone())

        fit(network, example_of_a_disc, FitConfig(40, 1, 1, 1e-2, schedule=schedule), watch=watch)  # type: ignore[arg-type]
        steps = [float((b - a).abs().max()) for a, b in pairwise(weights)]
        return steps[-1] / max(steps)

    assert last_step("cosine") < 0.02
    assert last_step("constant") > 0.1


def test_weights_lie_in_memory_as_before_so_that_a_saved_network_answers_to_the_bit() -> None:
    network = Watching()
    fit(network, example_of_a_disc, FitConfig(2, 1, 1))
    assert network.head.weight.is_contiguous()


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="schedule is constant or cosine, got 'linear'"):
        FitConfig(schedule="linear")  # type: ignore[arg-type]


def test_an_example_without_heat_is_turned_and_seen_through_lenses_too() -> None:
    example = example_of_a_disc(np.random.default_rng(0))
    bare = replace(example, heat=np.empty((0, 64, 64), np.float32))
    lenses = LensOptions(n=3, radius_px=(20, 30), strength=(-0.6, 0.6)).draw((64, 64), np.random.default_rng(1))
    seen, with_heat = bare.through(lenses), example.through(lenses)
    assert seen.heat.shape == (0, 64, 64)
    np.testing.assert_array_equal(seen.image, with_heat.image)
    np.testing.assert_array_equal(seen.mask, with_heat.mask)
    assert not np.array_equal(seen.mask, example.mask)
    assert bare.turned(1, True).heat.shape == (0, 64, 64)


def test_an_example_that_is_not_square_keeps_its_shape_and_truth_stays_on_the_picture() -> None:
    truth = Targets()
    object.__setattr__(truth, "seen", [])

    def wide(rng: np.random.Generator) -> Example:
        example = example_of_a_disc(rng)
        return Example(example.image[:40], example.heat[:, :40], example.mask[:40])

    network = Watching()
    fit(network, wide, FitConfig(8, 2, 1, augmentation=replace(STILL, turns=True), loss=truth))
    turned = torch.cat(network.seen)
    assert turned.shape == (16, 4, 40, 64)
    assert torch.equal(turned[:, 3], torch.cat(truth.seen).float())
    assert torch.equal(turned[:, 0] < 0.5, torch.cat(truth.seen) == 1)
