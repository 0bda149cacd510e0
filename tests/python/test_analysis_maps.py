"""The exact attention of a call, in chunks of rows, against a dense softmax in float64 and torch's attention."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import FLOAT64_TOLERANCE, assert_close, named
from mra_attention.analysis import AttentionCall, attention_map, logits, rows, take_queries
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

BATCH, HEADS, KEY_HEADS, QUERIES, KEYS, DIM = 2, 4, 2, 21, 27, 5


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def call_of(queries: int = QUERIES, keys: int = KEYS, **given: Any) -> AttentionCall:
    query, key = drawn(BATCH, HEADS, queries, DIM), drawn(BATCH, KEY_HEADS, keys, DIM)
    return AttentionCall(query, key, drawn(BATCH, KEY_HEADS, keys, 3), layer="layer", **given)


def dense_bias(call: AttentionCall) -> Tensor:
    """(B, H, Lq, Lk): -inf where a query does not see a key, pair by pair."""
    shape = (BATCH, HEADS, call.query.shape[2], call.key.shape[2])
    bias = torch.zeros(shape, dtype=torch.float64)
    lower_right = call.causal_alignment == "lower_right" or type(call.attn_mask) is type(causal_lower_right(1, 1))
    causal = call.is_causal or type(call.attn_mask) is type(causal_lower_right(1, 1))
    for t in range(shape[2]):
        for s in range(shape[3]):
            p = t + (shape[3] - shape[2] if lower_right else 0)
            left, right = call.window_size
            if (causal and s > p) or (left >= 0 and s < p - left) or (right >= 0 and not causal and s > p + right):
                bias[:, :, t, s] = -math.inf
            if call.alibi_slopes is not None:
                bias[:, :, t, s] -= call.alibi_slopes.double() * abs(p - s)
    mask = call.attn_mask
    if mask is not None and type(mask) is Tensor:
        bias += torch.where(mask, 0.0, -math.inf) if mask.dtype is torch.bool else mask.double()
    return bias


def dense(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Logits and weights, (B, H, Lq, Lk)."""
    key = call.key.repeat_interleave(HEADS // KEY_HEADS, 1)
    x = (call.query @ key.mT) * (1.0 / math.sqrt(DIM) if call.scale is None else call.scale)
    if call.softcap is not None:
        x = call.softcap * torch.tanh(x / call.softcap)
    x = x + dense_bias(call)
    raised = x.exp()
    total = raised.sum(-1, keepdim=True)
    if call.sinks is not None:
        total = total + call.sinks.double().exp()[:, None, None]
    return x, torch.where(raised.sum(-1, keepdim=True) > 0, raised / total, 0.0)


def calls() -> dict[str, AttentionCall]:
    padding = torch.ones(BATCH, 1, 1, KEYS, dtype=torch.bool)
    padding[0, ..., :4] = padding[1, ..., 20:] = False
    pairs = torch.rand(BATCH, HEADS, QUERIES, KEYS) < 0.6
    pairs[1, 2, 3] = False
    bias = drawn(1, HEADS, QUERIES, 1).expand(1, HEADS, QUERIES, KEYS) + drawn(1, 1, 1, KEYS)
    cap = call_of(softcap=0.7)
    return {
        "plain": call_of(),
        "causal": call_of(is_causal=True),
        "causal, more queries": call_of(KEYS, QUERIES, is_causal=True),
        "lower right": call_of(is_causal=True, causal_alignment="lower_right"),
        "lower right, more queries": call_of(KEYS, QUERIES, is_causal=True, causal_alignment="lower_right"),
        "causal bias": call_of(attn_mask=causal_lower_right(QUERIES, KEYS)),
        "window": call_of(window_size=(3, 2)),
        "causal window": call_of(window_size=(4, -1), is_causal=True),
        "window on the right": call_of(window_size=(-1, 1), causal_alignment="lower_right"),
        "padding": call_of(attn_mask=padding),
        "padding, causal": call_of(attn_mask=padding, is_causal=True),
        "pairs": call_of(attn_mask=pairs),
        "a mask of one head": call_of(attn_mask=pairs[:1, :1]),
        "a mask of queries": call_of(attn_mask=pairs[..., :1]),
        "bias": call_of(attn_mask=bias),
        "bias with -inf": call_of(attn_mask=bias.masked_fill(~pairs[:1], -math.inf)),
        "softcap": cap,
        "scale": call_of(scale=-1.5),
        "alibi": call_of(alibi_slopes=torch.rand(HEADS)),
        "alibi, lower right": call_of(alibi_slopes=torch.rand(HEADS), is_causal=True, causal_alignment="lower_right"),
        "sinks": call_of(sinks=torch.randn(HEADS), attn_mask=pairs),
        "all": call_of(
            attn_mask=bias.masked_fill(~pairs[:1], -math.inf),
            is_causal=True,
            window_size=(9, -1),
            causal_alignment="lower_right",
            scale=0.3,
            softcap=0.7,
            alibi_slopes=torch.rand(HEADS),
            sinks=torch.randn(HEADS),
        ),
    }


def test_every_kind_of_visibility():
    for name, call in calls().items():
        expected_logits, expected = dense(call)
        with named(name):
            for batch in range(BATCH):
                for head in range(HEADS):
                    parts = list(logits(call, batch, head, chunk=8))
                    assert_close(torch.cat([x.values for x in parts]), expected_logits[batch, head], "logits")
                    seen = expected_logits[batch, head] != -math.inf
                    assert torch.equal(torch.cat([x.visible for x in parts]), seen)
                    assert_close(attention_map(call, batch, head), expected[batch, head], "weights")


def test_as_torch():
    """Weights times values are the output of torch's attention."""
    for name in ("plain", "causal", "padding", "pairs", "bias", "scale", "causal bias"):
        call = calls()[name]
        given = {key: call.arguments()[key] for key in ("attn_mask", "is_causal", "scale", "enable_gqa")}
        out = torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value, **given)
        with named(name):
            for head in range(HEADS):
                weights = attention_map(call, 1, head)
                assert_close(weights @ call.value[1, head // 2], out[1, head].nan_to_num(0.0), "out")


def test_chunks_and_chosen_queries():
    call = calls()["all"]
    whole = attention_map(call, 1, 2)
    for chunk in (1, 4, QUERIES, 100):
        parts = list(rows(call, 1, 2, chunk=chunk))
        assert [x.values.shape[0] for x in parts] == [len(x) for x in torch.arange(QUERIES).split(chunk)]
        assert torch.equal(torch.cat([x.queries for x in parts]), torch.arange(QUERIES))
        assert_close(torch.cat([x.values for x in parts]), whole, f"chunk {chunk}")
    chosen = torch.tensor([0, 3, 4, 11, 20])
    some = take_queries(call, chosen)
    assert some.query_length == QUERIES
    assert torch.equal(next(rows(some, 1, 2)).queries, chosen)
    assert_close(attention_map(some, 1, 2), whole[chosen], "chosen")
    assert_close(attention_map(take_queries(some, chosen[2:4]), 1, 2), whole[chosen[2:4]], "chosen twice")
    with pytest.raises(ValueError, match="layer 'layer' lacks the query 5"):
        take_queries(some, torch.tensor([3, 5]))
    with pytest.raises(ValueError, match="lacks the query 21"):
        take_queries(call, torch.tensor([3, 21]))


def test_what_is_hidden_is_not_read():
    call = calls()["padding, causal"]
    key = call.key.clone()
    key[0, :, :4] = key[1, :, 20:] = math.nan
    for batch in range(BATCH):
        actual = attention_map(replace(call, key=key), batch, 0)
        assert torch.equal(actual, attention_map(call, batch, 0))


def test_no_gradient_is_recorded():
    call = calls()["all"]
    learned = {name: getattr(call, name).clone().requires_grad_() for name in ("query", "key", "attn_mask", "sinks")}
    learned["alibi_slopes"] = call.alibi_slopes.clone().requires_grad_()
    weights = attention_map(replace(call, **learned), 1, 1)
    assert not weights.requires_grad
    assert torch.equal(weights, attention_map(call, 1, 1))


def test_float32():
    """The error of a weight is at most its size times the error of two logits and of a sum of `Lk` numbers."""
    call = calls()["causal"]
    single = replace(call, query=call.query.float(), key=call.key.float(), value=call.value.float())
    expected = dense(replace(call, query=single.query.double(), key=single.key.double()))[1]
    eps = torch.finfo(torch.float32).eps
    largest = (call.query.norm(dim=-1).max() * call.key.norm(dim=-1).max() / math.sqrt(DIM)).item()
    tolerance = eps * (2 * (DIM + 2) * largest + KEYS + 4)
    actual = attention_map(single, 0, 1, dtype=torch.float32)
    assert actual.dtype is torch.float32
    assert_close(actual, expected[0, 1], "float32", tolerance=tolerance)
    half = replace(call, query=call.query.half(), key=call.key.half(), value=call.value.half())
    expected = dense(replace(call, query=half.query.double(), key=half.key.double()))[1]
    assert_close(attention_map(half, 0, 1), expected[0, 1], "float16 read", tolerance=FLOAT64_TOLERANCE)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_no_tensor_is_of_the_size_of_the_map():
    length, chunk = 4096, 32
    q, k = torch.randn(2, 1, 1, length, 4).unbind()
    padding = torch.ones(1, 1, 1, length, dtype=torch.bool)
    padding[..., -5:] = False
    call = AttentionCall(q, k, k, is_causal=True, window_size=(100, -1), attn_mask=padding)
    total = 0.0
    with LargestTensor() as largest:
        for some in rows(call, 0, 0, chunk=chunk, dtype=torch.float32):
            total += some.values.sum().item()
    assert total == pytest.approx(length, rel=length * torch.finfo(torch.float32).eps)
    assert largest.elements == chunk * length


def test_refusals():
    call = call_of()
    with pytest.raises(IndexError, match=r"batch must be in 0 .. 1 for layer 'layer', got 2"):
        rows(call, 2, 0)
    with pytest.raises(IndexError, match=r"head must be in 0 .. 3 for layer 'layer', got -1"):
        rows(call, 0, -1)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        rows(call, 0, 0, chunk=0)
    with pytest.raises(TypeError, match=r"dtype must be torch.float32 or torch.float64, got torch.float16"):
        rows(call, 0, 0, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"query_rows of layer 'layer' must be 21 ascending numbers"):
        rows(replace(call, query_rows=torch.arange(20)), 0, 0)
    with pytest.raises(ValueError, match="must be 21 ascending numbers"):
        rows(replace(call, query_rows=torch.arange(21).clamp(max=19)), 0, 0)
    with pytest.raises(ValueError, match="below query_length=20"):
        rows(replace(call, query_rows=torch.arange(21), query_length=20), 0, 0)
    with pytest.raises(ValueError, match="has 21 queries and query_length=30; say which they are by query_rows"):
        rows(replace(call, query_length=30), 0, 0)
    with pytest.raises(ValueError, match="attn_mask must be broadcastable"):
        rows(replace(call, attn_mask=torch.ones(3, 3, dtype=torch.bool)), 0, 0)
    with pytest.raises(ValueError, match="one batch size, got 1 and 2"):
        rows(replace(call, query=call.query[:1]), 0, 0)
    block_mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, QUERIES, KEYS, device="cpu")
    with pytest.raises(TypeError, match="attn_mask of layer 'layer' must be a tensor, got a BlockMask"):
        rows(replace(call, attn_mask=block_mask), 0, 0)  # type: ignore[arg-type]
