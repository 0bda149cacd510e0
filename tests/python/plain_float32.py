"""Attention in float32 whose bits are the same on every CPU: what rounding alone costs, whichever kernels torch has.

Every number is rounded to float32 once, and a sum after each of its terms, in their order. So an error here is the unit
roundoff, 2^-24, times the sizes of the terms and of their partial sums, and nothing else. A kernel of torch may happen
to be better: exact for one channel, or one that keeps the weights instead of computing them again from a rounded
log-sum-exp. No budget may hang on that, so none is smaller than the error of this arithmetic (`helpers.Budget`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.overrides import TorchFunctionMode

MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


def _round(x: Any) -> Any:
    return x.float().double() if isinstance(x, Tensor) and x.dtype == torch.float64 else x


def _add_up(start: Tensor, terms: Iterable[Tensor]) -> Tensor:
    for term in terms:
        start = _round(start + term)
    return start


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Products enter their sum exactly, as in a fused multiply-add."""
    start = a[..., :0] @ b[..., :0, :]
    return _add_up(start, (a[..., i, None] * b[..., i, None, :] for i in range(a.shape[-1])))


def _sum(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    total = _add_up(torch.zeros_like(x.select(dim, 0)), x.unbind(dim)) if x.shape[dim] else x.sum(dim)
    return total.unsqueeze(dim) if keepdim else total


class PlainFloat32(TorchFunctionMode):
    """Computes what is written in float64 as the docstring of this module says; gradients are to be written out."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func in MATMULS:
                return _matmul(*args)
            if func is Tensor.sum and len(args) == 2 and isinstance(args[1], int):
                return _sum(*args, **kwargs)
        return _round(func(*args, **kwargs))


def _bias(mask: Tensor | None, is_causal: bool, query_length: int, key_length: int) -> Tensor:
    """What is added to the logits."""
    if isinstance(mask, CausalBias) or is_causal:
        lower_right = not is_causal and mask.variant == causal_lower_right(1, 1).variant
        diagonal = key_length - query_length if lower_right else 0
        mask = torch.ones(query_length, key_length, dtype=torch.bool).tril(diagonal)
    if mask is None:
        return torch.zeros((), dtype=torch.float64)
    if mask.dtype != torch.bool:
        return mask.double()
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    with_bias: bool = False,
) -> list[Tensor]:
    """The output and, with grad_out, the gradients, for the arguments of torch's function; stored in query's dtype.

    With `with_bias`, that of `attn_mask` too.

    The gradients start from the stored output and log-sum-exp, as those of any attention that keeps no weights.
    """
    stored = query.dtype
    group = query.shape[-3] // key.shape[-3] if enable_gqa and query.dim() > 2 else 1
    bias = _bias(attn_mask, is_causal, query.shape[-2], key.shape[-2])
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    q, k, v = (x.detach().double() for x in (query, key, value))
    if group > 1:
        k, v = (x.repeat_interleave(group, -3) for x in (k, v))
    with PlainFloat32():
        logits = scale * (q @ k.mT) + bias
        largest = logits.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        total = (logits - largest).exp().sum(-1, keepdim=True)
        lse = (total.log() + largest).masked_fill(total == 0, math.inf)  # a query that sees nothing: weights of 0
        weights = (logits - lse).exp()
        out = (weights @ v).to(stored)
        if grad_out is None:
            return [out]
        g = grad_out.double()
        change = weights * (g @ v.mT - (g * out.double()).sum(-1, keepdim=True))
        gradients = scale * (change @ k), scale * (change.mT @ q), weights.mT @ g
        groups = 1, group, group
        like = (query, key, value)
        results = [out, *(_sum_to(*x) for x in zip(gradients, groups, like, strict=True))]
        return [*results, _sum_to(change, 1, attn_mask)] if with_bias and attn_mask is not None else results


def _sum_to(gradient: Tensor, group: int, x: Tensor) -> Tensor:
    """Summed over the heads of a group and over what was broadcast."""
    if group > 1:
        gradient = gradient.unflatten(-3, (-1, group)).sum(-3)
    return gradient.sum_to_size(x.shape).to(x.dtype)
