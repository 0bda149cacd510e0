"""Who sees whom, and the blocks of a segment: docs/definitions.md, sections 1, 2 and 6, one batch item at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

WIDEST_BIAS = 1e3


@dataclass(frozen=True)
class Settings:
    """What a call asks for, in the terms of docs/definitions.md. Masks are bool, True = valid, (B, Lk) and (B, Lq).

    bias is a mask (bool) or an additive bias; it broadcasts to (B, H, Lq, Lk), and the package takes it or key_mask as
    attn_mask, not both. offset and key_length, one number or one per batch item, are what a cache asks for.
    """

    block_size: int = 32
    mode: str = "full"
    coarse: str = "mean"
    score: str = "mean"
    coarse_shift: float = 0.0
    blocks_per_row: float | Sequence[float] | tuple[Any, ...] = 4.0
    """With coarser levels a sequence has one budget for each level, each of them a number or one for each head."""
    coarser: tuple[int, ...] = ()
    """The block sizes of the levels above, the coarsest first."""
    num_blocks: int | None = None
    first_blocks: int | None = None
    diagonal_blocks: int = 0
    local_blocks: int = 1
    pool_queries: bool = True
    is_causal: bool = False
    lower_right: bool = False
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None
    bias: Tensor | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    offset: int | tuple[int, ...] | None = None
    key_length: int | tuple[int, ...] | None = None

    def keywords(self) -> dict[str, Any]:
        """The same request as keyword arguments of the package's functions, without enable_gqa and lower_right."""
        keywords: dict[str, Any] = {
            "resolutions": (*self.coarser, self.block_size, 1),
            "mode": self.mode,
            "score": self.score,
            "blocks_per_row": self.blocks_per_row,
            "num_blocks": self.num_blocks,
            "diagonal_blocks": self.diagonal_blocks,
            "scale": self.scale,
            "attn_mask": self.bias if self.key_mask is None else self.key_mask[:, None, None, :],
            "query_padding_mask": self.query_mask,
        }
        others = {
            "coarse": (self.coarse, "mean"),
            "coarse_shift": (self.coarse_shift, 0.0),
            "first_blocks": (self.first_blocks, None),
            "local_blocks": (self.local_blocks, 1),
            "pool_queries": (self.pool_queries, True),
            "softcap": (self.softcap, None),
            "alibi_slopes": (self.alibi_slopes, None),
            "sinks": (self.sinks, None),
            "is_causal": (self.is_causal and not self.lower_right, False),
            "window_size": (self.window, (-1, -1)),
        }
        return keywords | {name: value for name, (value, default) in others.items() if not _is_equal(value, default)}

    def levels(self) -> list[Settings]:
        """The same for every level by itself, with its blocks and its budget, the coarsest first."""
        if not self.coarser:
            return [self]
        sizes, rates = (*self.coarser, self.block_size), self.blocks_per_row
        each = [rates] * len(sizes) if isinstance(rates, (int, float)) else list(rates)
        return [
            replace(self, block_size=size, blocks_per_row=rate, coarser=())
            for size, rate in zip(sizes, each, strict=True)
        ]

    def rates(self, heads: int) -> list[float]:
        """blocks_per_row of every head, of a level."""
        rates = self.blocks_per_row
        return [float(rates)] * heads if isinstance(rates, (int, float)) else [float(rate) for rate in rates]


def _is_equal(value: Any, default: Any) -> bool:
    return value is default or (not isinstance(value, Tensor) and bool(value == default))


class Geometry(NamedTuple):
    """One segment. Rows are those of a selection: query blocks in the block form, tokens in the token form."""

    form: str
    visible: Tensor
    """(H, Lq, Lk): the query has an output, the key is valid, and nothing hides the pair."""
    bias: Tensor
    """(H, Lq, Lk) in float64, that by distance included; 0 where a pair is not visible."""
    answers: Tensor
    """(Lq): the query has an output."""
    key_valid: Tensor
    """(Lk)."""
    member: Tensor
    """(nk, Lk): the valid keys of every block."""
    row_of: Tensor
    """(Lq): the row of every query; that of one without an output means nothing."""
    pooled: Tensor
    """(rows, Lq), block form: the queries whose mean stands for the row."""
    live_rows: Tensor
    """(rows), block form: the row has a valid query."""
    first_row: int
    """Block form: the number of the first row, negative where padded queries lie in front of the first valid one."""
    query_blocks: int
    """Blocks with a valid query, whatever the form."""
    own_block: Tensor
    """(Lq), token form: the block of the query's position."""
    is_open: Tensor
    """(H, rows, nk): may be coarse."""
    is_cut: Tensor
    """(H, rows, nk), token form: exact in any case."""
    mean_bias: Tensor
    """(H, rows, nk): the mean of the bias over the pairs that a coarse block stands for."""

    @property
    def count(self) -> Tensor:
        return self.member.sum(-1)


