"""Every setting that says how attention is approximated, as one value."""

from __future__ import annotations

import functools
import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, TypeVar, cast

from torch import Tensor

from . import _auto
from ._checks import numbers

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack

__all__ = ["MRAConfig", "MRASettings", "Unpack"]


class MRASettings(TypedDict, total=False):
    """The fields of `MRAConfig` as keywords of the public functions."""

    resolutions: Sequence[int] | Literal["auto"]
    blocks_per_row: float | Sequence[float | Sequence[float]] | Tensor
    num_blocks: int | None
    mode: Literal["full", "sparse"]
    coarse: Literal["mean", "first_order"]
    score: Literal["mean", "max"]
    coarse_shift: float
    first_blocks: int | None
    diagonal_blocks: int
    local_blocks: int
    pool_queries: bool
    grid: tuple[int, int] | None


@dataclass(frozen=True)
class MRAConfig:
    """How attention is approximated: which blocks are computed exactly, and what becomes of the others.

    Every function of this package takes its settings either as keywords or as `config=MRAConfig(...)`. Where both are
    given, a keyword takes the place of the config's field for that call; with `resolutions` of another number of levels
    pass `blocks_per_row`, too, where the config's is a sequence. Configs are compared and hashed by value;
    values are checked, and brought to one spelling, when a config is made.

    There are two forms of attention. In the *block form* the queries of a block are averaged to choose its key blocks,
    and the budget is shared by the rows of a head; it is used where nothing is hidden but padding. In the *token form*
    every token chooses for itself; it is used wherever a token does not see some other token, be it by `is_causal`, a
    window or a mask.

    Parameters
    ----------
    resolutions : sequence of int or "auto", default (32, 1)
        Tokens of the blocks of every level, the coarsest first, and at last 1. Each size divides the one before and is
        at least a 128th of it; the finest blocks, before the 1, have 4 to 128 tokens. With `(block_size, 1)` blocks are
        either exact or coarse. With more, as `(512, 32, 1)`, some blocks of each level are replaced by the blocks of
        the next one that they consist of, so that neither time nor memory grows with the square of the length.
        "auto" chooses them by the length L of the longer of queries and keys: blocks of 32, and above them, as long as
        the largest blocks are more than 512 in L, larger ones of 16 times the size, of which 16 per row are refined.
        `blocks_per_row` is then the budget of the finest level. L is that of the tensors: padding, all packed sequences
        together, and the `max_length` of a cache count, so a sequence by itself may get fewer levels.
    blocks_per_row : float, sequence or Tensor, default 4.0
        The budget: one number, or one for each head of the query. With more than two resolutions a sequence is taken as
        one budget for each refined level, each of them a number or one for each head; one number is that of all
        levels. In the block form, the exact blocks for each query block, on average over the query blocks of a head
        that have a valid token: `floor(blocks_per_row * query_blocks + 0.5)` blocks of the head are exact. In the token
        form, `floor(blocks_per_row + 0.5)` blocks, at least 1, are exact for each token. `math.inf` makes every block
        exact. At levels above the finest one blocks are refined where these words say exact.
    num_blocks : int, optional
        The budget as the number of exact blocks of a head, in place of `blocks_per_row`; in the token form each token
        gets its share, `num_blocks / query_blocks`. Either budget is raised to the blocks that are always exact, and
        limited to those that have a valid query and a valid key.
    mode : {"full", "sparse"}, default "full"
        Whether blocks that are not exact enter through their averages or are left out.
    coarse : {"mean", "first_order"}, default "mean"
        What a block that is not exact is in the block form: the means of its keys and values, as in the paper; or the
        softmax of the mean query within it, expanded to first order around that query. On a pretrained sentence encoder
        the latter halves the error of the output at equal budgets. It takes the time of `2.5 * key_blocks / block_size`
        more exact blocks per row: 1.25 at 512 tokens, 20 at 8192. The token form has the means in any case. In a call
        that may have the block form, "first_order" is not implemented together with more than two resolutions, a
        softcap, or an `attn_mask` that requires a gradient: NotImplementedError.
    score : {"mean", "max"}, default "max"
        What a token ranks the blocks by from which it chooses. "mean": the logit of the mean of a block's keys. "max":
        an estimate of the largest logit of a key, from 8-bit codes of what the keys differ from their mean, for four
        candidates by "mean" for each block to choose. On a pretrained decoder with two resolutions, at the time of 8,
        16 and 32 blocks by "mean", that leaves 0.99, 0.93 and 0.81 of their error. With more resolutions, a block above
        the finest ones is ranked by its blocks of the next size, by the largest logit of one of their means. The block
        form ranks by means. A step of a `KVCache` makes the codes of its candidates anew, which takes a few times as
        long as the rest of it.
    coarse_shift : float, default 0.0
        Added to the logit of each block that is not exact. The exponential of a mean is never above the mean of
        exponentials, so these blocks count too little; how much too little depends on the model.
    first_blocks : int, optional
        The number of first key blocks that are always exact: those that a token sees, in the token form; also the
        blocks of the first rows, in the block form. By default 0 in the block form and 1 in the token form, since
        trained decoders attend to the first tokens whatever these are.
    diagonal_blocks : int, default 0
        If positive, blocks `(i, j)` with `|i - j| <= diagonal_blocks // 2` are always exact. So is, in the block form,
        the best block of every row.
    local_blocks : int, default 1
        In the token form, the blocks at a distance of less than `local_blocks` from that of the token are always exact.
        In the block form a number above 1 does the same; the diagonal is not always exact there.
    pool_queries : bool, default True
        Whether the block form may be used. With False every token chooses for itself also where nothing is hidden.
    grid : tuple of two int, optional
        `(rows, columns)` of the patches of an image, which are the last tokens of the sequence, row by row. Blocks are
        then tiles of the grid, of 4 x 8 patches for blocks of 32, rather than parts of rows, which makes the error
        smaller; what comes before the grid, such as a class token, stays before it. For queries and keys of one
        sequence, without `is_causal`, `window_size` and `alibi_slopes`.

    Raises
    ------
    TypeError
        If a setting has the wrong type.
    ValueError
        If a setting has a value that is not accepted; `num_blocks` is for two resolutions.

    Notes
    -----
    Definition: docs/definitions.md, sections 2 to 5 and 8; "first_order" is 3.8, `score` 4.1 and 5, `coarse_shift` 3.6.

    Examples
    --------
    >>> from mra_attention import MRAConfig
    >>> config = MRAConfig(blocks_per_row=8, mode="sparse")
    >>> config == MRAConfig.from_json(config.to_json())
    True
    """

    resolutions: Sequence[int] | Literal["auto"] = (32, 1)
    blocks_per_row: float | Sequence[float | Sequence[float]] | Tensor = 4.0
    num_blocks: int | None = None
    mode: Literal["full", "sparse"] = "full"
    coarse: Literal["mean", "first_order"] = "mean"
    score: Literal["mean", "max"] = "max"
    coarse_shift: float = 0.0
    first_blocks: int | None = None
    diagonal_blocks: int = 0
    local_blocks: int = 1
    pool_queries: bool = True
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _set(self, "resolutions", numbers.resolutions(self.resolutions))
        levels = _levels(self.resolutions)
        _set(self, "blocks_per_row", numbers.budget(self.blocks_per_row, levels))
        _set(self, "num_blocks", numbers.optional_integer("num_blocks", self.num_blocks, 1))
        if self.num_blocks is not None and (levels > 1 or self.resolutions == "auto"):
            raise ValueError(
                f"num_blocks={self.num_blocks} is for two resolutions; with resolutions={self.resolutions!r} say with "
                "blocks_per_row how many blocks are refined at each level"
            )
        numbers.check_choice("mode", self.mode, ("full", "sparse"))
        numbers.check_choice("coarse", self.coarse, ("mean", "first_order"))
        numbers.check_choice("score", self.score, ("mean", "max"))
        _set(self, "coarse_shift", numbers.coarse_shift(self.coarse_shift))
        _set(self, "first_blocks", numbers.optional_integer("first_blocks", self.first_blocks, 0))
        _set(self, "diagonal_blocks", numbers.integer("diagonal_blocks", self.diagonal_blocks, 0))
        _set(self, "local_blocks", numbers.integer("local_blocks", self.local_blocks, 1))
        numbers.check_bool("pool_queries", self.pool_queries)
        _set(self, "grid", numbers.grid(self.grid))

    @property
    def block_size(self) -> int:
        """Tokens of the finest blocks, those that are computed exactly."""
        return self.block_sizes[-1]

    @property
    def block_sizes(self) -> Sequence[int]:
        """Tokens of the blocks of every level, the coarsest first; with "auto", as for short sequences."""
        return (_auto.FINEST,) if isinstance(self.resolutions, str) else self.resolutions[:-1]

    def for_length(self, length: int) -> MRAConfig:
        """Return the config with the resolutions that "auto" stands for; without "auto", the config itself.

        Parameters
        ----------
        length : int
            Tokens of the longer of queries and keys.
        """
        return _of_levels(self, _auto.resolutions(length)) if self.resolutions == "auto" else self

    def budgets(self) -> list[list[float]]:
        """Return the budget of every refined level, the coarsest first: one number, or one for each head."""
        levels = len(self.block_sizes)
        given: Any = self.blocks_per_row
        of_levels: list[Any] = [*given] if levels > 1 and isinstance(given, tuple) else [given] * levels
        return [[*rates] if isinstance(rates, tuple) else [rates] for rates in of_levels]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as values that JSON has: lists for tuples, "inf" for infinity."""
        return {name: _plain(getattr(self, name)) for name in SETTINGS}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> MRAConfig:
        """Return the config of settings that `to_dict` returned; what is left out has its default.

        Parameters
        ----------
        settings : mapping of str to value
            Names and values; an unknown name raises TypeError.
        """
        return configure(None, {name: _from_plain(value) for name, value in settings.items()})

    def to_json(self) -> str:
        """Return the settings as a JSON object."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> MRAConfig:
        """Return the config of settings that `to_json` returned.

        Parameters
        ----------
        text : str
            A JSON object; an unknown name raises TypeError.
        """
        settings = json.loads(text)
        if not isinstance(settings, dict):
            raise ValueError(f"text must be a JSON object of settings, got {text!r}")
        return cls.from_dict(settings)  # pyright: ignore[reportUnknownArgumentType]


