"""The MRA model of transformers by its own code on a CPU, in float64: three operators in place of its CUDA kernels.

A block of logits is stored as (keys, queries); `indices` are those of blocks, `row * columns + column`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mra import modeling_mra

BLOCK = 32
OWN_FORWARD = modeling_mra.MraSelfAttention.forward


def index_max(values: Tensor, indices: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Of values (N, 32 queries, blocks): the maxima of all queries, (N, rows * 32), and those at each block."""
    row = (indices // columns).long()[:, None].expand_as(values)
    maxima = values.new_full((values.shape[0], BLOCK, rows), -torch.inf).scatter_reduce(2, row, values, "amax").detach()
    return maxima.transpose(1, 2).flatten(1), maxima.gather(2, row)


def mm_to_sparse(query: Tensor, key: Tensor, indices: Tensor) -> Tensor:
    """Of query (N, rows, D, 32) and key (N, columns, D, 32): the logits of blocks, (N, blocks, 32, 32)."""
    item, columns = torch.arange(len(indices))[:, None], key.shape[1]
    return key[item, indices % columns].transpose(-1, -2) @ query[item, indices // columns]


def sparse_dense_mm(weights: Tensor, indices: Tensor, value: Tensor, rows: int) -> Tensor:
    """Of weights (N, blocks, 32, 32) and value (N, columns, D, 32): the sum for each query, (N, rows, D, 32)."""
    item, columns = torch.arange(len(indices))[:, None], value.shape[1]
    products = value[item, indices % columns] @ weights
    result = value.new_zeros(len(indices), rows, *value.shape[2:])
    return result.index_put((item, (indices // columns).long()), products, accumulate=True)


def without_epsilon(function: Any) -> FunctionType:
    """The function with 0 in place of the 1e-6 that it adds to denominators."""
    code = function.__code__
    assert 1e-6 in code.co_consts
    constants = tuple(0.0 if constant == 1e-6 else constant for constant in code.co_consts)
    return FunctionType(code.replace(co_consts=constants), function.__globals__, None, function.__defaults__)


@contextlib.contextmanager
def its_own_code(*, epsilon: bool = False) -> Iterator[None]:
    """Inside, modules of `modeling_mra` have their own attention, in float64, without the added 1e-6 unless asked for.

    The backward pass must be inside, too.
    """
    with pytest.MonkeyPatch.context() as patch:
        kernels = SimpleNamespace(index_max=index_max, mm_to_sparse=mm_to_sparse, sparse_dense_mm=sparse_dense_mm)
        patch.setattr(modeling_mra.MraSelfAttention, "forward", OWN_FORWARD)
        patch.setattr(modeling_mra, "mra_cuda_kernel", kernels)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        if not epsilon:
            for name in ("mra2_attention", "get_low_resolution_logit"):
                patch.setattr(modeling_mra, name, without_epsilon(getattr(modeling_mra, name)))
        yield


def padded_to_blocks(attention: torch.nn.Module, hidden_states: Tensor) -> Tensor:
    """The context of one sequence (1, L, width) of any length, by the model's own code.

    That takes multiples of 32 only, so the last block is filled up and masked; with one item no masks are mixed up.
    """
    length = hidden_states.shape[1]
    more = -length % BLOCK
    mask = torch.ones(1, length + more, dtype=torch.int)
    mask[:, length:] = 0
    with its_own_code():
        return attention(torch.nn.functional.pad(hidden_states, (0, 0, 0, more)), mask)[0][:, :length]
