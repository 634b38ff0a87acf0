"""Nyström attention: attention between all tokens in time and memory that grow with their number, not its square.

Xiong, Zeng, Chakraborty, Tan, Fung, Li, Singh: Nyströmformer, AAAI 2021, equations 13 and 14, in the form of the
nystrom-attention package: zeros in front to a multiple of the landmarks, a depth-wise convolution of the values beside.
Differs from it: the pseudo-inverse is scaled for each bag by itself, so that a bag does not depend on the bags beside it;
products are bracketed so that the narrow ones come first, A₁ (A₂⁺ (A₃ V)), and A₁, A₃ and A₂⁺ are never written out.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mil.models.attention import merge_heads, split_heads
from wsi.errors import UsageError

__all__ = ["NystromAttention", "apply_pseudo_inverse", "depthwise"]


def apply_pseudo_inverse(a: Tensor, x: Tensor, *, iterations: int = 6, unformed: int = 1) -> Tensor:
    """A⁺ X in float32, A⁺ the iterated Moore-Penrose inverse of matrices without negative entries.

    Equation 14: z ← z p(A z), p(Y) = ¼ (13 I − 15 Y + 7 Y² − Y³), from z₀ = Aᵀ / (largest row sum · largest column sum), the
    largest of each bag. What the last iterations would make is never formed but applied to X, product by product: one
    such iteration is 7 products with X in place of 4 of (m, m), two are 31.

    In training z is not formed at all: as Y = A z goes on by itself as Y ← Y p(Y), 2 products in place of 4, A⁺ X is
    z₀ p(Y₀) p(Y₁) … X. Rounding is not made good for then; after six iterations that is 1e-4 of the result, and nothing to
    a gradient.

    Args:
        a: (B, heads, m, m).
        x: (B, heads, m, v), narrower than m.
        unformed: how many of the iterations are applied to X; one pays for v below m / 2, two for a few columns.

    Returns:
        (B, heads, m, v).
    """
    # Autocast would have these products in half precision, which the iteration does not survive.
    with torch.autocast(a.device.type, enabled=False):
        a = a.float()
        rows, columns = (a.sum(axis).amax((1, 2))[:, None, None, None] for axis in (-1, -2))
        z = (a.mT / (rows * columns)).flatten(0, 1)  # (B · heads, m, m)
        apply = _apply_quickly if torch.is_grad_enabled() else partial(_apply, unformed=unformed)
        return apply(a.flatten(0, 1), z, x.float().flatten(0, 1), iterations).view_as(x)


def _apply(a: Tensor, z: Tensor, x: Tensor, iterations: int, *, unformed: int) -> Tensor:
    minus_a = -a
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

    return apply(x, unformed)


def _apply_quickly(a: Tensor, z: Tensor, x: Tensor, iterations: int) -> Tensor:
    y = a @ z  # symmetric, with eigenvalues from 0 to 1
    powers = []
    for _ in range(iterations - 1):
        square = y @ y
        powers.append((y, square))
        y = torch.baddbmm(torch.sub(13 * y, square, alpha=15), square, 7 * y - square, beta=0.25, alpha=0.25)
    y_x = y @ x
    x = torch.baddbmm(torch.sub(13 * x, y_x, alpha=15), y, y @ (7 * x - y_x), beta=0.25, alpha=0.25)
    for y, square in reversed(powers):
        y_x = y @ x
        x = torch.baddbmm(torch.sub(13 * x, y_x, alpha=15), square, 7 * x - y_x, beta=0.25, alpha=0.25)
    return z @ x


def depthwise(convolution: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A depth-wise convolution of x; in float32 on a CPU, where autocast would make its gradient several times slower."""
    with torch.autocast("cpu", enabled=False):
        return convolution(x.float() if x.device.type == "cpu" else x)


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

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, width), all of them real → (B, N, width)."""
        padded = self._padded(x)
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(padded).chunk(3, -1))  # (B, heads, P, ·)
        q_marks, k_marks = self._landmarks(q), self._landmarks(k)  # (B, heads, m, ·)
        a3_v = F.scaled_dot_product_attention(q_marks, k, v)  # (B, heads, m, ·)
        q, v = q[..., -x.shape[1] :, :], v[..., -x.shape[1] :, :]  # (B, heads, N, ·)
        inverse_a3_v = apply_pseudo_inverse(_weights(q_marks, k_marks), a3_v).to(v.dtype)
        mixed = F.scaled_dot_product_attention(q, k_marks, inverse_a3_v) + depthwise(
            self.residual, v
        )  # (B, heads, N, ·)
        result: Tensor = self.out(merge_heads(mixed))
        return result

    def of_first(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What ``forward`` says of the first of the tokens (B, N, width), at half the cost.

        Returns:
            (B, 1, width), and what its exact attention would be made of: its query (B, heads, 1, head width) and the keys
            of all tokens (B, heads, N, head width).
        """
        padded = self._padded(x)
        to_q, to_kv = self.qkv.weight.tensor_split([self.qkv.in_features])
        # Only the queries of the first token and of the landmarks are asked for, and a mean of queries is one of a mean.
        q, q_marks = (split_heads(F.linear(of, to_q), self.heads) for of in (x[:, :1], self._landmarks(padded)))
        k, v = (split_heads(part, self.heads) for part in F.linear(padded, to_kv).chunk(2, -1))  # (B, heads, P, ·)
        k_marks = self._landmarks(k)  # (B, heads, m, ·)
        a1, a2 = _weights(q, k_marks), _weights(q_marks, k_marks)  # (B, heads, 1, m), (B, heads, m, m)
        a1_inverse = apply_pseudo_inverse(a2.mT, a1.mT, unformed=2).mT.to(v.dtype)  # (B, heads, 1, m)
        a3_v = F.scaled_dot_product_attention(q_marks, k, v)  # (B, heads, m, ·)
        k, v = k[..., -x.shape[1] :, :], v[..., -x.shape[1] :, :]  # (B, heads, N, ·)
        mixed = (
            a1_inverse @ a3_v + depthwise(self.residual, v[..., : 1 + self.reach, :])[..., :1, :]
        )  # (B, heads, 1, ·)
        return self.out(merge_heads(mixed)), q, k

    def _padded(self, x: Tensor) -> Tensor:
        """Zeros in front of the tokens, to a multiple of the landmarks; no projection has a bias, so they stay zeros."""
        return F.pad(x, (0, 0, -x.shape[1] % self.landmarks, 0))

    def _landmarks(self, x: Tensor) -> Tensor:
        """Means of consecutive tokens: (…, P, ·) → (…, m, ·)."""
        return torch.unflatten(x, -2, (self.landmarks, -1)).mean(-2)


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """Softmax attention weights in float32: (…, M, ·), (…, N, ·) → (…, M, N)."""
    return (q @ k.mT / math.sqrt(q.shape[-1])).float().softmax(-1)
