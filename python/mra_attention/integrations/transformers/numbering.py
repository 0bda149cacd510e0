"""Settings of layers by the names of their modules, as settings by number in the configs of a model's parts."""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# transformers is partly without annotations.

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ...config import MRAConfig
from ...layer_configs import LayerConfigs


def by_number(model: PreTrainedModel, layers: LayerConfigs) -> dict[int, dict[str, Any]]:
    """Return for each config of a part, by its `id`, the settings of its layers, as `config.mra["layers"]` has them.

    Raises
    ------
    ValueError
        If a name matches no layer, a layer has None, or layers of one number in one config are to have other settings.
    """
    modules = _numbered(model)
    for pattern in layers.without_layers(modules):
        known = ", ".join(map(repr, modules)) or "layers: this model does not number those that compute attention"
        raise ValueError(f"layers has {pattern!r}, which matches none of {known}")
    found: dict[int, dict[str, Any]] = {}
    first: dict[tuple[int, int], tuple[str, MRAConfig | str]] = {}
    for name, module in modules.items():
        given = layers.of_layer(name, "not named")
        if given is None:
            raise ValueError(
                f"layers has None for {name!r}, but attn_implementation='mra' is that of all layers; pass "
                "MRAConfig(blocks_per_row=math.inf) for one that is to be exact"
            )
        place = (id(module.config), module.layer_idx)
        other, others = first.setdefault(place, (name, given))
        if others != given:
            raise ValueError(
                f"layers has other settings for {other!r} than for {name!r}, but both are number {module.layer_idx} in "
                "one config, which has one setting for a number; give both the same, or use replace_sdpa with "
                "attn_implementation='sdpa'"
            )
        if isinstance(given, MRAConfig):
            found.setdefault(place[0], {})[str(module.layer_idx)] = given.to_dict()
    return found


def _numbered(model: PreTrainedModel) -> dict[str, Any]:
    """Return the modules that compute attention and know their number, by name; not those that contain one."""
    return {
        name: module
        for name, module in model.named_modules()
        if _is_numbered(module) and not any(_is_numbered(part) for part in module.modules() if part is not module)
    }


def _is_numbered(module: torch.nn.Module) -> bool:
    is_attention = "attention" in type(module).__name__.lower()
    return is_attention and isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "config")
