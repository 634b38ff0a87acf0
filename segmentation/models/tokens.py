"""TokenDecoder: classes of pixels from the patch tokens of a frozen foundation model."""

import math
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from features.encoder import Encoder
from segmentation.models.base import SegmentationModel, SegmentationOutput, init_weights
from segmentation.models.blocks import upsampled
from wsi.errors import ModelMismatchError

__all__ = ["TokenDecoder"]

_RGB = 3
_GROUPS = 8


class TokenDecoder(SegmentationModel):
    """A linear layer on every patch token, or a light decoder, interpolated to pixels.

    The linear probe is that of DINOv2 (Oquab et al., TMLR 2024, section 7.4) without its batch norm. Any timm model whose
    ``forward_features`` gives a square of tokens will do. Pictures are seen in squares of the encoder's own size, which do
    not see each other: ask for tiles of ``stride`` pixels. The encoder is frozen and belongs neither to the parameters nor to
    the state of this module.

    Args:
        hidden: channels of the light decoder, two 3×3 convolutions with a doubling before each; 0 for the linear layer.
    """

    def __init__(self, encoder: Encoder, n_classes: int, *, hidden: int = 0) -> None:
        super().__init__(_RGB, n_classes)
        if encoder.spec.input_px is None or not hasattr(encoder.backbone, "forward_features"):
            raise ModelMismatchError(f"{encoder.spec.name}: gives vectors of whole tiles and no tokens to decode")
        self._frozen = (encoder,)  # in a tuple, where PyTorch does not look for parameters
        self._px = encoder.spec.input_px
        width = int(cast(int, encoder.backbone.num_features))
        self.decoder = nn.Conv2d(width, n_classes, 1) if hidden == 0 else _light(width, hidden, n_classes)
        init_weights(self.decoder)
        self.to(encoder.device)

    @property
    def encoder(self) -> Encoder:
        """The frozen foundation model."""
        return self._frozen[0]

    @property
    def stride(self) -> int:
        return self._px

    def whole(self, x: Tensor) -> SegmentationOutput:
        batch, channels, height, width = x.shape
        rows, columns, px = height // self._px, width // self._px, self._px
        squares = x.view(batch, channels, rows, px, columns, px).permute(0, 2, 4, 1, 3, 5)
        logits = self.decoder(self._tokens(squares.reshape(-1, channels, px, px)))  # (B · rows · columns, K, h, w)
        logits = F.interpolate(logits, size=(px, px), mode="bilinear", align_corners=False)
        logits = logits.view(batch, rows, columns, self.n_classes, px, px).permute(0, 3, 1, 4, 2, 5)
        return SegmentationOutput(logits.reshape(batch, self.n_classes, height, width))

    def _tokens(self, squares: Tensor) -> Tensor:
        """Values from 0 to 1 (N, 3, px, px) → patch tokens (N, D, h, w) float32, without a gradient."""
        encoder = self.encoder
        backbone = encoder.backbone
        mean, std = (squares.new_tensor(values).view(3, 1, 1) for values in (encoder.spec.mean, encoder.spec.std))
        weight = next(backbone.parameters())
        seen = ((squares - mean) / std).to(weight.dtype)
        tokens: Tensor = backbone.forward_features(seen).detach()  # type: ignore[operator]
        if tokens.ndim != 3:
            raise ModelMismatchError(f"{encoder.spec.name}: gives {tuple(tokens.shape)}, not tokens (N, patches, D)")
        tokens = tokens[:, cast(int, getattr(backbone, "num_prefix_tokens", 0)) :].float()  # (N, patches, D)
        side = math.isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            raise ModelMismatchError(f"{encoder.spec.name}: gives {tokens.shape[1]} patch tokens, which are no square")
        return tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return upsampled(x)


def _light(width: int, hidden: int, n_classes: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(width, hidden, 1)]
    for _ in range(2):
        groups = math.gcd(_GROUPS, hidden)
        layers += [_Doubled(), nn.Conv2d(hidden, hidden, 3, padding=1), nn.GroupNorm(groups, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(hidden, n_classes, 1))
