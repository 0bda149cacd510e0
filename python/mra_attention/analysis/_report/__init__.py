"""A page about the heads of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ..._checks import numbers
from ...config import MRAConfig
from .._extra import require
from ..attention_call import AttentionCall
from ..calibration_arguments import check_candidates

__all__ = ["report"]


def report(
    calls: Sequence[AttentionCall],
    path: str | PathLike[str],
    *,
    title: str = "Attention of a model",
    about: Mapping[str, str] | None = None,
    heads: Sequence[int] | None = None,
    max_rows: int | None = None,
    candidates: Sequence[MRAConfig] = (MRAConfig(),),
    target_error: float = 0.05,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Write a page about the heads of a model, with figures: one file of HTML that needs no network.

    It has the shares of frequency bands, scalograms of some heads, local against global heads, entropies and their
    correlation, errors against budgets, recommended budgets, and the blocks that are chosen, each beside null models.

    Parameters
    ----------
    calls : sequence of AttentionCall
        A `Capture`, or a list of calls. Calls with one `layer` are sequences of the same heads.
    path : str or path
        The file to write. One that is there is replaced.
    title : str, default "Attention of a model"
        Of the page.
    about : mapping of str to str, optional
        What the page is to say of the model and of the text, as `{"Model": "MiniLM", "Text": "a novel"}`.
    heads : sequence of int, optional
        Which heads of every layer to look at; by default all.
    max_rows : int, optional
        Of how many queries of a head, at most, metrics are computed, as for `analyze`. By default 128, or as few as
        one core looks at in about a minute.
    candidates : sequence of MRAConfig, default (MRAConfig(),)
        As for `calibrate`. Estimates of errors, the null model and the maps of blocks are with the first one.
    target_error : float, default 0.05
        The mean error that the recommended budgets keep.
    seed : int, default 0
        Of null models and of the queries of which errors are estimated.
    progress : bool, default True
        Whether to show what is being computed, by tqdm.

    Raises
    ------
    ImportError
        If jinja2, matplotlib, PyWavelets or tqdm is missing and needed.
    TypeError
        If an argument has the wrong type.
    ValueError
        If there is no call, a head is not there, or a value is not accepted.
    FileNotFoundError, IsADirectoryError
        If `path` is in no folder, or is one.
    NotImplementedError, TypeError, ValueError
        If `calibrate` refuses a call with one of the candidates.

    Notes
    -----
    Where exact attention of all heads takes more than about 7e11 floating-point operations, errors and budgets are of
    some heads, evenly spaced; the page says of which. Without all queries (`max_queries` of `capture`), or where all
    keys are in one block, it has no errors, budgets and blocks.

    Deterministic: the same bytes for the same calls, arguments, versions and number of threads.

    Examples
    --------
    >>> import torch
    >>> from mra_attention.analysis import capture, report
    >>> layer = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, num_layers=2).eval()
    >>> calls = capture(model, torch.randn(1, 512, 64))
    >>> report(calls, "report.html", title="Two layers", progress=False)  # doctest: +SKIP
    """
    from . import page
    from .findings import find
    from .sections import sections
    from .subject import subject

    for name, given in (("title", title), *(("about", each) for pair in (about or {}).items() for each in pair)):
        _check_text(name, given)
    _check_path(Path(path))
    numbers.check_bool("progress", progress)
    numbers.optional_integer("max_rows", max_rows, 1)
    target = numbers.finite("target_error", target_error, 0.0)
    for module, package in (("jinja2", "jinja2"), ("matplotlib", "matplotlib"), ("pywt", "PyWavelets")):
        require(module, package, "a report")
    check_candidates(candidates)
    found = find(
        subject(calls, heads),
        rows=max_rows,
        candidates=tuple(dict.fromkeys(candidates)),
        target=target,
        seed=numbers.integer("seed", seed, 0),
        progress=progress,
    )
    Path(path).write_text(page.render(title, sections(found, about or {})), encoding="utf-8")


def _check_path(path: Path) -> None:
    """Refuse a path that cannot be written, before what takes minutes."""
    if path.is_dir():
        raise IsADirectoryError(f"path must be a file to write, and {path} is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must be a file in a folder that is there, got {path}")


def _check_text(name: str, given: Any) -> None:
    if not isinstance(given, str):
        raise TypeError(f"{name} must be text, got {given!r}")
