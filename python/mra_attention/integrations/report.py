"""What became of the calls of torch's attention: which were taken, which were not, and why."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Shape = tuple["int | str", ...]


class FallbackWarning(UserWarning):
    """Torch's attention was used where this package's was asked for; the message says in which layer, and why."""


@dataclass(frozen=True)
class Calls:
    """Calls of one kind in one layer.

    Attributes
    ----------
    layer : str
        The qualified name of the module that called, in the outermost module that was being called.
        "(no module)" outside of modules, "(compiled)" in code that torch.compile traced.
    function : str
        The function of torch that was called: "scaled_dot_product_attention", "multi_head_attention_forward", or a
        fused operator of a compiled layer.
    query_shape, key_shape : tuple of int or str
        The shapes; a size that was not always the same is a string, "smallest..largest", a jagged one is "j". Empty in
        compiled code.
    reason : str or None
        Why torch's attention computed them, or None if this package's did.
    calls : int
        Their number. Compiled code counts when it is traced.
    """

    layer: str
    function: str
    query_shape: Shape
    key_shape: Shape
    reason: str | None
    calls: int

    @property
    def taken(self) -> bool:
        """Whether the attention of this package computed them."""
        return self.reason is None


@dataclass(frozen=True)
class Report:
    """What became of all calls inside a context, in the order of the first ones; `str` makes a table of it.

    Attributes
    ----------
    rows : tuple of Calls
        One for each layer, function and reason.
    unmatched : tuple of str
        The names and patterns of `layers` that no layer matched so far.
    """

    rows: tuple[Calls, ...]
    unmatched: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Calls]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def taken(self) -> int:
        """The number of calls that this package computed."""
        return sum(row.calls for row in self.rows if row.taken)

    @property
    def not_taken(self) -> int:
        """The number of calls that torch computed."""
        return sum(row.calls for row in self.rows if not row.taken)

    def __str__(self) -> str:
        lines = [("layer", "function", "query", "key", "calls", "taken")]
        for row in self.rows:
            verdict = "yes" if row.reason is None else f"no: {row.reason}"
            shapes = (_text(row.query_shape), _text(row.key_shape))
            lines.append((row.layer, row.function, *shapes, str(row.calls), verdict))
        *columns, _ = zip(*lines, strict=True)
        widths = [max(map(len, column)) for column in columns]
        table = ["  ".join([*map(str.ljust, line[:-1], widths), line[-1]]) for line in lines]
        table.append(f"{self.taken} calls taken, {self.not_taken} not")
        if self.unmatched:
            table.append(f"layers without a call: {', '.join(map(repr, self.unmatched))}")
        return "\n".join(table)


def _text(shape: Shape) -> str:
    return f"({', '.join(map(str, shape))})"


_JAGGED = -1


class _Tally:
    """How many calls, and between which sizes."""

    def __init__(self, sizes: list[int]) -> None:
        self.calls = 0
        self.least = self.most = sizes

    def add(self, sizes: list[int]) -> None:
        self.calls += 1
        self.least = list(map(min, self.least, sizes))
        self.most = list(map(max, self.most, sizes))

    def shape(self) -> Shape:
        return tuple(map(_size, self.least, self.most))


def _size(least: int, most: int) -> int | str:
    if least == most:
        return "j" if most == _JAGGED else most
    return f"{'j' if least == _JAGGED else least}..{most}"


class Recorder:
    """Counts calls from any number of threads. One entry for each kind of call, so its size does not follow theirs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tallies: dict[tuple[str, str, str | None, int, int], _Tally] = {}

    def add(self, layer: str, function: str, query: Sequence[Any], key: Sequence[Any], reason: str | None) -> bool:
        """Count a call with a query and a key of these shapes; return whether it is the first one of its kind."""
        # A jagged length is a symbol, without a value.
        sizes = [size if type(size) is int else _JAGGED for size in (*query, *key)]
        kind = (layer, function, reason, len(query), len(key))
        with self._lock:
            is_new = kind not in self._tallies
            self._tallies.setdefault(kind, _Tally(sizes)).add(sizes)
        return is_new

    def report(self) -> Report:
        """Return what was counted so far."""
        with self._lock:
            rows: list[Calls] = []
            for (layer, function, reason, rank, _), tally in self._tallies.items():
                shape = tally.shape()
                rows.append(Calls(layer, function, shape[:rank], shape[rank:], reason, tally.calls))
        return Report(tuple(rows))
