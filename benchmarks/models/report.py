"""The tables of `make bench-models`, and their record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .. import sections
from ..sections import document as document
from ..sections import table_row
from ..speed.report import folder
from . import gemma, minilm

LOSS_AIM = (16, 8192, 0.03)
"""Blocks, tokens, and how much larger than with "sdpa" the loss is to be at most, in nats per token."""

SPEED_AIMS = {8192: 2.5, 16384: 5.0}
"""With as many blocks as above: by tokens, how many times as fast as "sdpa" the prefill is to be."""


def gemma_table(rows: Sequence[gemma.Row]) -> str:
    """Return the results as Markdown, and below them which aims are reached."""
    lines = [
        table_row(
            "tokens", "attention", "prefill, s", "of it attention, s", "speed", "loss, nats per token", "more than sdpa"
        ),
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        times = (f"{row.seconds:.2f}", f"{row.attention_seconds:.2f}")
        compared = ("", f"{row.loss:.4f}", "")
        if row.blocks is not None:
            compared = (f"{row.speedup:.2f}x", f"{row.loss:.4f}", f"{row.loss_more:+.4f}")
        lines.append(table_row(str(row.length), gemma.label(row.blocks), *times, *compared))
    return "\n".join([*lines, "", *_aims(rows)])


def _aims(rows: Iterable[gemma.Row]) -> Iterable[str]:
    blocks, length, nats = LOSS_AIM
    for row in rows:
        name = f"{row.length} tokens, {gemma.label(row.blocks)}"
        if row.blocks == blocks and row.length == length:
            yield f"- {name}: loss at most {nats} more than sdpa: {_verdict(row.loss_more <= nats)}"
        if row.blocks == blocks and row.length in SPEED_AIMS:
            aim = SPEED_AIMS[row.length]
            yield f"- {name}: prefill at least {aim:g}x as fast as sdpa: {_verdict(row.speedup >= aim)}"
        if row.blocks is None:
            most = row.seconds / max(row.seconds - row.attention_seconds, 1e-9)
            yield f"- {row.length} tokens: a prefill without the time of attention would be {most:.2f}x as fast as sdpa"


def minilm_table(rows: Sequence[minilm.Row]) -> str:
    """Return the results as Markdown."""
    lines = [
        table_row("of 16 blocks in a row, exact", *(str(row.blocks) for row in rows)),
        "|---" + "|---:" * len(rows) + "|",
    ]
    lines.append(table_row("cosine, mean", *(f"{row.mean:.4f}" for row in rows)))
    lines.append(table_row("cosine, least", *(f"{row.least:.4f}" for row in rows)))
    return "\n".join(lines)


def write_record(text: str, rows: Mapping[str, Sequence[gemma.Row | minilm.Row]]) -> Path:
    """Write `<cpu>/models-<date>.md` and `.json`, and return the folder."""
    return sections.write("models", text, rows, folder())


def _verdict(holds: bool) -> str:
    return "reached" if holds else "not reached"
