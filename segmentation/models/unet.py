"""U-Net: the refinement network of H2G-Net."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmentation.models.base import SegmentationModel, SegmentationOutput, init_weights
from segmentation.models.blocks import ConvBlock, Norm, upsampled
from wsi.errors import UsageError

__all__ = ["UNet"]


class UNet(SegmentationModel):
    """Eight poolings from 1024 pixels to 4, so that every pixel sees the whole slide.

    Pedersen et al.: H2G-Net, Frontiers in Medicine 2022; the net is that of Ronneberger et al., MICCAI 2015. A level is two
    3×3 convolutions, each with batch renormalisation and ReLU, then 2×2 max-pooling; back up by nearest upsampling,
    concatenation [skip, up], a block and spatial dropout. Differs from the source: renormalisation is let in gradually,
    as its paper has it, see ``BatchRenorm2d``.

    Args:
        filters: of the levels, finest first; the last is the bottleneck's.
        dropout: of whole channels, on the way up.
        norm: ``"renorm"``, ``"batch"``, or ``"group"``, which does not look at the other pictures of a batch.
    """

    def __init__(
        self,
        in_channels: int,
        n_classes: int,
        *,
        filters: tuple[int, ...] = (8, 16, 32, 64, 128, 128, 256, 256, 512),
        dropout: float = 0.1,
        norm: Norm = "renorm",
    ) -> None:
        super().__init__(in_channels, n_classes)
        if len(filters) < 2:
            raise UsageError(f"a U-Net has at least two levels, got filters {tuple(filters)}")
        *levels, bottom = filters
        self.down = nn.ModuleList(
            ConvBlock(before, width, width, norm=norm)
            for before, width in zip([in_channels, *levels], levels, strict=False)
        )
        self.bottom = ConvBlock(levels[-1], bottom, bottom, norm=norm)
        self.up = nn.ModuleList(
            ConvBlock(width + below, width, width, norm=norm)
            for width, below in zip(reversed(levels), [bottom, *reversed(levels)], strict=False)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(levels[0], n_classes, 1)
        init_weights(self)

    @property
    def stride(self) -> int:
        return int(2 ** len(self.down))

    def whole(self, x: Tensor) -> SegmentationOutput:
        skips = []
        for block in self.down:
            skips.append(block(x))  # (B, filters[i], H / 2^i, W / 2^i)
            x = F.max_pool2d(skips[-1], 2)
        x = self.bottom(x)
        for block, skip in zip(self.up, reversed(skips), strict=True):
            x = self.dropout(block(torch.cat([skip, upsampled(x)], dim=1)))
        return SegmentationOutput(self.head(x))  # (B, K, H, W)
