"""Keys and values of the tokens so far, for attention of new tokens to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from . import _observers, _order
from ._cache_memory import Memory
from ._checks import calls, head_terms, numbers, tensors
from ._checks.arguments import Arguments
from ._ops import cpu
from .config import MRAConfig, MRASettings, Unpack, configure, with_settings

_SMALLEST_CAPACITY = 256


class KVCache:
    """Keys and values of a growing batch of sequences, with the averages that causal attention needs of them.

    A step appends the keys and values of the new tokens, then attends with their queries. It gives what causal
    `scaled_dot_product_attention` gives for these tokens when it is called on the whole sequences, but takes a time of
    `O(L / b + m b)` per query, with `m` exact blocks of `b` tokens, rather than `O(L)`, and less with larger blocks
    above: the averages of blocks of every level are computed once, when a block is complete.

    Parameters
    ----------
    batch_size, num_kv_heads, head_dim : int
        `B`, `Hk` and `D` of the keys.
    value_dim : int, optional
        Head dimension `Dv` of the values; `head_dim` by default.
    max_length : int, optional
        Most tokens that a sequence can have: memory is allocated at once, and a longer sequence is refused. By default
        the memory grows, doubling when it is full.
    dtype : torch.dtype, optional
        float32, float64, bfloat16 or float16; `torch.get_default_dtype()` by default.
    config : MRAConfig, optional
        How attention is approximated, if a call of `attend` does not say otherwise. A token always chooses for itself,
        so `pool_queries` makes no difference; a `grid` is refused, "auto" resolutions need a `max_length`.
    **settings
        Fields of `MRAConfig`; they take the place of those of `config`.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If an argument has a value that is not accepted, or tensors do not fit the cache.
    RuntimeError
        If a tensor requires gradients while gradients are recorded: the cache keeps none.

    Notes
    -----
    Definition: docs/definitions.md, section 4. Deterministic, as `scaled_dot_product_attention`: how a sequence was cut
    into steps makes no difference. Inputs must have the dtype of the cache; under `torch.autocast("cpu")` they are cast
    to it. The cache lives on the CPU.

    Examples
    --------
    >>> import torch
    >>> from mra_attention import KVCache
    >>> cache = KVCache(batch_size=1, num_kv_heads=2, head_dim=64)
    >>> for length in (100, 1, 1):  # a prompt, then token by token
    ...     query, key, value = torch.randn(3, 1, 2, length, 64).unbind()
    ...     cache.append(key, value)
    ...     out = cache.attend(query)
    >>> out.shape, cache.lengths
    (torch.Size([1, 2, 1, 64]), (102,))
    """

    @with_settings
    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        config: MRAConfig | None = None,
        **settings: Unpack[MRASettings],
    ) -> None:
        batch_size = numbers.integer("batch_size", batch_size, 0)
        heads = numbers.integer("num_kv_heads", num_kv_heads, 1)
        head_dim = numbers.integer("head_dim", head_dim, 1)
        value_dim = head_dim if value_dim is None else numbers.integer("value_dim", value_dim, 0)
        self._max_length = None if max_length is None else numbers.integer("max_length", max_length, 1)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self._config = configure(config, settings)
        _order.refuse(Arguments(), self._config, "a KVCache")
        if dtype not in tensors.FLOAT_DTYPES:
            raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype!r}")
        self._lengths = [0] * batch_size
        sizes, most = self._of_length(self._config).block_sizes, self._max_length or 0
        self._memory = Memory(batch_size, heads, head_dim, value_dim, dtype, sizes, most)

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return len(self._lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of each sequence."""
        return tuple(self._lengths)

    @property
    def length(self) -> int:
        """Number of tokens of the longest sequence."""
        return max(self._lengths, default=0)

    @property
    def capacity(self) -> int:
        """Number of tokens for which each sequence has memory."""
        return self._memory.capacity

    @property
    def max_length(self) -> int | None:
        """Most tokens that a sequence can have; None if the memory grows."""
        return self._max_length

    @property
    def config(self) -> MRAConfig:
        """How attention is approximated, if a call of `attend` does not say otherwise."""
        return self._config

    @property
    def block_size(self) -> int:
        """Tokens of the finest blocks."""
        return self._memory.block_sizes[-1]

    @property
    def dtype(self) -> torch.dtype:
        """Type of keys and values."""
        return self._memory.dtype

    def __repr__(self) -> str:
        _, heads, capacity, head_dim = self._memory.key.shape
        return (
            f"KVCache(batch_size={self.batch_size}, num_kv_heads={heads}, head_dim={head_dim}, "
            f"value_dim={self._memory.value.shape[3]}, lengths={self.lengths}, capacity={capacity}, dtype={self.dtype})"
        )

    def append(self, key: Tensor, value: Tensor, lengths: Sequence[int] | Tensor | None = None) -> None:
        """Append the keys and values of new tokens.

        Parameters
        ----------
        key : Tensor
            `(B, Hk, n, D)`.
        value : Tensor
            `(B, Hk, n, Dv)`.
        lengths : sequence of int or Tensor, optional
            How many of the `n` tokens each sequence really gets, the first ones; the rest is padding and is not read.
            `n` for each by default.

        Raises
        ------
        ValueError
            If a shape or a length does not fit, or a sequence would be longer than `max_length`. Then nothing is
            appended.
        """
        key, value = self._check("key", key, self._memory.key), self._check("value", value, self._memory.value)
        count = key.shape[2]
        if value.shape[2] != count:
            raise ValueError(f"key and value must have the same length, got {count} and {value.shape[2]}")
        if lengths is None:
            after = [n + count for n in self._lengths]
        else:
            new = self._counts("lengths", lengths, count)
            after = [n + m for n, m in zip(self._lengths, new, strict=True)]
        if not after:
            return
        self._reserve(max(after))
        self._memory.append(key, value, self._lengths, after)
        self._lengths = after

    @overload
    def attend(
        self,
        query: Tensor,
        *,
        lengths: Sequence[int] | Tensor | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        return_lse: Literal[False] = False,
        config: MRAConfig | None = None,
        **settings: Unpack[MRASettings],
    ) -> Tensor: ...

    @overload
    def attend(
        self,
        query: Tensor,
        *,
        lengths: Sequence[int] | Tensor | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        return_lse: Literal[True],
        config: MRAConfig | None = None,
        **settings: Unpack[MRASettings],
    ) -> tuple[Tensor, Tensor]: ...

    def attend(
        self,
        query: Tensor,
        *,
        lengths: Sequence[int] | Tensor | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        return_lse: bool = False,
        config: MRAConfig | None = None,
        **settings: Unpack[MRASettings],
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from the last tokens of every sequence to all tokens up to each of them.

        Parameters
        ----------
        query : Tensor
            `(B, H, n, D)`: the queries of the last `n` tokens of every sequence, whose keys and values have been
            appended. A query before the first token of its sequence sees nothing.
        lengths : sequence of int or Tensor, optional
            As in `append`: how many of the `n` queries of each sequence are its last tokens, the first ones; the rest
            is padding and gets the output 0 and the lse -inf. `n` for each by default.
        scale, enable_gqa, window_size, softcap, alibi_slopes, sinks, return_lse
            As in `mra_attention.scaled_dot_product_attention` with `is_causal=True`.
        config : MRAConfig, optional
            How attention is approximated in this call, in place of the cache's own config; of the same resolutions.
        **settings
            Fields of `MRAConfig`; they take the place of those of `config`, or else of the cache's own config.

        Returns
        -------
        out : Tensor
            `(B, H, n, Dv)`.
        lse : Tensor
            Only with `return_lse=True`: `(B, H, n)`.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As for the class.
        """
        _observers.refuse("KVCache.attend")
        numbers.check_bool("return_lse", return_lse)
        numbers.check_bool("enable_gqa", enable_gqa)
        chosen = configure(self._config if config is None else config, settings)
        _order.refuse(Arguments(), chosen, "a KVCache")
        of_length = self._of_length(chosen)
        if tuple(of_length.block_sizes) != self._memory.block_sizes:
            sizes = " and ".join(str(size) for size in self._memory.block_sizes)
            raise ValueError(
                f"resolutions={chosen.resolutions!r} do not fit the cache, whose averages are of blocks of "
                f"{sizes} tokens; pass resolutions={self._config.resolutions!r}, or leave them out"
            )
        query = self._check_query(query, enable_gqa)
        count, ends = query.shape[2], self._lengths
        new = None if lengths is None else self._counts("lengths", lengths, count)
        offsets = [n - count for n in ends] if new is None else [n - m for n, m in zip(ends, new, strict=True)]
        scale, window = numbers.scale_or_default(scale, query.shape[3]), calls.visible_window(window_size, causal=True)
        out, lse = cpu.attend_cache(
            query,
            self._memory.value.shape[3],
            self._memory.descriptors,
            offsets,
            ends,
            calls.settings(of_length, query.shape[1], scale, softcap, window, lower_right=False, dropout_p=0.0),
            head_terms=(
                self._check_head_terms("alibi_slopes", alibi_slopes, query),
                self._check_head_terms("sinks", sinks, query),
            ),
            with_lse=return_lse,
        )
        for item, valid in enumerate(new or ()):
            out[item, :, valid:] = 0.0
            if lse is not None:
                lse[item, :, valid:] = -torch.inf
        return out if lse is None else (out, lse)

    def _of_length(self, config: MRAConfig) -> MRAConfig:
        """Return a config with the resolutions that "auto" stands for: those of the longest sequence."""
        if config.resolutions == "auto" and self._max_length is None:
            raise ValueError(
                "resolutions='auto' needs to know the longest sequence of a KVCache; pass max_length, or resolutions "
                "such as (32, 1) or (512, 32, 1)"
            )
        return config.for_length(self._max_length or 0)

    def _check_head_terms(self, name: str, given: Any, query: Tensor) -> Tensor | None:
        checked = head_terms.check(name, given, *query.shape[:2])
        if checked is not None and checked.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name} requires a gradient, but a KVCache keeps none; call under torch.no_grad()")
        return checked

    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        """Let sequence `i` be what sequence `indices[i]` was, as beam search wants it.

        Parameters
        ----------
        indices : sequence of int or Tensor
            Integers in `[0, B)`, repetitions allowed. Their number is the new batch size.

        Raises
        ------
        TypeError, ValueError
            If `indices` is not that.
        """
        chosen = self._integers("indices", indices)
        size = self.batch_size
        if any(not 0 <= index < size for index in chosen):
            raise ValueError(f"indices must be integers from 0 to {size - 1}, got {chosen}")
        if chosen == list(range(size)):
            return
        self._memory = self._memory.copy(chosen, self.capacity, self._lengths)
        self._lengths = [self._lengths[index] for index in chosen]

    def crop(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Forget the last tokens of sequences that are longer than they should be.

        Parameters
        ----------
        lengths : int, sequence of int or Tensor
            Most tokens to keep, of every sequence or of each one.

        Raises
        ------
        TypeError, ValueError
            If `lengths` is not that.
        """
        if isinstance(lengths, int):
            most = [numbers.integer("lengths", lengths, 0)] * self.batch_size
        else:
            most = self._counts("lengths", lengths, None)
        self._lengths = [min(*pair) for pair in zip(self._lengths, most, strict=True)]

    def reset(self) -> None:
        """Forget all tokens, but keep the memory."""
        self.crop(0)

    def _check(self, name: str, tensor: Any, stored: Tensor) -> Tensor:
        """Check a tensor of new tokens, `(B, heads, n, channels)` with the sizes of what is stored."""
        tensor = self._check_kind(name, tensor)
        sizes, given = stored.shape, tensor.shape
        if len(given) != 4 or given[0] != sizes[0] or given[1] != sizes[1] or given[3] != sizes[3]:
            raise ValueError(f"{name} must have the shape ({sizes[0]}, {sizes[1]}, n, {sizes[3]}), got {tuple(given)}")
        return tensor

    def _check_query(self, query: Any, enable_gqa: bool) -> Tensor:
        query = self._check_kind("query", query)
        sizes, given = self._memory.key.shape, query.shape
        if len(given) != 4 or given[0] != sizes[0] or given[3] != sizes[3]:
            raise ValueError(f"query must have the shape ({sizes[0]}, heads, n, {sizes[3]}), got {tuple(given)}")
        if given[1] != sizes[1] and (not enable_gqa or given[1] % sizes[1]):
            rule = "a multiple of " if enable_gqa else ""
            hint = "" if enable_gqa or given[1] % sizes[1] else "; enable_gqa=True would group them"
            raise ValueError(f"query must have {rule}{sizes[1]} heads, as the cache, got {tuple(given)}{hint}")
        return query

    def _check_kind(self, name: str, tensor: Any) -> Tensor:
        if type(tensor) is not Tensor or not tensor.is_cpu or tensor.layout is not torch.strided:
            tensors.check_dense(name, tensor)
            tensors.check_cpu(name, tensor)
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} requires gradients, of which a KVCache keeps none; call under torch.no_grad(), or use "
                "mra_attention.scaled_dot_product_attention with is_causal=True"
            )
        if tensor.dtype is not self._memory.dtype:
            if not (torch.is_autocast_enabled("cpu") and tensor.is_floating_point()):
                raise TypeError(f"{name} must be {self._memory.dtype}, the dtype of the cache, got {tensor.dtype}")
            tensor = tensor.to(self._memory.dtype)
        return tensor.resolve_neg()  # what is stored is read as it is

    def _integers(self, name: str, values: Any) -> list[int]:
        if isinstance(values, Tensor):
            if values.dim() != 1 or values.dtype.is_floating_point or values.dtype in (torch.bool, torch.complex64):
                raise TypeError(f"{name} must be integers, got a {values.dtype} tensor of shape {tuple(values.shape)}")
            return [int(value) for value in values]
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise TypeError(f"{name} must be a sequence of integers or a tensor, got {values!r}")
        return [numbers.integer(f"{name}[{i}]", value, 0) for i, value in enumerate(cast("Sequence[Any]", values))]

    def _counts(self, name: str, values: Any, most: int | None) -> list[int]:
        """Check a number of tokens for each sequence."""
        counts = self._integers(name, values)
        wrong = any(count < 0 or (most is not None and count > most) for count in counts)
        if len(counts) != self.batch_size or wrong:
            limit = "of at least 0" if most is None else f"from 0 to {most}"
            raise ValueError(f"{name} must be {self.batch_size} integers {limit}, one for each sequence, got {counts}")
        return counts

    def _reserve(self, length: int) -> None:
        """Make room for sequences of this length."""
        if length <= self.capacity:
            return
        if self._max_length is not None:
            raise ValueError(f"a sequence would have {length} tokens, more than max_length={self._max_length}")
        capacity = max(length, 2 * self.capacity, _SMALLEST_CAPACITY)
        self._memory = self._memory.copy(range(self.batch_size), capacity, self._lengths)
