"""The sections of the page, in their order."""

from __future__ import annotations

from collections.abc import Mapping

from ..document import Section
from ..findings import Findings
from .all_heads import all_heads
from .bands import bands
from .blocks import blocks
from .budgets import budgets
from .entropies import entropies
from .errors import errors
from .locality import locality
from .measured import measured
from .null_models import null_models
from .scalograms import scalograms
from .summary import summary


def sections(found: Findings, about: Mapping[str, str]) -> list[Section]:
    """Return all sections; `about` has what the caller knows of model and text."""
    return [
        summary(found),
        measured(found, about),
        null_models(),
        locality(found),
        bands(found),
        scalograms(found),
        entropies(found),
        errors(found),
        *budgets(found),
        *blocks(found),
        all_heads(found),
    ]
