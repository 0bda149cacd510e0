"""The arguments of the operators, written once: names, order and types, from which schemas and calls are made.

`forward` takes `Inputs`, then `Settings`; `select` the tensors of it that a selection depends on, then `Settings`;
`backward` the gradients of out and lse, `Inputs` with the plan that was used, out, lse, whether `attn_bias` is to have
a gradient, then `Settings`.
"""

from __future__ import annotations

import typing
from typing import Any, NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The tensors of a call.

    Dense: query `(B, H, Lq, D)`, key `(B, Hk, Lk, D)`, value `(B, Hk, Lk, Dv)`. With `cu_seqlens_q` and `cu_seqlens_k`,
    the boundaries of packed sequences, the lengths are the totals and `B` is 1. The native module reads the boundaries
    when the operator runs, so that a compiler need not know them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None = None
    """bool `(B, Lk)`: which keys are valid."""
    query_mask: Tensor | None = None
    """bool `(B, Lq)`: which queries are valid."""
    attn_bias: Tensor | None = None
    """bool or float, broadcasts to `(B, H, Lq, Lk)`; with `mask_tiles` an int32 grid of blocks."""
    mask_tiles: Tensor | None = None
    """bool `(N, BQ, BK)`: the masks of the blocks whose number in the grid is not negative; -1: hidden, -2: visible."""
    alibi_slopes: Tensor | None = None
    """float64 `(B, H)`: a bias of minus the slope times the distance of query and key."""
    sinks: Tensor | None = None
    """float64 `(B, H)`: one more logit in the denominator."""
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    plan: Tensor | None = None
    """uint8 `(B, bytes)`: a selection made before."""
    seed: Tensor | None = None
    """int64 `(1,)`: the seed of dropout; a tensor, so that a compiled graph draws a new one at every call."""


class Settings(NamedTuple):
    """All else, in the form in which the native module reads it."""

    scale: float
    block_sizes: list[int]
    """Of every level, the coarsest first; the blocks of the last one are exact."""
    sparse: bool = False
    first_order: bool = False
    """Whether coarse blocks of the block form are expanded around the mean query, in place of their means."""
    coarse_shift: float = 0.0
    max_score: bool = False
    pool_queries: bool = True
    window_left: int = -1
    window_right: int = -1
    """Keys up to this far on the right are visible, -1 for all; 0 is causal."""
    lower_right: bool = False
    """Whether the last query is beside the last key, and not the first beside the first."""
    softcap: float | None = None
    """What logits approach and never exceed."""
    blocks_per_row: list[float] = [4.0]  # noqa: RUF012 : the default of a field, never changed
    """For each level one number, or one for each head."""
    num_blocks: int | None = None
    first_blocks: int | None = None
    diagonal_blocks: int = 0
    local_blocks: int = 1
    dropout_p: float = 0.0

    @property
    def block_size(self) -> int:
        """Tokens of the finest blocks."""
        return self.block_sizes[-1]

    def rates(self) -> list[list[float]]:
        """Return the budget of every level: one number, or one for each head."""
        count = len(self.blocks_per_row) // len(self.block_sizes)
        return [self.blocks_per_row[at : at + count] for at in range(0, len(self.blocks_per_row), count)]

    def is_token_form(self) -> bool:
        """Return whether every token chooses for itself, whatever masks say."""
        return self.window_left >= 0 or self.window_right >= 0 or not self.pool_queries


COUNT = len(Inputs._fields)
BIAS = Inputs._fields.index("attn_bias")
SINKS = Inputs._fields.index("sinks")
_LEFT_OUT_BY_SELECT = ("value", "sinks", "plan", "seed")
SELECT_FIELDS = tuple(name for name in Inputs._fields if name not in _LEFT_OUT_BY_SELECT)

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    list[float]: "float[]",
    list[int]: "int[]",
    int: "SymInt",
    int | None: "SymInt?",
    bool: "bool",
}


def _parameters(fields: type, names: tuple[str, ...]) -> list[str]:
    hints = typing.get_type_hints(fields)
    return [f"{_SCHEMA_TYPES[hints[name]]} {name}" for name in names]


_INPUTS, _SETTINGS = _parameters(Inputs, Inputs._fields), _parameters(Settings, Settings._fields)
_OF_BACKWARD = ("Tensor out", "Tensor lse", "bool wants_grad_bias")
FORWARD_SCHEMA = f"({', '.join(_INPUTS + _SETTINGS)}) -> (Tensor out, Tensor lse, Tensor plan_out)"
BACKWARD_SCHEMA = (
    f"({', '.join(['Tensor grad_out', 'Tensor? grad_lse', *_INPUTS, *_OF_BACKWARD, *_SETTINGS])})"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias, Tensor grad_sinks)"
)
SELECT_SCHEMA = f"({', '.join(_parameters(Inputs, SELECT_FIELDS) + _SETTINGS)}) -> Tensor"


class Call(NamedTuple):
    """The arguments of `forward` or `select`, sorted."""

    inputs: Inputs
    settings: Settings


class BackwardCall(NamedTuple):
    """The arguments of `backward`, sorted."""

    grad_out: Tensor
    grad_lse: Tensor | None
    inputs: Inputs
    out: Tensor
    lse: Tensor
    wants_grad_bias: bool
    settings: Settings


def of_forward(args: tuple[Any, ...]) -> Call:
    """Sort the arguments of `forward`."""
    return Call(Inputs(*args[:COUNT]), Settings(*args[COUNT:]))


def of_select(args: tuple[Any, ...]) -> Call:
    """Sort the arguments of `select`; the key stands for the value, which no selection depends on."""
    given = dict(zip(SELECT_FIELDS, args, strict=False))
    return Call(Inputs(**given, value=given["key"]), Settings(*args[len(SELECT_FIELDS) :]))


def of_backward(args: tuple[Any, ...]) -> BackwardCall:
    """Sort the arguments of `backward`."""
    end = 2 + COUNT
    inputs, settings = Inputs(*args[2:end]), Settings(*args[end + len(_OF_BACKWARD) :])
    out, lse, wants_grad_bias = args[end : end + len(_OF_BACKWARD)]
    return BackwardCall(args[0], args[1], inputs, out, lse, wants_grad_bias, settings)


def for_backward(inputs: Inputs, out: Tensor, lse: Tensor, plan: Tensor) -> tuple[Tensor | None, ...]:
    """Return the tensors that `backward` takes behind the two gradients and before the rest."""
    return (*inputs._replace(plan=plan), out, lse)


def for_select(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """Return the tensors that `select` takes."""
    return tuple(getattr(inputs, name) for name in SELECT_FIELDS)
