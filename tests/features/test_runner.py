"""EncoderRunner on a CPU: few tiles at a time through a network, the same vectors."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import features.runner as module
from features.encoder import Encoder, EncoderSpec
from features.runner import EncoderRunner


class Counting(nn.Module):
    """Means of colours; notes how many tiles came together."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return x.float().mean((2, 3)) * self.weight


@pytest.mark.parametrize(("batch", "together"), [(0, []), (3, [3]), (8, [8]), (21, [8, 8, 5])])
def test_few_tiles_go_through_a_network_together(
    batch: int, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PX_A_THREAD", 8 * 32**2 // torch.get_num_threads() + 1)
    network = Counting()
    runner = EncoderRunner(Encoder(EncoderSpec("means", "means", 3, 32, None, 32, 1.0, "pooled"), network))
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 32, 32, 3), np.uint8)
    network.seen.clear()
    found = runner.encode(pixels)
    assert network.seen == together
    assert found.finite.all()
    for row, tile in zip(found.vectors, pixels, strict=True):
        np.testing.assert_allclose(row, runner.encode(tile[None]).vectors[0], atol=1e-6)


def test_one_tile_at_least_goes_through_however_large_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PX_A_THREAD", 1)
    network = Counting()
    runner = EncoderRunner(Encoder(EncoderSpec("means", "means", 3, 32, None, 32, 1.0, "pooled"), network))
    network.seen.clear()
    assert runner.encode(np.zeros((3, 32, 32, 3), np.uint8)).finite.all()
    assert network.seen == [1, 1, 1]
