"""Nyström attention: attention between all tokens in time and memory that grow with their number, not its square.

Xiong, Zeng, Chakraborty, Tan, Fung, Li, Singh: Nyströmformer, AAAI 2021, equations 13 and 14, in the form of the
nystrom-attention package: zeros in front to a multiple of the landmarks, a depth-wise convolution of the values beside.
Differs from it: the pseudo-inverse is scaled for each bag by itself, so that a bag does not depend on the bags beside it;
products are bracketed so that the narrow ones come first, A₁ (A₂⁺ (A₃ V)), and A₁, A₃ and A₂⁺ are never written out.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mil.models.attention import merge_heads, split_heads
from wsi.errors import UsageError

__all__ = ["NystromAttention", "apply_pseudo_inverse"]


def apply_pseudo_inverse(a: Tensor, x: Tensor, *, iterations: int = 6, unformed: int = 1) -> Tensor:
    """A⁺ X in float32, A⁺ the iterated Moore-Penrose inverse of matrices without negative entries.

    Equation 14: z ← ¼ z (13 I − 15 Y + 7 Y² − Y³) with Y = A z, from z₀ = Aᵀ / (largest row sum · largest column sum), the
    largest of each bag. What the last iterations would make is never formed but applied to X, product by product: one
    such iteration is 7 products with X in place of 4 of (m, m), two are 31.

    Args:
        a: (B, heads, m, m).
        x: (B, heads, m, v), narrower than m.
        unformed: how many of the iterations are applied to X; one pays for v below m / 2, two for a few columns.

    Returns:
        (B, heads, m, v).
    """
    # Autocast would have these products in half precision, which the iteration does not survive.
    with torch.autocast(a.device.type, enabled=False):
        minus_a = -a.float().flatten(0, 1)
        rows, columns = (a.float().sum(axis).amax((1, 2))[:, None, None, None] for axis in (-1, -2))
        z = (a.float().mT / (rows * columns)).flatten(0, 1)  # (B · heads, m, m)
        for _ in range(iterations - unformed):
            minus_y, quarter = minus_a @ z, 0.25 * z
            # Horner's scheme with everything but products inside the products.
            inner = torch.baddbmm(quarter, quarter, minus_y, beta=7)
            inner = torch.baddbmm(quarter, inner, minus_y, beta=15)
            z = torch.baddbmm(quarter, inner, minus_y, beta=13)

        def apply(w: Tensor, later: int) -> Tensor:
            if later == 0:
                return z @ w
            inner = 0.25 * w
            for factor in (7, 15, 13):
                inner = torch.baddbmm(w, minus_a, apply(inner, later - 1), beta=0.25 * factor)
            return apply(inner, later - 1)

        return apply(x.float().flatten(0, 1), unformed).view_as(x)


class NystromAttention(nn.Module):
    """Nyström attention of several heads.

    Args:
        width: of the tokens; a multiple of ``heads``.
        landmarks: number of means of consecutive tokens that stand for all of them.
        residual_kernel: length of the convolution along the tokens that is added to what attention gives.
        dropout: after the last Linear.
    """

    def __init__(
        self, width: int, heads: int = 8, *, landmarks: int = 256, residual_kernel: int = 33, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if width % heads:
            raise UsageError(f"a width of {width} does not divide into {heads} heads")
        self.heads = heads
        self.reach = residual_kernel // 2
        self.landmarks = landmarks
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))
        self.residual = nn.Conv2d(heads, heads, (residual_kernel, 1), padding=(self.reach, 0), groups=heads, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, width) → queries, keys, values (B, heads, P, head width): P − N zeros, then those of the tokens.

        P is the next multiple of the number of landmarks.
        """
        padded = F.pad(x, (0, 0, -x.shape[1] % self.landmarks, 0))  # the projection has no bias: zeros stay zeros
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(padded).chunk(3, -1))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, n_tokens: int, n_first: int | None = None) -> Tensor:
        """What ``project`` gave for N tokens → (B, N, width), or no more than the first ``n_first``, a few, of them."""
        group = q.shape[-2] // self.landmarks
        q_marks, k_marks = (torch.unflatten(part, -2, (-1, group)).mean(-2) for part in (q, k))  # (B, heads, m, ·)
        a2 = (q_marks @ k_marks.mT / math.sqrt(q.shape[-1])).float().softmax(-1)  # (B, heads, m, m)
        a3_v = F.scaled_dot_product_attention(q_marks, k, v)  # (B, heads, m, ·)
        q, v = q[..., -n_tokens:, :], v[..., -n_tokens:, :]
        if n_first is None:
            mixed = F.scaled_dot_product_attention(q, k_marks, apply_pseudo_inverse(a2, a3_v).to(v.dtype))
            mixed = mixed + self.residual(v)  # (B, heads, N, ·)
        else:
            logits = q[..., :n_first, :] @ k_marks.mT / math.sqrt(q.shape[-1])
            a1 = logits.float().softmax(-1)  # (B, heads, n_first, m)
            mixed = apply_pseudo_inverse(a2.mT, a1.mT, unformed=2).mT @ a3_v
            mixed = mixed + self.residual(v[..., : n_first + self.reach, :])[..., :n_first, :]  # (B, heads, n_first, ·)
        result: Tensor = self.out(merge_heads(mixed))
        return result

    def forward(self, x: Tensor, n_first: int | None = None) -> Tensor:
        """Tokens (B, N, width), all of them real → (B, N, width), or no more than the first ``n_first`` of them."""
        return self.attend(*self.project(x), x.shape[1], n_first)
