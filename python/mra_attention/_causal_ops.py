"""The torch operators `mra_attention::causal_forward` and `causal_backward`: schemas and fake kernels.

`offsets` and `key_lengths` hold a number for each batch item, or a single one for all. The seed of dropout is a tensor,
so that a compiled graph takes it from the random number generator at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import _causal_cpu
from ._autograd import (
    Tensors3,
    call_forward,
    check_device,
    define,
    fold,
    refuse_dropout_below_vmap,
    register_derivative,
)
from ._outputs import empty_causal_outputs, empty_grads


def _fake_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Tensor | None,
    seed: Tensor | None,
    offsets: Sequence[int],
    key_lengths: Sequence[int] | None,
    scale: float,
    block_size: int,
    sparse: bool,
    blocks: int,
    local_blocks: int,
    first_blocks: int,
    dropout_p: float,
) -> Tensors3:
    check_device(query, key, value, plan, seed)
    return empty_causal_outputs(query, key, value, plan, block_size, blocks, local_blocks, first_blocks)


def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
    seed: Tensor | None,
    *_: Any,
) -> Tensors3:
    check_device(query, grad_out, grad_lse, key, value, out, lse, plan, seed)
    return empty_grads(query, key, value)


def _saved(inputs: tuple[Any, ...], output: Tensors3) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    query, key, value, _, seed, offsets, key_lengths, scale, block_size, sparse, _, _, _, dropout_p = inputs
    out, lse, plan = output
    return (query, key, value, out, lse, plan, seed), (offsets, key_lengths, scale, block_size, sparse, dropout_p)


def _fold(info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> list[Any]:
    refuse_dropout_below_vmap(args[-1])
    return fold(info, in_dims, args)


_forward_op = define(
    "causal_forward",
    "(Tensor query, Tensor key, Tensor value, Tensor? plan, Tensor? seed, SymInt[] offsets, SymInt[]? key_lengths, "
    "float scale, SymInt block_size, bool sparse, SymInt blocks, SymInt local_blocks, SymInt first_blocks, "
    "float dropout_p) -> (Tensor out, Tensor lse, Tensor plan_out)",
    _causal_cpu.causal_forward,
    _fake_forward,
)
_backward_op = define(
    "causal_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor plan, "
    "Tensor? seed, SymInt[] offsets, SymInt[]? key_lengths, float scale, SymInt block_size, bool sparse, "
    "float dropout_p) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    _causal_cpu.causal_backward,
    _fake_backward,
)
register_derivative("causal_forward", _forward_op, _backward_op, _saved, _fold, _fold)


def causal_forward(*args: Any) -> Tensors3:
    """Return the output, the log-sum-exp and the plan of 4-D inputs; the arguments are those of the schema."""
    return call_forward("causal_forward", *args)
