"""torch.func: grad, vmap, jacrev and their compositions."""

from __future__ import annotations

import pytest
import torch
from mra_attention import plan, scaled_dot_product_attention
from ops_cases import SETTINGS, attention, detached, inputs, loss
from torch import Tensor


def test_func_grad():
    tensors = inputs()
    expected = torch.autograd.grad(loss(*tensors), tensors)
    for grad, want in zip(torch.func.grad(loss, argnums=(0, 1, 2))(*detached(tensors)), expected, strict=True):
        assert torch.equal(grad, want)


def test_func_grad_of_lse():
    tensors = inputs()

    def total(*tensors: Tensor) -> Tensor:
        return scaled_dot_product_attention(*tensors, return_lse=True, **SETTINGS)[1].sum()

    expected = torch.autograd.grad(total(*tensors), tensors)
    for grad, want in zip(torch.func.grad(total, argnums=(0, 1, 2))(*detached(tensors)), expected, strict=True):
        assert torch.equal(grad, want)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, 0, 0), (0, None, None), (None, 2, 2), (-1, -1, -1)], ids=str)
def test_vmap(in_dims):
    batches = [
        tensor if dim is None else torch.stack([tensor, 2 * tensor, -tensor], dim)
        for tensor, dim in zip(detached(inputs()), in_dims, strict=True)
    ]
    out = torch.vmap(attention, in_dims)(*batches)
    expected = [
        attention(*(t if dim is None else t.select(dim, i) for t, dim in zip(batches, in_dims, strict=True)))
        for i in range(3)
    ]
    assert torch.equal(out, torch.stack(expected))


def test_vmap_of_masks_lse_and_grouped_heads():
    batches = [torch.stack([t, -t]) for t in detached(inputs("grouped"))]
    key_mask, query_mask = torch.rand(2, 2, 20) > 0.3, torch.rand(2, 2, 9) > 0.3

    def masked(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor, query_mask: Tensor) -> tuple[Tensor, ...]:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            key_mask[:, None, None, :],
            enable_gqa=True,
            query_padding_mask=query_mask,
            return_lse=True,
            **SETTINGS,
        )

    actual = torch.vmap(masked)(*batches, key_mask, query_mask)
    expected = [masked(*(t[i] for t in batches), key_mask[i], query_mask[i]) for i in range(2)]
    for got, want in zip(actual, zip(*expected, strict=True), strict=True):
        assert torch.equal(got, torch.stack(want))


def test_nested_vmap():
    batches = [torch.stack([torch.stack([t, -t]), torch.stack([2 * t, 3 * t])]) for t in detached(inputs())]
    out = torch.vmap(torch.vmap(attention))(*batches)
    for i in range(2):
        for j in range(2):
            assert torch.equal(out[i, j], attention(*(t[i, j] for t in batches)))


def test_vmap_of_an_empty_batch_of_tokens():
    assert torch.vmap(attention)(*(torch.randn(3, 2, 0, 4) for _ in range(3))).shape == (3, 2, 0, 4)


def test_vmap_of_plan():
    batches = [torch.stack([t, -t]) for t in detached(inputs())[:2]]
    chosen = torch.vmap(lambda query, key: plan(query, key, **SETTINGS).data)(*batches)
    for i in range(2):
        assert torch.equal(chosen[i], plan(batches[0][i], batches[1][i], **SETTINGS).data)


def test_vmap_of_grad():
    batches = [torch.stack([t, 2 * t]) for t in detached(inputs())]
    grads = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*batches)
    for i in range(2):
        leaves = [t[i].clone().requires_grad_() for t in batches]
        for grad, want in zip(grads, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            assert torch.equal(grad[i], want)


def test_jacrev_and_batched_gradients():
    query, key, value = detached(inputs("one-token")[:1] + inputs("long-row")[1:])
    query = torch.randn(1, 1, 2, 2, dtype=torch.float64)

    def of_query(query: Tensor) -> Tensor:
        return attention(query, key, value)

    expected = torch.autograd.functional.jacobian(of_query, query)
    torch.testing.assert_close(torch.func.jacrev(of_query)(query), expected)
    torch.testing.assert_close(torch.autograd.functional.jacobian(of_query, query, vectorize=True), expected)
