"""Masks and biases of pairs: docs/definitions.md, sections 2, 4 and 6."""

from __future__ import annotations

import math
from typing import Any

import helpers
import mra_attention
import oracle
import pytest
import torch
from helpers import random_inputs
from oracle import Settings
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as torch_attention

BLOCK = 8
SHAPE = (2, 2, 43, 51, 6)  # (B, H, Lq, Lk, D): the last blocks are short


def _generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _distance(shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.arange(shape[2])[:, None] - torch.arange(shape[3])


def _documents(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(shape[2])[:, None] // 13 == torch.arange(shape[3]) // 13


def _alibi(shape: tuple[int, ...]) -> Tensor:
    slopes = 2.0 ** -torch.arange(1, shape[1] + 1, dtype=torch.float64)
    return -slopes[:, None, None] * _distance(shape).abs()


def _bias(name: str, shape: tuple[int, ...] = SHAPE) -> Tensor:
    batch, heads, rows, columns, _ = shape
    random = torch.randn(batch, heads, rows, columns, generator=_generator(), dtype=torch.float64)
    masks = {
        "window": lambda: _distance(shape).abs() <= 11,
        "prefix": lambda: torch.arange(columns) < torch.tensor([20, 45])[:batch, None, None, None],
        "prefix-per-head": lambda: torch.arange(columns) < torch.tensor([20, 45])[:heads, None, None],
        "documents": lambda: _documents(shape),
        "random": lambda: random > 0.5,
        "sparse": lambda: random > 2.5,
        "causal": lambda: _distance(shape) >= 0,
        "nothing": lambda: torch.zeros(rows, columns, dtype=torch.bool),
        "everything": lambda: torch.ones(rows, columns, dtype=torch.bool),
        "hidden-queries": lambda: torch.arange(rows)[:, None] % 5 > 0,
        "alibi": lambda: _alibi(shape),
        "additive": lambda: 2 * random,
        "additive-documents": lambda: (2 * random).masked_fill(~_documents(shape), -math.inf),
        "additive-keys": lambda: random[:, :, :1],
        "additive-queries": lambda: random[:1, :, :, :1],
        "additive-one-row": lambda: random[0, 0, 0],
        "additive-one-number": lambda: random[:1, :1, :1, :1],
        "lowest": lambda: torch.zeros(rows, columns, dtype=torch.float64).masked_fill(_distance(shape) < 0, -1e9),
    }
    return masks[name]()


NAMES = [
    "window", "prefix", "prefix-per-head", "documents", "random", "sparse", "causal", "nothing", "everything",
    "hidden-queries", "alibi", "additive", "additive-documents", "additive-keys", "additive-queries",
    "additive-one-row", "additive-one-number", "lowest",
]  # fmt: skip


@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("name", NAMES)
def test_matches_the_formulas(name: str, mode: str) -> None:
    inputs = random_inputs(SHAPE, value_dim=5)
    settings = Settings(block_size=BLOCK, mode=mode, blocks_per_row=1.5, bias=_bias(name))
    if name in ("prefix", "prefix-per-head"):  # a bool mask that is the same for all queries only removes keys
        settings = Settings(
            block_size=BLOCK, mode=mode, blocks_per_row=1.5, bias=_bias(name).expand(2, 2, 43, 51).clone()
        )
    helpers.assert_matches_oracle(*inputs[:3], settings, *inputs[3:])


@pytest.mark.parametrize("name", ["window", "random", "additive-documents"])
@pytest.mark.parametrize("forced", [{"first_blocks": 1}, {"diagonal_blocks": 3}, {"num_blocks": 9}])
def test_forced_blocks_and_budgets(name: str, forced: dict[str, int]) -> None:
    inputs = random_inputs(SHAPE)
    helpers.assert_matches_oracle(*inputs[:3], Settings(block_size=BLOCK, bias=_bias(name), **forced), *inputs[3:])


@pytest.mark.parametrize("name", ["window", "random", "additive", "additive-documents"])
@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_with_padded_queries_and_groups(name: str, mode: str) -> None:
    shape = (2, 4, 43, 51, 6)
    inputs = random_inputs(shape, key_heads=2)
    query_mask = helpers.random_mask(2, 43, seed=3)
    settings = Settings(block_size=BLOCK, mode=mode, blocks_per_row=1.5, bias=_bias(name, shape), query_mask=query_mask)
    helpers.assert_matches_oracle(*inputs[:3], settings, *inputs[3:])


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7, 0])
@pytest.mark.parametrize("name", ["causal", "alibi"])
def test_lengths(length: int, name: str) -> None:
    shape = (1, 2, 17, length, 5)
    inputs = random_inputs(shape)
    settings = Settings(block_size=BLOCK, blocks_per_row=1.0, bias=_bias(name, shape))
    helpers.assert_matches_oracle(*inputs[:3], settings, *inputs[3:])


