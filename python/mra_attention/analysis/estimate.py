"""The error of an approximation, estimated from some queries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import functional
from .._checks import numbers
from ..config import MRAConfig, MRASettings, Unpack, configure, with_settings
from . import _intervals
from .attention_call import AttentionCall
from .exact_rows import outputs_of_rows
from .pairs import Pairs

LEAST_ROWS = 4


class ErrorEstimate(NamedTuple):
    """Relative errors of the output, with the limits of confidence intervals."""

    estimate: Tensor
    """`(B, H)`, float64: `||out - exact||_F / ||exact||_F` over the valid queries."""
    low: Tensor
    """`(B, H)`."""
    high: Tensor
    """`(B, H)`; infinite where the sample says nothing."""
    mean: Tensor
    """`(B, 3)`: the mean over heads, and its limits; the upper one is infinite where that of a head is."""
    rows: Tensor
    """int64 `(B,)`: the queries of each head that were computed exactly."""


class ErrorRecord(NamedTuple):
    """The estimate of one head of a layer: a row of a table."""

    layer: str
    item: int
    head: int
    estimate: float
    low: float
    high: float
    rows: int


@with_settings
def error_estimate(
    call: AttentionCall,
    config: MRAConfig | None = None,
    *,
    out: Tensor | None = None,
    rows: int = 64,
    confidence: float = 0.95,
    method: Literal["stratified", "betting"] = "stratified",
    seed: int = 0,
    **settings: Unpack[MRASettings],
) -> ErrorEstimate:
    """Estimate the relative error of the output of each head from some of its queries.

    Parameters
    ----------
    call : AttentionCall
        What attention was given.
    config : MRAConfig, optional
        How it is approximated, if `out` is not given.
    out : Tensor, optional
        `(B, H, Lq, Dv)`: an approximate output, of whatever origin. Where `call` kept some queries, their rows of it.
    rows : int, default 64
        How many queries of each head are computed exactly: even, at least 4. Where there are no more, all are, and the
        interval is a point.
    confidence : float, default 0.95
        The probability with which an interval is to cover the error, between 0 and 1.
    method : {"stratified", "betting"}, default "stratified"
        "stratified": two queries of each stretch of neighbours; the interval is Student's on the scale of logarithms.
        It covers as it says where errors are spread over the queries, and less often where few queries have most of
        the error, since a sample may have none of these. "betting": queries by chance; the interval covers at least as
        often as it says whatever the errors, because they are bounded by the largest value. It says little below some
        thousand rows.
    seed : int, default 0
        Of the choice of queries.
    **settings
        Fields of `MRAConfig`; they take the place of those of `config`.

    Returns
    -------
    ErrorEstimate
        Estimates and limits by batch item and head, and of the mean over heads. With "betting" the limits of the mean
        hold for all heads at once.

    Raises
    ------
    TypeError
        If `out` is no tensor, or a setting has the wrong type.
    ValueError
        If an argument has a value that is not accepted, or both `out` and settings are given.
    NotImplementedError
        If attention would refuse the call.

    Notes
    -----
    Definition: docs/analysis.md, "Errors known before they are paid". Padded queries, of `query_padding_mask` or of as
    many keys, do not count. Deterministic for a seed. The exact rows take
    `2 H rows Lk (D + Dv)` floating point operations: with 64 rows 1/64 of those of exact attention at 4096 tokens.

    Examples
    --------
    >>> import torch
    >>> from mra_attention.analysis import AttentionCall, error_estimate
    >>> _ = torch.manual_seed(0)
    >>> call = AttentionCall(*torch.randn(3, 1, 2, 512, 16).unbind())
    >>> found = error_estimate(call, blocks_per_row=4)
    >>> bool((found.low < found.estimate).all() and (found.estimate < found.high).all())
    True
    """
    generator = torch.Generator().manual_seed(numbers.integer("seed", seed, 0))
    return _estimate(call, config, settings, out, _checked(rows, confidence, method), generator)


@with_settings
def error_estimates(
    calls: Iterable[AttentionCall],
    config: MRAConfig | None = None,
    *,
    rows: int = 64,
    confidence: float = 0.95,
    method: Literal["stratified", "betting"] = "stratified",
    seed: int = 0,
    **settings: Unpack[MRASettings],
) -> list[ErrorRecord]:
    """Estimate the relative error of every head of several calls, such as those of a model.

    Parameters
    ----------
    calls : iterable of AttentionCall
        The calls, with all their queries.
    config, rows, confidence, method, seed, **settings
        As for `error_estimate`.

    Returns
    -------
    list of ErrorRecord
        By call, batch item and head.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `error_estimate`.

    Notes
    -----
    Definition: docs/analysis.md, "Errors known before they are paid". Deterministic for a seed.
    """
    generator = torch.Generator().manual_seed(numbers.integer("seed", seed, 0))
    sampling = _checked(rows, confidence, method)
    records: list[ErrorRecord] = []
    for call in calls:
        found = _estimate(call, config, settings, None, sampling, generator)
        for item, count in enumerate(found.rows):
            for head in range(found.estimate.shape[1]):
                estimate, low, high = (float(x[item, head]) for x in (found.estimate, found.low, found.high))
                records.append(ErrorRecord(call.layer, item, head, estimate, low, high, int(count)))
    return records


class _Sampling(NamedTuple):
    rows: int
    confidence: float
    betting: bool


def _checked(rows: Any, confidence: Any, method: Any) -> _Sampling:
    numbers.check_choice("method", method, ("stratified", "betting"))
    if numbers.integer("rows", rows, LEAST_ROWS) % 2:
        raise ValueError(f"rows must be even, got {rows}; queries are drawn in pairs")
    if isinstance(confidence, bool) or not isinstance(confidence, float):
        raise TypeError(f"confidence must be a float between 0 and 1, got {confidence!r}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    return _Sampling(rows, confidence, method == "betting")


def _estimate(
    call: AttentionCall,
    config: MRAConfig | None,
    settings: MRASettings,
    out: Tensor | None,
    sampling: _Sampling,
    generator: torch.Generator,
) -> ErrorEstimate:
    pairs = Pairs(call)
    approximate = _approximate(call, config, settings, out).detach()
    items = [_of_item(pairs, approximate, item, sampling, generator) for item in range(call.query.shape[0])]
    if not items:
        none = torch.zeros(0, call.query.shape[1], dtype=torch.float64)
        return ErrorEstimate(none, none, none, none.new_zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    *found, rows = zip(*items, strict=True)
    estimate, low, high, mean = (torch.stack(x) for x in found)
    return ErrorEstimate(estimate, low, high, mean, torch.tensor(rows))


def _approximate(call: AttentionCall, config: MRAConfig | None, settings: MRASettings, out: Tensor | None) -> Tensor:
    if out is None:
        attention: Any = functional.scaled_dot_product_attention  # which overload, pyright cannot tell from a dict
        return attention(call.query, call.key, call.value, **call.arguments(), config=configure(config, settings))
    if config is not None or settings:
        given = "config" if config is not None else ", ".join(settings)
        raise ValueError(f"out is given, so {given} would have no effect; pass one of the two")
    if not isinstance(out, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"out must be None or a tensor, got {type(out).__name__}")
    expected = (*call.query.shape[:-1], call.value.shape[-1])
    if out.shape != expected:
        raise ValueError(f"out must have the shape {tuple(expected)}, got {tuple(out.shape)}")
    return out


def _of_item(
    pairs: Pairs, out: Tensor, item: int, sampling: _Sampling, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Return estimate, low and high of the heads, the mean with its limits, and the number of rows."""
    heads = out.shape[1]
    population = pairs.valid(item)[0].nonzero()[:, 0]
    count = population.shape[0]
    everything = count <= sampling.rows
    if everything:
        places = torch.arange(count).expand(heads, count)
    elif sampling.betting:
        places = torch.rand(heads, count, generator=generator).argsort(-1)[:, : sampling.rows]
    else:
        places = _intervals.pairs_of_strata(count, sampling.rows // 2, (heads,), generator)
    rows = population[places.flatten(1)]
    exact = outputs_of_rows(pairs, item, rows)
    approximate = out[item].gather(1, rows[..., None].expand_as(exact)).to(exact.dtype)
    errors = (approximate.double() - exact.double()).square().sum(-1).view(places.shape)
    sizes = exact.double().square().sum(-1).view(places.shape)
    if everything:
        ratio = (errors.sum(-1) / sizes.sum(-1)).nan_to_num(nan=0.0).sqrt()
        return ratio, ratio, ratio, ratio.mean().expand(3), count
    if sampling.betting:
        found = _by_betting(pairs.call, out, item, (errors, sizes), count, sampling.confidence)
    else:
        found = _by_strata(errors, sizes, count, sampling.confidence)
    return *found, sampling.rows


def _by_strata(errors: Tensor, sizes: Tensor, count: int, confidence: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_heads = _intervals.stratified(errors, sizes, count)
    low, high = _intervals.log_limits(of_heads, confidence)
    estimate = of_heads.ratio.sqrt()
    # The logarithm of a root is half of it; heads have their own queries, so variances add up.
    shares = estimate / estimate.sum().clamp(min=1e-300)
    parts = (shares.square() * of_heads.variance / 4).nan_to_num(nan=0.0)
    degrees = (parts.sum().square() / (parts.square() / of_heads.degrees).sum()).nan_to_num(nan=1.0)
    of_mean = _intervals.Spread(estimate.mean(), parts.sum(), degrees)
    mean_low, mean_high = _intervals.log_limits(of_mean, confidence)
    # A head of which the sample says nothing may have any error.
    mean_high = torch.where(high.isinf().any(), torch.inf, mean_high)
    return estimate, low.sqrt(), high.sqrt(), torch.stack((of_mean.ratio, mean_low, mean_high))


def _by_betting(
    call: AttentionCall, out: Tensor, item: int, sample: tuple[Tensor, Tensor], count: int, confidence: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    errors, sizes = sample
    heads = errors.shape[0]
    # An exact output is a mean of values, with sinks or without a key one of values and 0.
    value = call.value[item].double()
    if call.attn_mask is not None:
        value = value.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    largest = value.square().sum(-1).amax(-1).sqrt().repeat_interleave(heads // value.shape[0])
    of_out = out[item].double().square().sum(-1).amax(-1).sqrt()
    bounds = ((largest + of_out).square(), largest.square())
    low, high = _intervals.betting_limits(errors, sizes, count, bounds, confidence)
    all_low, all_high = _intervals.betting_limits(errors, sizes, count, bounds, 1.0 - (1.0 - confidence) / heads)
    estimate = (errors.sum(-1) / sizes.sum(-1)).nan_to_num(nan=0.0).sqrt()
    mean = torch.stack((estimate.mean(), all_low.sqrt().mean(), all_high.sqrt().mean()))
    return estimate, low.sqrt(), high.sqrt(), mean
