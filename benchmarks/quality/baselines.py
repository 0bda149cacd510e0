"""Other approximations of softmax attention, in plain torch: low rank (Nystrom) and a window."""

from __future__ import annotations

import torch
from torch import Tensor


def nystrom(query: Tensor, key: Tensor, value: Tensor, scale: float, landmarks: int, iterations: int = 6) -> Tensor:
    """Return `softmax(q kl') inverse(softmax(ql kl')) softmax(ql k') v` with the means of segments as `ql` and `kl`.

    Nystromformer (arXiv 2102.03902), whose iterations towards the pseudo-inverse stop early: the pseudo-inverse itself
    is useless where the logits are large. Each of the four products has L * landmarks * D multiply-adds. Tensors are
    (B, H, L, D), computed in float64.
    """
    q, k, v = (x.double() for x in (query, key, value))
    of_queries, of_keys = (_segment_means(x, landmarks) for x in (q, k))
    left = (scale * q @ of_keys.mT).softmax(-1)
    middle = (scale * of_queries @ of_keys.mT).softmax(-1)
    right = (scale * of_queries @ k.mT).softmax(-1)
    return left @ (_inverse(middle, iterations) @ (right @ v))


def _inverse(matrix: Tensor, iterations: int) -> Tensor:
    """Approach the pseudo-inverse of matrices (B, H, m, m) of which the rows add up to 1."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    found = matrix.mT / matrix.sum(-2).amax(-1)[..., None, None]
    for _ in range(iterations):
        product = matrix @ found
        found = 0.25 * found @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product)))
    return found


def _segment_means(x: Tensor, segments: int) -> Tensor:
    return torch.stack([piece.mean(-2) for piece in x.tensor_split(segments, dim=-2)], dim=-2)


def window(query: Tensor, key: Tensor, value: Tensor, scale: float, width: int) -> Tensor:
    """Return exact attention to the `width` tokens around each one (B, H, L, D), itself among them."""
    place = torch.arange(query.shape[2])
    away = place - place[:, None]
    seen = (away >= -(width // 2)) & (away < width - width // 2)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)
