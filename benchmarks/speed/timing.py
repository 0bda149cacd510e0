"""Interleaved timing: the variants of a case take turns, so that drift of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(variants: Mapping[str, Callable[[], object]], *, seconds: float, least: int = 5) -> dict[str, float]:
    """Return the median seconds of one call of each variant.

    Each round calls every variant once; rounds go on for `seconds`, but `least` rounds are made in any case. One round
    beforehand warms up and is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(next(iter(times.values()))) < least:
        for name, call in variants.items():
            before = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - before)
    return {name: statistics.median(values) for name, values in times.items()}
