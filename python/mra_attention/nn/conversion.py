"""Models of torch's modules, converted in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch

from ..config import MRAConfig, MRASettings, Unpack, configure, with_settings
from ..layer_configs import LayerConfigs
from .attention import MultiheadAttention, check_heads


@with_settings
def convert(
    model: torch.nn.Module,
    config: MRAConfig | None = None,
    *,
    layers: Mapping[str, MRAConfig | None] | None = None,
    **settings: Unpack[MRASettings],
) -> dict[str, MultiheadAttention]:
    """Make every `torch.nn.MultiheadAttention` of a model a `mra_attention.nn.MultiheadAttention`, in place.

    The modules stay the same objects: parameters, hooks, device, dtype and mode are kept, optimizers and tied weights
    go on to work, and the `state_dict` does not change. Only their class does. Modules that are converted already get
    the new config; subclasses of torch's module, which may compute something else, are left alone.

    Parameters
    ----------
    model : torch.nn.Module
        For example a `torch.nn.Transformer`, a `TransformerEncoder`, or a `MultiheadAttention` itself.
    config : MRAConfig, optional
        How attention is approximated, with one budget or one for each head.
    layers : mapping of str to MRAConfig or None, optional
        Other configs for some layers, by their names in `model.named_modules()` or by patterns of them: see
        `mra_attention.LayerConfigs`. With None a layer stays as it is.
    **settings
        Fields of `MRAConfig`; they take the place of those of `config`.

    Returns
    -------
    dict of str to MultiheadAttention
        What was converted, by name.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If there is nothing to convert, a pattern matches nothing, or the budgets are not as many as the heads. The
        model is then as it was.

    Notes
    -----
    Convert a model before it is compiled, scripted or exported. A converted module gives no weights: see
    `mra_attention.nn.MultiheadAttention`.

    Examples
    --------
    >>> import torch
    >>> from mra_attention import MRAConfig
    >>> from mra_attention.nn import convert
    >>> layer = torch.nn.TransformerEncoderLayer(256, 4, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, num_layers=3)
    >>> list(convert(model, blocks_per_row=4, layers={"layers.0.*": None}))
    ['layers.1.self_attn', 'layers.2.self_attn']
    """
    if not isinstance(model, torch.nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = {
        name: module
        for name, module in _attentions(model).items()
        if type(module) in (torch.nn.MultiheadAttention, MultiheadAttention)
    }
    if not found:
        raise ValueError(f"model has no torch.nn.MultiheadAttention to convert{_subclasses(model)}")
    default, others = configure(config, settings), LayerConfigs({} if layers is None else layers)
    for pattern in others.without_layers(found):
        raise ValueError(f"layers has {pattern!r}, which matches none of {', '.join(map(repr, found))}")
    configs = {name: others.of_layer(name, default) for name in found}
    chosen = {name: given for name, given in configs.items() if given is not None}
    if not chosen:
        raise ValueError("layers leaves out every torch.nn.MultiheadAttention of model, so there is nothing to convert")
    for name, given in chosen.items():
        heads: Any = found[name].num_heads
        check_heads(given, heads, name)
    left = [name for name in _attentions(model) if name not in found]
    if left:
        warnings.warn(
            f"left alone, since they are subclasses of torch.nn.MultiheadAttention: {', '.join(map(repr, left))}",
            stacklevel=2,
        )
    converted = {name: _convert(found[name], given) for name, given in chosen.items()}
    _keep_padding(model, set(converted.values()))
    return converted


def _attentions(model: torch.nn.Module) -> dict[str, torch.nn.MultiheadAttention]:
    """Return the attention modules of a model by name, subclasses too."""
    modules = cast("Iterator[tuple[str, torch.nn.Module]]", model.named_modules())
    return {name: module for name, module in modules if isinstance(module, torch.nn.MultiheadAttention)}


def _subclasses(model: torch.nn.Module) -> str:
    names = ", ".join(map(repr, _attentions(model)))
    return f", only subclasses of it, which are left alone: {names}" if names else ""


def _convert(module: torch.nn.MultiheadAttention, config: MRAConfig) -> MultiheadAttention:
    module.__class__ = MultiheadAttention
    converted = cast("MultiheadAttention", module)
    converted.use(config)
    return converted


def _keep_padding(model: torch.nn.Module, converted: set[MultiheadAttention]) -> None:
    """Stop encoders from removing padding through nested tensors, which only the fused path of all layers takes."""
    for module in model.modules():
        if isinstance(module, torch.nn.TransformerEncoder):
            layers = (getattr(layer, "self_attn", None) for layer in module.layers)
            if any(attention in converted for attention in layers):
                module.use_nested_tensor = False
