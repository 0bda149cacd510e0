"""The calls of attention that a model made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import SupportsIndex, overload

from . import call_files
from .attention_call import AttentionCall
from .call_files import CallFile


class Capture(Sequence[AttentionCall]):
    """Calls of attention in the order in which they were made, in memory or in files.

    What is in files is read when an item is asked for, and its tensors are mapped from the file.

    Parameters
    ----------
    calls : iterable of AttentionCall
        The calls.

    Examples
    --------
    >>> import torch
    >>> from mra_attention.analysis import AttentionCall, Capture
    >>> calls = Capture([AttentionCall(*torch.randn(3, 1, 4, 100, 64), layer="layers.0.self_attn")])
    >>> calls
    Capture(1 call of 1 layer)
    >>> calls.layers()
    ['layers.0.self_attn']
    """

    def __init__(self, calls: Iterable[AttentionCall | CallFile]) -> None:
        self._calls = list(calls)

    @overload
    def __getitem__(self, index: SupportsIndex) -> AttentionCall: ...

    @overload
    def __getitem__(self, index: slice) -> Capture: ...

    def __getitem__(self, index: SupportsIndex | slice) -> AttentionCall | Capture:
        """Return a call, or of a slice a `Capture`."""
        if isinstance(index, slice):
            return Capture(self._calls[index])
        call = self._calls[index]
        return call.read() if isinstance(call, CallFile) else call

    def __len__(self) -> int:
        return len(self._calls)

    def layers(self) -> list[str]:
        """Return the names of the layers that called, in the order of their first calls."""
        return list(dict.fromkeys(call.layer for call in self._calls))

    def of_layer(self, layer: str) -> Capture:
        """Return the calls of one layer.

        Parameters
        ----------
        layer : str
            One of `layers()`.

        Raises
        ------
        ValueError
            If there is no call of this layer.
        """
        found = [call for call in self._calls if call.layer == layer]
        if not found:
            raise ValueError(f"layer must be one of {', '.join(map(repr, self.layers()))}, got {layer!r}")
        return Capture(found)

    def save(self, path: str | PathLike[str]) -> None:
        """Write every call to a file of its own, in the format of safetensors, bit for bit.

        Parameters
        ----------
        path : str or path
            A folder that is new or empty.

        Raises
        ------
        FileExistsError
            If there is something at `path` already.
        ImportError
            If safetensors is not installed.
        """
        with call_files.new_folder(path, "path") as folder:
            for number, call in enumerate(self):
                call_files.write(call, folder, number)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Capture:
        """Return the calls that `save`, or `capture` with `spill`, has written.

        Parameters
        ----------
        path : str or path
            The folder. Its files must stay as they are while the result is in use.

        Raises
        ------
        FileNotFoundError
            If there is no folder, or no call in it.
        ValueError
            If a file is not one of these.
        ImportError
            If safetensors is not installed.
        """
        return cls(call_files.read_folder(Path(path)))

    def __repr__(self) -> str:
        return f"Capture({_count(len(self), 'call')} of {_count(len(self.layers()), 'layer')})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
