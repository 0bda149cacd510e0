"""Random lives of a cache of keys and values: what it gives is what causal attention gives for the whole sequences."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from helpers import assert_close
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from mra_attention import KVCache, scaled_dot_product_attention
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

# torch warns that queries before the first key see nothing.
pytestmark = [
    pytest.mark.threads(3),
    pytest.mark.filterwarnings("ignore:Lower right causal bias:UserWarning"),
]

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
        score=st.sampled_from(["mean", "max"]),
        blocks=st.integers(1, 4),
        local=st.integers(1, 2),
        first=st.integers(0, 2),
        window=st.sampled_from([-1, -1, 0, 7, 20]),
        data=st.data(),
    )
    def attend(
        self, count: int, mode: str, score: str, blocks: int, local: int, first: int, window: int, data: st.DataObject
    ) -> None:
        query = self.numbers(len(self.history), HEADS, count, DIM)
        lengths = self.some_lengths(data, count)
        chosen: dict[str, Any] = {"mode": mode, "score": score, "coarse_shift": 0.5 * (score == "max")}
        chosen |= {"blocks_per_row": blocks, "local_blocks": local, "first_blocks": first}
        chosen |= {"enable_gqa": True, "return_lse": True, "window_size": (window, -1)}
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
