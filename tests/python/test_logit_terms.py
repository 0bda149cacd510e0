"""Softcap, sinks and slopes of a bias by distance: what the table of forms does not say of them."""

from __future__ import annotations

import math
from typing import Any

import mra_attention
import oracle
import pytest
import torch
from forms import FORMS, settings_of, sinks, slopes
from helpers import assert_close, call_keywords, keep_factors, random_inputs, run_package
from mra_attention import KVCache, scaled_dot_product_attention, varlen_attention
from torch import Tensor

SHAPE = (2, 4, 43, 51, 6)
WITH_SINKS = [form for form in FORMS if "sinks" in form]
CAPPED: dict[str, Any] = {"softcap": 0.7}


def gradient_of_sinks(form: str, mode: str, blocks_per_row: float) -> tuple[Tensor, Tensor]:
    """By the package, and by autograd through the formulas."""
    query, key, value, grad_out, grad_lse = random_inputs(SHAPE, key_heads=2, value_dim=5)
    settings = settings_of(form, SHAPE, mode=mode, blocks_per_row=blocks_per_row)
    selected = oracle.select(query, key, settings)
    assert settings.sinks is not None
    found = []
    for ours in (True, False):
        leaf = settings.sinks.clone().requires_grad_()
        if ours:
            keywords = call_keywords(query, key, settings) | {"sinks": leaf}
            out, lse = scaled_dot_product_attention(query, key, value, return_lse=True, **keywords)
        else:
            with_leaf = settings_of(form, SHAPE, mode=mode, blocks_per_row=blocks_per_row, sinks=leaf)
            out, lse = oracle.attention(query, key, value, selected, with_leaf)
        seen = lse.detach() > -math.inf
        target = (out * grad_out)[seen].sum() + (lse * grad_lse)[seen].sum()
        found.append(torch.autograd.grad(target, leaf)[0])
    return found[0], found[1]


