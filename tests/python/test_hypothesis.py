"""Random shapes, layouts, causality, windows, masks, biases, dropout and budgets against the dense evaluation."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from helpers import (
    assert_results_close,
    assert_same_selection,
    block_mask,
    keep_factors,
    random_inputs,
    run_package,
)
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from oracle import Result, Settings
from torch import Tensor

EFFORT = settings(
    max_examples=3 * settings.default.max_examples,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

# torch warns that queries before the first key see nothing.
pytestmark = [
    pytest.mark.threads(3),  # the fewer blocks than threads, the better
    pytest.mark.filterwarnings("ignore:Lower right causal bias:UserWarning"),
]
LAYOUTS = st.sampled_from(["contiguous", "transposed", "strided", "expanded"])
MASKS = st.sampled_from(["none", "right", "left", "holes", "nothing"])
PAIRS = st.sampled_from(
    ["none", "none", "window", "documents", "causal", "holes", "bias", "bias of documents", "lowest"]
)
DROPOUT_SEED = 11


class Case(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    grad_lse: Tensor
    settings: Settings
    dropout_p: float


def lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        return x.repeat_interleave(3, -1)[..., ::3]
    if layout == "expanded" and x.shape[0] > 0:
        return x[:1].expand_as(x)
    return x


def draw_mask(draw: st.DrawFn, batch: int, length: int) -> Tensor | None:
    kind = draw(MASKS)
    if kind == "none":
        return None
    if kind == "nothing":
        return torch.zeros(batch, length, dtype=torch.bool)
    if kind == "holes":
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
        return torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.05, 0.5, 0.95]))
    lengths = torch.tensor(draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch)), dtype=torch.int64)
    mask = torch.arange(length) < lengths[:, None]
    return mask if kind == "right" else mask.flip(-1)


def draw_pairs(draw: st.DrawFn, full: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """A mask or bias of pairs, as settings: of any shape that broadcasts to (B, H, Lq, Lk)."""
    kind = draw(PAIRS)
    if kind == "none" or 0 in full:
        return {}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    batch, heads, rows, columns = (size if draw(st.booleans()) else 1 for size in full)
    numbers = torch.randn(batch, heads, rows, columns, generator=generator, dtype=torch.float64)
    distance = torch.arange(full[2])[:, None] - torch.arange(full[3])
    documents = torch.arange(full[2])[:, None] // 13 == torch.arange(full[3]) // 13
    masks = {
        "causal": distance >= 0,
        "window": distance.abs() <= 11,
        "documents": documents,
        "holes": numbers > draw(st.sampled_from([-2, 0, 2])),
    }
    if kind not in masks:
        if kind == "bias of documents":
            numbers = numbers.masked_fill(~documents, -math.inf)
        if kind == "lowest":
            numbers = numbers.masked_fill(numbers > 0, draw(st.sampled_from([-300.0, -1e4])))
        return {"bias": numbers.to(dtype if draw(st.booleans()) else torch.float32)}
    mask = masks[kind]
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    if mask.shape[1] == mask.shape[2] == 1:  # key padding: those keys are in no average either
        return {"key_mask": mask[:, 0, 0].expand(full[0], full[3])}
    return {"bias": mask}


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    batch, key_heads, group = draw(st.integers(0, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    block_size = draw(st.integers(8, 40))
    lengths = st.one_of(
        st.integers(0, 8 * block_size), st.sampled_from([1, block_size - 1, block_size, block_size + 1])
    )
    query_length = draw(lengths)
    key_length = draw(st.one_of(st.just(query_length), lengths))
    dim, value_dim = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    tensors = random_inputs(
        (batch, key_heads * group, query_length, key_length, dim),
        value_dim=value_dim,
        key_heads=key_heads,
        dtype=dtype,
        magnitude=draw(st.sampled_from([0.1, 1.0, 4.0])),
        seed=draw(st.integers(0, 2**20)),
    )
    query, key, value, grad_out = (lay_out(x, draw(LAYOUTS)) for x in tensors[:4])
    num_blocks = draw(st.one_of(st.none(), st.integers(1, 80)))
    rate = st.one_of(st.floats(0.01, 10.0), st.just(math.inf))
    heads = key_heads * group
    query_mask, key_mask = draw_mask(draw, batch, query_length), draw_mask(draw, batch, key_length)
    masks: dict[str, Any] = {"query_mask": query_mask, "key_mask": key_mask}
    if key_mask is None:
        masks |= draw_pairs(draw, (batch, heads, query_length, key_length), dtype)
    # A CausalBias is the attn_mask itself.
    free = masks["key_mask"] is None and "bias" not in masks
    config = Settings(
        block_size=block_size,
        mode=draw(st.sampled_from(["full", "sparse"])),
        score=draw(st.sampled_from(["mean", "max"])),
        coarse_shift=draw(st.sampled_from([0.0, 0.0, 0.8, -1.5])),
        blocks_per_row=4.0 if num_blocks is not None else draw(rate | st.lists(rate, min_size=heads, max_size=heads)),
        num_blocks=num_blocks,
        first_blocks=draw(st.sampled_from([None, None, 0, 1, 2])),
        diagonal_blocks=draw(st.sampled_from([0, 0, 1, 2, 3])),
        local_blocks=draw(st.sampled_from([1, 1, 1, 2, 3])),
        pool_queries=draw(st.sampled_from([True, True, True, False])),
        is_causal=draw(st.sampled_from([False, False, True])),
        lower_right=free and draw(st.booleans()) and draw(st.booleans()),
        window=draw(st.sampled_from([(-1, -1), (-1, -1), (-1, 6), (9, 4), (30, -1), (0, 0)])),
        scale=draw(st.sampled_from([None, None, 0.125, 1.0])),
        **masks,
    )
    dropout_p = draw(st.sampled_from([0.0, 0.0, 0.3]))
    event(f"forms {sorted(set(oracle.forms(query, key, config)))}")
    event(f"mode {config.mode}, key mask {config.key_mask is not None}, query mask {config.query_mask is not None}")
    event(f"bias {None if config.bias is None else config.bias.dtype}, dropout {dropout_p}")
    return Case(query, key, value, grad_out, tensors[4], config, dropout_p)


def compute(case: Case, selected: Tensor) -> tuple[Result, Result]:
    """What the package gives, and what the formulas give."""
    query, key, value, grad_out, grad_lse, config, p = case
    if p == 0.0:
        keep, more = None, {}
    else:
        keep, more = keep_factors(query, key, selected, p, DROPOUT_SEED), {"dropout_p": p}
    torch.manual_seed(DROPOUT_SEED)
    actual = run_package(query, key, value, config, grad_out, grad_lse, **more)
    return actual, oracle.run(query, key, value, selected, config, grad_out, grad_lse, keep=keep)


@EFFORT
@given(case=cases(torch.float64))
def test_float64_agrees_with_the_oracle(case):
    query, key, config = case.query, case.key, case.settings
    selected = block_mask(query, key, config)
    assert_same_selection(selected, oracle.select(query, key, config))
    assert_results_close(*compute(case, selected))


def natural_magnitudes(case: Case) -> Result:
    """For every result a magnitude of the sums that it is made of: what rounding errors are relative to.

    Rounding a logit moves it by eps * |P|; a probability then moves by as much, and so on through the closed form.
    Largest norms stand for each factor, and the sums over tokens run over all of them.
    """
    query, key, value, grad_out, grad_lse, config, p = case
    valid_query = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool)
    valid_query = valid_query if config.query_mask is None else config.query_mask
    valid_key = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool)
    valid_key = valid_key if config.key_mask is None else config.key_mask

    def largest(x: Tensor, valid: Tensor) -> float:
        norms = x.double().norm(dim=-1)[valid[:, None].expand(x.shape[:-1])]
        return norms.max().item() if norms.numel() else 0.0

    q, k = largest(query, valid_query), largest(key, valid_key)
    v, g = largest(value, valid_key) / (1 - p), largest(grad_out, valid_query)
    scale = 1.0 / math.sqrt(query.shape[-1]) if config.scale is None else config.scale
    bias = torch.zeros(1) if config.bias is None or config.bias.dtype == torch.bool else config.bias
    logit = 1.0 + 2.0 * scale * q * k + bias[bias.isfinite()].abs().max().item()
    ds = 2.0 * g * v + (grad_lse.abs().max().item() if grad_lse.numel() else 0.0)
    tokens = query.shape[2] * (query.shape[1] // key.shape[1])
    return Result(
        out=torch.tensor(logit * v),
        lse=torch.tensor(logit + math.log1p(key.shape[2])),
        dq=torch.tensor(logit * scale * ds * k),
        dk=torch.tensor(tokens * logit * scale * ds * q),
        dv=torch.tensor(tokens * logit * g / (1 - p)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@EFFORT
@given(data=st.data())
def test_lower_precision_stays_near_the_oracle(dtype, data):
    """Shapes of any size, also too small for statistics: two roundings relative to the magnitude of what is summed.

    test_oracle.py and test_sdpa_parity.py hold larger shapes to the error of plain torch.
    """
    case = data.draw(cases(dtype))
    actual, expected = compute(case, block_mask(case.query, case.key, case.settings))
    eps = torch.finfo(dtype).eps
    for name, a, e, magnitude in zip(Result._fields, actual, expected, natural_magnitudes(case), strict=True):
        hidden = e.isinf()
        assert torch.equal(a.double()[hidden], e[hidden]), name
        error = (a.double() - e).masked_fill(hidden, 0.0).abs()
        assert a.masked_fill(hidden, 0.0).isfinite().all(), name
        if error.numel():
            assert error.max().item() <= 2 * eps * magnitude.item(), name
