"""Estimates of the error: exact rows, intervals that cover, and the same numbers for a seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import mra_attention
import oracle
import pytest
import torch
from forms import FORMS, settings_of
from helpers import named, random_inputs
from mra_attention.analysis import AttentionCall, error_estimate, error_estimates, exact_rows
from mra_attention.analysis._intervals import betting_limits, log_limits, pairs_of_strata, stratified
from mra_attention.analysis._student import student_quantile
from test_error_bound import call_of
from torch import Tensor

ROWS = 4096
DRAWS = 10_000


def populations() -> dict[str, tuple[Tensor, Tensor]]:
    """Squared errors and squared sizes of rows; the sizes of all spread as those of a decoder's heads."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(ROWS, generator=generator, dtype=torch.float64)

    place = torch.arange(ROWS) / ROWS
    sizes = (0.5 * normal()).exp()
    return {
        "alike": (0.06 * (0.5 * normal()).exp() * sizes, sizes),
        "spread": (0.06 * normal().exp() * sizes, sizes),
        "growing": (0.06 * torch.where(place < 1 / 16, 0.0, place.sqrt()) * (0.7 * normal()).exp() * sizes, sizes),
        "heavy": ((0.05 * (2.0 * normal() - 2.0).exp()).clamp(max=4.0) * sizes, sizes),
        "rare": (torch.where(torch.rand(ROWS, generator=generator) < 0.02, 1.5, 0.01 * normal().exp()) * sizes, sizes),
    }


COVERED = {"alike": 0.95, "spread": 0.95, "growing": 0.95, "heavy": 0.92, "rare": 0.75}
"""How often the intervals of 64 rows are to cover, at 0.95: docs/analysis.md has the same numbers."""


def test_intervals_of_strata_cover_as_documented() -> None:
    generator = torch.Generator().manual_seed(1)
    for name, (errors, sizes) in populations().items():
        rows = pairs_of_strata(ROWS, 32, (DRAWS,), generator)
        low, high = log_limits(stratified(errors[rows], sizes[rows], ROWS), 0.95)
        truth = errors.sum() / sizes.sum()
        share = ((low <= truth) & (truth <= high)).double().mean().item()
        chance = 3.0 * math.sqrt(COVERED[name] * (1 - COVERED[name]) / DRAWS)
        with named((name, share)):
            assert share >= COVERED[name] - chance


def test_intervals_by_betting_cover_whatever_the_population() -> None:
    generator, draws, count, length = torch.Generator().manual_seed(2), 2_000, 16, 60
    found = {name: rows for name, rows in populations().items() if name in ("spread", "heavy")}
    found["two values"] = ((torch.arange(ROWS) % 8 == 0).double(), torch.ones(ROWS, dtype=torch.float64))
    for name, (errors, sizes) in found.items():
        errors, sizes = errors[-length:], sizes[-length:]
        largest = errors.max().expand(500), sizes.max().expand(500)
        truth, covered = errors.sum() / sizes.sum(), 0
        for _ in range(draws // 500):
            rows = torch.rand(500, length, generator=generator).argsort(-1)[:, :count]
            low, high = betting_limits(errors[rows], sizes[rows], length, largest, 0.8)
            covered += int(((low <= truth) & (truth <= high)).sum())
        with named((name, covered / draws)):
            assert covered / draws >= 0.8 - 3.0 * math.sqrt(0.8 * 0.2 / draws)


def test_pairs_are_two_rows_of_each_stratum_and_every_pair_is_as_likely() -> None:
    rows = pairs_of_strata(11, 3, (9000,), torch.Generator().manual_seed(0))
    assert (rows[..., 0] != rows[..., 1]).all()
    for stratum, members in enumerate(([0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10])):
        found, counts = rows[:, stratum].unique(dim=0, return_counts=True)
        pairs = [[a, b] for a in members for b in members if a != b]
        assert found.tolist() == pairs
        expected = 9000 / len(pairs)
        assert ((counts - expected).abs() < 5 * math.sqrt(expected)).all()


def test_ratio_and_variance_are_those_of_the_formulas() -> None:
    """Two strata of 3 and 4 rows, by hand."""
    errors = torch.tensor([[1.0, 3.0], [2.0, 6.0]], dtype=torch.float64)
    sizes = torch.tensor([[10.0, 10.0], [20.0, 20.0]], dtype=torch.float64)
    found = stratified(errors, sizes, 7)
    ratio = (3 * 2.0 + 4 * 4.0) / (3 * 10.0 + 4 * 20.0)
    parts = 3 * 1 * 4.0 / 4, 4 * 2 * 16.0 / 4
    assert found.ratio.item() == pytest.approx(ratio, rel=1e-14)
    assert found.variance.item() == pytest.approx(sum(parts) / 22.0**2, rel=1e-14)
    assert found.degrees.item() == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 + parts[1] ** 2), rel=1e-14)


def test_quantiles_are_those_of_the_tables() -> None:
    degrees = torch.tensor([1.0, 2.0, 5.0, 30.0, 1e5])
    for confidence, expected in ((0.95, [12.7062, 4.30265, 2.57058, 2.04227, 1.95999]), (0.5, [1.0, 0.816497])):
        found = student_quantile(confidence, degrees[: len(expected)])
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0.0)


