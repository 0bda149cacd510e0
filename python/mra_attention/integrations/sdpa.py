"""`replace_sdpa`: torch's attention replaced inside a `with` block."""

from __future__ import annotations

import contextlib
import inspect
import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from .._checks import numbers
from ..config import MRAConfig, MRASettings, Unpack, configure, with_settings
from ..functional import scaled_dot_product_attention
from ..layer_configs import LayerConfigs
from ..nn.multi_head import multi_head_attention_forward
from .backward import without_dispatch
from .calls import WHY_FUSED, AttentionMode, Call
from .layers import COMPILED, LayerNames
from .report import FallbackWarning, Recorder, Report

__all__ = ["replace_sdpa"]

# Forward of 8 heads of dimension 64, float32, blocks_per_row=4, beside torch's attention (medians of calls in turns,
# AMD EPYC, 1 and 2 threads): at length 64 0.9 to 1.2 times as fast, at 128, where all blocks are exact, 1.1 to 1.5, at
# 256 1.8 to 1.9, at 512 3.2 to 4.2. Below 256 there is too little to gain for an approximation.
MIN_LENGTH = 256

_torch: Any = torch
_LATE = (
    inspect.isclass,
    inspect.iscoroutinefunction,
    inspect.isgeneratorfunction,
    inspect.isasyncgenfunction,
)
_LEFT_OUT = "None in layers"
_WHY_COMPILED = (
    "compiled code does not know its layers, of which layers speaks; convert the model with mra_attention.nn.convert"
)
_Function = TypeVar("_Function", bound=Callable[..., Any])