def _layouts(bias: Tensor) -> dict[str, Tensor]:
    full = bias.expand(SHAPE[:4])
    spaced = torch.full((2, 2, 43, 102), 7, dtype=torch.uint8).to(bias.dtype)
    spaced[..., ::2] = full
    return {
        "contiguous": full.contiguous(),
        "expanded": full,
        "transposed": full.transpose(-1, -2).contiguous().transpose(-1, -2),
        "heads-inside": full.transpose(1, 2).contiguous().transpose(1, 2),
        "every-other": spaced[..., ::2],
    }


@pytest.mark.parametrize("name", ["window", "alibi", "additive-queries"])
def test_layouts_give_the_same_bits(name: str) -> None:
    inputs = random_inputs(SHAPE)
    results = [
        helpers.run_package(*inputs[:3], Settings(block_size=BLOCK, blocks_per_row=1.5, bias=bias), *inputs[3:])
        for bias in _layouts(_bias(name)).values()
    ]
    for result in results[1:]:
        helpers.assert_same_bits(result, results[0])


@pytest.mark.parametrize(
    ("inputs_shape", "mask_shape"),
    [
        ((43, 6), (43, 51)),
        ((43, 6), (51,)),
        ((2, 43, 6), (2, 43, 51)),
        ((2, 43, 6), (43, 1)),
        ((3, 2, 2, 43, 6), (43, 51)),
        ((3, 2, 2, 43, 6), (3, 1, 2, 43, 51)),
        ((3, 2, 2, 43, 6), (2, 1, 43, 51)),
        ((3, 2, 2, 43, 6), (3, 2, 2, 1, 51)),
    ],
)
@pytest.mark.parametrize("additive", [False, True])
def test_shapes_broadcast_as_those_of_torch(
    inputs_shape: tuple[int, ...], mask_shape: tuple[int, ...], additive: bool
) -> None:
    key_shape = (*inputs_shape[:-2], 51, inputs_shape[-1])
    query, key = (
        torch.randn(shape, generator=_generator(), dtype=torch.float64) for shape in (inputs_shape, key_shape)
    )
    mask = torch.randn(mask_shape, generator=_generator(2), dtype=torch.float64)
    mask = mask if additive else mask > 0
    arguments: Any = {"resolutions": (BLOCK, 1), "blocks_per_row": 99.0}
    out = mra_attention.scaled_dot_product_attention(query, key, key, attn_mask=mask, **arguments)
    helpers.assert_close(out, torch_attention(query, key, key, attn_mask=mask).nan_to_num(0.0), "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["window", "documents", "additive", "additive-documents"])
@pytest.mark.parametrize("mask_dtype", ["own", "float32"])
def test_everything_selected_is_torch_attention(name: str, dtype: torch.dtype, mask_dtype: str) -> None:
    shape = (1, 2, 75, 75, 16)
    query, key, value, grad_out, grad_lse = random_inputs(shape, dtype=dtype)
    bias = _bias(name, shape)
    if bias.is_floating_point():
        bias = bias.to(dtype if mask_dtype == "own" else torch.float32)
    settings = helpers.everything(16, bias=bias)
    selected = helpers.block_mask(query, key, settings)
    actual = helpers.run_package(query, key, value, settings, grad_out, grad_lse)
    wide = [x.double() for x in (query, key, value)]
    out = torch_attention(*wide, attn_mask=bias if bias.dtype is torch.bool else bias.double())
    if dtype is torch.float64:
        helpers.assert_close(actual.out, out, "out")
        return
    expected = oracle.run(*wide, selected, settings, grad_out.double(), grad_lse.double())
    helpers.assert_close(expected.out, out, "the oracle's out")
    budget = helpers.dense_budget(query, key, value, selected, settings, grad_out, grad_lse)
    helpers.assert_results_within_budget(actual, expected, budget, block_size=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["window", "alibi", "additive-documents"])
@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_error_of_a_part_of_the_blocks(name: str, dtype: torch.dtype, mode: str) -> None:
    shape = (1, 2, 200, 200, 16)
    query, key, value, grad_out, grad_lse = random_inputs(shape, dtype=dtype)
    bias = _bias(name, shape)
    settings = Settings(block_size=16, mode=mode, blocks_per_row=2.0, bias=bias.to(dtype) if name != "window" else bias)
    selected = helpers.block_mask(query, key, settings)
    actual = helpers.run_package(query, key, value, settings, grad_out, grad_lse)
    wide = [x.double() for x in (query, key, value)]
    expected = oracle.run(*wide, selected, settings, grad_out.double(), grad_lse.double())
    budget = helpers.dense_budget(query, key, value, selected, settings, grad_out, grad_lse)
    helpers.assert_results_within_budget(actual, expected, budget, block_size=16)


def test_a_bias_that_hides_nothing_and_adds_nothing_gives_the_bits_without_it() -> None:
    inputs = random_inputs(SHAPE, dtype=torch.float32)
    plain = helpers.run_package(*inputs[:3], Settings(block_size=BLOCK), *inputs[3:])
    for bias in (torch.ones(43, 51, dtype=torch.bool), torch.zeros(43, 51)):
        masked = helpers.run_package(*inputs[:3], Settings(block_size=BLOCK, bias=bias), *inputs[3:])
        helpers.assert_same_bits(masked, plain)


def test_a_mask_of_keys_in_any_shape_is_key_padding() -> None:
    inputs = random_inputs(SHAPE, dtype=torch.float32)
    mask = helpers.random_mask(2, 51, seed=5)
    padding = helpers.run_package(*inputs[:3], Settings(block_size=BLOCK, key_mask=mask), *inputs[3:])
    for shape in ((2, 1, 1, 51), (2, 2, 1, 51), (2, 2, 43, 51)):
        bias = mask[:, None, None].expand(shape)
        result = helpers.run_package(*inputs[:3], Settings(block_size=BLOCK, bias=bias), *inputs[3:])
        helpers.assert_same_bits(result, padding)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("name", ["window", "additive-documents"])
def test_any_number_of_threads_gives_the_same_bits(name: str, threads: int) -> None:
    shape = (1, 3, 500, 500, 32)  # enough work for several threads, and heads that do not divide among them
    inputs = random_inputs(shape, dtype=torch.float32)
    bias = _bias(name, shape)
    settings = Settings(bias=bias.float() if bias.is_floating_point() else bias)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = helpers.run_package(*inputs[:3], settings, *inputs[3:])
        torch.set_num_threads(threads)
        helpers.assert_same_bits(helpers.run_package(*inputs[:3], settings, *inputs[3:]), single)
    finally:
        torch.set_num_threads(before)


def test_a_plan_with_a_mask() -> None:
    """Cut blocks are exact whatever the plan says, dead ones never."""
    inputs = random_inputs(SHAPE)
    settings = Settings(block_size=BLOCK, bias=_bias("documents"))
    for budget in (1e-9, math.inf):
        given = settings.keywords() | {"blocks_per_row": budget}
        plan = mra_attention.plan(*inputs[:2], **given)
        actual = helpers.run_package(*inputs[:3], settings, *inputs[3:], plan=plan, blocks_per_row=budget)
        expected = oracle.run(*inputs[:3], plan.block_mask(), settings, *inputs[3:])
        helpers.assert_results_close(actual, expected)


def test_the_plan_of_a_mask_has_the_cut_blocks_and_no_dead_ones() -> None:
    query, key, *_ = random_inputs(SHAPE)
    mask = torch.zeros(43, 51, dtype=torch.bool)
    mask[:16] = True  # every block is open
    mask[16, :9] = True  # the first block is open, the second is cut: it has one visible pair
    plan = mra_attention.plan(query, key, mask, resolutions=(BLOCK, 1), blocks_per_row=3)
    selected = plan.block_mask()
    assert (selected[:, :, :16].sum(-1) == 3).all()
    assert selected[:, :, 16, :2].all()
    assert not selected[:, :, 16, 2:].any()
    assert not selected[:, :, 17:].any()


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_a_bias_that_is_no_number_spoils_its_query_alone(number: float, mode: str) -> None:
    query, key, value, *_ = random_inputs(SHAPE)
    bias = torch.zeros(43, 51, dtype=torch.float64)
    bias[20, 30] = number
    out = mra_attention.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, resolutions=(BLOCK, 1), blocks_per_row=1.0, mode=mode
    )
    assert out[:, :, 20].isnan().all()
    assert out[:, :, :20].isfinite().all()
    assert out[:, :, 21:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("spoil", [math.nan, math.inf])
def test_what_is_hidden_never_reaches_a_result(dtype: torch.dtype, mode: str, additive: bool, spoil: float) -> None:
    """One document of several holds NaN or infinity: outputs and gradients of the others keep their bits."""
    shape = (1, 2, 60, 60, 8)
    query, key, value, grad_out, grad_lse = random_inputs(shape, dtype=dtype)
    mask = torch.arange(60)[:, None] // 20 == torch.arange(60) // 20
    bias = torch.zeros(60, 60).masked_fill(~mask, -math.inf) if additive else mask
    settings = Settings(block_size=BLOCK, mode=mode, blocks_per_row=1.0, bias=bias)
    clean = helpers.run_package(query, key, value, settings, grad_out, grad_lse)
    others = torch.cat([torch.arange(20), torch.arange(40, 60)])
    # Blocks 2 and 5 hold tokens of two documents.
    spoiled = [x.clone() for x in (query, key, value, grad_out)]
    for x in spoiled:
        x[:, :, 20:40] = spoil
    result = helpers.run_package(*spoiled[:3], settings, spoiled[3], grad_lse)
    for name, actual, expected in zip(result._fields, result, clean, strict=True):
        assert torch.equal(actual[:, :, others], expected[:, :, others]), name
    assert not result.out[:, :, 20:40].isfinite().any()


def test_queries_that_see_no_key() -> None:
    inputs = random_inputs(SHAPE, dtype=torch.float32)
    mask = _bias("random")
    mask[:, :, 5] = False
    mask[:, :, 8:16] = False
    for mode in ("full", "sparse"):
        settings = Settings(block_size=BLOCK, mode=mode, bias=mask)
        result = helpers.run_package(*inputs[:3], settings, *inputs[3:])
        for hidden in (slice(5, 6), slice(8, 16)):
            assert (result.out[:, :, hidden] == 0).all()
            assert (result.lse[:, :, hidden] == -math.inf).all()
            assert (result.dq[:, :, hidden] == 0).all()
        assert all(x.isfinite().all() for x in (result.out, result.dq, result.dk, result.dv))


def test_autocast_casts_the_bias_as_torch_does() -> None:
    query, key, value, *_ = random_inputs(SHAPE, dtype=torch.float32)
    bias = torch.full((43, 51), torch.finfo(torch.float32).min)  # becomes -inf in bfloat16
    bias[:10] = 0
    with torch.autocast("cpu", torch.bfloat16):
        out = mra_attention.scaled_dot_product_attention(query, key, value, attn_mask=bias, resolutions=(BLOCK, 1))
        expected = torch_attention(query, key, value, attn_mask=bias)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert (out[:, :, 10:] == 0).all()
    assert (expected[:, :, 10:] == 0).all()


@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("shape", [(43, 51), (1, 2, 43, 51), (2, 1, 43, 51)])
def test_vmap_over_inputs_and_masks(shape: tuple[int, ...], mode: Any) -> None:
    queries = torch.randn(3, 2, 2, 43, 6, generator=_generator(), dtype=torch.float64)
    keys = torch.randn(3, 2, 2, 51, 6, generator=_generator(2), dtype=torch.float64)
    masks = torch.randn(3, *shape, generator=_generator(3), dtype=torch.float64)

    def attention(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        keywords: Any = {"attn_mask": mask, "resolutions": (BLOCK, 1), "mode": mode}
        return mra_attention.scaled_dot_product_attention(query, key, key, **keywords)

    mapped = torch.vmap(attention)(queries, keys, masks)
    looped = torch.stack([attention(*arguments) for arguments in zip(queries, keys, masks, strict=True)])
    assert torch.equal(mapped, looped)
    shared = torch.vmap(attention, in_dims=(0, 0, None))(queries, keys, masks[0])
    looped = torch.stack([attention(query, key, masks[0]) for query, key in zip(queries, keys, strict=True)])
    assert torch.equal(shared, looped)

    def loss(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        return attention(query, key, mask).square().sum()

    gradients = torch.vmap(torch.func.grad(loss, (0, 1)))(queries, keys, masks)
    for index, arguments in enumerate(zip(queries, keys, masks, strict=True)):
        for mapped, single in zip(gradients, torch.func.grad(loss, (0, 1))(*arguments), strict=True):
            assert torch.equal(mapped[index], single)


@pytest.mark.parametrize("additive", [False, True])
def test_compile(additive: bool) -> None:
    query, key, value, *_ = random_inputs(SHAPE, dtype=torch.float32)
    mask = _bias("additive").float() if additive else _bias("window")

    def attention(query: Tensor, mask: Tensor) -> Tensor:
        out = mra_attention.scaled_dot_product_attention(query, key, value, attn_mask=mask, resolutions=(BLOCK, 1))
        return out.square()

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    leaves = [query.clone().requires_grad_() for _ in range(2)]
    results = [function(leaf, mask) for function, leaf in zip((attention, compiled), leaves, strict=True)]
    assert torch.equal(*results)
    gradients = [torch.autograd.grad(result.sum(), leaf)[0] for result, leaf in zip(results, leaves, strict=True)]
    assert torch.equal(*gradients)
