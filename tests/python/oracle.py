"""Dense evaluation of docs/definitions.md, written from its formulas: nothing is shared with the kernels.

Everything of size Lq x Lk is stored and gradients come from torch autograd through the dense formula, with the
selection held fixed. The default precision is float64; float32 gives the error of plain torch on the same formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """What a call asks for, in the terms of docs/definitions.md. Masks are bool, True = valid, (B, Lk) and (B, Lq).

    bias is a mask (bool) or an additive bias that depends on the query; it broadcasts to (B, H, Lq, Lk), and the
    package takes it or key_mask as attn_mask, not both.
    """

    block_size: int = 32
    mode: str = "full"
    blocks_per_row: float = 4.0
    num_blocks: int | None = None
    first_blocks: int = 0
    diagonal_blocks: int = 0
    scale: float | None = None
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None
    bias: Tensor | None = None

    def keywords(self) -> dict[str, Any]:
        """The same request as keyword arguments of the package's functions, without enable_gqa."""
        return {
            "resolutions": (self.block_size, 1),
            "mode": self.mode,
            "blocks_per_row": self.blocks_per_row,
            "num_blocks": self.num_blocks,
            "first_blocks": self.first_blocks,
            "diagonal_blocks": self.diagonal_blocks,
            "scale": self.scale,
            "attn_mask": self.bias if self.key_mask is None else self.key_mask[:, None, None, :],
            "query_padding_mask": self.query_mask,
        }


class Result(NamedTuple):
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


class _Pyramid(NamedTuple):
    """Inputs with invalid tokens zeroed and heads expanded, and their means over the valid tokens of every block."""

    query: Tensor
    key: Tensor
    query_valid: Tensor
    key_valid: Tensor
    query_mean: Tensor
    key_mean: Tensor
    query_count: Tensor
    key_count: Tensor
    query_block: Tensor
    key_block: Tensor
    scale: float


def _valid(mask: Tensor | None, batch: int, length: int) -> Tensor:
    return torch.ones(batch, length, dtype=torch.bool) if mask is None else mask.expand(batch, length)