def test_exact_rows_are_exact_in_every_form() -> None:
    shape = (2, 4, 21, 21, 4)
    q, k, v, *_ = random_inputs(shape, key_heads=2)
    rows = torch.tensor([[0, 7, 20], [3, 3, 4], [20, 1, 0], [5, 6, 7]])
    for form in FORMS:
        settings = settings_of(form, shape)
        call = replace(call_of(q, k, v, settings), query_padding_mask=settings.query_mask)
        selected = torch.ones_like(oracle.live_blocks(q, k, settings))
        expected, _ = oracle.attention(q, k, v, selected, replace(settings, coarse="mean"))
        if settings.bias is not None and (settings.bias.double() == -1e9).any():
            continue  # a huge number is a mask to blocks, and a number here
        for item in range(2):
            found = exact_rows(call, rows, item)
            with named((form, item)):
                torch.testing.assert_close(found, expected[item].gather(1, rows[..., None].expand(-1, -1, 4)))


def test_exact_rows_do_not_read_what_is_hidden_and_count_kept_queries() -> None:
    q, k, v, *_ = random_inputs((1, 2, 9, 9, 4))
    mask = (torch.arange(9) < 6)[None, None, None]
    rows = torch.tensor([[0, 2], [1, 1]])
    expected = exact_rows(AttentionCall(q, k, v, attn_mask=mask), rows)
    k[:, :, 6:], v[:, :, 6:] = math.nan, math.nan
    torch.testing.assert_close(exact_rows(AttentionCall(q, k, v, attn_mask=mask), rows), expected)
    kept = torch.tensor([1, 4, 5])
    part = AttentionCall(q[:, :, kept], k, v, attn_mask=mask, is_causal=True, query_rows=kept, query_length=9)
    whole = exact_rows(AttentionCall(q, k, v, attn_mask=mask, is_causal=True), kept[rows])
    torch.testing.assert_close(exact_rows(part, rows), whole)


def test_padded_queries_are_no_part_of_the_error() -> None:
    """A mask of queries says which they are; without one it is that of as many keys."""
    q, k, v, *_ = random_inputs((1, 2, 60, 60, 4))
    valid, every = torch.arange(60) < 37, torch.ones(1, 60, dtype=torch.bool)
    few = {"resolutions": (8, 1), "blocks_per_row": 2}
    padded = AttentionCall(q, k, v, query_padding_mask=valid[None])
    found = error_estimate(padded, **few)
    alone = error_estimate(AttentionCall(q[:, :, :37], k, v), **few)
    torch.testing.assert_close(found.estimate, alone.estimate)
    assert found.rows.tolist() == [37]
    of_keys = AttentionCall(q, k, v, attn_mask=valid[None, None, None])
    assert error_estimate(of_keys, **few).rows.tolist() == [37]
    assert error_estimate(replace(of_keys, query_padding_mask=every), **few).rows.tolist() == [60]


def test_an_item_of_padding_has_no_error() -> None:
    q, k, v, *_ = random_inputs((2, 2, 20, 20, 4))
    valid = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    valid[1] = False
    found = error_estimate(AttentionCall(q, k, v, attn_mask=valid), resolutions=(8, 1), blocks_per_row=1)
    assert found.rows.tolist() == [20, 0]
    assert found.estimate[1].tolist() == found.high[1].tolist() == [0.0, 0.0]
    assert bool((found.estimate[0] > 0.0).all())


def test_a_causal_bias_is_causality() -> None:
    q, k, v, *_ = random_inputs((1, 2, 20, 30, 4))
    rows = torch.tensor([[0, 19], [7, 8]])
    by_bias = AttentionCall(q, k, v, attn_mask=torch.nn.attention.bias.causal_lower_right(20, 30))
    by_name = AttentionCall(q, k, v, is_causal=True, causal_alignment="lower_right")
    assert torch.equal(exact_rows(by_bias, rows), exact_rows(by_name, rows))


def relative_errors(call: AttentionCall, out: Tensor, valid: Tensor) -> Tensor:
    every = torch.arange(call.query.shape[2]).expand(call.query.shape[1:3])
    exact = torch.stack([exact_rows(call, every, item) for item in range(call.query.shape[0])])
    parts = [x[item][:, valid[item]].double().square().sum((1, 2)) for x in (out - exact, exact) for item in range(2)]
    return (torch.stack(parts[:2]) / torch.stack(parts[2:])).sqrt()


