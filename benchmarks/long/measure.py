"""The measurements of long sequences. Each returns rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mra_attention import KVCache
from mra_attention import scaled_dot_product_attention as mra
from torch import Tensor
from tqdm import tqdm

from ..speed.measure import inputs, step
from ..speed.timing import interleaved
from . import exact
from .heads import heads
from .memory import extra_memory
from .settings import BUDGET, BY_NAME, SETTINGS, Setting, compared

SDPA = "SDPA"
SDPA_LONGEST = 16384
"""Tokens beyond which SDPA's time is extrapolated: L * L."""

BURST = 0.1
"""Seconds for which a short call is repeated in every round."""

GROWTH = 16
"""The ratio of the lengths that growth is said of."""


@dataclass
class Time:
    """Forward and backward of one head of 64 channels, standard normal inputs."""

    setting: str
    causal: bool
    length: int
    seconds: float
    measured: bool = True
    """False for SDPA's time where it is extrapolated."""
    growth: float | None = None
    """The time over that of a `GROWTH`-th of the length."""
    speedup: float | None = None
    """SDPA's time over this one."""
    extra_bytes: int | None = None
    """Peak memory beyond inputs, output and gradients."""


@dataclass
class Step:
    """A step of decoding: one token is appended, and attends to all."""

    setting: str
    length: int
    seconds: float
    growth: float | None = None
    """The time over that of a `GROWTH`-th of the length."""


@dataclass
class Point:
    """Time and error of one setting at one length."""

    data: str
    causal: bool
    length: int
    setting: str
    forward: float
    both: float
    """Seconds of forward, and of forward and backward."""
    error: float
    """Relative error of the output on a sample of queries, mean over the heads."""