@pytest.mark.parametrize("form", WITH_SINKS)
@pytest.mark.parametrize("blocks_per_row", [1.5, math.inf])
def test_gradient_of_sinks(form: str, blocks_per_row: float) -> None:
    for mode in ("full", "sparse"):
        ours, expected = gradient_of_sinks(form, mode, blocks_per_row)
        assert_close(ours, expected, f"gradient of sinks, {mode}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradient_of_sinks_has_their_dtype_and_is_near_that_of_float64(dtype: torch.dtype, is_causal: bool) -> None:
    query, key, value, grad_out, _ = random_inputs((1, 4, 200, 200, 16), dtype=dtype)
    results = []
    for cast in (dtype, torch.float64):
        leaf = sinks(SHAPE[:4]).clamp(-2.0, 2.0).to(dtype).requires_grad_()
        tensors = [x.to(cast) for x in (query, key, value)]
        selection = mra_attention.plan(query, key, is_causal=is_causal, resolutions=(8, 1)).data
        plan = mra_attention.plan(*tensors[:2], is_causal=is_causal, resolutions=(8, 1))
        plan = mra_attention.Plan(selection, plan.config, plan.query_shape, plan.key_shape, plan.settings, plan.masks)
        out = scaled_dot_product_attention(*tensors, is_causal=is_causal, sinks=leaf, plan=plan)
        (grad,) = torch.autograd.grad(out, leaf, grad_out.to(cast))
        assert grad.dtype == dtype
        results.append(grad.double())
    # Rounding of inputs of the products and of the output, each by half a unit.
    assert (results[0] - results[1]).norm() <= 4 * torch.finfo(dtype).eps * results[1].norm()


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck(is_causal: bool) -> None:
    query, key, value, *_ = random_inputs((1, 2, 19, 19, 3))
    plan = mra_attention.plan(query, key, is_causal=is_causal, resolutions=(8, 1), blocks_per_row=1.0, softcap=0.7)
    leaves = [x.requires_grad_() for x in (query, key, value, torch.tensor([0.5, -1.0], dtype=torch.float64))]

    def call(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        more: dict[str, Any] = {"is_causal": is_causal, "alibi_slopes": torch.tensor([0.5, 0.1]), "return_lse": True}
        return scaled_dot_product_attention(q, k, v, plan=plan, softcap=0.7, sinks=s, **more)

    assert torch.autograd.gradcheck(call, leaves)


def test_a_sink_far_below_changes_nothing_and_one_far_above_takes_all() -> None:
    query, key, value, grad_out, grad_lse = random_inputs(SHAPE, dtype=torch.float32)
    plain = run_package(query, key, value, settings_of("plain", SHAPE), grad_out, grad_lse)
    below = run_package(
        query, key, value, settings_of("plain", SHAPE, sinks=torch.full((4,), -1e30)), grad_out, grad_lse
    )
    for a, e in zip(below, plain, strict=True):
        assert torch.equal(a, e)
    hidden = torch.full((4,), -math.inf)
    without = run_package(query, key, value, settings_of("plain", SHAPE, sinks=hidden), grad_out, grad_lse)
    for a, e in zip(without, plain, strict=True):
        assert torch.equal(a, e)
    above = run_package(
        query, key, value, settings_of("plain", SHAPE, sinks=torch.full((4,), 1e30)), grad_out, grad_lse
    )
    assert not above.out.any()
    assert torch.equal(above.lse, torch.full_like(above.lse, 1e30))
    assert all(not grad.any() for grad in above[2:])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("magnitude", [1.0, 1e3])
def test_softcap_in_float32_is_as_near_as_torch(is_causal: bool, magnitude: float) -> None:
    """Beside plain torch in float32, against float64; also where nearly all logits reach the cap."""
    query, key, value, *_ = random_inputs((1, 2, 150, 150, 64), dtype=torch.float32)
    query = query * magnitude
    cap = 30.0

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = cap * torch.tanh(q @ k.transpose(-1, -2) / 8.0 / cap)
        if is_causal:
            logits = logits.masked_fill(torch.ones(150, 150, dtype=torch.bool).triu(1), -math.inf)
        return logits.softmax(-1) @ v

    expected = formula(query.double(), key.double(), value.double())
    ours = scaled_dot_product_attention(query, key, value, is_causal=is_causal, softcap=cap, blocks_per_row=math.inf)
    error, of_torch = ((x.double() - expected).square().mean().sqrt() for x in (ours, formula(query, key, value)))
    # A logit near the cap is rounded to a unit of it, whoever computes it.
    floor = cap * torch.finfo(torch.float32).eps / 2 * expected.square().mean().sqrt()
    assert error <= 2.0 * torch.maximum(of_torch, floor)


def test_packed_sequences_get_what_they_get_alone() -> None:
    query, key, value = (torch.randn(100, 4, 8) for _ in range(3))
    ends = [0, 30, 100]
    more: dict[str, Any] = {"is_causal": True, "resolutions": (8, 1), "blocks_per_row": 2.0}
    more |= {"softcap": 0.7, "alibi_slopes": slopes(SHAPE[:4]), "sinks": sinks(SHAPE[:4])}
    packed = varlen_attention(query, key, value, ends, ends, **more)
    for start, end in ((0, 30), (30, 100)):
        alone = [x[start:end].transpose(0, 1) for x in (query, key, value)]
        assert torch.equal(scaled_dot_product_attention(*alone, **more).transpose(0, 1), packed[start:end])


@pytest.mark.parametrize("steps", [[60], [40, 1, 1, 18]], ids=str)
def test_a_cache_gives_the_bits_of_the_whole_sequence(steps: list[int]) -> None:
    query, key, value = (torch.randn(2, 4, 60, 8) for _ in range(3))
    more: dict[str, Any] = {"softcap": 0.7, "alibi_slopes": slopes(SHAPE[:4]), "sinks": sinks(SHAPE[:4])}
    config = mra_attention.MRAConfig(resolutions=(8, 1), blocks_per_row=2)
    whole = scaled_dot_product_attention(query, key, value, is_causal=True, config=config, **more)
    cache, outs, start = KVCache(2, 4, 8, config=config), [], 0
    for count in steps:
        part = slice(start, start + count)
        cache.append(key[:, :, part], value[:, :, part])
        outs.append(cache.attend(query[:, :, part], **more))
        start += count
    assert torch.equal(torch.cat(outs, 2), whole)


def test_transforms_and_compilers_take_them() -> None:
    query, key, value = (torch.randn(3, 2, 4, 20, 8) for _ in range(3))
    leaf = sinks(SHAPE[:4]).float().clamp(-2.0, 2.0)

    def loss(s: Tensor, *tensors: Tensor) -> Tensor:
        more: dict[str, Any] = {"resolutions": (8, 1), "blocks_per_row": 1.0, "is_causal": True}
        slope = slopes(SHAPE[:4])
        return scaled_dot_product_attention(*tensors, sinks=s, softcap=0.7, alibi_slopes=slope, **more).square().sum()

    each = [
        torch.autograd.grad(loss(s, query[i], key[i], value[i]), s)[0]
        for i in range(3)
        for s in [leaf.clone().requires_grad_()]
    ]
    mapped = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(leaf, query, key, value)
    torch.testing.assert_close(mapped, torch.stack(each))
    tracked = leaf.clone().requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (grad,) = torch.autograd.grad(compiled(tracked, query[0], key[0], value[0]), tracked)
    torch.testing.assert_close(grad, each[0])


def test_mapped_terms_of_heads() -> None:
    query, key, value = (torch.randn(2, 4, 20, 8) for _ in range(3))
    of_maps = torch.rand(3, 4)

    def attend(terms: Tensor) -> Tensor:
        more: dict[str, Any] = {"resolutions": (8, 1), "blocks_per_row": 1.0}
        return scaled_dot_product_attention(query, key, value, sinks=terms, alibi_slopes=terms, **more)

    torch.testing.assert_close(torch.vmap(attend)(of_maps), torch.stack([attend(terms) for terms in of_maps]))


@pytest.mark.parametrize("form", ["softcap", "slopes", "sinks", "causal window, softcap, sinks", "causal, slopes"])
def test_dropout_beside_them(form: str) -> None:
    """Weights are dropped after the softmax, whatever its logits are made of."""
    query, key, value, *_ = random_inputs(SHAPE)
    settings = settings_of(form, SHAPE)
    selected = oracle.select(query, key, settings)
    keep = keep_factors(query, key, selected, 0.3, 5)
    torch.manual_seed(5)
    out = scaled_dot_product_attention(query, key, value, dropout_p=0.3, **call_keywords(query, key, settings))
    assert_close(out, oracle.attention(query, key, value, selected, settings, keep=keep)[0], "out")


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "negative": ({"softcap": -1.0}, ValueError, "softcap must be None or a positive number, got -1.0"),
    "infinite": ({"softcap": math.inf}, ValueError, "softcap must be"),
    "NaN": ({"softcap": math.nan}, ValueError, "softcap must be"),
    "text": ({"softcap": "30"}, TypeError, "softcap must be"),
    "a list": ({"sinks": [0.0] * 4}, TypeError, "sinks must be a torch.Tensor, got list"),
    "of other heads": ({"sinks": torch.zeros(3)}, ValueError, r"sinks must have the shape \(4,\)"),
    "integers": ({"alibi_slopes": torch.zeros(4, dtype=torch.int64)}, TypeError, "alibi_slopes must be a floating"),
    "of each item": ({"alibi_slopes": torch.zeros(2, 4)}, ValueError, r"alibi_slopes must have the shape \(4,\)"),
    "to be learned": (
        {"alibi_slopes": torch.zeros(4, requires_grad=True)},
        NotImplementedError,
        "alibi_slopes requires a gradient",
    ),
    "another device": ({"sinks": torch.zeros(4, device="meta")}, NotImplementedError, "sinks is on device meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    more, error, message = REFUSED[case]
    query, key, value, *_ = random_inputs(SHAPE)
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(query, key, value, **more)
    assert mra_attention.can_run(query, key, value, **more) is not None
    cache = KVCache(2, 4, 6, dtype=torch.float64)
    cache.append(key, key)
    expected = RuntimeError if case == "to be learned" else error
    with pytest.raises(expected, match=message.split(" ")[0]):
        cache.attend(query, **more)


def test_no_softcap_by_0() -> None:
    query, key, value, *_ = random_inputs(SHAPE)
    expected = scaled_dot_product_attention(query, key, value)
    for softcap in (0.0, 0, torch.tensor(0.0)):
        assert torch.equal(scaled_dot_product_attention(query, key, value, softcap=softcap), expected)


@pytest.mark.parametrize("window", [(-1, -1), (3, 3)], ids=["padding", "window"])
def test_queries_without_a_key_have_no_say_in_the_gradient_of_sinks(window: tuple[int, int]) -> None:
    query, key, value, grad_out, grad_lse = random_inputs((1, 4, 40, 40, 8))
    mask = (torch.arange(40) < (0 if window[0] < 0 else 10))[None, None, None]
    leaf = torch.zeros(4, requires_grad=True)
    more: dict[str, Any] = {"attn_mask": mask, "window_size": window, "sinks": leaf, "return_lse": True}
    more["query_padding_mask"] = torch.ones(1, 40, dtype=torch.bool)
    out, lse = scaled_dot_product_attention(query, key, value, **more)
    blind = lse.detach() == -math.inf
    assert blind.any()
    grads = [(grad_out, grad_lse), (grad_out.clone(), grad_lse.clone())]
    grads[1][0][blind] = math.nan
    grads[1][1][blind] = math.nan
    with_nan, without = (
        torch.autograd.grad((out, lse), leaf, given, retain_graph=True)[0] for given in reversed(grads)
    )
    assert torch.equal(with_nan, without)


@pytest.mark.parametrize("is_causal", [False, True])
def test_numbers_beyond_float32(is_causal: bool) -> None:
    query, key, value, *_ = random_inputs((1, 4, 40, 40, 8), dtype=torch.float32)
    more: dict[str, Any] = {"is_causal": is_causal, "blocks_per_row": 1.0, "resolutions": (8, 1)}
    plain = scaled_dot_product_attention(query, key, value, **more)
    for softcap in (1e30, 1e39, 1e300):
        assert torch.equal(scaled_dot_product_attention(query, key, value, softcap=softcap, **more), plain)
    even = scaled_dot_product_attention(
        torch.zeros_like(query), key, value, is_causal=is_causal, blocks_per_row=math.inf
    )
    for softcap in (1e-30, 1e-39, 1e-300):
        capped = scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, softcap=softcap, blocks_per_row=math.inf
        )
        assert_close(capped, even, "out", tolerance=1e-6)
    for large in (1e39, math.inf):
        terms = torch.full((4,), large, dtype=torch.float64)
        out, lse = scaled_dot_product_attention(query, key, value, sinks=terms, return_lse=True, **more)
        assert not out.any()
        assert lse.isfinite().all()
        nearest = scaled_dot_product_attention(query, key, value, alibi_slopes=terms, **more)
        assert not nearest.isnan().any()


def test_a_plan_with_softcap_is_used_with_another() -> None:
    """What is selected is the plan's; what is computed, the call's."""
    query, key, value, *_ = random_inputs(SHAPE)
    plan = mra_attention.plan(query, key, resolutions=(8, 1), blocks_per_row=1.5)
    capped = scaled_dot_product_attention(query, key, value, plan=plan, **CAPPED)
    settings = settings_of("plain", SHAPE, blocks_per_row=1.5, **CAPPED)
    expected, _ = oracle.attention(query, key, value, plan.block_mask(), settings)
    assert_close(capped, expected, "out")


@pytest.mark.parametrize("blocks_per_row", [2.0, math.inf])
def test_positions_far_from_the_start_lose_no_precision(blocks_per_row: float) -> None:
    """Distances are exact in float32 wherever they lie: positions of 24 bits times a slope would not be."""
    length, slope = 3_000_000, torch.tensor([0.3])
    key, value = (torch.randn(1, 1, 100, 4).repeat(1, 1, length // 100, 1) for _ in range(2))
    query, results = torch.randn(1, 1, 3, 4), []
    for dtype in (torch.float32, torch.float64):
        cache = KVCache(1, 1, 4, dtype=dtype, max_length=length, blocks_per_row=blocks_per_row)
        cache.append(key.to(dtype), value.to(dtype))
        window = (-1, -1) if blocks_per_row == 2.0 else (5000, -1)
        results.append(cache.attend(query.to(dtype), alibi_slopes=slope, window_size=window))
    assert_close(results[0], results[1], "out", tolerance=16 * torch.finfo(torch.float32).eps)
