"""The gradients in closed form: docs/definitions.md, section 3, "Backward", and its counterpart in section 4."""

from __future__ import annotations

import math

import torch
from oracle_terms import Item, Terms, by_row, mean, within_blocks
from torch import Tensor


def gradients_of_item(
    xs: list[Item],
    all_terms: list[Terms],
    value: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    active: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one batch item, every query head by itself, from the terms of all levels, the finest last.

    `active` are the queries with an incoming gradient.
    """
    x, terms = xs[-1], all_terms[-1]
    dtype = x.query.dtype
    lse = torch.where(active, lse, math.inf)  # exp(P - inf) = 0: no other query contributes
    delta = torch.where(active, (grad_out * torch.where(active[..., None], out, 0.0)).sum(-1) - grad_lse, 0.0)
    prob = (x.logits.masked_fill(~terms.keys, -math.inf) - lse[..., None]).exp()
    ds = prob * (grad_out @ value.transpose(-1, -2) - delta[..., None])
    ds = ds * x.slopes(x.query, x.key)
    dq, dk = x.scale * (ds @ x.key), x.scale * (ds.transpose(-1, -2) @ x.query)
    dv = prob.transpose(-1, -2) @ grad_out
    if x.first_order:
        more = _first_order(x, terms, value, grad_out, delta, lse)
        return dq + more[0], dk + more[1], dv + more[2]
    coarse = _block_form if x.g.form == "block" else _token_form
    for level, terms in zip(xs, all_terms, strict=True):
        dq_coarse, dkh, dvh = coarse(level, terms, mean(value, level.g.member), grad_out, delta, lse)
        share = (level.g.member.to(dtype) / level.g.count.clamp(min=1)[:, None]).T
        dq, dk, dv = dq + dq_coarse, dk + share @ dkh, dv + share @ dvh
    return dq, dk, dv


def _token_form(
    x: Item, terms: Terms, value_mean: Tensor, grad_out: Tensor, delta: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dkh and dvh of the coarse blocks of each token."""
    prob = (terms.block_logits.masked_fill(~terms.blocks, -math.inf) - lse[..., None]).exp() * x.block_counts
    dc = prob * (grad_out @ value_mean.transpose(-1, -2) - delta[..., None]) * x.slopes(x.query, x.key_mean)
    return (
        x.scale * (dc @ x.key_mean),
        x.scale * (dc.transpose(-1, -2) @ x.query),
        prob.transpose(-1, -2) @ grad_out,
    )


def _block_form(
    x: Item, terms: Terms, value_mean: Tensor, grad_out: Tensor, delta: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dkh and dvh of the coarse blocks, from pooled sums."""
    dtype = x.query.dtype
    rows = x.g.pooled.shape[0]
    in_row = (x.g.row_of == torch.arange(rows)[:, None]) & x.g.answers
    # Of every row, which of its blocks are coarse: what any of its queries says, for they all say the same.
    coarse = in_row.double() @ terms.blocks.double() > 0
    pooled = x.coarse_logits.masked_fill(~coarse, -math.inf)
    largest = pooled.amax(-1) if pooled.shape[-1] else pooled.new_full(pooled.shape[:-1], -math.inf)
    factor = (largest[:, x.g.row_of] - lse).exp() if rows else torch.zeros_like(lse)
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    sums = in_row.to(dtype)
    big_g = sums @ (factor[..., None] * grad_out)
    big_e = (sums @ (factor * delta)[..., None]).squeeze(-1)
    w = (pooled - largest[..., None]).exp()
    count = x.block_counts
    dc = count * w * (big_g @ value_mean.transpose(-1, -2) - big_e[..., None]) * x.slopes(x.query_mean, x.key_mean)
    dqh = x.scale * (dc @ x.key_mean)
    dkh = x.scale * (dc.transpose(-1, -2) @ x.query_mean)
    dvh = count[:, None] * (w.transpose(-1, -2) @ big_g)
    share = (x.g.pooled.to(dtype) / x.g.pooled.sum(-1).clamp(min=1)[:, None]).T
    return share @ dqh, dkh, dvh


def _first_order(
    x: Item, terms: Terms, value: Tensor, grad_out: Tensor, delta: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of the coarse blocks to first order: section 3.8, Backward."""
    dtype, rows = x.query.dtype, x.g.pooled.shape[0]
    weights, _ = within_blocks(x)
    keys, values = by_row(weights @ x.key[:, None], x.g), by_row(weights @ value[:, None], x.g)
    prob = (terms.block_logits.masked_fill(~terms.blocks, -math.inf) - lse[..., None]).exp()
    dl = prob * ((values @ grad_out[..., None]).squeeze(-1) - delta[..., None])
    in_row = ((x.g.row_of == torch.arange(rows)[:, None]) & x.g.answers).to(dtype)
    dq = x.scale * (dl[..., None, :] @ keys).squeeze(-2)
    dkt = x.scale * torch.einsum("rt,htj,htd->hrjd", in_row, dl, x.query)
    dvt = torch.einsum("rt,htj,htd->hrjd", in_row, prob, grad_out)
    turn = dkt - x.scale * torch.einsum("rt,htj,hrd->hrjd", in_row, dl, x.query_mean)
    u = dvt @ value.transpose(-1, -2)[:, None] + turn @ x.key.transpose(-1, -2)[:, None]
    dx = x.scale * weights * (u - (weights * u).sum(-1, keepdim=True))
    dqh = torch.einsum("hrjs,hsd->hrd", dx, x.key)
    dk = torch.einsum("hrjs,hrjd->hsd", weights, dkt) + torch.einsum("hrjs,hrd->hsd", dx, x.query_mean)
    dv = torch.einsum("hrjs,hrjd->hsd", weights, dvt)
    share = (x.g.pooled.to(dtype) / x.g.pooled.sum(-1).clamp(min=1)[:, None]).T
    return dq + share @ dqh, dk, dv