def _membership(valid: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Block index of every token, and (B, n, L) bool: token is a valid member of the block."""
    length = valid.shape[-1]
    block_of = torch.arange(length) // block_size
    blocks = torch.arange(-(-length // block_size))
    return block_of, (block_of == blocks[:, None]) & valid[:, None, :]


def _block_means(x: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    count = member.sum(-1)
    sums = member[:, None].to(x.dtype) @ x
    return sums / count.clamp(min=1)[:, None, :, None].to(x.dtype), count


def _clean(x: Tensor, valid: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Zero invalid tokens before any arithmetic, so that NaN stored there cannot spread; repeat heads of a group."""
    x = x.to(dtype)
    x = torch.where(valid[:, None, :, None], x, torch.zeros((), dtype=dtype))
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _pyramid(query: Tensor, key: Tensor, settings: Settings, dtype: torch.dtype) -> _Pyramid:
    batch, heads, query_length, dim = query.shape
    query_valid = _valid(settings.query_mask, batch, query_length)
    key_valid = _valid(settings.key_mask, batch, key.shape[2])
    query_block, query_member = _membership(query_valid, settings.block_size)
    key_block, key_member = _membership(key_valid, settings.block_size)
    query = _clean(query, query_valid, heads, dtype)
    key = _clean(key, key_valid, heads, dtype)
    query_mean, query_count = _block_means(query, query_member)
    key_mean, key_count = _block_means(key, key_member)
    scale = 1.0 / math.sqrt(dim) if settings.scale is None else settings.scale
    return _Pyramid(
        query, key, query_valid, key_valid, query_mean, key_mean, query_count, key_count, query_block, key_block, scale
    )


def live_blocks(query: Tensor, key: Tensor, settings: Settings) -> Tensor:
    """(B, nq, nk) bool: at least one valid query and one valid key (section 2.1)."""
    p = _pyramid(query, key, settings, torch.float64)
    return (p.query_count > 0)[:, :, None] & (p.key_count > 0)[:, None, :]


class _Blocks(NamedTuple):
    """What section 5 makes of every block, each (B, H, nq, nk), and the bias of every pair, (B, H, Lq, Lk)."""

    bias: Tensor
    live: Tensor
    cut: Tensor
    mean: Tensor


def _blocks(p: _Pyramid, settings: Settings, dtype: torch.dtype) -> _Blocks:
    batch, heads, query_length, _ = p.query.shape
    key_length = p.key.shape[2]
    bias = torch.zeros((), dtype=dtype) if settings.bias is None else settings.bias
    if bias.dtype is torch.bool:
        bias = torch.zeros(bias.shape, dtype=dtype).masked_fill(~bias, -math.inf)
    bias = bias.to(dtype).expand(batch, heads, query_length, key_length)
    _, query_member = _membership(p.query_valid, settings.block_size)
    _, key_member = _membership(p.key_valid, settings.block_size)
    rows, columns = query_member[:, None].double(), key_member[:, None].double().transpose(-1, -2)
    pairs = rows @ torch.ones(batch, heads, query_length, key_length, dtype=torch.float64) @ columns
    seen = rows @ (bias != -math.inf).double() @ columns
    valid = p.query_valid[:, None, :, None] & p.key_valid[:, None, None, :]
    highest, lowest = (
        sign * _block_maxima((sign * bias.double()).masked_fill(~valid, -math.inf), settings.block_size)
        for sign in (1.0, -1.0)
    )
    wide = ~(highest - lowest <= 1e3)  # NaN is wide, too
    cut = (seen > 0) & ((seen < pairs) | wide)
    live = (seen > 0) & ~cut
    finite = torch.where(bias.isfinite() & valid, bias, torch.zeros((), dtype=dtype)).double()
    mean = (rows @ finite @ columns / pairs.clamp(min=1)).to(dtype)
    return _Blocks(bias, live, cut, mean.masked_fill(~live, 0.0))


def _block_maxima(x: Tensor, block_size: int) -> Tensor:
    """(..., nq, nk) from (..., Lq, Lk); -inf where a block has nothing."""
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:2], *(-(-length // block_size) for length in x.shape[2:]))
    for dim in (-2, -1):
        x = torch.cat([part.amax(dim, keepdim=True) for part in x.split(block_size, dim)], dim)
    return x


def select(query: Tensor, key: Tensor, settings: Settings) -> Tensor:
    """(B, H, nq, nk) bool: the blocks selected by section 2.1 to 2.5, one head at a time."""
    p = _pyramid(query.detach(), key.detach(), settings, torch.float64)
    blocks = _blocks(p, settings, torch.float64)
    pooled = p.scale * (p.query_mean @ p.key_mean.transpose(-1, -2)) + blocks.mean
    batch, heads, nq, nk = pooled.shape
    selected = torch.zeros(batch, heads, nq, nk, dtype=torch.bool)
    for item in range(batch):
        num_blocks = settings.num_blocks
        if num_blocks is None:
            num_blocks = math.floor(settings.blocks_per_row * int((p.query_count[item] > 0).sum()) + 0.5)
        for head in range(heads):
            selected[item, head] = _select_head(pooled[item, head], blocks.live[item, head], num_blocks, settings)
    return selected | blocks.cut


def _select_head(pooled: Tensor, live: Tensor, num_blocks: int, settings: Settings) -> Tensor:
    nq, nk = pooled.shape
    score = {}
    forced = set()
    for i in range(nq):
        row = [j for j in range(nk) if live[i, j]]
        if not row:
            continue
        logits = pooled[i].tolist()
        best = max(row, key=lambda j: (logits[j], -j))
        score |= {(i, j): logits[j] - logits[best] for j in row}
        forced.add((i, best))
        forced |= {(i, j) for j in row if settings.diagonal_blocks > 0 and abs(i - j) <= settings.diagonal_blocks // 2}
        forced |= {(i, j) for j in row if i < settings.first_blocks or j < settings.first_blocks}
    optional = sorted((block for block in score if block not in forced), key=lambda b: (-score[b], b[0] * nk + b[1]))
    chosen = forced | set(optional[: max(0, num_blocks - len(forced))])
    selected = torch.zeros(nq, nk, dtype=torch.bool)
    for i, j in chosen:
        selected[i, j] = True
    return selected


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    settings: Settings,
    dtype: torch.dtype = torch.float64,
    keep: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of section 2.6 for a given selection, one softmax over all entries of both levels.

    The entries of a query are every key token (exact logit, counted if its block is selected) and every key block
    (pooled logit with multiplicity cnt_j, counted if the block is live and not selected). Dropout multiplies the
    weights by `keep`: (B, H, Lq, Lk) for tokens and (B, H, nq, nk) for blocks.
    """
    p = _pyramid(query, key, settings, dtype)
    value = _clean(value, p.key_valid, query.shape[1], dtype)
    _, key_member = _membership(p.key_valid, settings.block_size)
    value_mean, _ = _block_means(value, key_member)

    blocks = _blocks(p, settings, dtype)
    exact = p.scale * (p.query @ p.key.transpose(-1, -2)) + blocks.bias
    pooled = p.scale * (p.query_mean @ p.key_mean.transpose(-1, -2)) + blocks.mean
    pooled = pooled.index_select(-2, p.query_block)
    selected = (block_mask & blocks.live | blocks.cut).index_select(-2, p.query_block)
    visible_exact = (
        selected.index_select(-1, p.key_block)
        & p.query_valid[:, None, :, None]
        & p.key_valid[:, None, None, :]
        & (blocks.bias != -math.inf)
    )
    visible_pooled = ~selected & p.query_valid[:, None, :, None] & blocks.live.index_select(-2, p.query_block)
    if settings.mode == "sparse":
        visible_pooled = torch.zeros_like(visible_pooled)

    visible = torch.cat([visible_exact, visible_pooled], -1)
    logits = torch.cat([exact, pooled], -1).masked_fill(~visible, -math.inf)
    multiplicity = torch.cat([torch.ones_like(p.key_valid), p.key_count], -1).to(dtype)[:, None, None, :]
    seen = visible.any(-1, keepdim=True)
    # The extra hidden column keeps amax defined for Lk = 0.
    padded = torch.cat([logits.detach(), logits.new_full((*logits.shape[:-1], 1), -math.inf)], -1)
    largest = padded.amax(-1, keepdim=True).masked_fill(~seen, 0.0)
    weights = multiplicity * (logits - largest).exp()
    total = weights.sum(-1, keepdim=True).masked_fill(~seen, 1.0)
    weights = weights / total
    if keep is not None:
        weights = weights * torch.cat([keep[0], keep[1].index_select(-2, p.query_block)], -1).to(dtype)
    out = weights @ torch.cat([value, value_mean], -2)
    lse = (total.log() + largest).masked_fill(~seen, -math.inf).squeeze(-1)
    return out, lse


def clean_grad_out(grad_out: Tensor, settings: Settings) -> Tensor:
    """The cotangent of outputs of padded queries counts for nothing, whatever is stored there."""
    valid = _valid(settings.query_mask, grad_out.shape[0], grad_out.shape[2])
    return torch.where(valid[:, None, :, None], grad_out, torch.zeros((), dtype=grad_out.dtype))


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    settings: Settings,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    keep: tuple[Tensor, Tensor] | None = None,
) -> Result:
    """Output, log-sum-exp and gradients by autograd, for a given selection."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
    out, lse = attention(*leaves, block_mask, settings, dtype, keep)
    target = (out * clean_grad_out(grad_out.to(dtype), settings)).sum()
    if grad_lse is not None:
        finite = lse > -math.inf
        target = target + (lse[finite] * grad_lse.to(dtype)[finite]).sum()
    dq, dk, dv = torch.autograd.grad(target, leaves)
    return Result(out.detach(), lse.detach(), dq, dk, dv)


def closed_form_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    settings: Settings,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by the closed form of section 2, "Backward", from a stored output and log-sum-exp."""
    heads, groups = query.shape[1], key.shape[1]
    p = _pyramid(query, key, settings, dtype)
    value = _clean(value, p.key_valid, heads, dtype)
    _, query_member = _membership(p.query_valid, settings.block_size)
    _, key_member = _membership(p.key_valid, settings.block_size)
    value_mean, _ = _block_means(value, key_member)
    g = clean_grad_out(grad_out.to(dtype), settings)
    seen = lse > -math.inf
    lse = torch.where(seen, lse.to(dtype), math.inf)  # exp(P - inf) = 0: a query that sees nothing contributes nothing
    gl = torch.zeros_like(lse) if grad_lse is None else torch.where(seen, grad_lse.to(dtype), torch.zeros_like(lse))
    delta = (g * out.to(dtype)).sum(-1) - gl

    blocks = _blocks(p, settings, dtype)
    exact_blocks = block_mask & blocks.live | blocks.cut
    selected = exact_blocks.index_select(-2, p.query_block).index_select(-1, p.key_block)
    visible = selected & p.query_valid[:, None, :, None] & p.key_valid[:, None, None, :]
    logits = p.scale * (p.query @ p.key.transpose(-1, -2)) + blocks.bias
    prob = (logits.masked_fill(~visible, -math.inf) - lse[..., None]).exp()
    ds = prob * (g @ value.transpose(-1, -2) - delta[..., None])
    dq = p.scale * (ds @ p.key)
    dk = p.scale * (ds.transpose(-1, -2) @ p.query)
    dv = prob.transpose(-1, -2) @ g

    if settings.mode == "full":
        pooled = p.scale * (p.query_mean @ p.key_mean.transpose(-1, -2)) + blocks.mean
        pooled = pooled.masked_fill(exact_blocks | ~blocks.live, -math.inf)
        largest = pooled.amax(-1)
        largest = largest.masked_fill(largest == -math.inf, 0.0)
        factor = (largest.index_select(-1, p.query_block) - lse).exp().masked_fill(~p.query_valid[:, None, :], 0.0)
        row_sum = query_member[:, None].to(dtype)
        big_g = row_sum @ (factor[..., None] * g)
        big_e = (row_sum @ (factor * delta)[..., None]).squeeze(-1)
        w = (pooled - largest[..., None]).exp()
        count = p.key_count.to(dtype)[:, None, None, :]
        dc = count * w * (big_g @ value_mean.transpose(-1, -2) - big_e[..., None])
        dqh = p.scale * (dc @ p.key_mean)
        dkh = p.scale * (dc.transpose(-1, -2) @ p.query_mean)
        dvh = count.transpose(-1, -2) * (w.transpose(-1, -2) @ big_g)
        dq = dq + _spread(dqh, query_member, p.query_count)
        dk = dk + _spread(dkh, key_member, p.key_count)
        dv = dv + _spread(dvh, key_member, p.key_count)
    return dq, _sum_groups(dk, groups), _sum_groups(dv, groups)


def _spread(pooled_gradient: Tensor, member: Tensor, count: Tensor) -> Tensor:
    share = pooled_gradient / count.clamp(min=1)[:, None, :, None].to(pooled_gradient.dtype)
    return member[:, None].transpose(-1, -2).to(share.dtype) @ share


def _sum_groups(x: Tensor, groups: int) -> Tensor:
    batch, _, length, dim = x.shape
    return x if x.shape[1] == groups else x.reshape(batch, groups, -1, length, dim).sum(2)
