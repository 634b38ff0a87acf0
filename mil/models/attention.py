"""Attention between tokens: the softmax attention of several heads that the transformers here are made of."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsi.errors import UsageError

__all__ = ["MultiHeadAttention", "log_mean_attention", "merge_heads", "split_heads"]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(…, N, width) → (…, heads, N, width / heads)."""
    return torch.unflatten(x, -1, (heads, -1)).transpose(-2, -3)


def merge_heads(x: Tensor) -> Tensor:
    """(…, heads, N, width / heads) → (…, N, width)."""
    return x.transpose(-2, -3).flatten(-2)


def log_mean_attention(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Logarithm of the mean over heads of one query's softmax over the keys.

    Args:
        query: (B, heads, 1, head width).
        key: (B, heads, N, head width).
        mask: (B, N), True where there is a key.

    Returns:
        (B, 1, N); −inf at padding. Its softmax is the mean attention.
    """
    logits = (query @ key.mT).squeeze(2).float() / math.sqrt(query.shape[-1])  # (B, heads, N)
    per_head = logits.masked_fill(~mask[:, None], -torch.inf).log_softmax(-1)
    return per_head.logsumexp(1, keepdim=True) - math.log(query.shape[1])  # (B, 1, N)


class MultiHeadAttention(nn.Module):
    """Vaswani et al. 2017, section 3.2.2, with one matrix for queries, keys and values, one below the other.

    Args:
        width: of the tokens; a multiple of ``heads``.
        dropout: of the attention weights.
    """

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise UsageError(f"a width of {width} does not divide into {heads} heads")
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, heads, M, ·), keys and values (B, heads, N, ·); one product where the three are the same tensor."""
        if query is key and key is value:
            q, k, v = self.qkv(query).chunk(3, -1)
        else:
            weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        return split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, M, width), (B, N, width) twice, key mask (B, N) True = real → (B, M, width)."""
        q, k, v = self.project(query, key, value)
        return self.attend(q, k, v, mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """What ``forward`` does with what ``project`` gave."""
        result: Tensor = self.out(merge_heads(self.mix(q, k, v, mask)))
        return result

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Values mixed by attention, heads apart: (B, heads, M, ·)."""
        allowed = None if mask is None else mask[:, None, None]
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
