"""The text: the standard library's own documentation strings and sources, as bytes, split by file and masked."""

from __future__ import annotations

import ast
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

MASK_TOKEN = 256
"""The one token that is not a byte."""

VOCABULARY_SIZE = 257
MASKED_FRACTION = 0.15
VALIDATION_ONE_IN = 10


@dataclass(frozen=True)
class Corpus:
    """Bytes to learn from and bytes kept back, each a 1-D uint8 tensor; no file is in both."""

    train: Tensor
    validation: Tensor
    num_files: int

    def unigram_entropy(self) -> float:
        """Nats per byte of the training text's byte frequencies: the loss of a model that sees no context."""
        counts = torch.bincount(self.train.long(), minlength=MASK_TOKEN).double()
        frequencies = counts[counts > 0] / counts.sum()
        return float(-(frequencies * frequencies.log()).sum())


class MaskedBatch(NamedTuple):
    """Windows of text with some bytes hidden; all three are (batch, length)."""

    inputs: Tensor
    targets: Tensor
    masked: Tensor


def load_corpus() -> Corpus:
    """Read the top-level modules of the running Python's standard library.

    A module contributes its documentation strings as running text and then its source. The name alone decides
    whether a module is kept back for validation, so the split does not depend on the machine.

    Raises
    ------
    FileNotFoundError
        If this Python has no readable standard library sources (one that imports from a zip file, say).
    """
    folder = Path(sysconfig.get_path("stdlib"))
    modules = [path for path in sorted(folder.glob("*.py")) if path.stem in sys.stdlib_module_names]
    train, validation = bytearray(), bytearray()
    for path in modules:
        source = path.read_bytes()
        kept_back = zlib.crc32(path.stem.encode()) % VALIDATION_ONE_IN == 0
        (validation if kept_back else train).extend(documentation(source) + source)
    if not train or not validation:
        raise FileNotFoundError(f"found {len(modules)} standard library sources in {folder}: the demo learns from them")
    return Corpus(_as_tensor(train), _as_tensor(validation), len(modules))


def documentation(source: bytes) -> bytes:
    """Join the documentation strings of a module, its classes and its functions by blank lines."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, documented))
    return "".join(f"{text}\n\n" for text in map(ast.get_docstring, nodes) if text).encode()


def masked_batches(text: Tensor, *, length: int, batch_size: int, count: int, seed: int) -> Iterator[MaskedBatch]:
    """Yield windows of `text` at random places with random bytes masked; the same `seed` yields the same batches.

    Raises
    ------
    ValueError
        If `text` is shorter than one window.
    """
    if len(text) < length:
        raise ValueError(f"length={length} is longer than the text, {len(text)} bytes; ask for at most that")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(text) - length + 1, (batch_size, 1), generator=generator)
        targets = text[starts + torch.arange(length)].long()
        masked = torch.rand(targets.shape, generator=generator) < MASKED_FRACTION
        masked[:, 0] |= ~masked.any(dim=1)
        yield MaskedBatch(targets.masked_fill(masked, MASK_TOKEN), targets, masked)


def _as_tensor(data: bytearray) -> Tensor:
    return torch.frombuffer(data, dtype=torch.uint8)