@functools.lru_cache(maxsize=256)
def _of_levels(config: MRAConfig, resolutions: tuple[int, ...]) -> MRAConfig:
    budgets = _auto.budgets(len(resolutions) - 1, config.blocks_per_row)
    return replace(config, resolutions=resolutions, blocks_per_row=budgets)


SETTINGS = tuple(MRAConfig.__dataclass_fields__)
"""The names of all settings."""


def _set(config: MRAConfig, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)  # the class is frozen for everybody else


def _levels(resolutions: Any) -> int:
    """Return how many levels of budgets `blocks_per_row` may have."""
    return 1 if resolutions == "auto" else len(resolutions) - 1


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def _from_plain(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_plain(item) for item in value)  # pyright: ignore[reportUnknownVariableType]
    return math.inf if value == "inf" else value


_DEFAULT = MRAConfig()


def configure(config: Any, settings: Mapping[str, Any]) -> MRAConfig:
    """Return the config of a call: its argument `config`, with its keywords in place of the fields of that name."""
    for name in settings:
        if name not in SETTINGS:
            raise TypeError(f"{name!r} is no argument and no setting; the settings are {', '.join(SETTINGS)}")
    if config is None:
        return MRAConfig(**settings) if settings else _DEFAULT
    if not isinstance(config, MRAConfig):
        raise TypeError(f"config must be None or a mra_attention.MRAConfig, got {type(config).__name__}")
    if not settings:
        return config
    _check_meaning_of_budgets(config, settings)
    return MRAConfig(**({name: getattr(config, name) for name in SETTINGS} | dict(settings)))


