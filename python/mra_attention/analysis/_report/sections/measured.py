"""What the model is, what was measured of it and with which options."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from .... import __version__
from ....config import SETTINGS, MRAConfig
from ...attention_call import AttentionCall
from ..document import Grid, Section
from ..findings import Findings
from ..subject import Subject


def measured(found: Findings, about: Mapping[str, str]) -> Section:
    """Return the section; `about` has what the caller knows of model and text."""
    subject = found.subject
    rows = [
        *about.items(),
        ("Layers", f"{len(subject.layers)}, numbered from 0 in the order in which they called attention"),
        ("Heads", _heads(subject)),
        ("Calls of attention", f"{len(subject.calls)}, {_lengths(subject)}"),
        ("Queries looked at", _rows(found)),
        ("Errors and budgets", _budgets(found)),
        ("Approximation", f"blocks of {found.config.block_size} tokens, {_settings(found)}"),
        ("Seed", str(found.seed)),
        ("Versions", _versions()),
    ]
    paragraphs = (
        "Everything on this page comes from the queries, keys and values that the layers of the model handed to "
        "attention while it read the text. The same calls, options and versions give the same page. No number depends "
        "on the CPU but by rounding: costs are counted in floating-point operations, not in seconds.",
    )
    return Section(
        "measured",
        "What was measured",
        paragraphs,
        (
            Grid("Model, text and options", ("What", "Value"), rows),
            Grid(
                "Layers",
                ("Number", "Name", "Query heads", "Key heads", "Head dimension", "Queries", "Keys", "Who sees whom"),
                [_layer(number, layer, subject.first_call(layer)) for number, layer in enumerate(subject.layers)],
                "Lengths and masks are those of the first call of the layer.",
                folded=True,
            ),
        ),
    )


def _heads(subject: Subject) -> str:
    if len(subject.heads) == subject.of_heads:
        return f"all {subject.of_heads} of each layer, numbered from 0"
    return f"{', '.join(map(str, subject.heads))} of the {subject.of_heads} of each layer"


def _lengths(subject: Subject) -> str:
    keys = sorted({call.key.shape[-2] for call in subject.calls})
    sequences = sum(call.query.shape[0] for call in subject.calls if call.layer == subject.layers[0])
    lengths = str(keys[0]) if len(keys) == 1 else f"{keys[0]} to {keys[-1]}"
    return f"{lengths} keys long; {sequences} sequence{'' if sequences == 1 else 's'} in the first layer"


def _rows(found: Findings) -> str:
    held = max(call.query.shape[-2] for call in found.subject.calls)
    if held <= found.rows:
        return "all that were captured"
    return f"{found.rows} of each head and call, evenly spaced, of up to {held}; errors and maps are of all queries"


def _budgets(found: Findings) -> str:
    if found.budgets is None:
        return "not measured, since the capture has only some of the queries"
    count, of = len(found.budgets.places), len(found.subject.heads)
    if count == of:
        return "of all heads above"
    heads = ", ".join(str(found.subject.heads[place]) for place in found.budgets.places)
    return f"of {count} of {of} heads in each layer, evenly spaced, to bound the time: {heads}"


def _settings(found: Findings) -> str:
    if found.budgets is None:
        return "not used"
    configs = list(found.budgets.alike)
    default = MRAConfig()
    told = [name for name in SETTINGS if any(getattr(config, name) != getattr(default, name) for config in configs)]
    settings = (", ".join(f"{name}={getattr(config, name)}" for name in told) for config in configs)
    return " or ".join(settings) if told else "default settings"


def _versions() -> str:
    found: dict[str, Any] = {
        "mra-attention": __version__,
        "torch": torch.__version__,
        "NumPy": metadata.version("numpy"),
        "PyWavelets": metadata.version("PyWavelets"),
        "Python": platform.python_version(),
    }
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _layer(number: int, name: str, call: AttentionCall) -> tuple[str, ...]:
    sizes = (call.query.shape[1], call.key.shape[1], call.query.shape[-1], call.query_length, call.key.shape[-2])
    return (str(number), name or "(no name)", *map(str, sizes), _sight(call))


def _sight(call: AttentionCall) -> str:
    words = ["causal" if call.is_causal else ""]
    words.append("" if call.window_size == (-1, -1) else f"window {call.window_size[0]}, {call.window_size[1]}")
    words.append("" if call.attn_mask is None else "mask")
    return ", ".join(filter(None, words)) or "every query sees every key"
