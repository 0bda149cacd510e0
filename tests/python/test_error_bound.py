"""Bounds of errors: never violated, against the formulas in float64, and as tight as they say."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import mra_attention
import oracle
import pytest
import torch
from forms import FORMS, settings_of
from helpers import call_keywords, named, plan_keywords, random_inputs
from hypothesis import given
from mra_attention.analysis import AttentionCall, ErrorBound, error_bound, mass_bounds
from oracle import Settings
from oracle_terms import repeat
from torch import Tensor

SUPPORTED = [form for form in FORMS if "first order" not in form and "padded queries" not in form]
EPS = torch.finfo(torch.float64).eps


def call_of(q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> AttentionCall:
    keywords = call_keywords(q, k, replace(settings, lower_right=False))
    names = ("attn_mask", "is_causal", "window_size", "scale", "softcap", "alibi_slopes", "sinks")
    given = {name: keywords[name] for name in names if name in keywords}
    if settings.lower_right:
        given |= {"is_causal": True, "causal_alignment": "lower_right"}
    return AttentionCall(q, k, v, **given)


def bound_of(inputs: tuple[Tensor, Tensor, Tensor], settings: Settings, ranges: Any) -> tuple[ErrorBound, Any]:
    q, k, v = inputs
    plan = mra_attention.plan(q, k, **plan_keywords(q, k, settings))
    levels = [oracle.stack(plan.block_masks(level), q.shape[1]) for level in range(len(settings.levels()))]
    return error_bound(call_of(q, k, v, settings), plan, ranges=ranges), tuple(levels)


def matrices(q: Tensor, k: Tensor, selected: Any, settings: Settings, item: int) -> tuple[Tensor, Tensor, Tensor]:
    """A and its approximation, (H, Lq, Lk), as logarithms, and the valid queries."""
    geometries = oracle._levels(q, k, settings)[item]
    xs = [oracle.item_of(q[item], k[item], settings, g, torch.float64) for g in geometries]
    terms = oracle._terms_of_levels(xs, [level[item] for level in selected], settings)
    exact = xs[-1].logits.masked_fill(~xs[-1].g.visible, -math.inf)
    found = exact.masked_fill(~terms[-1].keys, -math.inf)
    for x, level in zip(xs, terms, strict=True):
        for block in range(level.blocks.shape[-1]):
            here = level.blocks[..., block, None] & x.g.member[block]
            logits = level.block_logits[..., block, None] + settings.coarse_shift
            found = torch.where(here, logits, found)
    g = xs[-1].g
    valid = g.answers & (g.key_valid if q.shape[2] == k.shape[2] else torch.ones_like(g.answers))
    return exact[:, valid], found[:, valid], valid


def rounding(q: Tensor, k: Tensor, settings: Settings) -> float:
    """What computing in float64 may change a logarithm of a sum of exponentials by, here and in the oracle."""
    scale = q.shape[-1] ** -0.5
    largest = scale * q.norm(dim=-1).max().item() * k.norm(dim=-1).max().item()
    bias = settings.bias
    if bias is not None and bias.dtype is not torch.bool:
        largest += bias[bias.isfinite()].abs().amax().item()
    if settings.alibi_slopes is not None:
        largest += settings.alibi_slopes.max().item() * (q.shape[2] + k.shape[2])
    return 4 * EPS * ((q.shape[-1] + 4) * largest + k.shape[2] + 32)


def one_or_all(levels: tuple[Tensor, ...]) -> Any:
    return levels if len(levels) > 1 else levels[0]


def assert_bounds_hold(inputs: tuple[Tensor, Tensor, Tensor], settings: Settings, ranges: str) -> ErrorBound:
    q, k, v = inputs
    bound, selected = bound_of(inputs, settings, ranges)
    everything = tuple(torch.ones_like(level) for level in selected)
    exact, exact_lse = oracle.attention(q, k, v, one_or_all(everything), replace(settings, mode="full"))
    out, lse = oracle.attention(q, k, v, one_or_all(selected), settings)
    slack, size = rounding(q, k, settings), v.norm(dim=-1).max().item()
    sees = exact_lse > -math.inf
    change = (exact_lse - lse)[sees]
    assert (bound.lse_low[sees] - slack <= change).all()
    assert (change <= bound.lse_high[sees] + slack).all()
    error = (out - exact).norm(dim=-1)
    assert (error <= bound.output * (1 + slack) + 8 * slack * size).all(), (error - bound.output).max()
    assert not bound.output[~sees].any()
    for item in range(q.shape[0]):
        log_exact, log_found, valid = matrices(q, k, selected, settings, item)
        if not valid.any():
            continue
        largest = torch.maximum(log_exact, log_found).flatten(1).amax(1)[:, None, None]
        largest = torch.where(largest > -math.inf, largest, 0.0)
        off = ((log_found - largest).exp() - (log_exact - largest).exp()).square().sum((1, 2)).sqrt()
        norm = (log_exact - largest).exp().square().sum((1, 2)).sqrt()
        seen = norm > 0
        for name in ("paper", "sharp", "uniform"):
            of_matrix = getattr(bound, name)[item]
            assert (off[seen] / norm[seen] <= of_matrix[seen] * (1 + 4 * slack) + 8 * slack).all(), name
        errors, sizes = ((x[item][:, valid].square().sum((1, 2)).sqrt()) for x in (out - exact, exact))
        assert (errors <= bound.relative[item] * sizes * (1 + slack) + 8 * slack * size * len(valid)).all()
    assert (bound.sharp <= bound.paper).all()
    assert (bound.paper <= bound.uniform * (1 + 1e-12)).all()
    return bound


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[Tensor, Tensor, Tensor], Settings, str]:
    form = draw(st.sampled_from(SUPPORTED))
    lengths = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    if draw(st.booleans()) or "documents" in form:
        lengths = (lengths[0], lengths[0])
    if "lower right" in form:  # torch warns of queries without a key
        lengths = (min(lengths), max(lengths))
    groups = draw(st.sampled_from([1, 2]))
    shape = (draw(st.integers(1, 2)), 2 * groups, *lengths, draw(st.sampled_from([1, 3, 8])))
    magnitude = draw(st.sampled_from([0.0, 0.3, 1.0, 4.0, 100.0]))
    q, k, v, *_ = random_inputs(shape, key_heads=2, magnitude=magnitude, seed=draw(st.integers(0, 2**20)))
    if draw(st.booleans()):  # ties: keys that are the same
        k = k[:, :, torch.arange(shape[3]) // 3]
    settings = settings_of(
        form,
        shape,
        mode=draw(st.sampled_from(["full", "full", "sparse"])),
        coarse_shift=draw(st.sampled_from([0.0, 0.0, 0.7, -2.0])),
        blocks_per_row=draw(st.sampled_from([1.0, 2.0])),
        block_size=draw(st.sampled_from([4, 8])),
        coarser=draw(st.sampled_from([(), (), (16,), (32, 16)])),
    )
    ranges = "keys" if settings.softcap else draw(st.sampled_from(["keys", "norms"]))
    return (q, k, v), settings, ranges


@given(cases())
def test_bounds_are_never_violated(case: tuple[tuple[Tensor, Tensor, Tensor], Settings, str]) -> None:
    assert_bounds_hold(*case)


@pytest.mark.parametrize("ranges", ["keys", "norms"])
def test_every_form_keeps_its_bounds(ranges: str) -> None:
    shape = (2, 2, 45, 45, 4)
    q, k, v, *_ = random_inputs(shape, key_heads=1)
    for form in SUPPORTED:
        settings = settings_of(form, shape, coarser=(16,), blocks_per_row=1.0)
        if settings.softcap and ranges == "norms":
            continue
        with named(form):
            assert_bounds_hold((q, k, v), settings, ranges)


def test_masses_lie_between_their_bounds_and_the_chord_is_below_hoeffding_and_the_largest() -> None:
    shape = (1, 2, 50, 60, 6)
    for causal in (False, True):
        q, k, v, *_ = random_inputs(shape, magnitude=1.5)
        settings = Settings(block_size=8, blocks_per_row=2.0, is_causal=causal)
        plan = mra_attention.plan(q, k, **plan_keywords(q, k, settings))
        for ranges in ("keys", "norms"):
            found = mass_bounds(call_of(q, k, v, settings), plan, head=1, ranges=ranges)
            logits = (q[0, 1] @ k[0, 1].T) / math.sqrt(6)
            padded = torch.nn.functional.pad(logits, (0, 4), value=-math.inf).unflatten(-1, (-1, 8))
            mass = padded.logsumexp(-1)
            coarse = found.low > -math.inf
            assert coarse.any()
            assert (coarse <= ~plan.block_masks()[0][1].repeat_interleave(1 if causal else 8, 0)[:50]).all()
            assert (found.low[coarse] <= mass[coarse] + 1e-12).all()
            assert (mass[coarse] <= found.high[coarse] + 1e-12).all()
            width = padded.masked_fill(padded == -math.inf, math.inf).amin(-1).neg() + padded.amax(-1)
            if ranges == "keys":
                torch.testing.assert_close(found.width[coarse], width[coarse])
                count = (padded > -math.inf).sum(-1).expand_as(mass)
                assert (found.high <= padded.amax(-1) + count.log() + 1e-12)[coarse].all()
            assert (found.high - found.low <= found.width**2 / 8 + 1e-12)[coarse].all()


def test_what_the_constants_are() -> None:
    """Beside values of the paper's constant and of Specht's ratio, which an example of two values reaches."""
    from mra_attention.analysis._frobenius import log_paper_constant, log_sharp_constant

    ranges = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    paper, sharp = (function(ranges / 2).exp() for function in (log_paper_constant, log_sharp_constant))
    expected = torch.tensor([0.0177, 0.0807, 0.4208, 2.9525, 40.82, 2872.8], dtype=torch.float64)
    torch.testing.assert_close(paper, expected, rtol=3e-3, atol=0.0)
    share = torch.linspace(0, 1, 200001, dtype=torch.float64)
    for width, constant in zip(ranges, sharp, strict=True):
        ratio = (1 + share * torch.expm1(width)) / (share * width).exp()
        torch.testing.assert_close(constant, ratio.max() - 1, rtol=1e-8, atol=0.0)
    small = torch.tensor([0.0, 1e-9, 4.9e-4, 5.1e-4], dtype=torch.float64)
    torch.testing.assert_close(log_sharp_constant(small).exp(), small**2 / 2, rtol=1e-6, atol=0.0)


def test_everything_exact_has_no_error_and_flat_blocks_nearly_none() -> None:
    q, k, v, *_ = random_inputs((1, 2, 40, 40, 4))
    plan = mra_attention.plan(q, k, blocks_per_row=math.inf, resolutions=(8, 1))
    bound = error_bound(AttentionCall(q, k, v), plan)
    for name, x in bound._asdict().items():
        assert not x.any(), name
    flat = [x[:, :, torch.arange(40) // 8] for x in (q, k, v)]
    plan = mra_attention.plan(flat[0], flat[1], blocks_per_row=1, resolutions=(8, 1))
    bound = error_bound(AttentionCall(*flat), plan, ranges="keys")
    assert bound.output.max() < 1e-12
    assert bound.sharp.max() < 1e-6  # a root of rounding


def test_the_bound_of_the_output_is_reached() -> None:
    """Two coarse keys with values of opposite sign far from the rest: the error is most of what is granted."""
    from mra_attention.analysis.bound import largest_error

    rest = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    low, high, used = (torch.tensor([x], dtype=torch.float64) for x in ([1.0, 2.0], [3.0, 2.5], [1.0, 2.0]))
    within, away = (torch.tensor([x], dtype=torch.float64) for x in ([0.5, 0.0], [2.0, 0.1]))
    masses = torch.cartesian_prod(torch.linspace(1, 3, 81), torch.linspace(2, 2.5, 21)).double()
    ratio = (masses * within + (masses - used).abs() * away).sum(-1) / (1 + masses.sum(-1))
    found = largest_error(rest, (low, high, used), within, away)
    torch.testing.assert_close(found, ratio.max()[None], rtol=1e-11, atol=0.0)


def test_a_huge_mass_of_little_error_hides_no_small_one_of_more() -> None:
    from mra_attention.analysis.bound import largest_error

    rest = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    high = torch.tensor([[1e250, 1e50]], dtype=torch.float64)
    away = torch.tensor([[0.3, 5.0]], dtype=torch.float64)
    found = largest_error(rest, (torch.zeros_like(high), high, torch.zeros_like(high)), torch.zeros_like(away), away)
    torch.testing.assert_close(found, torch.tensor([5.0], dtype=torch.float64), rtol=1e-11, atol=0.0)


def test_orders_come_back_to_the_caller() -> None:
    q, k, v, *_ = random_inputs((1, 2, 40, 40, 4))
    order = torch.randperm(40)
    config = mra_attention.MRAConfig(resolutions=(8, 1), blocks_per_row=2)
    plan = mra_attention.plan(q, k, query_order=order, key_order=order, config=config)
    moved = [x[:, :, order] for x in (q, k, v)]
    expected = error_bound(AttentionCall(*moved), mra_attention.plan(moved[0], moved[1], config=config))
    found = error_bound(AttentionCall(q, k, v), plan)
    torch.testing.assert_close(found.output[:, :, order], expected.output)
    torch.testing.assert_close(found.relative, expected.relative)


def test_what_is_refused() -> None:
    q, k, v, *_ = random_inputs((1, 2, 40, 40, 4))
    call, config = AttentionCall(q, k, v), mra_attention.MRAConfig(resolutions=(8, 1))
    plan = mra_attention.plan(q, k, config=config)
    with pytest.raises(TypeError, match=r"plan must be a mra_attention\.Plan, got MRAConfig"):
        error_bound(call, config)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="ranges must be 'keys' or 'norms', got 'all'"):
        error_bound(call, plan, ranges="all")  # pyright: ignore[reportArgumentType]
    with pytest.raises(NotImplementedError, match=r"softcap=2\.0 .* use ranges='keys'"):
        error_bound(replace(call, softcap=2.0), plan)
    with pytest.raises(NotImplementedError, match="coarse='first_order' is not implemented here"):
        error_bound(call, mra_attention.plan(q, k, coarse="first_order", config=config))
    padding = torch.ones(1, 40, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="query_padding_mask"):
        error_bound(call, mra_attention.plan(q, k, query_padding_mask=padding, config=config))
    with pytest.raises(NotImplementedError, match="call has a query_padding_mask"):
        error_bound(replace(call, query_padding_mask=padding), plan)
    with pytest.raises(ValueError, match="plan was made with another attn_mask of keys"):
        error_bound(replace(call, attn_mask=torch.ones(1, 1, 1, 40, dtype=torch.bool)), plan)
    with pytest.raises(ValueError, match="query must have the 4 dimensions"):
        error_bound(AttentionCall(q[0], k[0], v[0]), plan)
    with pytest.raises(ValueError, match="capture it without sampling queries"):
        error_bound(replace(call, query_rows=torch.arange(40)), plan)
    with pytest.raises(IndexError):
        mass_bounds(call, plan, head=2)


def test_repeat_is_what_groups_are() -> None:
    q, k, v, *_ = random_inputs((1, 4, 40, 40, 4), key_heads=2)
    plan = mra_attention.plan(q, k, enable_gqa=True, resolutions=(8, 1))
    k4, v4 = repeat(k[0], 4)[None], repeat(v[0], 4)[None]
    alone = error_bound(AttentionCall(q, k4, v4), mra_attention.plan(q, k4, resolutions=(8, 1)))
    torch.testing.assert_close(error_bound(AttentionCall(q, k, v), plan).output, alone.output)
