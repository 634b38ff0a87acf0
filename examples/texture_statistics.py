"""A plug-in encoder without weights: statistics of colour and texture, for trying things out without a download.

    wsi-extract slides/ out/ --encoder examples/texture_statistics.py:build

A plug-in is a Python file with a function that returns a ``torch.nn.Module``: uint8 (B, H, W, 3) in, float (B, D) out.
Light is turned into optical density, as dyes add up there, and taken apart into octaves as a Laplacian pyramid does. The
logarithms of what each octave holds are textures; a stronger stain shifts all of them by the same amount. Any learned
encoder should do better on real tissue.

Burt, Adelson: The Laplacian pyramid as a compact image code, IEEE Transactions on Communications 1983.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OCTAVES = 5
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)


class TextureStatistics(nn.Module):
    """uint8 (B, H, W, 3) → float32 (B, 60): of each colour five quantiles, and energy, skew and tail of five octaves."""

    def forward(self, pixels: Tensor) -> Tensor:
        density = -((pixels.permute(0, 3, 1, 2).float() + 1) / 256).log()  # (B, 3, H, W)
        shares = torch.tensor(SHARES, device=pixels.device)
        quantiles = torch.quantile(F.avg_pool2d(density, 4).flatten(2), shares, dim=2)  # (5, B, 3)
        found = [quantiles.permute(1, 2, 0).flatten(1)]
        for _ in range(OCTAVES):
            coarse = F.avg_pool2d(density, 2)
            band = (
                density[..., : 2 * coarse.shape[2], : 2 * coarse.shape[3]] - F.interpolate(coarse, scale_factor=2)
            ).flatten(2)
            energy = band.square().mean(2) + 1e-6  # (B, 3)
            skew = band.pow(3).mean(2) / energy.pow(1.5)
            tail = band.pow(4).mean(2) / energy.square()
            found += [energy.log() / 2, skew, tail.log()]
            density = coarse
        return torch.cat(found, dim=1)


def build() -> nn.Module:
    """The encoder; there is nothing to load."""
    return TextureStatistics()