def remembered(config: Any, settings: Mapping[str, Any]) -> MRAConfig:
    """Return what `configure` does, which it is not asked for again where the arguments are plain values."""
    if settings and (config is None or type(config) is MRAConfig) and all(map(_is_plain, settings.values())):
        return _remembered(config, **settings)
    return configure(config, settings)


def _is_plain(value: Any) -> bool:
    """Return whether whatever compares equal to a value, and has its type, is the same and never changes."""
    if type(value) is tuple:
        return all(type(item) is int for item in cast("tuple[Any, ...]", value))
    return value is None or type(value) in (int, float, bool, str)


# Types belong to the keys, since 1, 1.0 and True compare equal. An error is not remembered, it is raised anew.
@functools.lru_cache(maxsize=256, typed=True)
def _remembered(config: MRAConfig | None, /, **settings: Any) -> MRAConfig:
    return configure(config, settings)


def _check_meaning_of_budgets(config: MRAConfig, settings: Mapping[str, Any]) -> None:
    """Check that budgets of the config do not become those of something else by other resolutions."""
    budgets: Any = config.blocks_per_row
    if "resolutions" not in settings or "blocks_per_row" in settings or not isinstance(budgets, tuple):
        return
    resolutions, levels = numbers.resolutions(settings["resolutions"]), _levels(config.resolutions)
    if _levels(resolutions) != levels:
        raise ValueError(
            f"resolutions={resolutions!r} without blocks_per_row: the config's blocks_per_row={budgets} is one budget "
            f"for each {'head' if levels == 1 else 'level'} with its resolutions={config.resolutions!r}, and would be "
            "something else; pass blocks_per_row with resolutions"
        )


_Function = TypeVar("_Function", bound=Callable[..., Any])


def with_settings(function: _Function) -> _Function:
    """Let `inspect.signature` and `help` show every setting with its default in place of `**settings`."""
    signature = inspect.signature(function)
    fixed = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    settings = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for name, field in MRAConfig.__dataclass_fields__.items()
    ]
    setattr(function, "__signature__", signature.replace(parameters=[*fixed, *settings]))  # noqa: B010
    return function
