"""Reports in sections, and their records: a Markdown file to read, and a JSON file with the numbers."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .speed.report import machine


def document(sections: Mapping[str, str]) -> str:
    """Return the report: the machine, then each table below its heading."""
    parts = [machine(), *(f"## {heading}\n\n{table}" for heading, table in sections.items())]
    return "\n\n".join(parts) + "\n"


def write(name: str, text: str, rows: Mapping[str, Sequence[Any]], path: Path) -> Path:
    """Write `<name>-<date>.md` and `.json`, with rows that are dataclasses, into a folder, and return it."""
    path.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    (path / f"{name}-{date}.md").write_text(text)
    values = {"machine": machine(), **{part: [_finite(asdict(row)) for row in table] for part, table in rows.items()}}
    (path / f"{name}-{date}.json").write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
    return path


def _finite(value: Any) -> Any:
    """Return the value with null for what is not finite, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table_row(*cells: str) -> str:
    """Return a row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"
