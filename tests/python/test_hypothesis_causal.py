"""Random shapes, positions, budgets and dropout of causal attention, and random lives of a cache of keys and values."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import oracle_causal
import pytest
import torch
from helpers import assert_close, assert_results_close, random_inputs
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from mra_attention import CausalPlan, KVCache, plan, scaled_dot_product_attention
from oracle import Result
from oracle_causal import CausalSettings
from test_causal import kept
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

OPS = torch.ops.mra_attention
EFFORT = settings(
    max_examples=2 * settings.default.max_examples,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

# torch warns that queries before the first key see nothing.
pytestmark = pytest.mark.filterwarnings("ignore:Lower right causal bias:UserWarning")


class Case(NamedTuple):
    inputs: tuple[Tensor, Tensor, Tensor]
    grad_out: Tensor
    grad_lse: Tensor
    settings: CausalSettings


def lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        return x.repeat_interleave(3, -1)[..., ::3]
    return x


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    batch, key_heads, group = draw(st.integers(0, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    block_size = draw(st.integers(8, 40))
    lengths = st.one_of(
        st.integers(0, 4 * block_size), st.sampled_from([1, block_size - 1, block_size, block_size + 1])
    )
    query_length = draw(lengths)
    key_length = draw(st.one_of(st.just(query_length), lengths))
    tensors = random_inputs(
        (batch, key_heads * group, query_length, key_length, draw(st.integers(1, 40))),
        value_dim=draw(st.integers(0, 40)),
        key_heads=key_heads,
        dtype=dtype,
        magnitude=draw(st.sampled_from([0.1, 1.0, 4.0])),
        seed=draw(st.integers(0, 2**20)),
    )
    query, key, value, grad_out = (
        lay_out(x, draw(st.sampled_from(["contiguous", "transposed", "strided"]))) for x in tensors[:4]
    )
    config = CausalSettings(
        block_size=block_size,
        mode=draw(st.sampled_from(["full", "sparse"])),
        blocks=draw(st.integers(1, 6)),
        local_blocks=draw(st.sampled_from([1, 1, 2, 3])),
        first_blocks=draw(st.sampled_from([0, 0, 1, 2])),
        scale=draw(st.sampled_from([None, None, 0.125, -1.0])),
        offset=draw(st.sampled_from([0, key_length - query_length])),
    )
    event(f"mode {config.mode}, {'upper left' if config.offset == 0 else 'lower right'}")
    return Case((query, key, value), grad_out, tensors[4], config)


def run(case: Case, **more: Any) -> tuple[Result, CausalPlan]:
    """What the package gives, and the blocks that it chooses."""
    leaves = [x.detach().requires_grad_() for x in case.inputs]
    lengths = leaves[0].shape[2], leaves[1].shape[2]
    mask = causal_upper_left(*lengths) if case.settings.offset == 0 else causal_lower_right(*lengths)
    keywords: dict[str, Any] = case.settings.keywords() | {"attn_mask": mask, "enable_gqa": True}
    out, lse = scaled_dot_product_attention(*leaves, return_lse=True, **keywords, **more)
    grads = torch.autograd.grad((out, lse), leaves, (case.grad_out, case.grad_lse))
    return Result(out.detach(), lse.detach(), *grads), plan(*leaves[:2], **keywords)


@EFFORT
@given(case=cases(torch.float64))
def test_float64_agrees_with_the_formulas(case):
    actual, chosen = run(case)
    selected = chosen.block_mask()
    assert torch.equal(selected, oracle_causal.select(*case.inputs[:2], case.settings))
    expected = oracle_causal.run(*case.inputs, selected, case.settings, case.grad_out, case.grad_lse)
    assert_results_close(actual, expected)


@EFFORT
@given(case=cases(torch.float64), seed=st.integers(0, 2**20))
def test_dropout_agrees_with_the_formulas(case, seed):
    case = case._replace(settings=replace(case.settings, offset=0))
    _, chosen = run(case)
    keep = kept(chosen, 0.3, seed).double() / 0.7
    torch.manual_seed(seed)
    actual, _ = run(case, dropout_p=0.3)
    cotangents = (case.grad_out, case.grad_lse, keep)
    expected = oracle_causal.run(*case.inputs, chosen.block_mask(), case.settings, *cotangents)
    assert_results_close(actual, expected)


def magnitudes(case: Case) -> Result:
    """For every result a magnitude of the sums that it is made of: what rounding errors are relative to."""
    query, key, value = case.inputs

    def norm(x: Tensor) -> float:
        return x.double().norm(dim=-1).max().item() if x.numel() else 0.0

    q, k, v, g = (norm(x) for x in (query, key, value, case.grad_out))
    scale = 1.0 / math.sqrt(query.shape[-1]) if case.settings.scale is None else abs(case.settings.scale)
    logit = 1.0 + 2.0 * scale * q * k
    ds = 2.0 * g * v + (case.grad_lse.abs().max().item() if case.grad_lse.numel() else 0.0)
    tokens = query.shape[2] * (query.shape[1] // key.shape[1])
    numbers = (
        logit * v,
        logit + math.log1p(key.shape[2]),
        logit * scale * ds * k,
        tokens * logit * scale * ds * q,
        tokens * logit * g,
    )
    return Result(*(torch.tensor(x) for x in numbers))


@DTYPES
@EFFORT
@given(data=st.data())
def test_lower_precision_stays_near_the_formulas(dtype, data):
    case = data.draw(cases(dtype))
    actual, chosen = run(case)
    expected = oracle_causal.run(*case.inputs, chosen.block_mask(), case.settings, case.grad_out, case.grad_lse)
    eps = torch.finfo(dtype).eps
    for name, a, e, magnitude in zip(Result._fields, actual, expected, magnitudes(case), strict=True):
        hidden = e.isinf()
        assert torch.equal(a.double()[hidden], e[hidden]), name
        assert a.masked_fill(hidden, 0.0).isfinite().all(), name
        error = (a.double() - e).masked_fill(hidden, 0.0).abs()
        if error.numel():
            assert error.max().item() <= 2 * eps * magnitude.item(), name


@EFFORT
@given(data=st.data())
def test_items_of_their_own_lengths_and_positions(data):
    """What the cache asks of the operator: nothing behind the last key of an item is read."""
    case = data.draw(cases(torch.float64))
    query, key, value = (x.clone() for x in case.inputs)
    batch, length = key.shape[0], key.shape[2]
    numbers = st.lists(st.integers(0, length), min_size=batch, max_size=batch)
    lengths, positions = (
        data.draw(numbers),
        data.draw(st.lists(st.integers(-50, length + 50), min_size=batch, max_size=batch)),
    )
    clean = [x.clone() for x in (query, key, value)]
    for item, end in enumerate(lengths):
        key[item, :, end:] = value[item, :, end:] = math.nan
        clean[1][item, :, end:] = clean[2][item, :, end:] = 0.0
    config = CausalSettings(
        **(vars(case.settings) | {"scale": 0.3, "offset": tuple(positions), "key_length": tuple(lengths)})
    )
    leaves = [x.requires_grad_() for x in (query, key, value)]
    sizes = (
        0.3,
        config.block_size,
        config.mode == "sparse",
        config.blocks,
        config.local_blocks,
        config.first_blocks,
        0.0,
    )
    out, lse, blocks = OPS.causal_forward(*leaves, None, None, positions, lengths, *sizes)
    selected = CausalPlan(blocks, length, config.block_size, 0).block_mask()
    assert torch.equal(selected, oracle_causal.select(clean[0], clean[1], config))
    grads = torch.autograd.grad((out, lse), leaves, (case.grad_out, case.grad_lse))
    expected = oracle_causal.run(*clean, selected, config, case.grad_out, case.grad_lse)
    assert_results_close(Result(out.detach(), lse.detach(), *grads), expected)


BLOCK_SIZE, KEY_HEADS, HEADS, DIM, VALUE_DIM = 8, 2, 4, 5, 3


class Life(RuleBasedStateMachine):
    """A cache, and beside it the keys and values that each of its sequences should hold."""

    @initialize(
        batch=st.integers(0, 3),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        max_length=st.sampled_from([None, 60]),
    )
    def begin(self, batch: int, dtype: torch.dtype, max_length: int | None) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.dtype, self.max_length = dtype, max_length
        self.cache = KVCache(
            batch, KEY_HEADS, DIM, VALUE_DIM, dtype=dtype, resolutions=(BLOCK_SIZE, 1), max_length=max_length
        )
        self.history = [(self.numbers(KEY_HEADS, 0, DIM), self.numbers(KEY_HEADS, 0, VALUE_DIM)) for _ in range(batch)]

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def some_lengths(self, data: st.DataObject, most: int) -> list[int] | None:
        size = len(self.history)
        return data.draw(st.none() | st.lists(st.integers(0, most), min_size=size, max_size=size))

    @rule(count=st.integers(0, 30), data=st.data())
    def append(self, count: int, data: st.DataObject) -> None:
        size = len(self.history)
        key, value = self.numbers(size, KEY_HEADS, count, DIM), self.numbers(size, KEY_HEADS, count, VALUE_DIM)
        lengths = self.some_lengths(data, count)
        new = [count] * size if lengths is None else lengths
        longest = max((old[0].shape[1] + n for old, n in zip(self.history, new, strict=True)), default=0)
        for item, n in enumerate(new):
            key[item, :, n:] = value[item, :, n:] = math.nan
        if self.max_length is not None and longest > self.max_length:
            with pytest.raises(ValueError, match=f"{longest} tokens, more than max_length=60"):
                self.cache.append(key, value, lengths)
            return
        self.cache.append(key, value, lengths)
        self.history = [
            (torch.cat([old[0], key[item, :, :n]], 1), torch.cat([old[1], value[item, :, :n]], 1))
            for item, (old, n) in enumerate(zip(self.history, new, strict=True))
        ]

    @rule(
        count=st.integers(0, 20),
        mode=st.sampled_from(["full", "sparse"]),
        blocks=st.integers(1, 4),
        local=st.integers(1, 2),
        first=st.integers(0, 2),
        data=st.data(),
    )
    def attend(self, count: int, mode: str, blocks: int, local: int, first: int, data: st.DataObject) -> None:
        query = self.numbers(len(self.history), HEADS, count, DIM)
        lengths = self.some_lengths(data, count)
        chosen: dict[str, Any] = {"mode": mode, "blocks_per_row": blocks, "local_blocks": local, "first_blocks": first}
        chosen |= {"enable_gqa": True, "return_lse": True}
        out, lse = self.cache.attend(query, lengths=lengths, **chosen)
        assert out.shape == (len(self.history), HEADS, count, VALUE_DIM)
        for item, (key, value) in enumerate(self.history):
            n = count if lengths is None else lengths[item]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                bias = causal_lower_right(n, key.shape[1])
            expected = scaled_dot_product_attention(
                query[item, :, :n], key, value, attn_mask=bias, resolutions=(BLOCK_SIZE, 1), **chosen
            )
            assert torch.equal(out[item, :, :n], expected[0])
            assert torch.equal(lse[item, :, :n], expected[1])
            assert (out[item, :, n:] == 0).all()
            assert (lse[item, :, n:] == -math.inf).all()

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        size = len(self.history)
        indices = data.draw(st.lists(st.integers(0, size - 1), max_size=4) if size else st.just([]))
        self.cache.reorder(indices)
        self.history = [self.history[index] for index in indices]

    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        each = self.some_lengths(data, 70)
        most = data.draw(st.integers(0, 70)) if each is None else each
        self.cache.crop(most)
        most = [most] * len(self.history) if isinstance(most, int) else most
        self.history = [(k[:, :n], v[:, :n]) for (k, v), n in zip(self.history, most, strict=True)]

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.history = [(key[:, :0], value[:, :0]) for key, value in self.history]

    @invariant()
    def lengths(self) -> None:
        if hasattr(self, "cache"):
            assert self.cache.lengths == tuple(key.shape[1] for key, _ in self.history)
            assert self.cache.length == max(self.cache.lengths, default=0) <= self.cache.capacity
            assert self.cache.batch_size == len(self.history)


class TestLife(Life.TestCase):
    """Operations in any order give what causal attention gives for the whole sequences, to the bit."""

    settings = settings(stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_a_wrong_step_would_be_seen() -> None:
    """The comparison of the cache: a token more or less changes the bits."""
    query, key = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 20, 4)
    full, less = (
        scaled_dot_product_attention(query, k, k, attn_mask=causal_lower_right(1, k.shape[2]))
        for k in (key, key[:, :, 1:])
    )
    assert not torch.equal(full, less)
    assert_close(full, full, "itself")
