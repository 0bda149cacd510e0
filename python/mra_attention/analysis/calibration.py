"""What `calibrate` returns: a config for each layer, and why it was chosen."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from ..config import MRAConfig
from .budget_curves import BudgetCurve, Cost


@dataclass(frozen=True)
class CalibratedLayer:
    """A config for a layer, with what it does on the calls of that layer.

    Parameters
    ----------
    config : MRAConfig
        With one budget, or one for each head.
    errors : tuple of float
        The error of each head, as `BudgetCurve` defines it.
    cost, exact_cost : float
        Of attention in the calls, with the config and with every block.
    """

    config: MRAConfig
    errors: tuple[float, ...]
    cost: float
    exact_cost: float


@dataclass(frozen=True)
class Calibration:
    """A config for each layer of a model, with budgets for its heads; the result of `calibrate`.

    `str` is a table of the layers: what differs from the defaults, the budgets of the heads, the mean of their errors,
    and the cost beside that of exact attention.

    Parameters
    ----------
    layers : dict of str to CalibratedLayer
        The layers by name.
    cost_unit : {"flops", "seconds"}
        Of all costs.
    curves : tuple of BudgetCurve
        Errors and costs of each head at every budget, for all candidates.
    loss : float, optional
        The loss with these configs, where they were chosen by it.
    """

    layers: dict[str, CalibratedLayer]
    cost_unit: Cost
    curves: tuple[BudgetCurve, ...]
    loss: float | None = None

    @property
    def configs(self) -> dict[str, MRAConfig]:
        """The config of each layer, as `mra_attention.nn.convert(model, layers=...)` takes them."""
        return {name: layer.config for name, layer in self.layers.items()}

    @property
    def error(self) -> float:
        """The mean error of all heads on the calls."""
        errors = [error for layer in self.layers.values() for error in layer.errors]
        return math.fsum(errors) / len(errors)

    @property
    def cost(self) -> float:
        """The cost of attention in all calls with these configs."""
        return sum(layer.cost for layer in self.layers.values())

    @property
    def exact_cost(self) -> float:
        """The cost of attention in all calls with every block."""
        return sum(layer.exact_cost for layer in self.layers.values())

    @property
    def speedup(self) -> float:
        """What exact attention costs, as a multiple of the cost with these configs."""
        return self.exact_cost / self.cost

    def to_json(self) -> str:
        """Return everything as a JSON object, to be stored beside the weights of the model."""
        layers = {name: _with_plain_config(layer) for name, layer in self.layers.items()}
        curves = [_with_plain_config(curve) for curve in self.curves]
        return json.dumps({"layers": layers, "cost_unit": self.cost_unit, "loss": self.loss, "curves": curves})

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Return the calibration that `to_json` returned.

        Parameters
        ----------
        text : str
            What `to_json` returned; KeyError or TypeError tells if it is something else.
        """
        values = json.loads(text)
        return cls(
            layers={name: CalibratedLayer(**_with_config(layer)) for name, layer in values["layers"].items()},
            cost_unit=values["cost_unit"],
            curves=tuple(BudgetCurve(**_with_config(curve)) for curve in values["curves"]),
            loss=values["loss"],
        )

    def __str__(self) -> str:
        rows = [("layer", "settings", "blocks per row", "error", "cost")]
        for name, layer in self.layers.items():
            error = math.fsum(layer.errors) / len(layer.errors)
            budgets = " ".join(f"{budget:g}" for budget in layer.config.budgets()[0])
            rows.append((name, _settings(layer.config), budgets, *_measures(error, layer.cost / layer.exact_cost)))
        rows.append(("all", "", "", *_measures(self.error, self.cost / self.exact_cost)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def chosen_layer(curves: Sequence[BudgetCurve], places: Sequence[int]) -> CalibratedLayer:
    """Return the layer of heads with these curves, each with the budget at its place."""
    budgets = [curve.budgets[i] for curve, i in zip(curves, places, strict=True)]
    # In the token form a single infinity would give the plan of every head the room for all blocks.
    every = all(budget == curve.budgets[-1] for budget, curve in zip(budgets, curves, strict=True))
    one = math.inf if every else budgets[0]
    return CalibratedLayer(
        config=replace(curves[0].config, blocks_per_row=one if len({*budgets}) == 1 else tuple(budgets)),
        errors=tuple(curve.errors[i] for curve, i in zip(curves, places, strict=True)),
        cost=sum(curve.costs[i] for curve, i in zip(curves, places, strict=True)),
        exact_cost=sum(curve.costs[-1] for curve in curves),
    )


def _measures(error: float, share: float) -> tuple[str, str]:
    return f"{error:.3f}", f"{share:.1%} of exact"


def _settings(config: MRAConfig) -> str:
    """Return the block size, and what differs from the defaults."""
    default = MRAConfig()
    names = [field.name for field in dataclasses.fields(config) if field.name not in ("resolutions", "blocks_per_row")]
    changed = [f"{name}={getattr(config, name)}" for name in names if getattr(config, name) != getattr(default, name)]
    return ", ".join([f"blocks of {config.block_size}", *changed])


def _with_plain_config(value: CalibratedLayer | BudgetCurve) -> dict[str, Any]:
    """Return the fields of a value, with its config as what JSON has."""
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return fields | {"config": value.config.to_dict()}


def _with_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a value from those that JSON has, in which tuples are lists."""
    tuples = {name: tuple(cast("list[Any]", value)) for name, value in fields.items() if isinstance(value, list)}
    return {**fields, **tuples} | {"config": MRAConfig.from_dict(fields["config"])}
