"""Which settings a layer has: those of its model's config, above the defaults given to `register`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch

from ...config import MRAConfig, configure

FIELD = "mra"
"""The name of the field of a model's config."""

LAYERS, SLIDING = "layers", "sliding"


@dataclass(frozen=True)
class Defaults:
    """What `register` was given."""

    config: MRAConfig
    sliding: MRAConfig
    """That of layers with a sliding window."""


def of_layer(model_config: Any, layer: int | None, is_sliding: bool, defaults: Defaults) -> MRAConfig:
    """Return the settings of a layer.

    Parameters
    ----------
    model_config : PreTrainedConfig
        The config of the layer's model; its field `mra`, if it has one, is read again at every call.
    layer : int or None
        The number of the layer, None where the model does not number its layers.
    is_sliding : bool
        Whether the layer sees a sliding window only.
    defaults : Defaults
        What `register` was given.

    Raises
    ------
    TypeError
        If `mra` is no dictionary of what JSON has, or names something that is no setting.
    ValueError
        If a setting has a value that is not accepted, or the layer is not numbered and there are settings of layers.
    """
    given = getattr(model_config, FIELD, None)
    if given is None:
        return defaults.sliding if is_sliding else defaults.config
    count = getattr(model_config, "num_hidden_layers", None)
    if torch.compiler.is_compiling():
        return _resolve(given, layer, count, is_sliding, defaults)
    return _parse(_as_text(given), layer, count, is_sliding, defaults)


def check(given: Any, count: int | None) -> None:
    """Check the value of a field `mra`, every layer of it; `count` is the number of layers, if that is known."""
    text = _as_text(given)
    layers = _checked_layers(json.loads(text).get(LAYERS, {}), count)
    for layer in [int(name) for name in layers] or [None]:
        for is_sliding in (False, True):
            _parse(text, layer, None, is_sliding, Defaults(MRAConfig(), MRAConfig()))


def _checked_layers(layers: Any, count: int | None) -> dict[str, Any]:
    if not isinstance(layers, dict) or not all(name.isdecimal() for name in cast("dict[str, Any]", layers)):
        raise TypeError(f"config.{FIELD}[{LAYERS!r}] must map numbers of layers to settings, got {layers!r}")
    layers = cast("dict[str, Any]", layers)
    if count is not None and any(int(name) >= count for name in layers):
        raise ValueError(f"config.{FIELD}[{LAYERS!r}] has settings of layers {sorted(layers)}, but there are {count}")
    return layers


def _as_text(given: Any) -> str:
    if isinstance(given, Mapping):
        try:
            return json.dumps(given, sort_keys=True)
        except TypeError as error:
            raise TypeError(f"config.{FIELD} must hold what JSON has, got {given!r}: {error}") from error
    raise TypeError(
        f"config.{FIELD} must be a dictionary of settings, such as MRAConfig(...).to_dict(), got {type(given).__name__}"
    )


@lru_cache(maxsize=4096)
def _parse(text: str, layer: int | None, count: int | None, is_sliding: bool, defaults: Defaults) -> MRAConfig:
    """Return the settings of a layer; what is written is the key, so a change is seen and nothing is parsed twice."""
    return _resolve(json.loads(text), layer, count, is_sliding, defaults)


def _resolve(
    mra: Mapping[str, Any], layer: int | None, count: int | None, is_sliding: bool, defaults: Defaults
) -> MRAConfig:
    given = dict(mra)
    layers = _checked_layers(given.pop(LAYERS, {}), count)
    sliding = given.pop(SLIDING, {})
    if layers and layer is None:
        raise ValueError(
            f"config.{FIELD}[{LAYERS!r}] has settings of layers {sorted(layers)}, but this model does not number its "
            "attention layers; configure the part that does, such as model.model.language_model, or leave it out"
        )
    config = _with(defaults.config, given, f"config.{FIELD}")
    if is_sliding:
        # What is said of all layers holds here too, but for the budget: a layer's window is its own.
        budget = {"blocks_per_row", "num_blocks"}
        config = _with(defaults.sliding, {n: v for n, v in given.items() if n not in budget}, f"config.{FIELD}")
        config = _with(config, sliding, f"config.{FIELD}[{SLIDING!r}]")
    return _with(config, layers.get(str(layer), {}), f"config.{FIELD}[{LAYERS!r}]['{layer}']")


def _with(config: MRAConfig, given: Any, name: str) -> MRAConfig:
    if not isinstance(given, dict):
        raise TypeError(f"{name} must be a dictionary of settings, got {given!r}")
    given = cast("dict[str, Any]", given)
    try:
        # `from_dict` checks names and values, and reads "inf".
        settings = MRAConfig.from_dict(given)
        return configure(config, {field: getattr(settings, field) for field in given})
    except (TypeError, ValueError, NotImplementedError) as error:
        raise type(error)(f"{name}: {error}") from error
