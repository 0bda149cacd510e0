"""The torch operators `mra_attention::varlen_forward` and `varlen_backward`: schemas and fake kernels."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from . import _varlen_cpu
from ._autograd import Tensors3, call_forward, check_device, define, register_derivative
from ._outputs import budget_of_a_token, empty_packed_grads, empty_packed_outputs


def _fake_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    scale: float,
    block_size: int,
    sparse: bool,
    causal: bool,
    lower_right: bool,
    dropout_p: float,
    blocks_per_row: float,
    num_blocks: int | None,
    first_blocks: int,
    diagonal_blocks: int,
    local_blocks: int,
) -> Tensors3:
    check_device(query, key, value, cu_seqlens_q, cu_seqlens_k, seed)
    count = cu_seqlens_q.shape[0] - 1
    return empty_packed_outputs(
        query, key, value, count, block_size, causal, blocks_per_row, local_blocks, first_blocks
    )


def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *others: Any,
) -> Tensors3:
    tensors = [other for other in others if isinstance(other, Tensor)]
    check_device(query, grad_out, grad_lse, key, value, *tensors)
    return empty_packed_grads(query, key, value)


def _saved(inputs: tuple[Any, ...], output: Tensors3) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    query, key, value, cu_seqlens_q, cu_seqlens_k, seed = inputs[:6]
    scale, block_size, sparse, causal, lower_right, dropout_p, blocks_per_row, _, first, _, local = inputs[6:]
    out, lse, plans = output
    numbers = (scale, block_size, sparse, causal, lower_right, dropout_p)
    tensors = (query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, plans, seed)
    return tensors, (*numbers, budget_of_a_token(blocks_per_row), first, local)


def _refuse_vmap(info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> NoReturn:
    raise NotImplementedError(
        "attention over packed sequences below torch.vmap: the mapped tensors are no packed tensor. Pack the sequences "
        "of all maps in one, or call without vmap"
    )


_forward_op = define(
    "varlen_forward",
    "(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seed, float scale, "
    "SymInt block_size, bool sparse, bool causal, bool lower_right, float dropout_p, float blocks_per_row, "
    "SymInt? num_blocks, SymInt first_blocks, SymInt diagonal_blocks, SymInt local_blocks) "
    "-> (Tensor out, Tensor lse, Tensor plans)",
    _varlen_cpu.varlen_forward,
    _fake_forward,
)
_backward_op = define(
    "varlen_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor plans, Tensor? seed, float scale, SymInt block_size, "
    "bool sparse, bool causal, bool lower_right, float dropout_p, SymInt blocks, SymInt first_blocks, "
    "SymInt local_blocks) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    _varlen_cpu.varlen_backward,
    _fake_backward,
)
register_derivative("varlen_forward", _forward_op, _backward_op, _saved, _refuse_vmap, _refuse_vmap)


def varlen_forward(*args: Any) -> Tensors3:
    """Return the output, the log-sum-exp and the plans of packed sequences; the arguments are those of the schema."""
    return call_forward("varlen_forward", *args)
