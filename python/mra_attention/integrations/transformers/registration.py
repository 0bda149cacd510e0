"""What users call: `register`, and `configure` for the settings of a model."""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# transformers is partly without annotations.

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import transformers
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel, masking_utils

from ...config import MRAConfig
from ...layer_configs import LayerConfigs
from . import numbering, settings
from .attention import Registered, attend
from .masks import mra_mask

NAME = "mra"


def register(
    config: MRAConfig | None = None,
    *,
    sliding: MRAConfig | None = None,
    ignored_arguments: Iterable[str] = (),
) -> None:
    """Make `attn_implementation="mra"` known to transformers: the attention function and the mask function.

    Call it before a model is loaded with that name; a second call replaces the first one for all models.

    Parameters
    ----------
    config : MRAConfig, optional
        The settings of models whose config says nothing else; `MRAConfig()` by default.
    sliding : MRAConfig, optional
        Likewise for layers with a sliding window; by default `blocks_per_row=math.inf` with the other settings of
        `config`, which is exact and takes time in proportion to the window.
    ignored_arguments : iterable of str, optional
        Names of arguments that a model hands to its attention and that do not change it. Arguments that are not known
        are refused otherwise.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ImportError
        If this version of transformers calls its mask functions with other arguments.

    Notes
    -----
    A layer's settings come from, the later above the earlier: `register`; the dictionary `model.config.mra`, which is
    saved and loaded with the model, has the fields of `MRAConfig.to_dict()` and is read at every call; its entry
    `"sliding"`, for layers with a sliding window, for which the budget beside it does not count; its entry `"layers"`,
    settings by the number of the layer. `configure` writes it.

    Padded batches get on their valid tokens what each sequence gets alone, packed ones (`position_ids` that begin anew)
    what each sequence gets alone. Under `torch.compile` the mask of pairs of "sdpa" is used.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from mra_attention import MRAConfig
    >>> from mra_attention.integrations.transformers import register
    >>> register(MRAConfig(blocks_per_row=8))
    >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    >>> config._attn_implementation = "mra"
    >>> LlamaForCausalLM(config).config._attn_implementation
    'mra'
    """
    names = frozenset(_names(ignored_arguments))
    options: dict[str, Any] = {"config": config, "sliding": sliding}
    for name, given in options.items():
        if given is not None and not isinstance(given, MRAConfig):
            raise TypeError(f"{name} must be None or a mra_attention.MRAConfig, got {type(given).__name__}")
    if not {"q_length", "q_offset", "kv_offset"} <= set(inspect.signature(masking_utils.sdpa_mask).parameters):
        raise ImportError(
            f"transformers {transformers.__version__} calls its mask functions without q_length and q_offset; install "
            "a later one (5.24 is tested)"
        )
    config = MRAConfig() if config is None else config
    if sliding is None:
        sliding = MRAConfig.from_dict({**config.to_dict(), "blocks_per_row": math.inf, "num_blocks": None})
    AttentionInterface.register(NAME, partial(attend, Registered(settings.Defaults(config, sliding), names)))
    AttentionMaskInterface.register(NAME, mra_mask)


def configure(
    model: PreTrainedModel,
    config: MRAConfig | Mapping[str, Any] | None,
    *,
    layers: Mapping[str, MRAConfig | None] | None = None,
) -> None:
    """Write settings into the config of a model and of all its parts.

    Encoders and decoders, and the parts of composite models, often have configs of their own, which are copies: a value
    that is set on `model.config` alone does not reach them.

    Parameters
    ----------
    model : PreTrainedModel
        The model, or a part of it that is to have settings of its own.
    config : MRAConfig, mapping or None
        Its settings; as a mapping, what `model.config.mra` may hold, `"sliding"` and `"layers"` too. None takes the
        settings away, so that those of `register` count again.
    layers : mapping of str to MRAConfig, optional
        Configs of single layers, by the names in `model.named_modules()` of the modules that compute attention, or by
        patterns: see `mra_attention.LayerConfigs`. They are written as the entry `"layers"`, by number, in place of
        those that `config` has for the same numbers, and say everything of a layer, also if it has a sliding window.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        If the settings have an unknown name or a value that is not accepted, name a layer that no part has, or the
        model does not use the attention functions of transformers; if `layers` has None, or other settings for layers
        that have one number in one config, as may be for the self-attention and the cross-attention of a decoder. Then
        nothing is written.

    Examples
    --------
    >>> from transformers import BertConfig, BertModel
    >>> from mra_attention.integrations.transformers import configure
    >>> model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64))
    >>> configure(model, {"blocks_per_row": 2, "layers": {"0": {"blocks_per_row": "inf"}}})
    >>> model.config.mra["blocks_per_row"]
    2
    """
    given = config.to_dict() if isinstance(config, MRAConfig) else config
    # A model that does not ask for attention functions by name would ignore the settings.
    if not getattr(type(model), "_can_set_attn_implementation", lambda: True)():
        raise ValueError(
            f"{type(model).__name__} computes attention by itself, whatever attn_implementation says: settings would "
            "have no effect"
        )
    configs = _configs(model)
    numbered = {} if layers is None else numbering.by_number(model, LayerConfigs(layers))
    if numbered and given is None:
        given = {}
    if given is not None:
        counts = [getattr(found, "num_hidden_layers", None) for found in configs]
        settings.check(given, max((count for count in counts if count is not None), default=None))
    for found in configs:
        if given is not None:
            value = copy.deepcopy(dict(given))
            if id(found) in numbered:
                value[settings.LAYERS] = {**value.get(settings.LAYERS, {}), **numbered[id(found)]}
            setattr(found, settings.FIELD, value)
        elif hasattr(found, settings.FIELD):
            delattr(found, settings.FIELD)


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return every config that a layer of the model may ask, each once."""
    found = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())


def _names(given: Any) -> list[str]:
    names = [given] if isinstance(given, str) else list(given)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"ignored_arguments must be names of arguments, got {name!r}")
    return names
