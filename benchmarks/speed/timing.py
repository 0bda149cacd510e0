"""Interleaved timing: the variants of a case take turns, so that drift of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
    variants: Mapping[str, Callable[[], object]], *, seconds: float, least: int = 5, burst: float = 0.0
) -> dict[str, float]:
    """Return the median seconds of one call of each variant.

    Each round calls every variant once, or for `burst` seconds if that is more calls, so that short calls beside long
    ones are not few; rounds go on for `seconds`, but `least` rounds are made in any case. One round beforehand warms up
    and is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    start = time.perf_counter()
    rounds = 0
    while time.perf_counter() - start < seconds or rounds < least:
        rounds += 1
        for name, call in variants.items():
            end = time.perf_counter() + burst
            while True:
                before = time.perf_counter()
                call()
                after = time.perf_counter()
                times[name].append(after - before)
                if after >= end:
                    break
    return {name: statistics.median(values) for name, values in times.items()}