class replace_sdpa(contextlib.ContextDecorator):  # noqa: N801  it is used as a function
    """Replace `torch.nn.functional.scaled_dot_product_attention` by this package's, in this thread, for a while.

    Inside `with replace_sdpa(...):`, or while a function decorated with `@replace_sdpa(...)` runs, every call of
    torch's attention computes `mra_attention.scaled_dot_product_attention`: calls of the function, under whatever name
    it was imported, and calls by `torch.nn.MultiheadAttention`, `TransformerEncoder` and the like, whose fused
    inference paths are off meanwhile. What is not supported goes to torch, with a `FallbackWarning` that names the
    layer and the reason, once each. `report` lists all calls.

    Parameters
    ----------
    config : MRAConfig, optional
        How attention is approximated.
    min_length : int, default 256
        Calls with fewer keys go to torch, without a warning; for jagged tensors the average length counts.
    layers : mapping of str to MRAConfig or None, optional
        Other configs for some layers, by their names in the outermost module that is called, as `report` shows them,
        or by patterns: see `mra_attention.LayerConfigs`. With None a layer goes to torch, without a warning. Names are
        known when layers call: `report` lists those that none has. Code that is compiled has no names; with `layers` it
        goes to torch, with a warning.
    **settings
        Fields of `MRAConfig`; they take the place of those of `config`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        If a setting is not accepted.
    RuntimeError
        If contexts are not left in the order in which they were entered. Do not suspend one by `yield` or `await`.

    Notes
    -----
    A token learns only from what it sees. In cross-attention of a decoder it does not see later tokens of its own
    sequence, which averages of queries would have it learn from. So queries are averaged only where there are as many
    of them as keys, and in `torch.nn.MultiheadAttention` only where query and key are one tensor. Where a model calls
    torch's function for cross-attention of equal lengths, pass `pool_queries=False`.

    No function is patched. The context is a `torch.overrides.TorchFunctionMode`: other threads are not affected, and
    nothing is left behind, also after an exception. Contexts can be nested, and then the innermost one alone decides;
    one object may be used many times, also in several threads at once, and counts all calls.

    Layers that are checkpointed compute attention again in backward, so run backward inside, too. Calls that Python
    does not make are not seen: those of scripted modules and of AOTInductor. `torch.compile` works inside and around
    the context; compiled code counts when it is traced. Only the fused inference path of a compiled
    `TransformerEncoderLayer` goes to torch, with a warning: convert such a model with `mra_attention.nn.convert`.

    `torch.nn.MultiheadAttention` called without `need_weights=False` goes to torch, since weights are never computed.

    Deterministic, as `mra_attention.scaled_dot_product_attention`.

    Examples
    --------
    >>> import torch
    >>> from mra_attention import replace_sdpa
    >>> model = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True).eval()
    >>> with replace_sdpa(blocks_per_row=4) as replaced:
    ...     out = model(torch.randn(1, 1000, 64))
    >>> print(replaced.report())
    layer      function                      query          key            calls  taken
    self_attn  multi_head_attention_forward  (1000, 1, 64)  (1000, 1, 64)  1      yes
    1 calls taken, 0 not
    """

    @with_settings
    def __init__(
        self,
        config: MRAConfig | None = None,
        *,
        min_length: int = MIN_LENGTH,
        layers: Mapping[str, MRAConfig | None] | None = None,
        **settings: Unpack[MRASettings],
    ) -> None:
        self._config = configure(config, settings)
        self._min_length = numbers.integer("min_length", min_length, 0)
        self._too_short = f"fewer keys than min_length={self._min_length}"
        self._of_layers = LayerConfigs({} if layers is None else layers)
        self._calls = Recorder()
        self._layers = LayerNames()

    def report(self) -> Report:
        """Return what became of all calls so far, in this context and all others made with this object."""
        report = self._calls.report()
        unmatched = self._of_layers.without_layers(row.layer for row in report)
        return replace(report, unmatched=tuple(unmatched))

    def __enter__(self) -> replace_sdpa:
        outer = _thread.modes
        mode = _Mode(self)
        if outer:
            outer[-1].is_covered = True
        mode.__enter__()
        outer.append(mode)
        return self

    def __exit__(self, *error: Any) -> None:
        modes = _thread.modes
        if not modes or modes[-1].context is not self:
            raise RuntimeError(
                "replace_sdpa is left in another order than its contexts were entered, as after a yield or an await "
                "inside of one; use `with` around calls alone"
            )
        mode: Any = modes.pop()
        mode.__exit__(*error)
        if modes:
            modes[-1].is_covered = False

    def attention(self, call: Call) -> Any:
        """Compute a call of scaled_dot_product_attention."""
        return self._compute(call, "scaled_dot_product_attention", _attention, _length(call.key))

    def multi_head(self, call: Call) -> Any:
        """Compute a call of multi_head_attention_forward, inside of which torch's attention could not be seen."""
        length = call.key.shape[0]
        return self._compute(call, "multi_head_attention_forward", multi_head_attention_forward, length)

    def fused(self, call: Call) -> Any:
        """Leave a layer that torch computes as one operator to torch."""
        shape = _shape(call.query)
        self._record(call.function.__name__.removesuffix(".default"), shape, shape, WHY_FUSED)
        return call.run()

    def __call__(self, func: _Function) -> _Function:
        """Decorate a function."""
        if any(is_late(func) for is_late in _LATE):
            raise TypeError(
                f"replace_sdpa decorates functions that return a result, got {func!r}, whose body runs after the call "
                "returns; use `with` inside it, around calls alone, without a yield or an await"
            )
        return super().__call__(func)

    def _compute(self, call: Call, function: str, ours: Callable[..., Any], length: float) -> Any:
        """Compute a call with this package's attention, or with torch's where that is not to be."""
        config = self._config_here()
        reason = self._reason_beforehand(call, length) if isinstance(config, MRAConfig) else config
        if reason is None:
            try:
                out = ours(*call.args, **call.kwargs, config=config)
            except (TypeError, ValueError, NotImplementedError) as refusal:
                reason = str(refusal)
            else:
                self._record(function, _shape(call.query), _shape(call.key), None)
                return out
        self._record(function, _shape(call.query), _shape(call.key), reason)
        return call.run()

    def _config_here(self) -> MRAConfig | str:
        """Return the config of the layer that calls, or why there is none."""
        if not self._of_layers:
            return self._config
        if torch.compiler.is_compiling():
            return _WHY_COMPILED
        return self._of_layers.of_layer(self._layers.current(), self._config) or _LEFT_OUT

    def _reason_beforehand(self, call: Call, length: float) -> str | None:
        if length < self._min_length:
            return self._too_short
        if not call.key.is_nested:
            for kind in call.types:
                if kind not in (Tensor, CausalBias):
                    return f"{kind.__name__} is a subclass of Tensor that decides for itself what attention is"
        return None

    def _record(self, function: str, query: Sequence[Any], key: Sequence[Any], reason: str | None) -> None:
        if torch.compiler.is_compiling():
            _count_traced(self, function, reason)
        else:
            self.count(self._layers.current(), function, query, key, reason)

    def count(self, layer: str, function: str, query: Sequence[Any], key: Sequence[Any], reason: str | None) -> None:
        """Count a call with these shapes, and warn of the first one of its kind that goes to torch."""
        is_new = self._calls.add(layer, function, query, key, reason)
        if is_new and reason not in (None, self._too_short, _LEFT_OUT):
            warnings.warn(f"{layer}: torch's {function} is used: {reason}", FallbackWarning, _frames_to_caller())


