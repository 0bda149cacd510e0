"""What is timed must be right: results are compared with a dense float64 evaluation before a case is timed."""

from __future__ import annotations

import math
from collections.abc import Mapping

import mra_attention
import torch
from torch import Tensor

ROWS_CHECKED = 4
"""Query blocks of each head that are evaluated densely: all of them would need L * L numbers."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ||actual - expected|| / ||expected|| in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def check_forward(query: Tensor, key: Tensor, value: Tensor, keywords: Mapping[str, object], tolerance: float) -> None:
    """Compare some blocks of query rows with docs/definitions.md, section 3.6, for the plan that is selected."""
    keywords = dict(keywords)
    mode = keywords.pop("mode", "full")
    plan = mra_attention.plan(query, key, **keywords)
    block = plan.config.block_size
    out = mra_attention.scaled_dot_product_attention(query, key, value, plan=plan, mode=mode, resolutions=(block, 1))
    blocks = torch.linspace(0, query.shape[2] // block - 1, ROWS_CHECKED).long()
    expected = torch.cat([_dense_rows(query, key, value, plan, int(i), mode) for i in blocks], dim=2)
    actual = torch.cat([out[:, :, i * block : (i + 1) * block] for i in blocks], dim=2)
    error = relative_error(actual, expected)
    if not error <= tolerance:
        raise AssertionError(
            f"forward of {tuple(query.shape)} {query.dtype} {keywords}: error {error:.1e} > {tolerance:.1e}"
        )


def _dense_rows(query: Tensor, key: Tensor, value: Tensor, plan: mra_attention.Plan, i: int, mode: object) -> Tensor:
    """Return the output of query block i, all lengths being multiples of the block size."""
    b = plan.config.block_size
    q, k, v = (x.double() for x in (query[:, :, i * b : (i + 1) * b], key, value))
    scale = query.shape[-1] ** -0.5
    logits = scale * q @ k.transpose(-1, -2)
    selected = plan.block_mask()[:, :, i].repeat_interleave(b, dim=-1)[:, :, None]
    pooled_keys, pooled_values = (x.unflatten(2, (-1, b)).mean(3) for x in (k, v))
    pooled = (scale * q.mean(2, keepdim=True) @ pooled_keys.transpose(-1, -2)).repeat_interleave(b, dim=-1)
    logits = torch.where(selected, logits, pooled if mode == "full" else -torch.inf)
    weights = logits.softmax(-1)
    coarse = weights * ~selected
    return (weights * selected) @ v + coarse @ pooled_values.repeat_interleave(b, dim=2)


def check_causal(query: Tensor, key: Tensor, value: Tensor, keywords: Mapping[str, object], tolerance: float) -> None:
    """Compare some tokens with docs/definitions.md, section 4, for the plan that is selected."""
    plan = mra_attention.plan(query, key, is_causal=True, **keywords)
    out = mra_attention.scaled_dot_product_attention(query, key, value, is_causal=True, **keywords)
    tokens = [0, 31, 32, query.shape[2] // 2 + 5, query.shape[2] - 1]
    expected = torch.stack([_causal_token(query, key, value, plan, token) for token in tokens], dim=2)
    error = relative_error(out[:, :, tokens], expected)
    if not error <= tolerance:
        raise AssertionError(f"causal forward of {tuple(query.shape)} {keywords}: error {error:.1e} > {tolerance:.1e}")


def _causal_token(query: Tensor, key: Tensor, value: Tensor, plan: mra_attention.Plan, token: int) -> Tensor:
    """Return the output of one token."""
    b = plan.config.block_size
    q, k, v = query[:, :, token].double(), key[:, :, : token + 1].double(), value[:, :, : token + 1].double()
    past = token // b  # blocks that are wholly visible
    selected = plan.block_mask()[:, :, token]
    if not selected[..., past].all():
        raise AssertionError(f"token {token} has not selected its own block")
    scale = q.shape[-1] ** -0.5
    means_k, means_v = (x[:, :, : past * b].unflatten(2, (past, b)).mean(3) for x in (k, v))
    exact = scale * torch.einsum("bhd,bhsd->bhs", q, k)
    exact = exact.masked_fill(~selected.repeat_interleave(b, dim=-1)[..., : token + 1], -torch.inf)
    coarse = scale * torch.einsum("bhd,bhjd->bhj", q, means_k) + math.log(b)
    coarse = coarse.masked_fill(selected[..., :past], -torch.inf)
    weights = torch.cat([exact, coarse], dim=-1).softmax(-1)
    return torch.einsum("bhs,bhsd->bhd", weights, torch.cat([v, means_v], dim=2))


def check_gradients(
    tensors: tuple[Tensor, ...],
    grad_out: Tensor,
    keywords: Mapping[str, object],
    tolerance: float,
    *,
    causal: bool = False,
) -> None:
    """Compare gradients with those of the same plan in float64, which the tests compare with the definitions."""
    keywords = dict(keywords)
    mode = keywords.pop("mode", "full")
    plan = mra_attention.plan(tensors[0], tensors[1], is_causal=causal, **keywords)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        out = mra_attention.scaled_dot_product_attention(*leaves, is_causal=causal, plan=plan, mode=mode)
        return torch.autograd.grad(out, leaves, grad_out.to(dtype))

    for name, actual, expected in zip("qkv", gradients(tensors[0].dtype), gradients(torch.float64), strict=True):
        error = relative_error(actual, expected)
        if not error <= tolerance:
            raise AssertionError(
                f"d{name} of {tuple(tensors[0].shape)} {keywords}: error {error:.1e} > {tolerance:.1e}"
            )


def check_masked(
    tensors: tuple[Tensor, ...], mask: Tensor, keywords: Mapping[str, object], tolerance: float, *, backward: bool
) -> None:
    """Compare some rows, and gradients of their sum, with softmax attention over what the mask leaves, in float64."""
    rows = torch.linspace(0, tensors[0].shape[2] - 1, 97).long()

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        query, key, value = leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        if dtype is torch.float64:
            logits = query.shape[-1] ** -0.5 * query[:, :, rows] @ key.transpose(-1, -2)
            out = logits.masked_fill(~mask[rows], -torch.inf).softmax(-1) @ value
        else:
            out = mra_attention.scaled_dot_product_attention(query, key, value, **keywords)[:, :, rows]
        return (out, *torch.autograd.grad(out.sum(), leaves)) if backward else (out,)

    for name, actual, expected in zip(("out", "dq", "dk", "dv"), run(torch.float32), run(torch.float64), strict=False):
        error = relative_error(actual, expected)
        if not error <= tolerance:
            raise AssertionError(f"{name} with a mask, {list(keywords)}: error {error:.1e} > {tolerance:.1e}")
