"""All metrics of all heads, beside null models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .._checks import numbers
from . import nulls as null_models
from ._arguments import choice
from ._arrays import Floats
from ._extra import with_progress
from .attention_call import AttentionCall
from .attention_map import AttentionMap
from .heads import HeadRows, SampledCall, SampledMap, Sampling, Source, shape_of
from .metrics import METRICS, HeadSamples, Options, Samples, check_options, mean
from .table import Record, Table

__all__ = ["analyze"]

NULLS = ("uniform", "random", "shuffled", "alibi")
OBSERVED = "value"

Found = dict[tuple[str, int], dict[tuple[str, str], Samples]]
"""Samples by layer and head, then by model and metric; the models are the observed one and the null models."""


def analyze(
    sources: Iterable[Source],
    *,
    metrics: Sequence[str] | None = None,
    nulls: Sequence[str] | None = None,
    reduction: str = "each",
    first_row: int = 0,
    max_rows: int | None = 128,
    options: Options | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Table:
    """Compute metrics of attention for each head of each layer, and the same metrics of null models.

    Parameters
    ----------
    sources : iterable of AttentionCall or AttentionMap
        Calls of attention, or matrices of weights. Those of one layer are sequences of the same heads, whose samples
        are put together. They are read one after the other, once.
    metrics : sequence of str, optional
        Which ones: "band_shares", "frequency_selectivity", "entropies", "entropy_correlation", "wavelet_energy",
        "wavelet_entropy", "scale_sensitivity", "reconstruction_error", "local_global_ratio", "window_entropy",
        "entropic_uncertainty". By default all. docs/analysis.md defines them.
    nulls : sequence of str, optional
        Which null models: "uniform", "random", "shuffled", "alibi". By default all; "random" draws queries and keys, so
        where an `AttentionMap` is given its numbers are NaN, and asking for it by name is an error.
    reduction : {"each", "mean", "last"}, default "each"
        What the signals of a head in a sequence are: each of its rows, of which metrics are averaged; the mean of its
        rows; its last row. The paper does not say. "local_global_ratio" and "window_entropy" are of each row always.
    first_row : int, default 0
        Queries before this one are left out. Those of causal attention see few keys.
    max_rows : int, optional
        At most how many rows of a head and sequence are looked at, evenly spaced, the last one among them; None for
        all. Memory is proportional to `max_rows * Lk`: with None, to the matrix of one head. 128 by default.
    options : mapping, optional
        Keyword arguments of the functions that compute, by the name of the function, for example
        `{"power_spectral_density": {"demean": True}, "wavelet_coefficients": {"wavelet": "haar"}}`. The functions are
        `power_spectral_density`, `band_shares`, `wavelet_coefficients`, `wavelet_energy`, `scale_sensitivity`,
        `local_share` and `window_entropy`.
    seed : int, default 0
        Of "random" and "shuffled".
    progress : bool, default True
        Whether to show how many sources are done, by tqdm.

    Returns
    -------
    Table
        A record for each layer, head and metric, and for "entropy_correlation" one for each layer, with head None: the
        mean over its heads (equation 9 of the paper). Samples for which a metric is not defined are left out; a metric
        is NaN if it is defined for none.

    Raises
    ------
    ImportError
        If PyWavelets or tqdm is missing and needed.
    TypeError
        If a source is neither a call nor a map, or an argument has the wrong type.
    ValueError
        If an argument is not accepted, sources of a layer differ in their heads, or no row of a head is left.

    Notes
    -----
    Deterministic: the same bits for the same sources, in the same order, the same seed, and as many threads. Nothing is
    drawn from the default generators of torch and NumPy.

    References
    ----------
    V. Ruscio, U. Nanni, F. Silvestri, "Beyond Position: the emergence of wavelet-like properties in Transformers", ACL
    2025, arXiv 2410.18067.
    """
    wanted = _checked("metrics", metrics, tuple(METRICS))
    models = _checked("nulls", nulls, NULLS)
    choice("reduction", reduction, ("each", "mean", "last"))
    numbers.check_bool("progress", progress)
    sampling = Sampling(numbers.integer("first_row", first_row, 0), numbers.optional_integer("max_rows", max_rows, 1))
    seed = numbers.integer("seed", seed, 0)
    given: Options = {} if options is None else options
    check_options(given)
    if isinstance(sources, (AttentionCall, AttentionMap)):
        raise TypeError(f"sources must be several calls or maps, got one {type(sources).__name__}; pass a list of it")
    found: Found = {}
    for number, source in enumerate(with_progress(sources, progress, "analyze", "call")):
        _check_source(source, nulls)
        for head, model, rows in _rows(source, models, sampling, (seed, number)):
            samples = HeadSamples(rows, reduction, given)
            of_head = found.setdefault((source.layer, head), {})
            for name in wanted:
                _extend(of_head.setdefault((model, name), {}), METRICS[name].of_samples(samples))
        _check_heads(source, found, first_row)
    return Table(_records(found, wanted, models))


def _checked(name: str, given: Sequence[str] | None, accepted: tuple[str, ...]) -> tuple[str, ...]:
    if given is None:
        return accepted
    if isinstance(given, str):
        raise TypeError(f"{name} must be a sequence of names, got {given!r}; pass [{given!r}]")
    for x in given:
        choice(name, x, accepted)
    return tuple(dict.fromkeys(given))


def _check_source(source: Any, nulls: Sequence[str] | None) -> None:
    if not isinstance(source, (AttentionCall, AttentionMap)):
        raise TypeError(f"sources must be AttentionCall or AttentionMap, got {type(source).__name__}")
    if isinstance(source, AttentionMap) and nulls is not None and "random" in nulls:
        raise ValueError(
            f"nulls has 'random', which draws queries and keys; layer {source.layer!r} is an AttentionMap, which has "
            "none. Pass calls, or leave it out"
        )


def _check_heads(source: Source, found: Found, first_row: int) -> None:
    heads = {head for layer, head in found if layer == source.layer}
    count = shape_of(source)[1]
    if len(heads) != count:
        raise ValueError(
            f"layer {source.layer!r} has {count} heads here and rows of {len(heads)} heads in all: sources of a layer "
            f"must have the same heads, and each head a query from first_row={first_row} on that sees a key"
        )


def _rows(
    source: Source, models: Sequence[str], sampling: Sampling, seeds: tuple[int, int]
) -> Iterator[tuple[int, str, HeadRows]]:
    """Yield head, model and rows, for all sequences of a source."""
    batch, heads = shape_of(source)
    observed = SampledCall(source, sampling) if isinstance(source, AttentionCall) else SampledMap(source, sampling)
    random = None
    if isinstance(source, AttentionCall) and "random" in models:
        drawn = int(np.random.SeedSequence(seeds).generate_state(1)[0])
        random = SampledCall(null_models.random_call(source, drawn), sampling)
    for item in range(batch):
        for head in range(heads):
            rows = observed.rows(item, head)
            if rows is None:
                continue
            yield head, OBSERVED, rows
            slope = null_models.alibi_slope(head, heads)
            for model in models:
                if model != "random":
                    rng = np.random.default_rng((*seeds, item, head))
                    yield head, model, rows._replace(weights=_null(model, rows, rng, slope))
            drawn_rows = None if random is None else random.rows(item, head)
            if drawn_rows is not None:
                yield head, "random", drawn_rows


def _null(model: str, rows: HeadRows, rng: np.random.Generator, slope: float) -> Floats:
    if model == "uniform":
        return null_models.uniform_rows(rows.visible)
    if model == "shuffled":
        return null_models.shuffled_rows(rows.weights, rows.visible, rng)
    return null_models.alibi_rows(rows.visible, rows.positions, slope)


def _extend(samples: Samples, more: Samples) -> None:
    for name, values in more.items():
        samples[name] = np.concatenate([samples[name], values]) if name in samples else values


def _records(found: Found, metrics: Sequence[str], models: Sequence[str]) -> Iterator[Record]:
    correlations: dict[str, dict[str, list[float]]] = {}
    for (layer, head), of_head in found.items():
        for metric in metrics:
            numbers = {
                model: METRICS[metric].combine(of_head[model, metric]) if (model, metric) in of_head else {}
                for model in (OBSERVED, *models)
            }
            for name, value in numbers[OBSERVED].items():
                nulls = {model: numbers[model].get(name, float("nan")) for model in models}
                yield Record(layer, head, name, value, nulls)
                if name == "entropy_correlation":
                    for model, number in (nulls | {OBSERVED: value}).items():
                        correlations.setdefault(layer, {}).setdefault(model, []).append(number)
    for layer, by_model in correlations.items():
        means = {model: mean(np.asarray(values)) for model, values in by_model.items()}
        yield Record(layer, None, "entropy_correlation", means[OBSERVED], {model: means[model] for model in models})
