"""DRU-Net's refinement network: small, and the probability map goes through a convolution of its own first."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmentation.models.base import SegmentationModel, SegmentationOutput, init_weights
from segmentation.models.blocks import ConvBlock, Norm, upsampled
from wsi.errors import UsageError

__all__ = ["DRUNet"]

_RGB = 3
_DROPOUT_LEVEL = 2  # the third


class DRUNet(SegmentationModel):
    """Four levels and a bottleneck as fine as the fourth, on pictures of 1120 pixels.

    Oskouei et al.: DRU-Net: lung carcinoma segmentation using multi-lens distortion and fusion refinement network, 2024. The
    two convolutions of a level have different widths (4 and 8, 8 and 16, …); there is no pooling before the bottleneck; one
    decoder block a level, spatial dropout in the third. The width of the map's own convolution is not stated and is that of
    the first level's first convolution; of momentum and initialisation PyTorch's and He's are used, not those of Keras.

    Args:
        filters: of the second convolution of each level, finest first; the last is the bottleneck's.
        dropout: of whole channels, in the third level.
        norm: as for ``UNet``.

    Raises:
        UsageError: fewer than four channels: there is no probability map then.
    """

    def __init__(
        self,
        in_channels: int,
        n_classes: int,
        *,
        filters: tuple[int, ...] = (8, 16, 32, 64, 128),
        dropout: float = 0.3,
        norm: Norm = "batch",
    ) -> None:
        super().__init__(in_channels, n_classes)
        if in_channels <= _RGB:
            raise UsageError(f"DRU-Net refines a probability map beside RGB; {in_channels} channels hold none")
        if len(filters) < 2:
            raise UsageError(f"a DRU-Net has at least two levels, got filters {tuple(filters)}")
        *levels, bottom = filters
        thin = levels[0] // 2
        self.of_map = ConvBlock(in_channels - _RGB, thin, norm=norm)
        self.down = nn.ModuleList(
            ConvBlock(before, width // 2, width, norm=norm)
            for before, width in zip([_RGB + thin, *levels], levels, strict=False)
        )
        self.bottom = ConvBlock(levels[-1], bottom, norm=norm)
        self.up = nn.ModuleList(
            ConvBlock(width + below, width, norm=norm)
            for width, below in zip(reversed(levels), [bottom, *reversed(levels)], strict=False)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(levels[0], n_classes, 1)
        init_weights(self)

    @property
    def stride(self) -> int:
        return int(2 ** (len(self.down) - 1))

    def whole(self, x: Tensor) -> SegmentationOutput:
        x = torch.cat([x[:, :_RGB], self.of_map(x[:, _RGB:])], dim=1)
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)  # (B, filters[i], H / 2^i, W / 2^i)
            x = self.dropout(x) if level == _DROPOUT_LEVEL else x
            skips.append(x)
        x = self.bottom(x)
        for level, block in enumerate(self.up):
            x = block(torch.cat([skips.pop(), upsampled(x) if level else x], dim=1))
        return SegmentationOutput(self.head(x))  # (B, K, H, W)
