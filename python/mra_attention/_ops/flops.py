"""What `torch.utils.flop_counter` counts for the operators: the products, two operations for each multiplication.

Of a plan, the exact blocks are those that it has. Under fake tensors, which hold no plan, and for a selection, they are
as many as the budget grants. Masks count where they cut blocks; pairs inside of a block are all counted. The products
of 8-bit codes by which `score="max"` ranks blocks are no floating-point operations, and not counted.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils.flop_counter import register_flop_formula  # pyright: ignore[reportUnknownVariableType]

from .. import _core  # pyright: ignore[reportPrivateUsage]
from .._native.descriptors import describe
from . import cpu, register
from .arguments import Inputs, Settings, of_backward, of_forward, of_select
from .sizes import blocks_per_token


class _Work(NamedTuple):
    """How often what meets what, over all batch items and heads. A row is a block of queries, or a single query."""

    exact: float
    """A query and a key, in exact blocks."""
    pooled: float
    """A row and a block of keys that is not exact."""
    scored: float
    """A row and a block of keys, to choose; nothing is chosen where every block is exact."""
    expanded: float
    """A block of queries and a block of keys that is not exact, to first order."""


def _work_of(exact: float, refined: list[float], candidates: list[float], expanded: float) -> _Work:
    """Return the work of some exact pairs, and of the blocks among which each level chooses and of those it refines."""
    others = [max(blocks - chosen, 0) for blocks, chosen in zip(candidates, refined, strict=True)]
    scored = sum(blocks if rest else 0 for blocks, rest in zip(candidates, others, strict=True))
    return _Work(exact, sum(others) - expanded, scored, expanded)


def _budgeted(inputs: Inputs, settings: Settings) -> _Work:
    """Return the work that shapes and settings ask for."""
    batch, heads, queries, _ = inputs.query.shape
    keys, by_token = inputs.key.shape[2], settings.is_token_form()
    refined: list[float] = []
    candidates: list[float] = []
    per_head: list[float] = []
    above = 0
    for size, rates in zip(settings.block_sizes, settings.rates(), strict=True):
        query_blocks, key_blocks = -(-queries // size), -(-keys // size)
        rows, children = (queries, above // size) if by_token else (query_blocks, (above // size) ** 2)
        among = [count * children for count in per_head] if above else [rows * key_blocks] * heads
        if settings.num_blocks is not None:
            wanted = [settings.num_blocks / max(query_blocks, 1)] * heads
        else:
            wanted = [blocks_per_token(rate) if by_token else rate for rate in rates * (heads // len(rates))]
        per_head = [min(rows * min(rate, key_blocks), most) for rate, most in zip(wanted, among, strict=True)]
        refined.append(batch * sum(per_head))
        candidates.append(batch * sum(among))
        above = size
    pairs = settings.block_size * (1 if by_token else settings.block_size)
    exact = sum(min(count * pairs, queries * keys) for count in per_head)
    expanded = max(candidates[-1] - refined[-1], 0) * settings.first_order
    return _work_of(batch * exact, refined, candidates, expanded)


def _planned(inputs: Inputs, settings: Settings, plan: Tensor) -> _Work:
    """Return the work that a plan asks for."""
    sequences = cpu.read_boundaries(inputs)
    levels = _core.refined_blocks(
        tuple(inputs.query.shape),
        tuple(inputs.key.shape),
        cpu.describe_masks(inputs.query.shape, inputs.key.shape, inputs[3:7]),
        describe(plan.contiguous()),
        settings=settings,
        sequences=sequences,
    )
    exact = expanded = 0
    for at, item in enumerate(levels[-1]):
        queries, keys = inputs.query.shape[2], inputs.key.shape[2]
        if sequences is not None:
            queries, keys = (ends[at + 1] - ends[at] for ends in sequences)
        _, rows, columns = item.shape
        # A row is a block of queries, unless there are as many rows as queries; the last block may be short.
        of_rows = np.ones(rows, np.int64) if rows == queries else _block_lengths(rows, queries, settings.block_size)
        of_columns = _block_lengths(columns, keys, settings.block_size)
        exact += int(of_rows @ item.sum(0, dtype=np.int64) @ of_columns)
        if settings.first_order and rows != queries:
            expanded += item.size - int(item.sum())
    refined: list[float] = [sum(int(item.sum()) for item in items) for items in levels]
    candidates: list[float] = [sum(item.size for item in levels[0])]
    sizes = itertools.pairwise(settings.block_sizes)
    for (size, finer), (items, below) in zip(sizes, itertools.pairwise(levels), strict=True):
        pairs = zip(items, below, strict=True)
        candidates.append(sum(_children(item, of_item.shape, size // finer) for item, of_item in pairs))
    return _work_of(exact, refined, candidates, expanded)


def _children(refined: npt.NDArray[np.bool_], shape: tuple[int, ...], times: int) -> int:
    """Return how many blocks of a level of this shape, (H, rows, columns), lie in refined blocks of the level above.

    A block of that level has `times` of this one side by side; in the token form both have the same rows.
    """
    if refined.shape[1] != shape[1]:
        refined = np.repeat(refined, times, 1)
    refined = np.repeat(refined, times, 2)
    return int(refined[:, : shape[1], : shape[2]].sum())


def _block_lengths(count: int, tokens: int, block: int) -> npt.NDArray[np.int64]:
    starts = block * np.arange(count, dtype=np.int64)
    return np.minimum(np.maximum(tokens - starts, 0), block)


def _work(inputs: Inputs, settings: Settings, plan: Tensor | None) -> _Work:
    if plan is None or any(is_fake(tensor) for tensor in (inputs.query, plan)):
        return _budgeted(inputs, settings)
    return _planned(inputs, settings, plan)


@register_flop_formula(register.OPS.forward, get_raw=True)
def forward_flops(*args: Any, out_val: Any = None, **_: Any) -> int:
    """Count the logits, exact and pooled, and the products of weights and values."""
    inputs, settings = of_forward(args)
    work = _work(inputs, settings, None if out_val is None else out_val[2])
    head_dim, value_dim = inputs.query.shape[3], inputs.value.shape[3]
    pooled = 0 if settings.sparse else work.pooled
    logits = work.exact + (pooled if inputs.plan is not None else work.scored)
    # For each query of a block a logit and a value, for each key of the other one a logit, a weighted key and a value.
    expanded = work.expanded * settings.block_size * (3 * head_dim + 2 * value_dim)
    return int(2 * (logits * head_dim + (work.exact + pooled) * value_dim + expanded))


@register_flop_formula(register.OPS.backward, get_raw=True)
def backward_flops(*args: Any, out_val: Any = None, **_: Any) -> int:
    """Count five products for the two of the forward pass: the logits again, and those of the gradients."""
    call = of_backward(args)
    inputs, settings = call.inputs, call.settings
    work = _work(inputs, settings, inputs.plan)
    head_dim, value_dim = inputs.query.shape[3], inputs.value.shape[3]
    pairs = work.exact + (0 if settings.sparse else work.pooled)
    # For each key those of forward again, then the gradients of weights, keys, values and the mean query.
    expanded = work.expanded * settings.block_size * (9 * head_dim + 5 * value_dim)
    return int(2 * (pairs * (3 * head_dim + 2 * value_dim) + expanded))


@register_flop_formula(register.OPS.select, get_raw=True)
def select_flops(*args: Any, out_val: Any = None, **_: Any) -> int:
    """Count the logits of pooled keys."""
    inputs, settings = of_select(args)
    return int(2 * _budgeted(inputs, settings).scored * inputs.query.shape[3])