def _of_item(value: int | tuple[int, ...], item: int) -> int:
    return value if isinstance(value, int) else value[item]


def _offset(settings: Settings, query_length: int, key_length: int, item: int) -> int:
    if settings.offset is not None:
        return _of_item(settings.offset, item)
    return key_length - query_length if settings.lower_right else 0


def _interval(settings: Settings, query_length: int, key_length: int, offset: int) -> Tensor | None:
    """(Lq, Lk) bool: what causality and the window let a query see; None if there is neither."""
    left, right = settings.window
    causal = settings.is_causal or settings.lower_right
    if not causal and left < 0 and right < 0:
        return None
    ahead = torch.arange(key_length) - (torch.arange(query_length)[:, None] + offset)
    seen = torch.ones(query_length, key_length, dtype=torch.bool)
    if left >= 0:
        seen &= ahead >= -left
    if causal:
        seen &= ahead <= 0
    elif right >= 0:
        seen &= ahead <= right
    return seen


def _pair_bias(settings: Settings, shape: tuple[int, int, int, int], item: int) -> Tensor:
    """(H, Lq, Lk) in float64: the mask as 0 and -inf, or the bias."""
    if settings.bias is None:
        return torch.zeros(shape[1:], dtype=torch.float64)
    bias = settings.bias
    if bias.dtype is torch.bool:
        bias = torch.zeros(bias.shape, dtype=torch.float64).masked_fill(~bias, -math.inf)
    return bias.double().expand(shape)[item]


def _distance_bias(settings: Settings, shape: tuple[int, int, int, int], offset: int) -> Tensor:
    """(H, Lq, Lk) in float64: minus the slope of the head times the distance."""
    if settings.alibi_slopes is None:
        return torch.zeros(shape[1:], dtype=torch.float64)
    distance = (torch.arange(shape[2])[:, None] + offset - torch.arange(shape[3])).abs()
    return -settings.alibi_slopes.detach().double()[:, None, None] * distance


def _blocks_from(first: int, length: int, block_size: int) -> Tensor:
    return (torch.arange(length) - first).div(block_size, rounding_mode="floor")


def _first(valid: Tensor) -> int:
    return int(valid.nonzero()[0]) if valid.any() else 0


class _Grid(NamedTuple):
    """Blocks along a dimension: where block 0 begins, the first block that counts, and how many do."""

    origin: int
    first: int
    blocks: int
    block_size: int

    def largest(self, x: Tensor, dim: int) -> Tensor:
        """The largest of every block along a dimension; -inf beyond the ends."""
        x = x.transpose(dim, -1)
        before = self.origin + self.first * self.block_size
        behind = self.blocks * self.block_size - (x.shape[-1] - before)
        x = torch.nn.functional.pad(x, (-before, behind), value=-math.inf)
        return x.unflatten(-1, (self.blocks, self.block_size)).amax(-1).transpose(dim, -1)


def _is_wide(bias: Tensor, pairs: Tensor, rows: _Grid | None, columns: _Grid) -> Tensor:
    """(H, rows, columns): no mean stands for the bias of the block's pairs. A row is a query where none are given."""
    bias = torch.where(bias.isnan(), math.inf, bias)
    ends = []
    for sign in (1.0, -1.0):
        largest = columns.largest((sign * bias).masked_fill(~pairs, -math.inf), 2)
        ends.append(largest if rows is None else rows.largest(largest, 1))
    highest, lowest = ends[0], -ends[1]
    some = (highest > -math.inf) | (lowest < math.inf)
    return some & ~(highest - lowest <= WIDEST_BIAS)


