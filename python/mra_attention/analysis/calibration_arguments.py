"""The arguments of `calibrate`, checked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, cast, get_args

from .._checks import numbers
from ..config import MRAConfig
from .attention_call import AttentionCall
from .budget_curves import Cost

_LEAST = {"target_error": 0.0, "speedup": 1.0, "target_loss": -math.inf}
"""The least value of each target."""


def the_target(target_error: Any, speedup: Any, target_loss: Any, loss: Any) -> tuple[str, float]:
    """Return name and value of the one target that is given."""
    values = dict(zip(_LEAST, (target_error, speedup, target_loss), strict=True))
    given = [name for name, value in values.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"exactly one of {', '.join(values)} must be given, got {' and '.join(given) or 'none'}")
    (name,) = given
    if name == "target_loss" and not callable(loss):
        raise TypeError(f"target_loss needs loss, a function from configs to a number, got {loss!r}")
    if name != "target_loss" and loss is not None:
        raise ValueError(f"loss goes with target_loss, not with {name}; leave it out, or give target_loss")
    return name, numbers.finite(name, values[name], _LEAST[name])


def check_cost(cost: Any) -> None:
    """Check what costs are."""
    numbers.check_choice("cost", cost, get_args(Cost))


def checked_budgets(budgets: Any) -> tuple[float, ...] | None:
    """Return the budgets that are to be tried, or None for those of the default."""
    if budgets is None:
        return None
    if not isinstance(budgets, (tuple, list)) or not budgets:
        raise TypeError(f"budgets must be None or a sequence of numbers, got {budgets!r}")
    given = cast("Sequence[Any]", budgets)
    checked = tuple(numbers.finite(f"budgets[{at}]", budget) for at, budget in enumerate(given))
    if not all(less < more for less, more in itertools.pairwise((0.0, *checked))):
        raise ValueError(f"budgets must be positive and ascending, got {budgets!r}")
    return checked


def check_candidates(candidates: Any) -> None:
    """Check that candidates leave the budget open."""
    if not isinstance(candidates, (tuple, list)) or not candidates:
        raise TypeError(f"candidates must be a sequence of at least one mra_attention.MRAConfig, got {candidates!r}")
    default = MRAConfig()
    for config in candidates:  # pyright: ignore[reportUnknownVariableType]
        if not isinstance(config, MRAConfig):
            raise TypeError(f"candidates must be a sequence of mra_attention.MRAConfig, got {config!r} among them")
        if len(config.resolutions) != 2:
            raise ValueError(f"candidates must have two resolutions, got resolutions={config.resolutions!r}")
        for name in ("blocks_per_row", "num_blocks"):
            if getattr(config, name) != getattr(default, name):
                raise ValueError(
                    f"candidates has {name}={getattr(config, name)!r}, but the budget is what is chosen; leave it out"
                )


def by_layer(calls: Any) -> dict[str, list[AttentionCall]]:
    """Return the calls of each layer."""
    if not isinstance(calls, Iterable):
        raise TypeError(f"calls must be a sequence of mra_attention.analysis.AttentionCall, got {type(calls).__name__}")
    layers: dict[str, list[AttentionCall]] = {}
    for at, call in enumerate(cast("Iterable[Any]", calls)):
        if not isinstance(call, AttentionCall):
            raise TypeError(f"calls must be of mra_attention.analysis.AttentionCall, got {type(call).__name__}")
        if not call.layer:
            raise ValueError(f"calls[{at}].layer is empty; the config of a layer is returned under its name")
        layers.setdefault(call.layer, []).append(call)
    if not layers:
        raise ValueError("calls is empty; budgets are chosen from at least one call")
    for layer, of_layer in layers.items():
        heads = sorted({call.query.shape[-3] for call in of_layer})
        if len(heads) > 1:
            raise ValueError(f"calls of layer {layer!r} have different numbers of heads: {heads}")
    return layers
