"""Results as a list of records."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

__all__ = ["Record", "Table"]

COLUMNS = ("layer", "head", "metric", "value")


class Record(NamedTuple):
    """A metric of a head, and what null models have in its place."""

    layer: str
    head: int | None
    """None for a metric of the whole layer."""
    metric: str
    value: float
    nulls: dict[str, float]
    """By the name of the null model."""


class Table(Sequence[Record]):
    """Records in the order in which they were made: by layer, head and metric.

    Parameters
    ----------
    records : iterable of Record
        The records. All have the same null models.

    Raises
    ------
    ValueError
        If they do not.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._records = list(records)
        if any(record.nulls.keys() != self._records[0].nulls.keys() for record in self._records):
            raise ValueError("records must all have the same null models")

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Table: ...
    def __getitem__(self, index: int | slice) -> Record | Table:
        return Table(self._records[index]) if isinstance(index, slice) else self._records[index]

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def __repr__(self) -> str:
        layers, metrics = ({getattr(r, name) for r in self._records} for name in ("layer", "metric"))
        return f"Table({len(self)} records: {len(layers)} layers, {len(metrics)} metrics; null models {self.nulls()})"

    def nulls(self) -> list[str]:
        """Return the names of the null models."""
        return list(self._records[0].nulls) if self._records else []

    def select(self, *, layer: str | None = None, head: int | None = None, metric: str | None = None) -> Table:
        """Return the records of a layer, of a head, of a metric; `None` is all of them."""
        wanted = [(0, layer), (1, head), (2, metric)]
        return Table(r for r in self._records if all(value is None or r[i] == value for i, value in wanted))

    def to_records(self) -> list[dict[str, Any]]:
        """Return a flat dict for each record: layer, head, metric, value, and a key for each null model.

        `pandas.DataFrame(table.to_records())` is a data frame.
        """
        return [dict(zip(COLUMNS, record[:4], strict=True)) | record.nulls for record in self._records]

    def to_csv(self, path: str | Path) -> None:
        """Write the records as CSV with a header; the head of a whole layer is empty."""
        with Path(path).open("w", newline="") as file:
            writer = csv.DictWriter(file, [*COLUMNS, *self.nulls()])
            writer.writeheader()
            writer.writerows(self.to_records())

    def to_json(self, path: str | Path) -> None:
        """Write the records as a JSON array; JSON has no word for what is not finite, so that is a string, `"nan"`."""
        written = [{name: _as_json(value) for name, value in record.items()} for record in self.to_records()]
        Path(path).write_text(json.dumps(written, indent=1, allow_nan=False) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> Table:
        """Read what `to_json` wrote; every number is the same, bit for bit."""
        return cls(
            Record(
                read["layer"],
                read["head"],
                read["metric"],
                float(read["value"]),
                {name: float(value) for name, value in read.items() if name not in COLUMNS},
            )
            for read in json.loads(Path(path).read_text())
        )


def _as_json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
