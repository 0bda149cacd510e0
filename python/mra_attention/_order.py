"""Tokens in another order than the caller's: which orders a call may ask for, and how tensors are brought to them.

A block is summed up by a mean, so it should hold tokens that are alike. Everything is gathered into the wanted order,
computed there, and gathered back.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ._checks.arguments import Arguments
from ._checks.block_mask import is_block_mask
from ._checks.masks import of_tokens
from ._checks.shapes import Shape
from ._checks.tensors import check_cpu, check_dense
from ._grid import grid_order
from ._ops import Inputs
from ._ops.outputs import memory_order
from ._ops.plain import is_direct
from ._ops.refusals import refuse_forward_ad
from ._ops.sizes import is_one
from ._plan import planned_orders
from .config import MRAConfig

_torch: Any = torch
_assert_async = _torch.ops.aten._assert_async.msg
_functorch = _torch._C._functorch


class Order(NamedTuple):
    """A permutation, int64 `(L,)` or `(B, L)`."""

    tokens: Tensor
    """The token of the caller at each place."""
    places: Tensor
    """The place of each token of the caller: the inverse."""


class Orders(NamedTuple):
    """That of the queries and that of the keys; None where tokens stay as they are."""

    query: Order | None
    key: Order | None


class Requested(NamedTuple):
    """What a call asks for, not yet checked."""

    grid: tuple[int, int] | None
    config: MRAConfig
    query: Any
    key: Any

    @property
    def name(self) -> str:
        """The argument that errors speak of."""
        if self.grid is not None:
            return f"grid={self.grid}"
        return "query_order" if self.query is not None else "key_order"


def requested(arguments: Arguments, config: MRAConfig) -> Requested | None:
    """Return which order a call asks for, None for none; with a plan, the one that the plan was made with."""
    query, key = arguments.query_order, arguments.key_order
    if arguments.plan is not None:
        config, query, key = planned_orders(arguments.plan, query, key)
    if config.grid is None and query is None and key is None:
        return None
    return Requested(config.grid, config, query, key)


def check_beside(order: Requested, arguments: Arguments, window: tuple[int, int]) -> None:
    """Check that nothing comes along that speaks of positions, which an order does not keep."""
    name = order.name
    if order.grid is not None and (order.query is not None or order.key is not None):
        other = "query_order" if order.query is not None else "key_order"
        raise ValueError(f"{name} and {other} both say in which order tokens are cut into blocks; pass one of them")
    if window != (-1, -1):
        given = tuple(arguments.window_size)
        positional = "is_causal=True or a causal bias" if given == (-1, -1) else f"window_size={given}"
        raise ValueError(
            f"{positional} cannot be used together with {name}: blocks of reordered tokens have no positions; leave "
            f"{name.partition('=')[0]} out, or say with a bool attn_mask who sees whom"
        )
    if arguments.alibi_slopes is not None:
        raise ValueError(
            f"alibi_slopes cannot be used together with {name}: blocks of reordered tokens have no positions; pass the "
            "bias itself as attn_mask"
        )
    if is_block_mask(arguments.attn_mask):
        raise ValueError(
            f"attn_mask is a BlockMask, which cannot be used together with {name}: its blocks are those of the given "
            "order; pass a bool tensor"
        )


def check(order: Requested, arguments: Arguments, inputs: Inputs, lead: Shape | None) -> Orders:
    """Check the orders of a call against its inputs, and return them with their inverses."""
    queries, keys = inputs.query.shape[2], inputs.key.shape[2]
    if order.grid is not None:
        sizes = order.config.for_length(max(queries, keys)).block_sizes
        of_grid = _of_grid(order.grid, (*sizes, 1), queries, keys)
        return Orders(of_grid, of_grid)
    full = tuple(inputs.query.shape[:2]) if lead is None else lead
    if order.query is order.key and queries == keys:
        of_both = _permutation("query_order", order.query, full, queries)
        return Orders(of_both, of_both)
    if queries == keys and arguments.attn_mask is not None and arguments.query_padding_mask is None:
        raise ValueError(
            "attn_mask with a query_order and a key_order that are not one tensor: padded keys are taken for padded "
            "queries where there are as many of both, and the places of these would differ; pass one tensor as both, "
            "or a query_padding_mask"
        )
    return Orders(
        None if order.query is None else _permutation("query_order", order.query, full, queries),
        None if order.key is None else _permutation("key_order", order.key, full, keys),
    )


def refuse(arguments: Arguments, config: MRAConfig, where: str) -> None:
    """Raise if a call asks for an order where there is none."""
    order = requested(arguments, config)
    if order is not None:
        raise ValueError(
            f"{order.name} cannot be used with {where}; leave it out, or call scaled_dot_product_attention for dense "
            "tensors"
        )


def apply(inputs: Inputs, orders: Orders) -> Inputs:
    """Bring the tensors of a call to the orders."""
    refuse_forward_ad(*inputs)  # in other words than those of a Function without a `jvp`
    of_query, of_key = orders
    query, key, value = inputs[:3]
    ordered_key = _take(key, of_key)
    return inputs._replace(
        query=_take(query, of_query),
        key=ordered_key,
        value=ordered_key if value is key else _take(value, of_key),
        key_mask=_take_mask(inputs.key_mask, of_key),
        query_mask=_take_mask(inputs.query_mask, of_query),
        attn_bias=_take_pairs(inputs.attn_bias, of_query, of_key),
    )


def restore(result: Tensor, orders: Orders) -> Tensor:
    """Bring an output or log-sum-exp back to the caller's order of queries."""
    return _take(result, None if orders.query is None else Order(*reversed(orders.query)))


