"""What a page consists of: sections of paragraphs, figures, tables and code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple


class Picture(NamedTuple):
    """A drawing, with what a reader who does not see it is told."""

    svg: str
    alt: str
    width: float
    """In rem: how wide it is at most."""


@dataclass(frozen=True)
class Figure:
    """Pictures with a title and a caption that says how to read them."""

    kind: ClassVar[str] = "figure"
    title: str
    pictures: Sequence[Picture]
    caption: str


@dataclass(frozen=True)
class Grid:
    """A table of text; it is folded away if `folded`."""

    kind: ClassVar[str] = "grid"
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Code:
    """Lines to copy, folded away."""

    kind: ClassVar[str] = "code"
    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the page that the table of contents names; `key` is its anchor."""

    key: str
    title: str
    paragraphs: Sequence[str]
    parts: Sequence[Figure | Grid | Code] = field(default_factory=tuple)
