"""Dropout of attention weights: docs/definitions.md, section 5, Dropout.

What is dropped is read off the package itself: with values that are the columns of an identity, every weight is an
element of the output, and the kept ones are those that are not 0.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import helpers
import mra_attention
import oracle
import pytest
import torch
from helpers import kept_weights, random_inputs
from mra_attention import scaled_dot_product_attention
from oracle import Settings
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK = 8
SHAPE = (2, 4, 43, 51, 6)  # (B, H, Lq, Lk, D)
SETTINGS: dict[str, Any] = {"resolutions": (BLOCK, 1), "blocks_per_row": 1.5}


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("bias", ["none", "window", "additive"])
def test_matches_the_formulas(p: float, mode: str, bias: str) -> None:
    query, key, value, grad_out, grad_lse = random_inputs(SHAPE, value_dim=5, key_heads=2)
    generator = torch.Generator().manual_seed(3)
    biases = {
        "none": None,
        "window": (torch.arange(43)[:, None] - torch.arange(51)).abs() <= 13,
        "additive": torch.randn(4, 43, 51, generator=generator, dtype=torch.float64),
    }
    settings = Settings(
        block_size=BLOCK,
        blocks_per_row=1.5,
        mode=mode,
        bias=biases[bias],
        query_mask=helpers.random_mask(2, 43, seed=2),
    )
    selected = helpers.block_mask(query, key, settings)
    keep = kept_weights(SHAPE, selected, settings, p, seed=7)
    torch.manual_seed(7)
    actual = helpers.run_package(query, key, value, settings, grad_out, grad_lse, dropout_p=p)
    scaled = tuple(part.double() / (1 - p) for part in keep)
    expected = oracle.run(query, key, value, selected, settings, grad_out, grad_lse, keep=scaled)
    helpers.assert_results_close(actual, expected)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.75])
def test_the_rate_of_tokens_and_of_blocks(p: float) -> None:
    shape = (2, 2, 512, 512, 1)
    selected = torch.rand(2, 2, 64, 64, generator=torch.Generator().manual_seed(1)) < 0.5
    exact, coarse = kept_weights(shape, selected, Settings(block_size=BLOCK), p, seed=1)
    tokens = selected.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
    for kept, decided in ((exact, tokens), (coarse, ~selected)):
        total, dropped = int(decided.sum()), int((~kept).sum())
        deviation = (total * p * (1 - p)) ** 0.5
        assert abs(dropped - total * p) <= 5 * deviation
        # Batch items, heads, queries and keys are dropped independently of their neighbours.
        for dim in range(4):
            both = decided & decided.roll(1, dim)
            pairs, same = int(both.sum()), int((both & (kept == kept.roll(1, dim))).sum())
            agree = p * p + (1 - p) * (1 - p)
            assert abs(same - pairs * agree) <= 5 * (pairs * agree * (1 - agree)) ** 0.5 + 1


def test_what_is_dropped_depends_on_nothing_but_the_seed_and_the_place() -> None:
    selected = torch.rand(2, 4, 6, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    settings = Settings(block_size=BLOCK)
    first = kept_weights(SHAPE, selected, settings, 0.4, seed=1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert all(
            torch.equal(*pair)
            for pair in zip(first, kept_weights(SHAPE, selected, settings, 0.4, 1, dtype), strict=True)
        )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(
            torch.equal(*pair) for pair in zip(first, kept_weights(SHAPE, selected, settings, 0.4, 1), strict=True)
        )
    finally:
        torch.set_num_threads(before)
    # A block that is exact here and coarse there: the others keep their decisions.
    fewer = selected.clone()
    fewer[:, :, 2] = False
    other = kept_weights(SHAPE, fewer, settings, 0.4, seed=1)
    assert torch.equal(first[0][:, :, :16], other[0][:, :, :16])
    assert not torch.equal(first[0], kept_weights(SHAPE, selected, settings, 0.4, seed=2)[0])


def test_the_mean_over_seeds_is_the_result_without_dropout() -> None:
    query, key, value, *_ = random_inputs((1, 2, 43, 51, 6))
    expected = scaled_dot_product_attention(query, key, value, **SETTINGS)
    torch.manual_seed(0)
    draws = torch.stack(
        [scaled_dot_product_attention(query, key, value, dropout_p=0.3, **SETTINGS) for _ in range(500)]
    )
    deviation = draws.std(0) / len(draws) ** 0.5
    # 516 numbers, each the mean of 500 draws: beyond 5 standard deviations once in thousands of seeds.
    assert ((draws.mean(0) - expected).abs() <= 5 * deviation).all()


def test_the_seed_of_torch_decides() -> None:
    query, key, value, grad_out, grad_lse = random_inputs(SHAPE, dtype=torch.float32, key_heads=2)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        settings = Settings(block_size=BLOCK)
        results.append(helpers.run_package(query, key, value, settings, grad_out, grad_lse, dropout_p=0.3))
    helpers.assert_same_bits(results[0], results[1])
    assert not torch.equal(results[0].out, results[2].out)
    assert not torch.equal(results[0].dv, results[2].dv)
    assert torch.equal(results[0].lse, results[2].lse)  # of the weights before anything is dropped
    torch.manual_seed(1)
    outputs = [scaled_dot_product_attention(query, key, value, dropout_p=0.3, enable_gqa=True) for _ in range(2)]
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("zero", [0.0, 0])
def test_without_dropout_nothing_is_drawn(zero: float) -> None:
    query, key, value, *_ = random_inputs(SHAPE, dtype=torch.float32, key_heads=2)
    plain = scaled_dot_product_attention(query, key, value, enable_gqa=True)
    state = torch.get_rng_state()
    assert torch.equal(scaled_dot_product_attention(query, key, value, dropout_p=zero, enable_gqa=True), plain)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("one", [1.0, 1])
def test_everything_dropped(mode: str, one: float) -> None:
    inputs = random_inputs(SHAPE, dtype=torch.float32, key_heads=2)
    settings = Settings(block_size=BLOCK, mode=mode)
    plain = helpers.run_package(*inputs[:3], settings, inputs[3])
    dropped = helpers.run_package(*inputs[:3], settings, inputs[3], dropout_p=one)
    assert torch.equal(dropped.lse, plain.lse)
    assert all((x == 0).all() for x in (dropped.out, dropped.dq, dropped.dk, dropped.dv))


def test_gradcheck() -> None:
    inputs = [x.requires_grad_() for x in random_inputs((1, 2, 19, 21, 3))[:3]]
    plan = mra_attention.plan(*inputs[:2], **SETTINGS)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        return scaled_dot_product_attention(
            query, key, value, dropout_p=0.4, resolutions=(BLOCK, 1), plan=plan, return_lse=True
        )

    assert torch.autograd.gradcheck(attention, inputs, fast_mode=True)


def _gradients(function: Any, inputs: list[Tensor], seed: int) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    torch.manual_seed(seed)
    out = function(*leaves)
    torch.rand(3)  # backward must not depend on the state that it finds
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


ATTENTION = partial(scaled_dot_product_attention, dropout_p=0.3, **SETTINGS)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_drops_the_same_again(use_reentrant: bool) -> None:
    inputs = list(random_inputs((1, 2, 43, 51, 6), dtype=torch.float32)[:3])

    def checkpointed(*tensors: Tensor) -> Tensor:
        out: Tensor = checkpoint(ATTENTION, *tensors, use_reentrant=use_reentrant)  # pyright: ignore
        return out

    def gradients(function: Any) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        torch.manual_seed(4)
        out = function(*leaves)
        out.square().sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    for plain, again in zip(gradients(ATTENTION), gradients(checkpointed), strict=True):
        assert torch.equal(plain, again)


def test_compiled_calls_draw_anew_and_can_be_repeated() -> None:
    inputs = list(random_inputs((1, 2, 43, 51, 6), dtype=torch.float32)[:3])
    compiled = torch.compile(ATTENTION, fullgraph=True, backend="aot_eager")
    first = _gradients(compiled, inputs, 6)
    for a, b in zip(first, _gradients(compiled, inputs, 6), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first, _gradients(ATTENTION, inputs, 6), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert not torch.equal(compiled(*inputs), compiled(*inputs))


def test_torch_func() -> None:
    query, key, value = random_inputs((1, 2, 43, 51, 6))[:3]

    def loss(query: Tensor) -> Tensor:
        return ATTENTION(query, key, value).square().sum()

    torch.manual_seed(8)
    functional = torch.func.grad(loss)(query)
    leaf = query.clone().requires_grad_()
    torch.manual_seed(8)
    assert torch.equal(functional, torch.autograd.grad(loss(leaf), leaf)[0])


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_vmap_is_refused(randomness: str) -> None:
    query = torch.randn(3, 1, 2, 20, 4)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"random|vmap"):
        torch.vmap(lambda x: ATTENTION(x, x, x), randomness=randomness)(query)
