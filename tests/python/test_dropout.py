"""Dropout of attention weights: docs/definitions.md, section 6, Dropout."""

from __future__ import annotations

from functools import partial
from typing import Any

import helpers
import mra_attention
import oracle
import oracle_dropout
import pytest
import torch
from forms import by_form, settings_of
from helpers import random_inputs
from mra_attention import scaled_dot_product_attention
from oracle import Settings
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK = 8
SHAPE = (2, 4, 43, 51, 6)  # (B, H, Lq, Lk, D)
SETTINGS: dict[str, Any] = {"resolutions": (BLOCK, 1), "blocks_per_row": 1.5}


@pytest.mark.parametrize("p", [0.1, 0.5])
@by_form
def test_matches_the_formulas(p: float, form: str) -> None:
    query, key, value, grad_out, grad_lse = random_inputs(SHAPE, value_dim=5, key_heads=2)
    for mode in ("full", "sparse"):
        settings = settings_of(form, SHAPE, mode=mode)
        selected = helpers.block_mask(query, key, settings)
        keep = helpers.keep_factors(query, key, selected, p, torch_seed=7)
        torch.manual_seed(7)
        actual = helpers.run_package(query, key, value, settings, grad_out, grad_lse, dropout_p=p)
        expected = oracle.run(query, key, value, selected, settings, grad_out, grad_lse, keep=keep)
        helpers.assert_results_close(actual, expected)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.75])
def test_decisions_are_those_of_independent_draws(p: float) -> None:
    """Batch items, heads, rows and columns, keys and blocks, and seeds: within five standard deviations."""
    shape = (2, 2, 256, 256)
    of_seed = [oracle_dropout.kept_weights(seed, p, shape, shape) for seed in (1, 2)]
    agree = p * p + (1 - p) * (1 - p)

    def assert_rate(count: int, total: int, expected: float) -> None:
        assert abs(count - total * expected) <= 5 * (total * expected * (1 - expected)) ** 0.5 + 1

    for kept in of_seed[0]:
        assert_rate(int((~kept).sum()), kept.numel(), p)
        for dim in range(4):
            neighbours = kept == kept.roll(1, dim)
            assert_rate(int(neighbours.sum()), kept.numel(), agree)
    assert_rate(int((of_seed[0][0] == of_seed[0][1]).sum()), of_seed[0][0].numel(), agree)
    assert_rate(int((of_seed[0][0] == of_seed[1][0]).sum()), of_seed[0][0].numel(), agree)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_dropped_depends_on_nothing_but_the_seed_and_the_place(dtype: torch.dtype, causal: bool) -> None:
    """With values that are the columns of an identity, every weight is an element of the output."""
    batch, heads, rows, columns, _ = SHAPE
    inputs = [torch.zeros(batch, heads, length, 1, dtype=dtype) for length in (rows, columns)]
    settings = Settings(block_size=BLOCK, blocks_per_row=2.0, is_causal=causal)
    value = torch.eye(columns, dtype=dtype).expand(batch, heads, columns, columns)
    selected = helpers.block_mask(*inputs, settings)
    wide = [x.double() for x in (*inputs, value)]
    keep = helpers.keep_factors(*inputs, selected, 0.4, torch_seed=3)
    expected, _ = oracle.attention(*wide, selected, settings, keep=keep)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(3)
            out = scaled_dot_product_attention(*inputs, value, dropout_p=0.4, **settings.keywords())
            assert torch.equal(out == 0, expected == 0)
            out = scaled_dot_product_attention(*inputs, value, dropout_p=0.4, **settings.keywords())
            assert not torch.equal(out == 0, expected == 0)
    finally:
        torch.set_num_threads(before)


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