def _mean_bias(bias: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(H, rows, columns): the mean over all pairs of a block; an infinity or NaN counts as 0, and so does no pair."""
    finite = torch.where(bias.isfinite(), bias, 0.0)
    rows, columns = rows.double(), columns.double()
    pairs = rows.sum(-1)[:, None] * columns.sum(-1)
    return rows @ finite @ columns.T / pairs.clamp(min=1.0)


def geometry(shape: tuple[int, int, int, int], settings: Settings, item: int) -> Geometry:
    """The segment of a batch item, for (B, H, Lq, Lk)."""
    _, heads, query_length, key_length = shape
    block_size = settings.block_size
    key_valid = torch.ones(key_length, dtype=torch.bool)
    if settings.key_mask is not None:
        key_valid &= settings.key_mask.expand(shape[0], key_length)[item]
    if settings.key_length is not None:
        key_valid &= torch.arange(key_length) < _of_item(settings.key_length, item)
    answers = torch.ones(query_length, dtype=torch.bool)
    if settings.query_mask is not None:
        answers &= settings.query_mask.expand(shape[0], query_length)[item]

    # What the mask says: padding of keys, padding of queries, hidden pairs.
    bias = _pair_bias(settings, shape, item)
    allowed = bias != -math.inf
    if settings.bias is not None:
        answers = answers & (allowed & key_valid).any(-1).any(0)
        key_valid = key_valid & allowed[:, answers].any(1).any(0)
    hidden = bool((~allowed[:, answers][..., key_valid]).any())

    # Queries whose mean stands for a block: without a mask of their own, those whose keys are valid.
    counted = answers & key_valid if settings.query_mask is None and query_length == key_length else answers
    query_block = _blocks_from(_first(counted), query_length, block_size)
    numbers = query_block[answers].tolist()
    blocks = torch.arange(min(numbers), max(numbers) + 1) if numbers else torch.arange(0)
    in_block = (query_block == blocks[:, None]) & answers
    live_rows = (in_block & counted).any(-1)
    pooled = torch.where(live_rows[:, None], in_block & counted, in_block)

    first_key = _first(key_valid)
    key_block = _blocks_from(first_key, key_length, block_size)
    nk = int(key_block[key_valid].max()) + 1 if key_valid.any() else 0
    member = (key_block == torch.arange(nk)[:, None]) & key_valid

    offset = _offset(settings, query_length, key_length, item)
    interval = _interval(settings, query_length, key_length, offset)
    visible = allowed & key_valid & answers[:, None]
    row_of = (query_block - min(numbers, default=0)).clamp(0, max(0, blocks.shape[0] - 1))
    rows = _Grid(_first(counted), min(numbers, default=0), blocks.shape[0], block_size)
    columns = _Grid(first_key, 0, nk, block_size)
    biased = settings.bias is not None and bool(answers.any()) and nk > 0
    wide = biased and bool(_is_wide(bias, visible, rows, columns).any())
    token = hidden or interval is not None or wide or not settings.pool_queries
    common = {
        "answers": answers,
        "key_valid": key_valid,
        "member": member,
        "pooled": pooled,
        "live_rows": live_rows,
        "first_row": min(numbers, default=0),
        "query_blocks": int(live_rows.sum()),
        "own_block": _blocks_from(first_key - offset, query_length, block_size),
    }
    by_distance = _distance_bias(settings, shape, offset)
    if not token:
        bias = bias + by_distance
        is_open = torch.ones(heads, blocks.shape[0], nk, dtype=torch.bool) & member.any(-1)
        return Geometry(
            form="block",
            visible=visible,
            bias=torch.where(visible, bias, 0.0),
            row_of=row_of,
            is_open=is_open,
            is_cut=torch.zeros_like(is_open),
            mean_bias=_mean_bias(torch.where(key_valid, bias, 0.0), pooled, member),
            **common,
        )
    if interval is not None:
        visible = visible & interval
    each = torch.eye(query_length, dtype=torch.bool)
    seen = visible.double() @ member.double().T
    whole = (seen == member.sum(-1)) & (seen > 0)
    is_open = whole & ~_is_wide(bias, visible, None, columns) if biased else whole
    bias = torch.where(visible, bias + by_distance, 0.0)
    return Geometry(
        form="token",
        visible=visible,
        bias=bias,
        row_of=torch.arange(query_length),
        is_open=is_open,
        is_cut=(seen > 0) & ~is_open,
        mean_bias=_mean_bias(bias, each, member),
        **common,
    )
