"""AGU-Net and DAGU-Net: U-Nets that weigh their skip connections, the second with heads at every level."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmentation.models.base import SegmentationModel, SegmentationOutput, init_weights
from segmentation.models.blocks import AttentionGate, ConvBlock, Norm, upsampled
from wsi.errors import UsageError

__all__ = ["AGUNet", "DAGUNet"]


class AGUNet(SegmentationModel):
    """A U-Net with attention gates and the picture itself, made smaller, at every level.

    Oktay et al.: Attention U-Net, MIDL 2018; Bouget et al.: Meningioma segmentation in T1-weighted MRI leveraging global
    context and attention mechanisms, Frontiers in Radiology 2021; as a refinement network in H2G-Net (Pedersen et al. 2022).
    The epithelium model (16 to 128 filters, 1024 pixels) is trained with deep supervision under this name: here that is
    ``DAGUNet``, and this one is the same net with a single head. Its norm and upsampling are not stated and are U-Net's:
    batch norm, nearest.

    Args:
        filters: of the levels, finest first; the last is the bottleneck's.
        dropout: of whole channels, on the way up.
        norm: as for ``UNet``.
    """

    def __init__(
        self,
        in_channels: int,
        n_classes: int,
        *,
        filters: tuple[int, ...] = (16, 32, 32, 64, 64, 128, 128),
        dropout: float = 0.1,
        norm: Norm = "batch",
    ) -> None:
        super().__init__(in_channels, n_classes)
        if len(filters) < 2:
            raise UsageError(f"an AGU-Net has at least two levels, got filters {tuple(filters)}")
        *levels, bottom = filters
        finer = [0, *levels]  # what comes down from the level above; the picture joins it
        self.down = nn.ModuleList(
            ConvBlock(before + in_channels, width, width, norm=norm)
            for before, width in zip(finer, filters, strict=True)
        )
        coarser = [bottom, *reversed(levels)]
        self.gates = nn.ModuleList(
            AttentionGate(width, below) for width, below in zip(reversed(levels), coarser, strict=False)
        )
        self.up = nn.ModuleList(
            ConvBlock(width + below, width, width, norm=norm)
            for width, below in zip(reversed(levels), coarser, strict=False)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(levels[0], n_classes, 1)
        init_weights(self)

    @property
    def stride(self) -> int:
        return int(2 ** len(self.up))

    def whole(self, x: Tensor) -> SegmentationOutput:
        return SegmentationOutput(self.head(self._decoded(x)[0]))

    def _decoded(self, picture: Tensor) -> list[Tensor]:
        """Feature maps on the way up, finest first."""
        x = self.down[0](picture)
        skips = [x]
        for block in self.down[1:]:
            picture = F.avg_pool2d(picture, 2)
            x = block(torch.cat([F.max_pool2d(x, 2), picture], dim=1))  # (B, filters[i], H / 2^i, W / 2^i)
            skips.append(x)
        skips.pop()  # the bottleneck's own
        decoded: list[Tensor] = []
        for gate, block in zip(self.gates, self.up, strict=True):
            skip = gate(skips.pop(), x)
            x = self.dropout(block(torch.cat([skip, upsampled(x)], dim=1)))
            decoded.insert(0, x)
        return decoded


class DAGUNet(AGUNet):
    """AGU-Net with a head at every level of the way up: what the epithelium model and H2G-Net's DAGU-Net are.

    Sources as for ``AGUNet``; deep supervision: Lee et al., AISTATS 2015. The heads see targets of their own size, see
    ``segmentation.losses``. Some readings take the D for dual attention; here it is deep supervision.
    """

    def __init__(
        self,
        in_channels: int,
        n_classes: int,
        *,
        filters: tuple[int, ...] = (16, 32, 32, 64, 64, 128, 128),
        dropout: float = 0.1,
        norm: Norm = "batch",
    ) -> None:
        super().__init__(in_channels, n_classes, filters=filters, dropout=dropout, norm=norm)
        self.deep_heads = nn.ModuleList(nn.Conv2d(width, n_classes, 1) for width in filters[1:-1])
        init_weights(self.deep_heads)

    def whole(self, x: Tensor) -> SegmentationOutput:
        finest, *coarser = self._decoded(x)
        deep = tuple(head(level) for head, level in zip(self.deep_heads, coarser, strict=True))
        return SegmentationOutput(self.head(finest), deep)
