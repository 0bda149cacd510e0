"""Calls of attention in a folder: one file of safetensors for each, with what is no tensor as JSON in its header."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ._extra import require
from .attention_call import AttentionCall

_KEY = "mra_attention.AttentionCall"
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class CallFile:
    """A call in a file, of which the layer is known and the rest is read when it is asked for."""

    path: Path
    layer: str

    def read(self) -> AttentionCall:
        """Return the call; its tensors are mapped from the file."""
        with _open(self.path) as file:
            values = _metadata(file, self.path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
        values["window_size"] = tuple(values["window_size"])
        return AttentionCall(**tensors, **values)


def write(call: AttentionCall, folder: Path, number: int) -> Path:
    """Write a call as the one of this number; return the file."""
    values = {field.name: getattr(call, field.name) for field in fields(call)}
    tensors = {name: value.contiguous() for name, value in values.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in values.items() if name not in tensors}
    path = folder / f"{number:06}{_SUFFIX}"
    # Two fields may be one tensor, as key and value, which the format refuses.
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    if len(set(storages)) < len(storages):
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    _safetensors("safetensors.torch").save_file(tensors, path, {_KEY: json.dumps(plain)})
    return path


def read_folder(folder: Path) -> list[CallFile]:
    """Return the calls of a folder in their order, without reading their tensors."""
    if not folder.is_dir():
        raise FileNotFoundError(f"path must be a folder of captured calls, and there is none at {folder}")
    paths = sorted(folder.glob("*" + _SUFFIX))
    if not paths:
        raise FileNotFoundError(f"path must be a folder of captured calls, but {folder} has no file *{_SUFFIX}")
    found: list[CallFile] = []
    for path in paths:
        with _open(path) as file:
            found.append(CallFile(path, _metadata(file, path)["layer"]))
    return found


@contextlib.contextmanager
def new_folder(given: Any, name: str) -> Generator[Path]:
    """Make a folder for calls, or take an empty one; what an exception leaves half done is removed."""
    _safetensors()
    folder = Path(given)
    was_there = folder.exists()
    if was_there and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{name} must be a new folder or an empty one, and {folder} is neither")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except BaseException:
        for path in folder.glob("*" + _SUFFIX):
            path.unlink()
        if not was_there:
            folder.rmdir()
        raise


def _open(path: Path) -> Any:
    return _safetensors().safe_open(path, "pt")


def _metadata(file: Any, path: Path) -> dict[str, Any]:
    header: dict[str, str] = file.metadata() or {}
    text = header.get(_KEY)
    if text is None:
        raise ValueError(f"{path} holds no captured call: its header has no {_KEY!r}")
    return json.loads(text)


def _safetensors(module: str = "safetensors") -> Any:
    return require(module, "safetensors", "a folder of calls")
