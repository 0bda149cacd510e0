"""What is looked at: the calls of some layers and heads, and how much of them is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..attention_call import AttentionCall

MOST_WEIGHTS = 200_000_000
"""How many weights the metrics look at, about: a minute on one core."""

MOST_WORK = 6_000_000_000_000
"""How many floating-point operations the errors take, about: a minute or two on one core."""

ROWS = 128


@dataclass(frozen=True)
class Subject:
    """Some layers and heads of captured calls.

    Parameters
    ----------
    calls : sequence of AttentionCall
        Of the wanted layers and heads.
    layers : list of str
        The names of the layers, in the order of their first calls.
    heads : tuple of int
        The numbers that the heads have in the model.
    of_heads : int
        How many the layers have, at most.
    """

    calls: Sequence[AttentionCall]
    layers: list[str]
    heads: tuple[int, ...]
    of_heads: int

    def first_call(self, layer: str) -> AttentionCall:
        """Return the first call of a layer."""
        return next(call for call in self.calls if call.layer == layer)

    def name(self, layer: int, head: int) -> str:
        """Return what the page calls a head, by its place."""
        return f"layer {layer}, head {self.heads[head]}"


def subject(calls: Sequence[Any], heads: Sequence[int] | None) -> Subject:
    """Check calls and heads, and put them together.

    Raises
    ------
    TypeError
        If something is not a call.
    ValueError
        If there is no call, or a head is not there.
    """
    found: list[AttentionCall] = []
    for at, call in enumerate(calls):
        if not isinstance(call, AttentionCall):
            raise TypeError(f"calls must be of mra_attention.analysis.AttentionCall, got {type(call).__name__} at {at}")
        found.append(call)
    if not found:
        raise ValueError("calls is empty; a report is about at least one call of attention")
    counts = {call.query.shape[1] for call in found}
    layers = list(dict.fromkeys(call.layer for call in found))
    if heads is None:
        return Subject(found, layers, tuple(range(max(counts))), max(counts))
    wanted = tuple(dict.fromkeys(heads))
    if not wanted or not all(0 <= head < min(counts) for head in wanted):
        raise ValueError(f"heads must be some of 0 .. {min(counts) - 1}, which all layers have, got {list(heads)}")
    return Subject([with_heads(call, wanted) for call in found], layers, wanted, max(counts))


def with_heads(call: AttentionCall, heads: Sequence[int]) -> AttentionCall:
    """Return a call with some of its heads."""
    count = call.query.shape[1]
    group = count // call.key.shape[1]
    of_keys = [head // group for head in heads]

    def of_heads(given: Tensor | None, dim: int) -> Tensor | None:
        wanted = given is not None and given.dim() >= -dim and given.shape[dim] == count > 1
        return given.index_select(dim, torch.tensor(heads)) if wanted and given is not None else given

    return replace(
        call,
        query=call.query[:, list(heads)],
        key=call.key[:, of_keys],
        value=call.value[:, of_keys],
        attn_mask=of_heads(call.attn_mask, -3),
        sinks=of_heads(call.sinks, -1),
        alibi_slopes=of_heads(call.alibi_slopes, -1),
    )


def rows_within(calls: Sequence[AttentionCall]) -> int:
    """Return of how many queries of a head metrics are computed, so that they take about a minute."""
    models = 5  # what was observed, and four null models
    keys = sum(call.query.shape[0] * call.query.shape[1] * call.key.shape[-2] for call in calls)
    return max(8, min(ROWS, MOST_WEIGHTS // (models * max(keys, 1))))


def heads_within(calls: Sequence[AttentionCall]) -> list[int]:
    """Return the heads, evenly spaced, of which errors are measured, so that this takes a minute or two."""
    count = max(call.query.shape[1] for call in calls)
    # Once exactly, and at budgets that grow by factors, together about four times; and all of that for the null model.
    work = 8.0 * sum(_work(call) for call in calls)
    kept = max(1, min(count, int(count * MOST_WORK / max(work, 1.0))))
    return [at * count // kept for at in range(kept)]


def _work(call: AttentionCall) -> float:
    batch, heads, _, dim = call.query.shape
    return 2.0 * batch * heads * float(call.query_length or 0) * call.key.shape[-2] * (dim + call.value.shape[-1])
