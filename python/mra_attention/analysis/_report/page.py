"""The page: one file of HTML that needs no other."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from .._extra import require
from .document import Section


def render(title: str, sections: Sequence[Section]) -> str:
    """Return the page as HTML.

    Parameters
    ----------
    title : str
        Of the page.
    sections : sequence of Section
        Its sections in their order.

    Raises
    ------
    ImportError
        If jinja2 is not installed.
    """
    jinja2 = require("jinja2", "jinja2", "a report")
    folder = resources.files("mra_attention.analysis._report")
    # Autoescape, since titles and layers may be named anything.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((folder / "page.html").read_text("utf-8"))
    return template.render(title=title, sections=sections, style=(folder / "page.css").read_text("utf-8"))
