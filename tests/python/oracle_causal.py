"""Dense evaluation of docs/definitions.md, section 3, written from its formulas: nothing is shared with the kernels.

Everything of size Lq x Lk is stored and gradients come from torch autograd through the dense formula, with the
selection held fixed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from oracle import Result
from torch import Tensor


@dataclass(frozen=True)
class CausalSettings:
    """What a causal call asks for; `offset` and `key_length` for all batch items alike, or for each one."""

    block_size: int = 32
    mode: str = "full"
    blocks: int = 4
    local_blocks: int = 1
    first_blocks: int = 0
    scale: float | None = None
    offset: int | tuple[int, ...] = 0
    key_length: int | tuple[int, ...] | None = None

    def keywords(self) -> dict[str, Any]:
        """The same request as keyword arguments of the package's functions, without offset, length and enable_gqa."""
        return {
            "resolutions": (self.block_size, 1),
            "mode": self.mode,
            "blocks_per_row": self.blocks,
            "local_blocks": self.local_blocks,
            "first_blocks": self.first_blocks,
            "scale": self.scale,
        }


class _Geometry(NamedTuple):
    """Where queries and keys are: positions (B, Lq), own blocks (B, Lq), keys of each block (B, nk, Lk)."""

    position: Tensor
    own_block: Tensor
    member: Tensor
    count: Tensor
    blocks: Tensor


def _geometry(query: Tensor, key: Tensor, settings: CausalSettings) -> _Geometry:
    batch, key_length = query.shape[0], key.shape[2]
    offset = torch.as_tensor(settings.offset).expand(batch)
    length = torch.as_tensor(key_length if settings.key_length is None else settings.key_length).expand(batch)
    position = torch.arange(query.shape[2]) + offset[:, None]
    tokens, blocks = torch.arange(key_length), torch.arange(-(-key_length // settings.block_size))
    member = (tokens // settings.block_size == blocks[:, None]) & (tokens < length[:, None, None])
    return _Geometry(position, position.div(settings.block_size, rounding_mode="floor"), member, member.sum(-1), blocks)


def _scale(query: Tensor, settings: CausalSettings) -> float:
    return 1.0 / math.sqrt(query.shape[-1]) if settings.scale is None else settings.scale


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _means(x: Tensor, g: _Geometry) -> Tensor:
    return (g.member[:, None].to(x.dtype) @ x) / g.count.clamp(min=1)[:, None, :, None].to(x.dtype)


def select(query: Tensor, key: Tensor, settings: CausalSettings) -> Tensor:
    """(B, H, Lq, nk) bool: the blocks that are exact for each token, one token at a time."""
    g = _geometry(query, key, settings)
    key = _repeat(key.detach().double(), query.shape[1])
    pooled = _scale(query, settings) * (query.detach().double() @ _means(key, g).transpose(-1, -2))
    selected = torch.zeros(pooled.shape, dtype=torch.bool)
    for b in range(query.shape[0]):
        present = [int(j) for j in g.blocks if g.count[b, j] > 0]
        for t in range(query.shape[2]):
            own = int(g.own_block[b, t])
            forced = [j for j in present if own - settings.local_blocks < j <= own]
            forced += [j for j in present if j < settings.first_blocks and j <= own and j not in forced]
            others = [j for j in present if j < own and j not in forced]
            for h in range(query.shape[1]):
                logits = pooled[b, h, t].tolist()
                best = sorted(others, key=lambda j: (-logits[j], j))[: max(0, settings.blocks - len(forced))]
                selected[b, h, t, forced + best] = True
    return selected


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Tensor,
    settings: CausalSettings,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp for a given selection: one softmax over keys of selected blocks and unselected blocks.

    Dropout multiplies the weights of keys and of blocks by `keep`, (B, H, Lq, Lk + nk).
    """
    g, heads, scale = _geometry(query, key, settings), query.shape[1], _scale(query, settings)
    key, value = _repeat(key, heads), _repeat(value, heads)
    own, position = g.own_block[:, None, :, None], g.position[:, None, :, None]
    key_block = torch.arange(key.shape[2]) // settings.block_size
    valid = g.member.any(1)[:, None, None, :]
    seen_keys = selected.index_select(-1, key_block) & valid & (torch.arange(key.shape[2]) <= position)
    seen_blocks = ~selected & (g.blocks < own) & (g.count > 0)[:, None, None, :]
    if settings.mode == "sparse":
        seen_blocks = torch.zeros_like(seen_blocks)
    logits = torch.cat([query @ key.transpose(-1, -2), query @ _means(key, g).transpose(-1, -2)], -1) * scale
    seen = torch.cat([seen_keys, seen_blocks.expand(selected.shape)], -1)
    logits = logits.masked_fill(~seen, -math.inf)
    log_count = torch.cat([torch.zeros_like(valid[:, 0, 0], dtype=query.dtype), g.count.to(query.dtype).log()], -1)
    logits = torch.where(seen, logits + log_count[:, None, None, :], -math.inf)
    some = seen.any(-1)
    lse = torch.where(some[..., None], logits, 0.0).logsumexp(-1) if logits.shape[-1] else logits.sum(-1)
    weights = (logits - lse[..., None]).exp()
    if keep is not None:
        weights = weights * keep
    out = weights @ torch.cat([value, _means(value, g)], -2)
    return out, lse.masked_fill(~some, -math.inf)


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Tensor,
    settings: CausalSettings,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    keep: Tensor | None = None,
) -> Result:
    """Output, log-sum-exp and gradients by autograd in float64, for a given selection."""
    leaves = [x.detach().double().requires_grad_() for x in (query, key, value)]
    out, lse = attention(*leaves, selected, settings, keep)
    target = (out * grad_out.double()).sum()
    if grad_lse is not None:
        finite = lse > -math.inf
        target = target + (lse[finite] * grad_lse.double()[finite]).sum()
    dq, dk, dv = torch.autograd.grad(target, leaves)
    return Result(out.detach(), lse.detach(), dq, dk, dv)
