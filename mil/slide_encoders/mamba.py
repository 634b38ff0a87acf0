"""Mamba-2: a state-space layer that reads tiles one after the other, in time and memory that grow with their number.

Dao, Gu: Transformers are SSMs, ICML 2024, section 6 (the chunked scan) and figure 6 (the block, with one group).
Differs from the authors' code: plain PyTorch, so that it runs anywhere; sequences may be given in pieces.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsi.errors import UsageError

__all__ = ["Carry", "Mamba2", "scan"]

_CHUNK = (
    64  # tokens whose pairs are worked out at once: work within a chunk equals that on the state at about this size
)


class Carry(NamedTuple):
    """What the tokens so far leave to those that follow.

    Attributes:
        tail: (B, kernel − 1, channels), the last inputs of the convolution.
        state: (B, heads, head width, state width) float32.
    """

    tail: Tensor
    state: Tensor


class Mamba2(nn.Module):
    """The block: (B, N, width) → (B, N, width); token t sees tokens 0 to t.

    Args:
        width: of the tokens.
        state: width of the state that each channel has.
        expand: inner width by the width.
        head: inner channels that share one decay.
        kernel: tokens that the convolution sees.
    """

    def __init__(self, width: int, *, state: int = 128, expand: int = 2, head: int = 64, kernel: int = 4) -> None:
        super().__init__()
        inner = expand * width
        if inner % head:
            raise UsageError(f"an inner width of {inner} does not divide into heads of {head}")
        self.inner, self.state, self.head = inner, state, head
        channels, heads = inner + 2 * state, inner // head
        self.in_proj = nn.Linear(width, inner + channels + heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, kernel, groups=channels)
        # The authors' start: steps from 0.001 to 0.1, decays from 1 to 16.
        steps = torch.empty(heads).uniform_(-6.9, -2.3).exp()
        self.dt_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # softplus gives the step back
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, u: Tensor, carry: Carry | None = None) -> tuple[Tensor, Carry]:
        """Tokens (B, N, width) that follow those which left ``carry`` → (B, N, width), and what these leave.

        Pieces give what the whole gives, to within rounding.
        """
        inner, state, heads = self.inner, self.state, len(self.D)
        if carry is None:
            tail = u.new_zeros(len(u), self.conv1d.kernel_size[0] - 1, inner + 2 * state)
            carry = Carry(tail, u.new_zeros(len(u), heads, self.head, state, dtype=torch.float32))
        gate, signal, step = torch.split(self.in_proj(u), [inner, inner + 2 * state, heads], -1)
        padded = torch.cat([carry.tail.to(signal.dtype), signal], 1)  # (B, kernel - 1 + N, channels)
        signal = F.silu(self.conv1d(padded.mT).mT)  # (B, N, channels)
        x, b, c = torch.split(signal.float(), [inner, state, state], -1)
        x = torch.unflatten(x, -1, (heads, self.head))  # (B, N, heads, head)
        step = F.softplus(step.float() + self.dt_bias.float())  # (B, N, heads)
        y, last = scan(x, step, -self.A_log.float().exp(), b, c, carry.state)
        y = (y + self.D.float()[:, None] * x).flatten(2)  # (B, N, inner)
        out: Tensor = self.out_proj(self.norm(y * F.silu(gate.float())))
        return out, Carry(padded[:, u.shape[1] :], last)


def scan(
    x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, state: Tensor, *, chunk: int = _CHUNK
) -> tuple[Tensor, Tensor]:
    """S_t = exp(step_t rate) S_{t−1} + step_t x_t ⊗ b_t and y_t = S_t c_t, a chunk of tokens at a time.

    Within a chunk every token looks back at each other one; what came before it is in the state.

    Args:
        x: (B, N, heads, head width).
        step: (B, N, heads), positive.
        rate: (heads,), negative.
        b, c: (B, N, state width).
        state: (B, heads, head width, state width), S before the first token.
        chunk: how many tokens; changes only rounding and cost.

    Returns:
        y as x, and S after the last token.
    """
    outputs = []
    for start in range(0, x.shape[1], chunk):
        part = slice(start, start + chunk)
        fed = (x[:, part] * step[:, part, :, None]).transpose(1, 2)  # (B, heads, L, head)
        b_, c_ = b[:, part], c[:, part]  # (B, L, state)
        # In float64: what is left between neighbours is a small difference of sums that grow along the chunk.
        faded = (
            (step[:, part].double() * rate).cumsum(1).transpose(1, 2)
        )  # (B, heads, L), log of what is left since start
        ahead = torch.ones(faded.shape[-1], faded.shape[-1], dtype=torch.bool, device=x.device).triu(1)
        between = (faded[..., :, None] - faded[..., None, :]).float().masked_fill(ahead, -torch.inf).exp()
        near = ((c_ @ b_.mT)[:, None] * between) @ fed  # (B, heads, L, head)
        far = (c_[:, None] @ state.mT) * faded.float().exp()[..., None]  # (B, heads, L, head)
        outputs.append((near + far).transpose(1, 2))
        left = (faded[..., -1:] - faded).float().exp()  # (B, heads, L)
        state = state * faded[..., -1, None, None].float().exp() + (fed * left[..., None]).mT @ b_[:, None]
    return torch.cat(outputs, 1), state
