"""What `torch.utils.flop_counter` counts for the operators: the products, two operations for each multiplication.

Of a plan, the exact blocks are those that it has. Under fake tensors, which hold no plan, and for a selection, they are
as many as the budget grants. Masks count where they cut blocks; pairs inside of a block are all counted.
"""

from __future__ import annotations

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


def _work_of(exact: float, exact_blocks: float, blocks: float) -> _Work:
    pooled = max(blocks - exact_blocks, 0)
    return _Work(exact, pooled, blocks if pooled else 0)


def _is_token_form(settings: Settings) -> bool:
    return settings.window_left >= 0 or settings.window_right >= 0 or not settings.pool_queries


def _budgeted(inputs: Inputs, settings: Settings) -> _Work:
    """Return the work that shapes and settings ask for."""
    batch, heads, queries, _ = inputs.query.shape
    block, keys = settings.block_size, inputs.key.shape[2]
    query_blocks, key_blocks = -(-queries // block), -(-keys // block)
    rows = queries if _is_token_form(settings) else query_blocks
    rates = settings.blocks_per_row * (heads // len(settings.blocks_per_row))
    exact = chosen = 0.0
    for rate in rates:
        if settings.num_blocks is not None:
            per_row = settings.num_blocks / max(query_blocks, 1)
        else:
            per_row = blocks_per_token(rate) if _is_token_form(settings) else rate
        of_head = rows * min(per_row, key_blocks)
        chosen += of_head
        exact += min(of_head * block * (1 if _is_token_form(settings) else block), queries * keys)
    return _work_of(batch * exact, batch * chosen, batch * heads * rows * key_blocks)


def _planned(inputs: Inputs, settings: Settings, plan: Tensor) -> _Work:
    """Return the work that a plan asks for."""
    sequences = cpu.read_boundaries(inputs)
    items = _core.exact_blocks(
        tuple(inputs.query.shape),
        tuple(inputs.key.shape),
        cpu.describe_masks(inputs.query.shape, inputs.key.shape, inputs[3:7]),
        describe(plan.contiguous()),
        settings=settings,
        sequences=sequences,
    )
    exact = chosen = blocks = 0
    for at, item in enumerate(items):
        queries, keys = inputs.query.shape[2], inputs.key.shape[2]
        if sequences is not None:
            queries, keys = (ends[at + 1] - ends[at] for ends in sequences)
        heads, rows, columns = item.shape
        # A row is a block of queries, unless there are as many rows as queries; the last block may be short.
        of_rows = np.ones(rows, np.int64) if rows == queries else _block_lengths(rows, queries, settings.block_size)
        of_columns = _block_lengths(columns, keys, settings.block_size)
        exact += int(of_rows @ item.sum(0, dtype=np.int64) @ of_columns)
        chosen += int(item.sum())
        blocks += heads * rows * columns
    return _work_of(exact, chosen, blocks)


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
    return int(2 * (logits * head_dim + (work.exact + pooled) * value_dim))


@register_flop_formula(register.OPS.backward, get_raw=True)
def backward_flops(*args: Any, out_val: Any = None, **_: Any) -> int:
    """Count five products for the two of the forward pass: the logits again, and those of the gradients."""
    call = of_backward(args)
    inputs, settings = call.inputs, call.settings
    work = _work(inputs, settings, inputs.plan)
    head_dim, value_dim = inputs.query.shape[3], inputs.value.shape[3]
    pairs = work.exact + (0 if settings.sparse else work.pooled)
    return int(2 * pairs * (3 * head_dim + 2 * value_dim))


@register_flop_formula(register.OPS.select, get_raw=True)
def select_flops(*args: Any, out_val: Any = None, **_: Any) -> int:
    """Count the logits of pooled keys."""
    inputs, settings = of_select(args)
    return int(2 * _budgeted(inputs, settings).scored * inputs.query.shape[3])
