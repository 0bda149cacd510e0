"""Properties that hold whatever the numbers are: of the softmax, of the blocks, of the gradients, and of the bits."""

from __future__ import annotations

import math
from collections.abc import Iterator

import mra_attention
import oracle
import pytest
import torch
from helpers import (
    GRADIENT_FACTOR,
    OUTPUT_FACTOR,
    assert_close,
    assert_same_bits,
    assert_within_budget,
    block_mask,
    call_keywords,
    dense_budget,
    random_inputs,
    random_mask,
    run_package,
)
from oracle import Settings
from plain_float32 import PlainFloat32
from torch import Tensor

MODES = pytest.mark.parametrize("mode", ["full", "sparse"])
MASKED = pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "masks"])
BLOCK = 8


def make_settings(mode: str, masked: bool, query: Tensor, key: Tensor) -> Settings:
    masks = {}
    if masked:
        masks["key_mask"] = random_mask(key.shape[0], key.shape[2], seed=1)
        masks["query_mask"] = random_mask(query.shape[0], query.shape[2], seed=2)
    return Settings(block_size=BLOCK, mode=mode, blocks_per_row=2.0, **masks)


def attend(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> Tensor:
    return mra_attention.scaled_dot_product_attention(query, key, value, **settings.keywords())


@MODES
@MASKED
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_weights_of_a_query_sum_to_one(mode, masked, dtype):
    query, key, value, *_ = random_inputs((2, 2, 61, 90, 16), dtype=dtype)
    settings = make_settings(mode, masked, query, key)
    out = attend(query, key, torch.ones_like(value), settings)
    expected = torch.ones_like(out)
    if masked:
        expected = expected.masked_fill(~settings.query_mask[:, None, :, None], 0.0)
    if dtype == torch.float64:
        assert_close(out, expected, "out")
    else:
        arguments = (query, key, torch.ones_like(value), block_mask(query, key, settings), settings)

        def floor() -> Tensor:
            with PlainFloat32():
                return oracle.attention(*arguments, torch.float64)[0].float()

        torchs, _ = oracle.attention(*arguments, dtype)
        assert_within_budget(
            out, expected.double(), [torchs], "out", factor=OUTPUT_FACTOR, floor=floor, block_size=BLOCK
        )


@MODES
@MASKED
def test_the_output_is_linear_in_the_values(mode, masked):
    query, key, value, *_ = random_inputs((2, 2, 61, 90, 16))
    other = random_inputs((2, 2, 61, 90, 16), seed=1)[2]
    settings = make_settings(mode, masked, query, key)
    combined = attend(query, key, 3.0 * value - 0.25 * other, settings)
    separate = 3.0 * attend(query, key, value, settings) - 0.25 * attend(query, key, other, settings)
    assert_close(combined, separate, "out")


@MODES
@MASKED
@pytest.mark.parametrize("magnitude", [0.1, 1.0, 30.0])
def test_the_output_lies_inside_the_hull_of_the_values(mode, masked, magnitude):
    query, key, value, *_ = random_inputs((2, 2, 61, 90, 16), magnitude=magnitude)
    settings = make_settings(mode, masked, query, key)
    out = attend(query, key, value, settings)
    valid = torch.ones(2, 90, dtype=torch.bool) if settings.key_mask is None else settings.key_mask
    hidden = ~valid[:, None, :, None]
    low = value.masked_fill(hidden, math.inf).amin(2, keepdim=True) - 1e-10
    high = value.masked_fill(hidden, -math.inf).amax(2, keepdim=True) + 1e-10
    inside = (low <= out) & (out <= high)
    if settings.query_mask is not None:
        inside |= ~settings.query_mask[:, None, :, None]
    assert inside.all()


@MASKED
def test_a_constant_added_to_every_key_changes_nothing_in_sparse_mode(masked):
    """The logits of a query all move by scale * <q_t, c>, which softmax does not see; lse moves by just that."""
    query, key, value, *_ = random_inputs((2, 2, 61, 90, 16))
    settings = make_settings("sparse", masked, query, key)
    shift = torch.randn(16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert torch.equal(block_mask(query, key + shift, settings), block_mask(query, key, settings))
    keywords = settings.keywords() | {"return_lse": True}
    out, lse = mra_attention.scaled_dot_product_attention(query, key, value, **keywords)
    moved_out, moved_lse = mra_attention.scaled_dot_product_attention(query, key + shift, value, **keywords)
    assert_close(moved_out, out, "out")
    assert_close(moved_lse, lse + query @ shift / 4.0, "lse")


@MODES
@MASKED
@pytest.mark.parametrize("shift", [1.0, -500.0])
def test_a_constant_added_to_every_logit_changes_nothing(mode, masked, shift):
    """One coordinate of every query is 1, so that coordinate of the keys moves pooled and exact logits alike."""
    query, key, value, *_ = random_inputs((2, 2, 61, 90, 16))
    settings = make_settings(mode, masked, query, key)
    query[..., 5] = 1.0
    moved = key.clone()
    moved[..., 5] += 4.0 * shift
    assert torch.equal(block_mask(query, moved, settings), block_mask(query, key, settings))
    keywords = settings.keywords() | {"return_lse": True}
    out, lse = mra_attention.scaled_dot_product_attention(query, key, value, **keywords)
    moved_out, moved_lse = mra_attention.scaled_dot_product_attention(query, moved, value, **keywords)
    assert_close(moved_out, out, "out")
    assert_close(moved_lse, lse + shift, "lse")


def permute_blocks(x: Tensor, order: Tensor) -> Tensor:
    """Whole blocks of tokens of a (..., n * BLOCK, D) tensor, in another order."""
    return x.unflatten(-2, (-1, BLOCK))[..., order, :, :].flatten(-3, -2)


@MODES
def test_the_order_of_key_blocks_does_not_matter(mode):
    query, key, value, grad_out, grad_lse = random_inputs((2, 2, 61, 96, 16))
    settings = make_settings(mode, False, query, key)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    moved_key, moved_value = permute_blocks(key, order), permute_blocks(value, order)
    assert torch.equal(block_mask(query, moved_key, settings), block_mask(query, key, settings)[..., order])
    here = run_package(query, key, value, settings, grad_out, grad_lse)
    there = run_package(query, moved_key, moved_value, settings, grad_out, grad_lse)
    for name in ("out", "lse", "dq"):
        assert_close(getattr(there, name), getattr(here, name), name)
    for name in ("dk", "dv"):
        assert_close(getattr(there, name), permute_blocks(getattr(here, name), order), name)


@MODES
def test_query_blocks_may_come_in_any_order(mode):
    query, key, value, grad_out, grad_lse = random_inputs((2, 2, 96, 75, 16))
    settings = make_settings(mode, False, query, key)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    moved = permute_blocks(query, order)
    assert torch.equal(block_mask(moved, key, settings), block_mask(query, key, settings)[:, :, order])
    here = run_package(query, key, value, settings, grad_out, grad_lse)
    moved_grad_lse = permute_blocks(grad_lse[..., None], order)[..., 0]
    there = run_package(moved, key, value, settings, permute_blocks(grad_out, order), moved_grad_lse)
    for name in ("out", "dq"):
        assert_close(getattr(there, name), permute_blocks(getattr(here, name), order), name)
    assert_close(there.lse, permute_blocks(here.lse[..., None], order)[..., 0], "lse")
    for name in ("dk", "dv"):
        assert_close(getattr(there, name), getattr(here, name), name)


@MODES
def test_tokens_of_a_block_may_come_in_any_order(mode):
    query, key, value, grad_out, grad_lse = random_inputs((2, 2, 61, 96, 16))
    settings = make_settings(mode, False, query, key)
    within = torch.randperm(BLOCK, generator=torch.Generator().manual_seed(3))
    order = (torch.arange(0, 96, BLOCK)[:, None] + within).flatten()
    here = run_package(query, key, value, settings, grad_out, grad_lse)
    there = run_package(query, key[:, :, order], value[:, :, order], settings, grad_out, grad_lse)
    assert_close(there.out, here.out, "out")
    assert_close(there.dk, here.dk[:, :, order], "dk")
    assert_close(there.dv, here.dv[:, :, order], "dv")


@MODES
@pytest.mark.parametrize("key_heads", [4, 2])
def test_a_head_among_many_long_ones_has_the_bits_that_it_has_alone(mode, key_heads):
    """Long heads are computed group by group."""
    query, key, value, *_ = random_inputs((1, 4, 4500, 4500, 128), key_heads=key_heads, dtype=torch.float32)
    settings = Settings(block_size=64, mode=mode, blocks_per_row=2.0)

    def run(head: slice, key_head: slice) -> tuple[Tensor, Tensor]:
        inputs = (query[:, head], key[:, key_head], value[:, key_head])
        keywords = call_keywords(*inputs[:2], settings)
        return mra_attention.scaled_dot_product_attention(*inputs, return_lse=True, **keywords)

    out, lse = run(slice(None), slice(None))
    for head in range(4):
        key_head = head * key_heads // 4
        alone, alone_lse = run(slice(head, head + 1), slice(key_head, key_head + 1))
        assert torch.equal(out[:, head : head + 1], alone), head
        assert torch.equal(lse[:, head : head + 1], alone_lse), head


@pytest.fixture
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@MODES
@MASKED
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("key_heads", [1, 4])
@pytest.mark.usefixtures("keep_threads")
def test_same_bits_for_any_number_of_threads_and_in_every_run(mode, masked, dtype, key_heads):
    query, key, value, grad_out, grad_lse = random_inputs((2, 4, 261, 290, 33), key_heads=key_heads, dtype=dtype)
    settings = make_settings(mode, masked, query, key)
    results, plans = [], []
    for threads in (1, 2, 3, 1, 3):
        torch.set_num_threads(threads)
        plans.append(block_mask(query, key, settings))
        results.append(run_package(query, key, value, settings, grad_out, grad_lse))
    for result, plan in zip(results[1:], plans[1:], strict=True):
        assert torch.equal(plan, plans[0])
        assert_same_bits(result, results[0])


@MODES
@MASKED
@pytest.mark.parametrize("key_heads", [1, 2])
def test_gradcheck(mode, masked, key_heads):
    query, key, value, *_ = random_inputs((1, 2, 19, 29, 3), key_heads=key_heads, value_dim=2)
    settings = make_settings(mode, masked, query, key)
    more = {"enable_gqa": key_heads != 2}
    plan = mra_attention.plan(query, key, **settings.keywords(), **more)
    keywords = settings.keywords() | more | {"return_lse": True, "plan": plan}
    del keywords["blocks_per_row"]
    visible = torch.ones(1, 2, 19, dtype=torch.bool)
    if settings.query_mask is not None:
        visible = settings.query_mask[:, None].expand(1, 2, 19)

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = mra_attention.scaled_dot_product_attention(*leaves, **keywords)
        return out, lse[visible]

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in (query, key, value)])


