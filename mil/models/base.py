"""MILModel, MILOutput: what every slide model takes and returns."""

from typing import NamedTuple

from torch import Tensor, nn

from mil.bag import Batch

__all__ = ["MILModel", "MILOutput"]


class MILOutput(NamedTuple):
    """Logits (B, C); attention (B, K, N) normalised; scores (B, K, N) raw; embedding (B, E)."""

    logits: Tensor
    attention: Tensor
    scores: Tensor
    embedding: Tensor


class MILModel(nn.Module):
    """Bags in, slide answers out."""

    def forward(self, batch: Batch) -> MILOutput:
        raise NotImplementedError

    def auxiliary_loss(self, batch: Batch, output: MILOutput, targets: Tensor) -> Tensor:
        """A loss beside that of the slide's label; none by default."""
        return output.logits.new_zeros(())