@pytest.mark.parametrize("method", ["stratified", "betting"])
def test_intervals_cover_end_to_end(method: str) -> None:
    """Padding, causal or not, shared keys; at least as often as 0.95 says, but for what 5 standard errors allow."""
    q, k, v, *_ = random_inputs((2, 4, 300, 300, 8), key_heads=2, dtype=torch.float32, magnitude=1.5)
    valid = torch.arange(300) < torch.tensor([[300], [211]])
    covered, total = 0, 0
    for causal in (False, True):
        call = AttentionCall(q, k, v, attn_mask=valid[:, None, None], is_causal=causal)
        out = mra_attention.scaled_dot_product_attention(q, k, v, **call.arguments(), resolutions=(16, 1))
        truth = relative_errors(call, out, valid)
        for seed in range(10):
            found = error_estimate(call, out=out, rows=40, method=method, seed=seed)
            assert found.rows.tolist() == [40, 40]
            covered += int(((found.low <= truth) & (truth <= found.high)).sum())
            total += truth.numel()
            assert (found.mean[:, 1] <= found.mean[:, 0]).all()
            assert (found.mean[:, 0] <= found.mean[:, 2]).all()
    assert covered / total >= 0.95 - 5 * math.sqrt(0.05 * 0.95 / total)


def test_all_rows_give_the_error_itself_and_settings_are_those_of_attention() -> None:
    q, k, v, *_ = random_inputs((2, 2, 50, 50, 8))
    call = AttentionCall(q, k, v)
    out = mra_attention.scaled_dot_product_attention(q, k, v, resolutions=(8, 1), blocks_per_row=2)
    truth = relative_errors(call, out, torch.ones(2, 50, dtype=torch.bool))
    found = error_estimate(call, resolutions=(8, 1), blocks_per_row=2)
    for x in (found.estimate, found.low, found.high):
        torch.testing.assert_close(x, truth)
    torch.testing.assert_close(found.mean, truth.mean(-1, keepdim=True).expand(-1, 3))
    assert found.rows.tolist() == [50, 50]


def test_a_seed_gives_the_same_numbers_and_another_others() -> None:
    q, k, v, *_ = random_inputs((1, 2, 200, 200, 8))
    call = AttentionCall(q, k, v, layer="encoder.0")
    first, again, other = (error_estimate(call, rows=16, seed=seed).estimate for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    records = error_estimates([call, replace(call, layer="encoder.1")], rows=16, seed=3)
    places = [(record.layer, record.item, record.head, record.rows) for record in records]
    assert places == [(f"encoder.{layer}", 0, head, 16) for layer in range(2) for head in range(2)]
    assert [record.estimate for record in records[:2]] == first[0].tolist()


def test_a_sample_without_an_error_says_nothing_of_the_rest() -> None:
    q, k, v, *_ = random_inputs((1, 1, 60, 64, 4))
    call = AttentionCall(q, 0 * k, torch.ones_like(v))  # weights of 1/64, so outputs are 1 without rounding
    exact = torch.ones_like(q)
    found = error_estimate(call, out=exact.clone(), rows=8)
    assert (found.estimate.item(), found.low.item(), found.high.item()) == (0.0, 0.0, math.inf)
    assert error_estimate(replace(call, value=0 * v), out=0 * exact, rows=8).estimate.item() == 0.0
    both = AttentionCall(*(x.expand(1, 2, -1, -1) for x in (call.query, call.key, call.value)))
    one_is_off = torch.cat((exact, exact + torch.rand(60, 1)), 1)
    found = error_estimate(both, out=one_is_off, rows=8)
    assert found.high[0, 1] < math.inf
    assert found.mean[0, 2] == math.inf


REFUSED: dict[str, tuple[Callable[[AttentionCall, Tensor], object], type[Exception], str]] = {
    "odd": (lambda c, o: error_estimate(c, out=o, rows=7), ValueError, "rows must be even, got 7"),
    "few": (lambda c, o: error_estimate(c, out=o, rows=2), ValueError, "rows must be .* got 2"),
    "level": (lambda c, o: error_estimate(c, out=o, confidence=95.0), ValueError, "confidence must be .* got 95"),
    "type": (lambda c, o: error_estimate(c, out=o, confidence=1), TypeError, "confidence must be a float"),
    "method": (lambda c, o: error_estimate(c, out=o, method="t"), ValueError, "method must be .* got 't'"),  # pyright: ignore[reportArgumentType]
    "both": (lambda c, o: error_estimate(c, out=o, blocks_per_row=2), ValueError, "out is given, so blocks_per_row"),
    "shape": (lambda c, o: error_estimate(c, out=o[:, :1]), ValueError, "out must have the shape"),
    "no tensor": (lambda c, _: error_estimate(c, out=3), TypeError, "out must be None or a tensor, got int"),  # pyright: ignore[reportArgumentType]
    "slopes": (lambda c, o: error_estimate(replace(c, alibi_slopes=o[0, 0]), out=o), ValueError, "alibi_slopes must"),
    "places": (
        lambda c, _: exact_rows(c, torch.tensor([[0], [20]])),
        IndexError,
        r"rows must be in 0 \.\. 19, got 0 .. 20",
    ),
    "heads": (
        lambda c, _: exact_rows(c, torch.tensor([[0]])),
        ValueError,
        r"rows must be int64 \(2, R\), got .* \(1, 1\)",
    ),
    "item": (lambda c, _: exact_rows(c, torch.tensor([[0], [0]]), -1), IndexError, r"item must be in 0 \.\. 0, got -1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    q, k, v, *_ = random_inputs((1, 2, 20, 20, 4))
    function, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        function(AttentionCall(q, k, v), q.clone())