@MODES
@MASKED
def test_the_gradient_of_the_values_is_the_adjoint_of_the_forward(mode, masked):
    """<out(v), u> = <v, dv(u)> for any v and u, since the output is linear in the values."""
    query, key, value, grad_out, _ = random_inputs((2, 2, 61, 90, 16))
    settings = make_settings(mode, masked, query, key)
    result = run_package(query, key, value, settings, grad_out)
    visible = grad_out
    if settings.query_mask is not None:
        visible = grad_out.masked_fill(~settings.query_mask[:, None, :, None], 0.0)
    assert_close((result.out * visible).sum(), (value * result.dv).sum(), "<out, u>")


@MODES
@MASKED
def test_directional_derivative_in_float32(mode, masked):
    """The float32 gradient along a direction against a float64 central difference of the formulas, plan frozen."""
    *inputs, grad_out, grad_lse = random_inputs((2, 4, 253, 290, 32), dtype=torch.float32)
    settings = make_settings(mode, masked, inputs[0], inputs[1])
    selected = block_mask(inputs[0], inputs[1], settings)
    result = run_package(*inputs, settings, grad_out, grad_lse)
    exact = oracle.run(*inputs, selected, settings, grad_out, grad_lse)
    budget = dense_budget(*inputs, selected, settings, grad_out, grad_lse)
    weight = oracle.clean_grad_out(grad_out.double(), settings)
    lse_weight = oracle.clean_grad_out(grad_lse.double()[..., None], settings)[..., 0]

    def loss(index: int, step: Tensor) -> float:
        moved = [x.double() for x in inputs]
        moved[index] = moved[index] + step
        out, lse = oracle.attention(*moved, selected, settings)
        return ((out * weight).sum() + (lse.masked_fill(lse == -math.inf, 0.0) * lse_weight).sum()).item()

    for index, name in enumerate(("query", "key", "value")):
        generator = torch.Generator().manual_seed(7)
        direction = torch.randn(inputs[index].shape, generator=generator, dtype=torch.float64)
        coarse, fine = ((loss(index, h * direction) - loss(index, -h * direction)) / (2 * h) for h in (1e-4, 0.5e-4))
        expected = (4 * fine - coarse) / 3
        derivative = (result[2 + index].double() * direction).sum().item()
        # Along a random direction the errors of the elements add up like a random walk: to a few times their norm.
        sources = (lambda: budget.comparisons[0], budget.floor)
        risks = ((source()[2 + index].double() - exact[2 + index]).norm().item() for source in sources)
        assert any(abs(derivative - expected) <= 3 * GRADIENT_FACTOR * risk for risk in risks), name