def _attention(query: Tensor, key: Tensor, *args: Any, config: MRAConfig, **kwargs: Any) -> Tensor:
    """Compute attention; if there are not as many keys as queries, every token chooses for itself.

    That is cross-attention, where a decoder's tokens would learn from later ones if queries were averaged, or a step
    with a cache, whose one query is that of the last key.
    """
    attention: Any = scaled_dot_product_attention  # whose overloads cannot be told apart by a dictionary
    lengths = [0 if x.is_nested or x.dim() < 2 else x.shape[-2] for x in (query, key)]
    if lengths[0] != lengths[1]:
        config = replace(config, pool_queries=False)
        if lengths[0] == 1 and not kwargs.get("is_causal") and len(args) < 4:
            kwargs = {**kwargs, "causal_alignment": "lower_right"}
    return attention(query, key, *args, config=config, **kwargs)


class _Mode(AttentionMode):
    """One for each time that a context is entered."""

    def __init__(self, context: replace_sdpa) -> None:
        super().__init__()
        self.context = context

    def attention(self, call: Call) -> Any:
        return self.context.attention(call)

    def multi_head(self, call: Call) -> Any:
        return self.context.multi_head(call)

    def fused(self, call: Call) -> Any:
        return self.context.fused(call)

    def backward(self, call: Call) -> Any:
        with self:
            return without_dispatch(call.function)(*call.args, **call.kwargs)


class _Thread(threading.local):
    """The modes that are on in a thread, the innermost last."""

    def __init__(self) -> None:
        self.modes: list[_Mode] = []


_thread = _Thread()


def is_on() -> bool:
    """Return whether this thread is inside a context."""
    return bool(_thread.modes)


@_torch.compiler.assume_constant_result
def _count_traced(context: replace_sdpa, function: str, reason: str | None) -> None:
    """Count a call while it is traced: a compiler calls this at once and leaves it out of the code."""
    context.count(COMPILED, function, (), (), reason)


def _length(key: Tensor) -> float:
    """Return the number of keys, of jagged tensors `(B, H, j, D)` the average; more than any for what has none."""
    if not key.is_nested:
        return key.shape[-2] if key.dim() > 1 else 0
    if key.layout is not torch.jagged or key.dim() != 4:
        return math.inf
    jagged: Any = key
    batch, heads, _, channels = key.shape
    return jagged.values().numel() // max(1, batch * heads * channels)


def _shape(tensor: Tensor) -> Sequence[Any]:
    """Return the shape, but of nested tensors of layout strided, which have none, nothing."""
    return () if tensor.is_nested and tensor.layout is not torch.jagged else tensor.shape


def _frames_to_caller() -> int:
    """Return the `stacklevel` of a warning for the code that called torch."""
    level, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("torch.", "mra_attention.")):
        level, frame = level + 1, frame.f_back
    return level
