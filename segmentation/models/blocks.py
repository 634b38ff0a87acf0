"""Blocks: the convolutions, norms and gates that the networks are put together from."""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsi.errors import UsageError

__all__ = ["AttentionGate", "BatchRenorm2d", "ConvBlock", "Norm", "upsampled"]

Norm = Literal["renorm", "batch", "group"]

_RENORM_STEPS = 500  # over which the correction is let in; the paper's schedule on 160,000 steps, shortened
_MAX_SCALE, _MAX_SHIFT = 3.0, 5.0  # the paper's r_max and d_max
_GROUP_CHANNELS = 4


class BatchRenorm2d(nn.Module):
    """Batch normalisation whose training and inference agree, for batches of a few pictures.

    Ioffe: Batch Renormalization, NIPS 2017, algorithm 1. The correction towards the running statistics is let in over the
    first 500 steps, as the paper does over more of them; Keras' ``renorm=True`` has it in full from the first step on.
    """

    mean: Tensor
    deviation: Tensor
    steps: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-3, momentum: float = 0.05) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.eps = eps
        self.momentum = momentum

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            weight = self.weight / self.deviation
            return x * weight[:, None, None] + (self.bias - self.mean * weight)[:, None, None]
        variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)  # (C,)
        deviation = (variance + self.eps).sqrt()
        with torch.no_grad():
            share = min(1.0, float(self.steps) / _RENORM_STEPS)
            largest, furthest = 1 + share * (_MAX_SCALE - 1), share * _MAX_SHIFT
            r = (deviation / self.deviation).clamp(1 / largest, largest)
            d = ((mean - self.mean) / self.deviation).clamp(-furthest, furthest)
            momentum = max(self.momentum, 1 / (1 + float(self.steps)))  # at first the plain mean of what was seen
            self.mean.lerp_(mean, momentum)
            self.deviation.lerp_(deviation, momentum)
            self.steps += 1
        normal = (x - mean[:, None, None]) * (r / deviation)[:, None, None] + d[:, None, None]
        return normal * self.weight[:, None, None] + self.bias[:, None, None]


def _norm(kind: Norm, channels: int) -> nn.Module:
    match kind:
        case "renorm":
            return BatchRenorm2d(channels)
        case "batch":
            return nn.BatchNorm2d(channels)
        case "group":
            return nn.GroupNorm(max(1, channels // _GROUP_CHANNELS) if channels % _GROUP_CHANNELS == 0 else 1, channels)
    raise UsageError(f"no norm {kind!r}; there are renorm, batch and group")


class ConvBlock(nn.Sequential):
    """3×3 convolution, norm and ReLU for each of ``widths`` after the first, which is the input's."""

    def __init__(self, *widths: int, norm: Norm) -> None:
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), _norm(norm, after), nn.ReLU()]
        super().__init__(*layers)


class AttentionGate(nn.Module):
    """Weights of 0 to 1 on a skip connection, from what the coarser level saw.

    Oktay et al.: Attention U-Net, MIDL 2018, equations 1 and 2, additive attention. Differs from the paper: the gating map
    is brought to the skip's size by nearest upsampling before the sum, so that no pixel of the skip is left out.
    """

    def __init__(self, skip: int, gate: int) -> None:
        super().__init__()
        hidden = max(1, skip // 2)
        self.of_skip = nn.Conv2d(skip, hidden, 1, bias=False)
        self.of_gate = nn.Conv2d(gate, hidden, 1)
        self.score = nn.Conv2d(hidden, 1, 1)

    def forward(self, skip: Tensor, gate: Tensor) -> Tensor:
        hidden = F.relu(self.of_skip(skip) + upsampled(self.of_gate(gate)))  # (B, hidden, H, W)
        return skip * torch.sigmoid(self.score(hidden))


def upsampled(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, C, 2H, 2W), each pixel four times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