def lengths(longest: int) -> list[int]:
    """Return every fourth of the longest length, down to 1024 tokens, the shortest first; at most 5 of them."""
    return [longest // 4**i for i in reversed(range(5)) if longest // 4**i >= 1024 or i == 0]


def times(longest: int, seconds: float, *, causal: bool) -> list[Time]:
    """Time forward and backward of every setting at every length, and of SDPA, in turns."""
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    for length in lengths(longest):
        tensors = inputs(1, length, 64, grad=True)
        grad_out = torch.randn_like(tensors[0])
        for setting in SETTINGS:
            if setting.longest is None or length <= setting.longest:
                keywords = setting.keywords(length, BUDGET[causal])
                calls[setting.name, length] = step(_attention(causal, keywords), tensors, grad_out)
        if length <= SDPA_LONGEST:
            calls[SDPA, length] = step(_sdpa(causal), tensors, grad_out)
    named = {f"{name} {length}": call for (name, length), call in calls.items()}
    found = interleaved(named, seconds=seconds, least=2, burst=BURST)
    measured = {key: found[f"{key[0]} {key[1]}"] for key in calls}
    return _time_rows(measured, lengths(longest), causal=causal)


def _attention(causal: bool, keywords: Mapping[str, object]) -> Callable[..., Tensor]:
    return lambda *args: mra(*args, is_causal=causal, **keywords)


def _sdpa(causal: bool) -> Callable[..., Tensor]:
    return lambda *args: F.scaled_dot_product_attention(*args, is_causal=causal)


def _time_rows(measured: Mapping[tuple[str, int], float], every: Sequence[int], *, causal: bool) -> list[Time]:
    last = max(length for name, length in measured if name == SDPA)
    peer = {n: measured.get((SDPA, n), measured[SDPA, last] * (n / last) ** 2) for n in every}
    rows = [Time(SDPA, causal, n, peer[n], measured=(SDPA, n) in measured) for n in every]
    for (name, length), seconds in measured.items():
        if name != SDPA:
            row = Time(name, causal, length, seconds, speedup=peer[length] / seconds)
            shorter = measured.get((name, length // GROWTH))
            row.growth = None if shorter is None else seconds / shorter
            rows.append(row)
    names = [SDPA, *BY_NAME]
    return sorted(rows, key=lambda row: (names.index(row.setting), row.length))


def add_memory(rows: Sequence[Time]) -> None:
    """Measure the extra memory of the longest run of every setting, each in a process of its own."""
    last = {row.setting: row for row in rows if row.setting != SDPA}
    for row in tqdm(last.values(), desc="memory", unit="process", leave=False):
        row.extra_bytes = extra_memory(row.setting, row.length, causal=row.causal)


def decoding(setting: Setting, longest: int, seconds: float) -> list[Step]:
    """Time steps of decoding with caches of the longest length and of a `GROWTH`-th of it, 4 heads of 64 channels."""
    ends = (longest // GROWTH, longest)
    caches = {length: _cache(length, setting.keywords(length, BUDGET[True])) for length in ends}
    tensors = inputs(4, 1, 64)
    calls = {str(length): _decode(cache, *tensors) for length, cache in caches.items()}
    with torch.no_grad():
        found = interleaved(calls, seconds=seconds, least=15, burst=BURST / 10)
    short, long = (found[str(length)] for length in ends)
    return [Step(setting.name, ends[0], short), Step(setting.name, ends[1], long, long / short)]


def _cache(length: int, keywords: Mapping[str, Any], piece: int = 65536) -> KVCache:
    cache = KVCache(1, 4, 64, max_length=length, **keywords)
    generator = torch.Generator().manual_seed(0)
    while cache.length < length:
        count = min(piece, length - cache.length)
        cache.append(*(torch.randn(1, 4, count, 64, generator=generator) for _ in range(2)))
    return cache


def _decode(cache: KVCache, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], object]:
    """Return a step near the longest length of a cache: the last 32 tokens come over and over."""

    def call() -> Tensor:
        if cache.length == cache.max_length:
            cache.crop(cache.length - cache.block_size)
        cache.append(key, value)
        return cache.attend(query)

    return call


def comparison(
    data: str, layers: Sequence[tuple[Tensor, Tensor, Tensor]], scale: float, seconds: float, *, causal: bool
) -> list[Point]:
    """Return time and error of ladders and of two levels: times on the first layer, errors over all of them."""
    length = layers[0][0].shape[2]
    settings = compared(length, causal=causal)
    options = {"is_causal": causal, "scale": scale, "enable_gqa": layers[0][0].shape[1] != layers[0][1].shape[1]}
    rows = exact.sample(length)
    errors: dict[str, float] = dict.fromkeys(settings, 0.0)
    for layer in layers:
        expected = exact.exact_rows(*layer, rows, scale, causal=causal)
        for name, keywords in settings.items():
            errors[name] += exact.error(mra(*layer, **options, **keywords), rows, expected) / len(layers)
    forward, both = _comparison_times(layers[0], options, settings, seconds)
    return [Point(data, causal, length, name, forward[name], both[name], errors[name]) for name in settings]


def _comparison_times(
    layer: Sequence[Tensor], options: Mapping[str, object], settings: Mapping[str, Mapping[str, object]], seconds: float
) -> tuple[dict[str, float], dict[str, float]]:
    leaves = [x.clone().requires_grad_() for x in layer]
    grad_out = torch.randn(layer[0].shape, generator=torch.Generator().manual_seed(3))

    def attention(keywords: Mapping[str, object]) -> Callable[..., Tensor]:
        return lambda *args: mra(*args, **options, **keywords)

    calls = {name: step(attention(keywords), leaves, grad_out) for name, keywords in settings.items()}
    both = interleaved(calls, seconds=seconds, least=2)
    alone = {name: lambda keywords=keywords: attention(keywords)(*layer) for name, keywords in settings.items()}
    with torch.no_grad():
        forward = interleaved(alone, seconds=seconds, least=2)
    return forward, both


def synthetic(length: int, seconds: float, *, causal: bool) -> list[Point]:
    """Compare ladders with two levels on heads like those of a decoder."""
    return comparison("synthetic", [heads(length)], 64**-0.5, seconds, causal=causal)
