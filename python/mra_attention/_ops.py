"""The torch operators `mra_attention::select_blocks`, `forward` and `backward`: schemas and fake kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _cpu
from ._autograd import (
    Tensors3,
    call_for_out,
    call_forward,
    check_device,
    define,
    fold,
    refuse_dropout_below_vmap,
    register_derivative,
    transforms_active,
    unfold,
)
from ._outputs import empty_grads, empty_outputs, empty_plan


def _fake_select_blocks(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    attn_bias: Tensor | None,
    scale: float,
    block_size: int,
    *_: Any,
) -> Tensor:
    check_device(query, key, key_mask, query_mask, attn_bias)
    return empty_plan(query, key, block_size)


def _fake_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    attn_bias: Tensor | None,
    plan: Tensor | None,
    seed: Tensor | None,
    scale: float,
    block_size: int,
    *_: Any,
) -> Tensors3:
    check_device(query, key, value, key_mask, query_mask, attn_bias, plan, seed)
    return empty_outputs(query, key, value, block_size)


def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    attn_bias: Tensor | None,
    plan: Tensor,
    seed: Tensor | None,
    *_: Any,
) -> Tensors3:
    check_device(query, grad_out, grad_lse, key, value, out, lse, key_mask, query_mask, attn_bias, plan, seed)
    return empty_grads(query, key, value)


def _saved(inputs: tuple[Any, ...], output: Tensors3) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    query, key, value, key_mask, query_mask, attn_bias, _, seed = inputs[:8]
    out, lse, plan = output
    return (query, key, value, out, lse, key_mask, query_mask, attn_bias, plan, seed), inputs[8:12]


def _fold_with_bias(info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...], bias_at: int) -> list[Any]:
    """Fold the arguments; the mask or bias, argument `bias_at`, keeps the batch size 1 where it may: it is large."""
    folded = fold(info, in_dims, args)
    bias, dim = args[bias_at], in_dims[bias_at]
    if isinstance(bias, Tensor):
        bias = bias.unsqueeze(0) if dim is None else bias.movedim(dim, 0)
        if bias.shape[0] == bias.shape[1] == 1:
            folded[bias_at] = bias[0]
        else:
            batch = folded[0].shape[0] // info.batch_size
            folded[bias_at] = bias.expand(info.batch_size, batch, *bias.shape[2:]).flatten(0, 1)
    return folded


def _fold_forward(info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> list[Any]:
    refuse_dropout_below_vmap(args[11])
    return _fold_with_bias(info, in_dims, args, 5)


def _fold_backward(info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> list[Any]:
    refuse_dropout_below_vmap(args[15])
    return _fold_with_bias(info, in_dims, args, 9)


_select_blocks_op = define(
    "select_blocks",
    "(Tensor query, Tensor key, Tensor? key_mask, Tensor? query_mask, Tensor? attn_bias, float scale, "
    "SymInt block_size, float blocks_per_row, SymInt? num_blocks, SymInt first_blocks, SymInt diagonal_blocks) "
    "-> Tensor",
    _cpu.select_blocks,
    _fake_select_blocks,
)
_forward_op = define(
    "forward",
    "(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? query_mask, Tensor? attn_bias, Tensor? plan, "
    "Tensor? seed, float scale, SymInt block_size, bool sparse, float dropout_p, float blocks_per_row, "
    "SymInt? num_blocks, SymInt first_blocks, "
    "SymInt diagonal_blocks) -> (Tensor out, Tensor lse, Tensor plan_out)",
    _cpu.forward,
    _fake_forward,
)
_backward_op = define(
    "backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "Tensor? key_mask, Tensor? query_mask, Tensor? attn_bias, Tensor plan, Tensor? seed, float scale, "
    "SymInt block_size, bool sparse, float dropout_p) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    _cpu.backward,
    _fake_backward,
)
register_derivative("forward", _forward_op, _backward_op, _saved, _fold_forward, _fold_backward)


class _SelectBlocksFunction(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _select_blocks_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return unfold(info, _SelectBlocksFunction.apply(*_fold_with_bias(info, in_dims, args, 4))), 0


def select_blocks(*args: Any) -> Tensor:
    """Return the plan of 4-D inputs as bits. No gradient flows through it. The arguments are those of the operator."""
    return _SelectBlocksFunction.apply(*args) if transforms_active() else _select_blocks_op(*args)


def forward(*args: Any) -> Tensors3:
    """Return the output, the log-sum-exp and the plan of 4-D inputs. The arguments are those of the operator."""
    return call_forward("forward", *args)


def forward_out(*args: Any) -> Tensor:
    """Return the output alone; where no gradient is recorded, the rest is not even allocated."""
    return call_for_out("forward", _cpu.forward_out, *args)
