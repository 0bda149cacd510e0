"""Tokens in another order than the caller's: tiles of a grid, `query_order` and `key_order`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mra_attention import (
    FallbackWarning,
    KVCache,
    MRAConfig,
    can_run,
    plan,
    replace_sdpa,
    scaled_dot_product_attention,
    varlen_attention,
)
from mra_attention._grid import grid_order, tile_shapes
from mra_attention.nn import MultiheadAttention, convert
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask

FEW: dict[str, Any] = {"resolutions": (8, 1), "blocks_per_row": 1.5}
BATCH, HEADS, LENGTH, GRID = 2, 3, 79, (7, 11)  # two tokens before the grid


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(keys: int = LENGTH) -> list[Tensor]:
    shapes = [(BATCH, HEADS, LENGTH, 8), (BATCH, HEADS, keys, 8), (BATCH, HEADS, keys, 5)]
    return [normal(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def shuffled(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)


# The grid


@pytest.mark.parametrize("leading", [0, 1, 5])
@pytest.mark.parametrize("grid", [(1, 1), (1, 40), (40, 1), (3, 5), (7, 11), (14, 14), (32, 32), (37, 23), (5, 200)])
@pytest.mark.parametrize("resolutions", [(32, 1), (8, 1), (31, 1), (96, 1), (128, 32, 8, 1)], ids=str)
def test_the_order_of_a_grid_is_a_permutation_that_leaves_the_first_tokens_first(grid, leading, resolutions):
    length = leading + grid[0] * grid[1]
    order, inverse = grid_order(grid, resolutions, length)
    assert order.dtype is inverse.dtype is torch.int64
    assert torch.equal(order.sort()[0], torch.arange(length))
    assert torch.equal(order[inverse], torch.arange(length))
    assert torch.equal(order[:leading], torch.arange(leading))


def test_tiles_of_the_paper_are_4_by_8():
    assert tile_shapes((32, 1)) == [(4, 8), (1, 1)]
    order, _ = grid_order((32, 32), (32, 1), 1024)
    tiles = {(int(block[0]) // 32, int(block[0]) % 32) for block in order.view(32, 32).sort(-1)[0]}
    assert tiles == {(row, column) for row in range(0, 32, 4) for column in range(0, 32, 8)}
    for block in order.view(32, 32):
        rows, columns = block // 32, block % 32
        assert (rows.max() - rows.min(), columns.max() - columns.min()) == (3, 7)


@pytest.mark.parametrize(
    ("resolutions", "shapes"),
    [
        ((64, 1), [(8, 8), (1, 1)]),
        ((128, 32, 8, 1), [(8, 16), (4, 8), (2, 4), (1, 1)]),
        ((64, 32, 1), [(8, 8), (4, 8), (1, 1)]),
        ((96, 32, 1), [(12, 8), (4, 8), (1, 1)]),
    ],
)
def test_tiles_of_a_ladder_are_nested(resolutions, shapes):
    assert tile_shapes(resolutions) == shapes
    height, width = 4 * shapes[0][0], 3 * shapes[0][1]
    order, _ = grid_order((height, width), resolutions, height * width)
    for size, shape in zip(resolutions, shapes, strict=True):
        blocks = order.view(-1, size)
        rows, columns = blocks // width, blocks % width
        assert set((rows.amax(1) - rows.amin(1) + 1).tolist()) == {shape[0]}
        assert set((columns.amax(1) - columns.amin(1) + 1).tolist()) == {shape[1]}
        assert (columns.amin(1) % shape[1] == 0).all(), "tiles begin where others end"


def spread(order: Tensor, grid: tuple[int, int], size: int) -> float:
    """The mean squared distance of cells to the middle of their block."""
    places = torch.stack((order // grid[1], order % grid[1]), -1).double()
    blocks = places.split(size)
    return sum(float((block - block.mean(0)).square().sum()) for block in blocks) / len(order)


@pytest.mark.parametrize("leading", [0, 1, 7])
@pytest.mark.parametrize("grid", [(32, 32), (24, 24), (37, 23), (21, 50), (16, 64)])
def test_blocks_are_compact_though_tiles_do_not_divide_the_grid(grid, leading):
    count, size = grid[0] * grid[1], 32
    order, _ = grid_order(grid, (size, 1), leading + count)
    cells = order[leading:] - leading
    first = size - leading % size  # the cells that share a block with the tokens before
    parts = [cells[:first], cells[first:]]
    whole = sum(spread(part, grid, size) * len(part) for part in parts) / count
    tile = (4**2 - 1) / 12 + (8**2 - 1) / 12
    assert whole < 1.25 * tile
    assert whole < 0.6 * spread(torch.arange(count), grid, size)


# What is computed


def masks(keys: int) -> dict[str, dict[str, Any]]:
    padding = torch.arange(keys) < torch.tensor([[keys], [keys - 20]])
    bias = normal(BATCH, HEADS, LENGTH, keys, seed=7)
    return {
        "none": {},
        "padding": {"attn_mask": padding[:, None, None], "query_padding_mask": torch.arange(LENGTH) > 4},
        "pairs": {"attn_mask": bias > -0.5, "query_padding_mask": torch.ones(LENGTH, dtype=torch.bool)},
        "causal pairs": {
            "attn_mask": torch.ones(LENGTH, keys, dtype=torch.bool).tril(),
            "query_padding_mask": torch.ones(BATCH, LENGTH, dtype=torch.bool),
        },
        "bias": {"attn_mask": bias, "query_padding_mask": torch.arange(LENGTH) > 4},
        "bias of rows": {"attn_mask": bias[:1, :, :, :1], "query_padding_mask": torch.arange(LENGTH) > 4},
        "bias of keys": {
            "attn_mask": bias[:, :1, :1].expand(bias.shape),
            "query_padding_mask": torch.arange(LENGTH) > 4,
        },
        "token form": {"pool_queries": False},
        "sinks": {"softcap": 2.0, "sinks": normal(HEADS)},
    }


# name: the number of keys, the arguments, and the orders of queries and keys, (B, L)
ORDERS: dict[str, tuple[int, dict[str, Any]]] = {
    "grid": (LENGTH, {"grid": GRID}),
    "one order": (LENGTH, dict.fromkeys(("query_order", "key_order"), shuffled(LENGTH))),
    "one order for each item": (LENGTH, dict.fromkeys(("query_order", "key_order"), shuffled(BATCH, LENGTH))),
    "two orders": (LENGTH, {"query_order": shuffled(LENGTH), "key_order": shuffled(BATCH, LENGTH, seed=1)}),
    "cross": (50, {"query_order": shuffled(BATCH, LENGTH), "key_order": shuffled(50)}),
    "keys": (50, {"key_order": shuffled(50)}),
    "queries": (LENGTH, {"query_order": shuffled(LENGTH)}),
}
by_order = pytest.mark.parametrize("name", ORDERS)
by_mask = pytest.mark.parametrize("mask", masks(LENGTH))


def orders_of(name: str) -> tuple[Tensor, Tensor]:
    keys, given = ORDERS[name]
    if "grid" in given:
        given = dict.fromkeys(("query_order", "key_order"), grid_order(GRID, FEW["resolutions"], LENGTH)[0])
    query, key = (given.get(side, torch.arange(n)) for side, n in (("query_order", LENGTH), ("key_order", keys)))
    return query.expand(BATCH, -1), key.expand(BATCH, -1)


def rows(tensor: Tensor, order: Tensor, dim: int = 2) -> Tensor:
    """Tokens in an order of each batch item, by indexing alone."""
    moved = tensor.expand(BATCH, *tensor.shape[1:]).movedim(dim, 1)
    return torch.stack([item[places] for item, places in zip(moved, order, strict=True)]).movedim(1, dim)


def run(tensors: list[Tensor], **arguments: Any) -> list[Tensor]:
    """Output, log-sum-exp and gradients; cotangents depend on the query, so that they follow any order."""
    out, lse = scaled_dot_product_attention(*tensors, return_lse=True, **arguments)
    wanted = [*tensors, *(x for x in (arguments.get("attn_mask"),) if x is not None and x.requires_grad)]
    cotangent = tensors[0].detach()
    finite = lse.masked_fill(lse.isinf(), 0.0)
    loss = (out * cotangent[..., :5]).sum() + (finite * cotangent[..., 5]).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, wanted)]


def by_hand(tensors: list[Tensor], query: Tensor, key: Tensor, arguments: dict[str, Any]) -> list[Tensor]:
    """What `run` returns, with everything brought to the orders here, and back."""
    arguments = dict(arguments)
    bias = arguments.get("attn_mask")
    if bias is not None:
        moved = bias.detach()[(None,) * (4 - bias.dim())]
        for dim in range(4):  # what is repeated stays so: the mean of equal numbers rounds differently
            moved = moved if moved.stride(dim) else moved.narrow(dim, 0, 1)
        moved = moved if moved.shape[3] == 1 else rows(moved, key, 3)
        moved = moved if moved.shape[2] == 1 else rows(moved, query)
        arguments["attn_mask"] = moved.requires_grad_(bias.requires_grad)
    valid = arguments.get("query_padding_mask")
    if valid is not None:
        arguments["query_padding_mask"] = valid.expand(BATCH, -1).gather(1, query)
    ordered = [rows(x.detach(), o).requires_grad_() for x, o in zip(tensors, (query, key, key), strict=True)]
    out, lse, dq, dk, dv, *dbias = run(ordered, **arguments)
    to_query, to_key = query.argsort(-1), key.argsort(-1)
    back = [rows(x, to_query) for x in (out, lse, dq)] + [rows(x, to_key) for x in (dk, dv)]
    return back + [rows(rows(x, to_query), to_key, 3) for x in dbias]


@by_order
@by_mask
def test_an_ordered_call_is_one_that_is_permuted_by_hand(name, mask):
    keys, given = ORDERS[name]
    arguments = FEW | masks(keys)[mask]
    expected = by_hand(inputs(keys), *orders_of(name), arguments)
    actual = run(inputs(keys), **arguments, **given)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    assert not torch.equal(actual[0], run(inputs(keys), **arguments)[0]) or mask == "pairs"


@by_order
@by_mask
def test_full_budget_is_attention_in_the_order_of_the_caller(name, mask):
    keys, given = ORDERS[name]
    arguments: dict[str, Any] = {"resolutions": (8, 1), "blocks_per_row": math.inf} | masks(keys)[mask]
    for each, plain in zip(run(inputs(keys), **arguments, **given), run(inputs(keys), **arguments), strict=True):
        torch.testing.assert_close(each, plain, rtol=0.0, atol=1e-10)
    if not set(arguments) & {"query_padding_mask", "softcap"}:
        out = torch.nn.functional.scaled_dot_product_attention(*inputs(keys))
        torch.testing.assert_close(run(inputs(keys), **arguments, **given)[0], out, rtol=0.0, atol=1e-10)


@by_order
def test_the_gradient_of_a_bias_is_in_the_order_of_the_caller(name):
    keys, given = ORDERS[name]
    bias = normal(BATCH, HEADS, LENGTH, keys, seed=7).requires_grad_()
    arguments = FEW | {"attn_mask": bias, "query_padding_mask": torch.ones(LENGTH, dtype=torch.bool)}
    expected = by_hand(inputs(keys), *orders_of(name), arguments)
    for a, e in zip(run(inputs(keys), **arguments, **given), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("mask", ["padding", "bias"])
def test_padded_keys_are_padded_queries_in_one_order(mask):
    """As in the order of the caller, where the padding of the queries is not given."""
    arguments = FEW | masks(LENGTH)[mask]
    del arguments["query_padding_mask"]
    for name in ("grid", "one order for each item"):
        expected = by_hand(inputs(), *orders_of(name), arguments)
        for a, e in zip(run(inputs(), **arguments, **ORDERS[name][1]), expected, strict=True):
            assert torch.equal(a, e)


@by_order
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0)])
def test_the_output_lies_in_memory_as_the_query(name, order):
    keys, given = ORDERS[name]
    back = [order.index(dim) for dim in range(3)]
    stored = [x.detach().permute(*order, 3).contiguous().permute(*back, 3) for x in inputs(keys)]
    out = scaled_dot_product_attention(*stored, **FEW, **given)
    assert torch.equal(out, run(inputs(keys), **FEW, **given)[0])
    assert out.stride() == scaled_dot_product_attention(*stored, **FEW).stride()


@pytest.mark.parametrize("shape", [(LENGTH, 4), (2, LENGTH, 4), (2, 2, 3, LENGTH, 4)])
def test_inputs_of_any_number_of_dimensions(shape):
    query = normal(*shape)
    for given in ({"grid": GRID}, dict.fromkeys(("query_order", "key_order"), shuffled(LENGTH))):
        order = grid_order(GRID, (8, 1), LENGTH)[0] if "grid" in given else given["query_order"]
        moved = query[..., order, :]
        expected = scaled_dot_product_attention(moved, moved, moved, **FEW)[..., order.argsort(), :]
        assert torch.equal(scaled_dot_product_attention(query, query, query, **FEW, **given), expected)


def test_orders_of_several_batch_dimensions():
    query, order = normal(2, 3, 2, LENGTH, 4), shuffled(2, 3, LENGTH)
    out = scaled_dot_product_attention(query, query, query, query_order=order, key_order=order, **FEW)
    for i in range(2):
        for j in range(3):
            alone = dict.fromkeys(("query_order", "key_order"), order[i, j])
            expected = scaled_dot_product_attention(*[query[i, j]] * 3, **FEW, **alone)
            assert torch.equal(out[i, j], expected)


def test_grouped_heads_dropout_and_autocast_follow():
    query, key, value = (x.detach() for x in inputs())
    order = orders_of("grid")[0][0]

    def both(*tensors: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        out = scaled_dot_product_attention(*tensors, grid=GRID, **FEW, **more)
        torch.manual_seed(3)
        moved = scaled_dot_product_attention(*(x[:, :, order] for x in tensors), **FEW, **more)
        return out, moved[:, :, order.argsort()]

    assert torch.equal(*both(query, key[:, :1], value[:, :1], enable_gqa=True))
    assert torch.equal(*both(query, key, value, dropout_p=0.4))
    with torch.autocast("cpu"):
        out, expected = both(query.float(), key.float(), value.float())
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@by_order
def test_derivatives_that_there_are_none_of_are_refused_as_without_an_order(name):
    keys, given = ORDERS[name]
    query, key, value = inputs(keys)
    (grad,) = torch.autograd.grad(function_of(query, key, value, given), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="mra_attention has no second derivative"):
        grad.sum().backward()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(NotImplementedError, match="mra_attention has no forward-mode"):
            function_of(dual, key, value, given)


def function_of(query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> Tensor:
    return scaled_dot_product_attention(query, key, value, **FEW, **given).square().sum()


# Plans


@by_order
def test_a_plan_keeps_the_order_with_which_it_was_made(name):
    keys, given = ORDERS[name]
    query, key, value = (x.detach() for x in inputs(keys))
    selection = plan(query, key, **FEW, **given)
    of_query, of_key = orders_of(name)
    assert torch.equal(selection.data, plan(rows(query, of_query), rows(key, of_key), **FEW).data)
    expected = scaled_dot_product_attention(query, key, value, **FEW, **given)
    assert torch.equal(scaled_dot_product_attention(query, key, value, plan=selection), expected)
    assert torch.equal(scaled_dot_product_attention(query, key, value, plan=selection, **given), expected)


# Accuracy


def smooth(rows: int, columns: int, seed: int) -> list[Tensor]:
    """Query, key and value (1, 4, L, 64) of a class token and patches: fields of low frequency, values with noise."""
    generator = torch.Generator().manual_seed(seed)
    along = torch.stack(torch.meshgrid(torch.arange(rows) / rows, torch.arange(columns) / columns, indexing="ij"), -1)
    heads, waves, channels = 4, 16, 64

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    phases = (
        2 * math.pi * (along.view(-1, 2) @ draw(heads, 2, waves) + torch.rand(heads, 1, waves, generator=generator))
    )
    fields = phases.cos() / waves**0.5
    query = 1.5 * fields @ draw(heads, waves, channels)
    key = query + 0.5 * fields @ draw(heads, waves, channels)
    value = fields @ draw(heads, waves, channels) + 0.2 * draw(heads, rows * columns, channels)
    return [torch.cat((draw(heads, 1, channels), x), 1)[None] for x in (query, key, value)]


@pytest.mark.parametrize(("grid", "factor"), [((32, 32), 1.5), ((64, 64), 1.5), ((37, 23), 1.25)])
@pytest.mark.parametrize("pool_queries", [True, False])
def test_the_error_on_an_image_is_smaller_in_tiles(grid, factor, pool_queries):
    ratios: list[float] = []
    for seed in range(3):
        tensors = smooth(*grid, seed)
        exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in tensors))
        errors = [
            (scaled_dot_product_attention(*tensors, pool_queries=pool_queries, grid=given) - exact).norm()
            for given in (None, grid)
        ]
        ratios.append(float(errors[0] / errors[1]))
    assert min(ratios) > factor, ratios


# Tracers


def calls() -> dict[str, Callable[..., Tensor]]:
    def call(given: dict[str, Any]) -> Callable[..., Tensor]:
        return lambda q, k, v: scaled_dot_product_attention(q, k, v, **FEW, **given)

    return {name: call(given) for name, (_, given) in ORDERS.items()}


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@by_order
@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_compile(name, backend, dynamic):
    if backend == "inductor" and name not in ("grid", "one order for each item"):
        pytest.skip("one order of each kind is enough for the slow one")
    function, tensors = calls()[name], inputs(ORDERS[name][0])
    traced = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    out, expected = traced(*tensors), function(*tensors)
    assert torch.equal(out, expected)
    assert out.stride() == expected.stride()
    cotangent = torch.randn_like(expected)
    for grads in zip(*(torch.autograd.grad(x, tensors, cotangent) for x in (out, expected)), strict=True):
        assert torch.equal(*grads)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_grid_is_compiled_once_for_all_numbers_of_tokens_before_it():
    counter = torch._dynamo.testing.CompileCounter()
    traced = torch.compile(
        lambda x: scaled_dot_product_attention(x, x, x, grid=(7, 11), **FEW), backend=counter, dynamic=True
    )
    for length in (79, 82, 90, 101):
        traced(torch.randn(1, 2, length, 4))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_checks_orders_that_it_is_given():
    def attention(x: Tensor, order: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, x, x, query_order=order, key_order=order, **FEW)

    traced = torch.compile(attention, fullgraph=True, backend="aot_eager")
    x = inputs()[0].detach()
    for order in (shuffled(LENGTH), shuffled(LENGTH, seed=1)):
        assert torch.equal(traced(x, order), attention(x, order))
    with pytest.raises(RuntimeError, match="query_order must have each of the numbers from 0 to 78 once"):
        traced(x, torch.zeros(LENGTH, dtype=torch.int64))


@by_order
def test_transforms(name):
    function, keys = calls()[name], ORDERS[name][0]
    query, key, value = inputs(keys)
    (expected,) = torch.autograd.grad(function(query, key, value).square().sum(), query)
    grad = torch.func.grad(lambda q: function(q, key.detach(), value.detach()).square().sum())
    assert torch.equal(grad(query.detach()), expected)
    batch = [torch.stack([x.detach(), 2 * x.detach()]) for x in (query, key, value)]
    mapped = torch.vmap(function)(*batch)
    assert torch.equal(mapped, torch.stack([function(*(x[i] for x in batch)) for i in range(2)]))


def test_vmap_of_orders():
    def attention(x: Tensor, order: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, x, x, query_order=order, key_order=order, **FEW)

    x, orders = normal(3, BATCH, HEADS, LENGTH, 4), shuffled(3, LENGTH)
    expected = torch.stack([attention(*each) for each in zip(x, orders, strict=True)])
    assert torch.equal(torch.vmap(attention)(x, orders), expected)
    with pytest.raises(ValueError, match="query_order must have each of the numbers"):
        torch.vmap(attention)(x, orders.clamp(max=5))


def test_an_order_made_under_a_mode_serves_outside_of_it():
    grid = (6, 13)  # of no other test, so that nothing is kept of it
    tensors = inputs(78 + 1)
    with FakeTensorMode():
        fake = [torch.empty(x.shape) for x in tensors]
        assert scaled_dot_product_attention(*fake, grid=grid, **FEW).shape == (BATCH, HEADS, LENGTH, 5)
    with torch.inference_mode():
        inside = scaled_dot_product_attention(*tensors, grid=grid, **FEW)
    out = scaled_dot_product_attention(*tensors, grid=grid, **FEW)
    assert torch.equal(out.detach(), inside)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), tensors))


# In models


def test_modules_take_a_grid():
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    x = torch.randn(2, LENGTH, 12)
    expected = theirs(x, x, x, need_weights=False)[0]
    plain = MultiheadAttention(12, 3, batch_first=True, **FEW)
    plain.load_state_dict(theirs.state_dict())
    converted = convert(theirs, grid=GRID, **FEW)[""]
    order = grid_order(GRID, (8, 1), LENGTH)[0]
    moved = x[:, order]
    torch.testing.assert_close(converted(x, x, x)[0], plain(moved, moved, moved)[0][:, order.argsort()])
    convert(converted, grid=GRID, blocks_per_row=math.inf)
    torch.testing.assert_close(converted(x, x, x)[0], expected)


def test_modules_refuse_a_grid_in_cross_attention():
    """Also where there are as many keys as queries: what a decoder attends to is another sequence."""
    x, memory = torch.randn(2, 2, LENGTH, 12).unbind()
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    with warnings.catch_warnings(record=True) as caught, replace_sdpa(min_length=0, grid=GRID, **FEW):
        warnings.simplefilter("always")
        theirs(x, memory, memory, need_weights=False)
    ours = convert(theirs, grid=GRID, **FEW)[""]
    with pytest.raises(ValueError, match=r"grid=\(7, 11\) is for self-attention") as error:
        ours(x, memory, memory)
    assert [str(error.value) in str(x.message) for x in caught if x.category is FallbackWarning] == [True]
    convert(ours, **FEW)
    assert ours(x, memory, memory)[0].shape == x.shape


def test_replaced_attention_takes_a_grid_where_it_can():
    query, key, value = (x.detach() for x in inputs())
    with replace_sdpa(min_length=0, grid=GRID, **FEW) as replaced:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            torch.nn.functional.scaled_dot_product_attention(query[:, :, :5], key, value)
    assert torch.equal(out, scaled_dot_product_attention(query, key, value, grid=GRID, **FEW))
    messages = [str(x.message) for x in caught if x.category is FallbackWarning]
    assert len(messages) == 2
    assert all("grid=(7, 11)" in message for message in messages)
    assert "1 calls taken, 2 not" in str(replaced.report())


# Refusals

ORDER = shuffled(LENGTH)
BOTH = {"query_order": ORDER, "key_order": ORDER}
NO_POSITIONS = "blocks of reordered tokens have no positions"
ALL_VISIBLE = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "grid, causal": (
        {"grid": GRID, "is_causal": True},
        ValueError,
        ["is_causal=True", "grid=(7, 11)", NO_POSITIONS, "attn_mask"],
    ),
    "grid, causal bias": (
        {"grid": GRID, "attn_mask": causal_lower_right(LENGTH, LENGTH)},
        ValueError,
        ["a causal bias", "grid=(7, 11)"],
    ),
    "grid, window": (
        {"grid": GRID, "window_size": (4, -1)},
        ValueError,
        ["window_size=(4, -1)", "grid=(7, 11)", "leave grid out"],
    ),
    "grid, slopes": (
        {"grid": GRID, "alibi_slopes": torch.ones(HEADS)},
        ValueError,
        ["alibi_slopes", "grid=(7, 11)", "the bias itself as attn_mask"],
    ),
    "grid, block mask": (
        {"grid": GRID, "attn_mask": create_block_mask(lambda b, h, i, j: i >= j, None, None, LENGTH, LENGTH, "cpu")},
        ValueError,
        ["BlockMask", "grid=(7, 11)", "a bool tensor"],
    ),
    "grid, too large": (
        {"grid": (8, 10)},
        ValueError,
        ["grid=(8, 10) has 80 tokens, more than query and key, which have 79"],
    ),
    "grid, order": ({"grid": GRID} | BOTH, ValueError, ["grid=(7, 11) and query_order both say"]),
    "order, causal": (BOTH | {"is_causal": True}, ValueError, ["is_causal=True", "query_order", NO_POSITIONS]),
    "order, window": ({"key_order": ORDER, "window_size": (1, 1)}, ValueError, ["window_size=(1, 1)", "key_order"]),
    "order, slopes": (BOTH | {"alibi_slopes": torch.ones(HEADS)}, ValueError, ["alibi_slopes", "query_order"]),
    "two orders, mask": (
        {"query_order": ORDER, "key_order": ORDER.clone(), "attn_mask": ALL_VISIBLE},
        ValueError,
        ["attn_mask with a query_order and a key_order that are not one tensor", "query_padding_mask"],
    ),
    "one order, mask": ({"key_order": ORDER, "attn_mask": ALL_VISIBLE}, ValueError, ["query_padding_mask"]),
    "order, list": ({"query_order": list(range(LENGTH))}, TypeError, ["query_order must be a torch.Tensor, got list"]),
    "order, int32": ({"key_order": ORDER.int()}, TypeError, ["key_order must be an int64 tensor", "torch.int32"]),
    "order, device": ({"key_order": ORDER.to("meta")}, NotImplementedError, ["key_order", "meta"]),
    "order, short": (
        {"query_order": ORDER[1:]},
        ValueError,
        ["query_order", "(batch, query length) = (2, 79)", "(78,)"],
    ),
    "order, batch": (
        {"key_order": shuffled(3, LENGTH)},
        ValueError,
        ["key_order", "(batch, key length) = (2, 79)", "(3, 79)"],
    ),
    "order, twice": (
        {"query_order": ORDER.clamp(max=77)},
        ValueError,
        ["query_order must have each of the numbers from 0 to 78 once"],
    ),
    "order, outside": (
        {"key_order": ORDER - 1},
        ValueError,
        ["key_order must have each of the numbers from 0 to 78 once"],
    ),
    "plan, other order": (
        {"plan": plan(*inputs()[:2], **BOTH), "query_order": ORDER.clone()},
        ValueError,
        ["query_order is not the tensor with which plan was made", "leave it out"],
    ),
    "plan, no order": ({"plan": plan(*inputs()[:2]), "key_order": ORDER}, ValueError, ["key_order is not the tensor"]),
    "plan, other grid": (
        {"plan": plan(*inputs()[:2], grid=GRID), "grid": (11, 7)},
        ValueError,
        ["grid=(11, 7) does not fit plan, which was made with grid=(7, 11)"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_with_an_order_is_refused(name):
    arguments, error, words = REFUSED[name]
    tensors = [x.detach() for x in inputs()]
    with pytest.raises(error) as caught:
        scaled_dot_product_attention(*tensors, **arguments)
    for word in words:
        assert word in str(caught.value)
    assert can_run(*tensors, **arguments) == str(caught.value)


def test_a_grid_is_of_one_sequence():
    query, key, value = inputs(50)
    with pytest.raises(
        ValueError, match=r"grid=\(7, 11\) is for queries and keys of one image.*79 queries and 50 keys"
    ):
        scaled_dot_product_attention(query, key, value, grid=GRID)


def test_one_order_is_not_for_sequences_of_two_lengths():
    with pytest.raises(ValueError, match=r"key_order must be broadcastable to \(batch, key length\) = \(2, 50\)"):
        scaled_dot_product_attention(*inputs(50), **BOTH)


def test_where_there_is_no_order_it_is_refused():
    packed = [torch.randn(LENGTH, 2, 4) for _ in range(3)]
    config = MRAConfig(grid=GRID)
    with pytest.raises(ValueError, match=r"grid=\(7, 11\) cannot be used with packed sequences"):
        varlen_attention(*packed, [0, LENGTH], [0, LENGTH], config=config)
    with pytest.raises(ValueError, match=r"grid=\(7, 11\) cannot be used with a KVCache"):
        KVCache(1, 2, 4, config=config)
    cache = KVCache(1, 2, 4)
    cache.append(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"grid=\(7, 11\) cannot be used with a KVCache"):
        cache.attend(torch.randn(1, 2, 1, 4), config=config)
    nested = torch.nested.nested_tensor([torch.randn(80, 2, 4), torch.randn(90, 2, 4)], layout=torch.jagged).transpose(
        1, 2
    )
    for given in ({"grid": GRID}, {"query_order": ORDER}, {"key_order": ORDER}):
        with pytest.raises(ValueError, match=r"(grid=\(7, 11\)|_order) cannot be used with nested tensors"):
            scaled_dot_product_attention(nested, nested, nested, **given)
