"""SegmentationModel: what every network from pixels to classes has in common; SegmentationOutput: what it says."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from wsi.errors import UsageError

__all__ = ["SegmentationModel", "SegmentationOutput", "init_weights"]


class SegmentationOutput(NamedTuple):
    """What a network says of B pictures of H × W pixels, K classes, background the first.

    Attributes:
        logits: (B, K, H, W), before the softmax.
        deep: logits of the deeply supervised heads, finest first: (B, K, ⌈H/s⌉, ⌈W/s⌉) for s = 2, 4, …; most networks
            have none. Pixel (i, j) speaks of the s × s pixels from (s·i, s·j) on.
    """

    logits: Tensor
    deep: tuple[Tensor, ...] = ()


class SegmentationModel(nn.Module, ABC):
    """Pictures in, class logits of every pixel out.

    The constructor of every network is ``(in_channels, n_classes, *, hyper-parameters with the paper's defaults)``. Pictures
    of any size are taken: what lacks to a multiple of ``stride`` is filled with the last row and column and cut off again.
    Channels are values from 0 to 1; the first three are red, green, blue, those after them probability maps.
    """

    def __init__(self, in_channels: int, n_classes: int) -> None:
        super().__init__()
        if in_channels < 1 or n_classes < 2:
            raise UsageError(
                f"a network needs channels and at least two classes, not in_channels={in_channels}, n_classes={n_classes}"
            )
        self.in_channels = in_channels
        self.n_classes = n_classes

    @property
    @abstractmethod
    def stride(self) -> int:
        """Pixels that one pixel of the coarsest feature map stands for; shifts by it shift the answer."""

    @abstractmethod
    def whole(self, x: Tensor) -> SegmentationOutput:
        """``forward`` for pictures whose sides are multiples of ``stride``."""

    def forward(self, x: Tensor) -> SegmentationOutput:
        """float (B, in_channels, H, W) → logits of the same H and W.

        Raises:
            UsageError: another number of channels.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise UsageError(f"the network takes (B, {self.in_channels}, H, W), not {tuple(x.shape)}")
        height, width = x.shape[2:]
        below, right = -height % self.stride, -width % self.stride
        output = self.whole(F.pad(x, (0, right, 0, below), mode="replicate") if below or right else x)
        return SegmentationOutput(
            output.logits[..., :height, :width],
            tuple(
                head[..., : -(-height // 2**level), : -(-width // 2**level)]
                for level, head in enumerate(output.deep, start=1)
            ),
        )


def init_weights(network: nn.Module) -> None:
    """He's normal weights for all convolutions (He et al., ICCV 2015), biases zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
