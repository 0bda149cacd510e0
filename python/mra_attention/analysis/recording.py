"""Calls of attention as they happen in this thread, made into values."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .. import _observers
from .._checks import shapes
from .._checks.arguments import Arguments
from .._checks.autocast import autocast
from ..integrations import sdpa
from ..integrations.backward import without_dispatch
from ..integrations.calls import WHY_FUSED, AttentionMode, Call
from ..integrations.layers import LayerNames
from .attention_call import AttentionCall
from .call_masks import CallMasks
from .layer_patterns import LayerPatterns

_torch: Any = torch


class Recording:
    """Hands a value of every call of the wanted layers to `keep`, and changes no result.

    Parameters
    ----------
    patterns : LayerPatterns
        Which layers are wanted.
    max_queries : int or None
        How many queries of a call are kept, at most.
    keep : callable
        Takes an `AttentionCall`.
    """

    def __init__(
        self, patterns: LayerPatterns, max_queries: int | None, keep: Callable[[AttentionCall], object]
    ) -> None:
        self._patterns = patterns
        self._max_queries = max_queries
        self._keep = keep
        self._names = LayerNames()
        self._masks = CallMasks()
        self._is_paused = False

    @contextlib.contextmanager
    def on(self) -> Generator[None]:
        """Record the calls in this thread."""
        if sdpa.is_on():
            raise RuntimeError(
                "capture is called inside replace_sdpa, which would compute what is captured; call it outside, and "
                "enter replace_sdpa in a function that is given as the batch"
            )
        with _uncompiled(), _observers.observed(self.record), _Mode(self):
            yield

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """Let calls pass for a while."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def record(
        self, inputs: tuple[Any, Any, Any], arguments: Arguments, boundaries: tuple[Any, Any] | None = None
    ) -> None:
        """Record a call with these arguments of `mra_attention.scaled_dot_product_attention`, each sequence for itself.

        With `boundaries` the inputs are those of `mra_attention.varlen_attention`.
        """
        if self._is_paused:
            return
        layer = self._names.current()
        if not self._patterns.want(layer):
            return
        if any(_torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in inputs):
            raise NotImplementedError(
                f"{layer} calls attention below torch.vmap or torch.func.grad, where tensors have no values to capture"
            )
        # What is kept must be usable outside of the caller's torch.inference_mode.
        with torch.inference_mode(False), torch.no_grad():
            for sequence in _sequences(inputs, boundaries):
                self._keep(self._call(layer, sequence, arguments))

    def _call(self, layer: str, inputs: tuple[Tensor, ...], arguments: Arguments) -> AttentionCall:
        if torch.is_autocast_enabled("cpu"):
            inputs = autocast(inputs)
        (query, key, value), lead = shapes.arrange(inputs, arguments.enable_gqa)
        batch, heads, queries, _ = query.shape
        sight = self._masks.of_call(arguments, (batch, heads) if lead is None else lead, queries, key.shape[2])
        rows = self._rows(queries)
        return AttentionCall(
            query=_copy(query if rows is None else query.index_select(2, rows)),
            key=_copy(key),
            value=_copy(value),
            layer=layer,
            **sight._asdict(),
            scale=None if arguments.scale is None else float(arguments.scale),
            softcap=float(arguments.softcap) if arguments.softcap else None,
            sinks=None if arguments.sinks is None else _copy(arguments.sinks),
            alibi_slopes=None if arguments.alibi_slopes is None else _copy(arguments.alibi_slopes),
            query_rows=rows,
            query_length=queries,
        )

    def _rows(self, queries: int) -> Tensor | None:
        """Return which queries are kept, the middle of equal parts; None for all."""
        most = self._max_queries
        if most is None or queries <= most:
            return None
        return (2 * torch.arange(most) + 1) * queries // (2 * most)


class _Mode(AttentionMode):
    """Records torch's calls, and lets torch answer them."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def attention(self, call: Call) -> Any:
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                "attention in compiled code is captured by torch 2.6 or later only, which can run it uncompiled"
            )
        out = call.run()
        self._recording.record(*_arguments(*call.args, **call.kwargs))
        return out

    def multi_head(self, call: Call) -> Any:
        # A copy of torch's function that does not ask the mode, so that the mode can be on inside of it.
        function = without_dispatch(call.function)
        given = inspect.signature(call.function).bind(*call.args, **call.kwargs).arguments
        if not given.get("need_weights", True):
            with self:
                return function(**given)
        # For its weights torch does not call scaled_dot_product_attention. `attn_mask` holds what `is_causal` says.
        out = call.run()
        with self, torch.no_grad():
            function(**given | {"need_weights": False, "is_causal": False, "training": False})
        return out

    def fused(self, call: Call) -> Any:
        name = call.function.__name__.removesuffix(".default")
        raise NotImplementedError(f"the attention in {name} is not seen: it is {WHY_FUSED}")

    def backward(self, call: Call) -> Any:
        # Checkpointed layers would be recorded a second time.
        with self._recording.paused():
            return call.run()

    def flex(self, call: Call) -> Any:
        raise NotImplementedError(
            "flex_attention is not captured, since it may compute any score; for a model of transformers call "
            'model.set_attn_implementation("sdpa")'
        )


def _arguments(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[tuple[Any, Any, Any], Arguments]:
    """Take the arguments of torch's scaled_dot_product_attention."""
    return (query, key, value), Arguments(attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _sequences(inputs: tuple[Any, ...], boundaries: tuple[Any, Any] | None) -> Iterator[tuple[Tensor, ...]]:
    """Yield query, key and value of each sequence of nested or packed ones; dense ones as they are."""
    if any(tensor.is_nested for tensor in inputs):
        yield from zip(*(tensor.unbind() for tensor in inputs), strict=True)
    elif boundaries is None:
        yield inputs
    else:
        ends = [[int(end) for end in of_tensor] for of_tensor in boundaries]
        ends.append(ends[1])
        for i in range(len(ends[0]) - 1):
            parts = [x[of[i] : of[i + 1]] for x, of in zip(inputs, ends, strict=True)]
            yield tuple(part.transpose(0, 1) for part in parts)


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy, since models write to what they hand to attention, such as caches."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _uncompiled() -> AbstractContextManager[Any]:
    """Let compiled code run as the Python that it was made of."""
    set_stance: Any = getattr(torch.compiler, "set_stance", None)  # torch 2.5 has none
    return contextlib.nullcontext() if set_stance is None else set_stance("force_eager")
