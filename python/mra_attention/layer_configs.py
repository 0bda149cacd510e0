"""Settings of single layers, by the names of their modules."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar, cast

from .config import MRAConfig

__all__ = ["LayerConfigs"]

_Default = TypeVar("_Default")


class LayerConfigs(Mapping[str, "MRAConfig | None"]):
    """Configs of layers by name, as the argument `layers` of functions that put this attention into a model takes them.

    Those take any mapping; this one has JSON, too.

    Parameters
    ----------
    layers : mapping of str to MRAConfig or None
        The keys are names of modules, as in `model.named_modules()`, or patterns of names, such as
        `"encoder.layers.1?.self_attn"` or `"decoder.*"`. Of several that match, the last one counts. With None a layer
        stays as it is; a layer that is to be exact has `MRAConfig(blocks_per_row=math.inf)`.

    Raises
    ------
    TypeError
        If it is no mapping, or has a key or a value of another type.

    Notes
    -----
    `replace_sdpa`, `nn.convert` and `configure` of `mra_attention.integrations.transformers` take it. Their names are
    those that `mra_attention.analysis.capture` and the report of `replace_sdpa` show, if the model is what is called.
    A name that no layer has is an error, or, for `replace_sdpa`, in its report.

    Examples
    --------
    >>> from mra_attention import LayerConfigs, MRAConfig
    >>> layers = LayerConfigs({"layers.*": MRAConfig(blocks_per_row=4), "layers.0.*": None})
    >>> layers == LayerConfigs.from_json(layers.to_json())
    True
    """

    def __init__(self, layers: Mapping[str, MRAConfig | None]) -> None:
        self._layers = _checked(layers)

    def __getitem__(self, pattern: str) -> MRAConfig | None:
        return self._layers[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def of_layer(self, layer: str, default: _Default) -> MRAConfig | _Default | None:
        """Return the config of a layer, or `default` if nothing matches its name.

        Parameters
        ----------
        layer : str
            A name without wildcards.
        default : Any
            For all other layers.
        """
        patterns = [pattern for pattern in self._layers if fnmatchcase(layer, pattern)]
        return self._layers[patterns[-1]] if patterns else default

    def without_layers(self, names: Iterable[str]) -> list[str]:
        """Return the names and patterns that match none of these layers.

        Parameters
        ----------
        names : iterable of str
            All layers that there are.
        """
        names = list(names)
        return [pattern for pattern in self._layers if not any(fnmatchcase(name, pattern) for name in names)]

    def to_json(self) -> str:
        """Return a JSON object with the fields of each config, null for None."""
        return json.dumps({name: given and given.to_dict() for name, given in self._layers.items()})

    @classmethod
    def from_json(cls, text: str) -> LayerConfigs:
        """Return the configs that `to_json` returned.

        Parameters
        ----------
        text : str
            A JSON object; an unknown setting raises TypeError.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"text must be a JSON object of names and settings, got {text!r}")
        layers = cast("dict[str, Any]", values)
        return cls({name: None if given is None else MRAConfig.from_dict(given) for name, given in layers.items()})

    def __repr__(self) -> str:
        return f"LayerConfigs({self._layers!r})"


def _checked(layers: Any) -> dict[str, MRAConfig | None]:
    if not isinstance(layers, Mapping):
        raise TypeError(f"layers must be a mapping of names to MRAConfig or None, got {type(layers).__name__}")
    for name, given in cast("Mapping[Any, Any]", layers).items():
        if not isinstance(name, str):
            raise TypeError(f"layers must have names of modules as keys, got {name!r}")
        if given is not None and not isinstance(given, MRAConfig):
            raise TypeError(f"layers[{name!r}] must be a mra_attention.MRAConfig or None, got {type(given).__name__}")
    return dict(cast("Mapping[str, MRAConfig | None]", layers))