def _of_grid(grid: tuple[int, int], resolutions: tuple[int, ...], queries: int, keys: int) -> Order:
    if queries != keys:
        raise ValueError(
            f"grid={grid} is for queries and keys of one image, but there are {queries} queries and {keys} keys; leave "
            "it out, or pass query_order and key_order"
        )
    count = grid[0] * grid[1]
    if queries < count:
        raise ValueError(f"grid={grid} has {count} tokens, more than query and key, which have {queries}")
    return Order(*grid_order(grid, resolutions, queries))


def _permutation(name: str, given: Any, lead: Shape, length: int) -> Order:
    """Check `query_order` or `key_order` and invert it."""
    check_dense(name, given)
    if given.dtype is not torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, a permutation of the tokens, got {given.dtype}")
    check_cpu(name, given)
    side = name.removesuffix("_order")
    tokens = given if tuple(given.shape) == (length,) else of_tokens(name, side, given, lead, length)
    found, places = tokens.sort()
    _assert(name, (found == torch.arange(length, device="cpu")).all(), length)
    return Order(tokens, places)


def _assert(name: str, right: Tensor, length: int) -> None:
    words = f"{name} must have each of the numbers from 0 to {length - 1} once, in every row"
    if torch.compiler.is_compiling():
        _assert_async(right, words)  # the numbers are not known here, so the compiled code checks them
        return
    while _functorch.is_functorch_wrapped_tensor(right):  # torch.vmap maps no assertion
        right = _functorch.get_unwrapped(right)
    try:
        _assert_async(right.all(), words)
    except RuntimeError as error:
        if words not in str(error):
            raise
        raise ValueError(words) from None


class _IndexSelect(torch.autograd.Function):
    """`index_select` by a permutation: its gradient is another one, where torch would add to zeros."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, order: Order) -> Tensor:
        ctx.dim = dim
        ctx.save_for_backward(*order)
        return tensor.index_select(dim, order.tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        tokens, places = ctx.saved_tensors
        return _index_select(grads[0], ctx.dim, Order(places, tokens)), None, None


def _index_select(tensor: Tensor, dim: int, order: Order) -> Tensor:
    if tensor.requires_grad and torch.is_grad_enabled() and is_direct((tensor, *order)):
        return cast("Tensor", _IndexSelect.apply(tensor, dim, order))
    return tensor.index_select(dim, order.tokens)


def _take(tensor: Tensor, order: Order | None) -> Tensor:
    """Reorder the tokens of `(B, H, L, D)` or `(B, H, L)`; the dimensions lie in memory as before."""
    if order is None:
        return tensor
    dims = memory_order(tensor)
    back, rest = [dims.index(dim) for dim in range(3)], list(range(3, tensor.dim()))
    stored = tensor.permute(*dims, *rest)
    if order.tokens.dim() == 1:
        # With one dimension before that of the tokens torch takes a faster loop than with two.
        at = dims.index(2)
        taken = _index_select(stored.flatten(0, 1), 1, order) if at == 2 else _index_select(stored, at, order)
    else:
        batch, heads, length = tensor.shape[:3]
        rows = torch.arange(batch * heads * length, device="cpu").view(stored.shape[:3]).permute(back)
        rows = rows.gather(2, order.tokens.unsqueeze(1).expand(rows.shape))
        taken = stored.flatten(0, 2).index_select(0, rows.permute(dims).flatten())
    return taken.reshape(stored.shape).permute(*back, *rest)


def _take_mask(mask: Tensor | None, order: Order | None) -> Tensor | None:
    """Reorder a mask `(B, L)`."""
    if mask is None or order is None:
        return mask
    return mask.index_select(1, order.tokens) if order.tokens.dim() == 1 else mask.gather(1, order.tokens)


def _take_pairs(bias: Tensor | None, of_query: Order | None, of_key: Order | None) -> Tensor | None:
    """Reorder rows and columns of a mask or bias that broadcasts to `(B, H, Lq, Lk)`; nothing repeated is copied."""
    if bias is None:
        return None
    if not bias.requires_grad:  # else its gradient has the shape that was given
        for dim in range(4):
            if bias.stride(dim) == 0 and bias.shape[dim] > 0:
                bias = bias.narrow(dim, 0, 1)
    for dim, order in ((2, of_query), (3, of_key)):
        if order is None or is_one(bias.shape[dim]):
            continue
        if order.tokens.dim() == 1:
            bias = _index_select(bias, dim, order)
        else:
            bias = _take(bias.expand(order.tokens.shape[0], -1, -1, -1).movedim(dim, 2), order).movedim(2, dim)
    return bias
