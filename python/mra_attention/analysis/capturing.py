"""`capture`: the calls of attention of a model."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any, cast

import torch

from .._checks import numbers
from . import call_files
from ._extra import with_progress
from .attention_call import AttentionCall
from .captured import Capture
from .layer_patterns import LayerPatterns
from .recording import Recording


def capture(
    model: Callable[..., Any],
    batch: Any,
    *,
    layers: str | Iterable[str] | None = None,
    max_queries: int | None = None,
    spill: str | PathLike[str] | None = None,
    progress: bool = True,
    enable_grad: bool = False,
) -> Capture:
    """Run a model and return what its layers handed to attention.

    Calls of `torch.nn.functional.scaled_dot_product_attention` are seen under whatever name, those inside of
    `torch.nn.MultiheadAttention` and `Transformer`, and those of this package's `scaled_dot_product_attention` and
    `varlen_attention`, as by `mra_attention.nn`, `replace_sdpa` and models of transformers with the implementation
    "sdpa" or "mra".

    Parameters
    ----------
    model : callable
        For example a `torch.nn.Module`. It runs in the mode that it is in: call `model.eval()` first.
    batch : Tensor, tuple, mapping, callable, or iterable of these
        A tensor is the one argument of the model, a tuple its arguments, a mapping its keyword arguments; a callable is
        called with the model, as `lambda model: model.generate(ids)`. A list or another iterable, as a `DataLoader`,
        has several batches, among which a list is taken as a tuple.
    layers : str or iterable of str, optional
        Which layers to capture: their names in the outermost module that is called, or patterns that match the whole
        name, as `"encoder.layers.1?.self_attn"` or `"decoder.*"`. All by default.
    max_queries : int, optional
        Of a call with more queries keep so many, evenly spread; `query_rows` of the call says which. A mask that is
        kept has all of them.
    spill : str or path, optional
        A folder, new or empty. Every call is written there as it comes, and the result reads it when it is asked for;
        `Capture.load` does so later. Without it calls are kept in memory.
    progress : bool, default True
        Whether to show a bar of the batches, by tqdm, where there are several.
    enable_grad : bool, default False
        Whether the model runs with gradients where the caller has them. What is captured has none.

    Returns
    -------
    Capture
        The calls in their order, `AttentionCall` each. Tensors are copies on the CPU, in the dtype that they had. Of
        nested and packed sequences each is a call.

    Raises
    ------
    ValueError
        If no call of attention was seen, or one of `layers` matches none.
    TypeError
        If an argument has the wrong type.
    NotImplementedError
        If the model has attention that cannot be seen: in scripted modules, `flex_attention`, encoder layers that were
        exported as one operator, `KVCache.attend`, below `torch.vmap`.
    RuntimeError
        Inside of `replace_sdpa`.
    FileExistsError
        If there is something at `spill`.
    ImportError
        If safetensors or tqdm is asked for and not installed.

    Notes
    -----
    No result of attention changes. But torch's modules do not take their fused inference paths meanwhile, and compiled
    code runs uncompiled, so that results of such models may differ by rounding. Calls in other threads are not seen.

    A mask that hides just padding, what causality hides, what is outside of a window, or these together is recorded as
    that: `is_causal`, `window_size`, and a mask of keys `(B, 1, 1, Lk)`. Any other is kept as it is. The one query of a
    step with a cache is recorded as causal, beside the last key. What says how to approximate is no part of a call:
    configs, plans, orders, dropout.

    After an exception nothing is left behind, no files either. Deterministic, as the model is.

    Examples
    --------
    >>> import torch
    >>> from mra_attention.analysis import capture
    >>> layer = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, num_layers=2).eval()
    >>> calls = capture(model, torch.randn(1, 1000, 64), max_queries=100)
    >>> calls
    Capture(2 calls of 2 layers)
    >>> calls[1].layer, calls[1].query.shape, calls[1].key.shape
    ('layers.1.self_attn', torch.Size([1, 4, 100, 16]), torch.Size([1, 4, 1000, 16]))
    """
    if not callable(model):
        raise TypeError(f"model must be a module or another callable, got {type(model).__name__}")
    numbers.check_bool("progress", progress)
    numbers.check_bool("enable_grad", enable_grad)
    most = numbers.optional_integer("max_queries", max_queries, 1)
    patterns = LayerPatterns(layers)
    _refuse_scripted(model)
    calls: list[AttentionCall] = []
    with contextlib.ExitStack() as stack:
        keep: Callable[[AttentionCall], object] = calls.append
        if spill is not None:
            folder = stack.enter_context(call_files.new_folder(spill, "spill"))
            numbered = itertools.count()
            keep = lambda call: call_files.write(call, folder, next(numbered))  # noqa: E731
        recording = Recording(patterns, most, keep)
        for each in with_progress(_batches(batch), progress and not _is_one(batch), "capture", "batch"):
            with recording.on(), contextlib.nullcontext() if enable_grad else torch.no_grad():
                _run(model, each)
        patterns.check(type(model).__name__)
    return Capture(calls) if spill is None else Capture.load(spill)


def _is_one(batch: Any) -> bool:
    return isinstance(batch, (torch.Tensor, tuple, Mapping)) or callable(batch)


def _batches(given: Any) -> Iterable[Any]:
    if _is_one(given):
        return [given]
    if isinstance(given, str) or not hasattr(given, "__iter__"):
        raise TypeError(
            "batch must be a tensor, a tuple of arguments, a mapping of keyword arguments, a callable that takes the "
            f"model, or an iterable of these, got {type(given).__name__}"
        )
    return cast("Iterable[Any]", given)


def _run(model: Callable[..., Any], batch: Any) -> None:
    if isinstance(batch, torch.Tensor):
        model(batch)
    elif isinstance(batch, Mapping):
        model(**cast("Mapping[str, Any]", batch))
    elif isinstance(batch, (tuple, list)):
        model(*cast("tuple[Any, ...]", batch))
    elif callable(batch):
        batch(model)
    else:
        raise TypeError(
            "batch has an item that is no tensor, tuple, list, mapping or callable that takes the model: "
            f"{type(batch).__name__}"
        )


def _refuse_scripted(model: Any) -> None:
    """Refuse modules whose attention Python does not call."""
    if not isinstance(model, torch.nn.Module):
        return
    for name, module in cast("Iterable[tuple[str, torch.nn.Module]]", model.named_modules()):
        if isinstance(module, torch.jit.ScriptModule) and re.search(
            "scaled_dot_product_attention|multi_head_attention|transformer_encoder_layer", _graph(module)
        ):
            raise NotImplementedError(
                f"{name or 'model'} is scripted or traced, and its attention is not seen; capture the model before "
                "torch.jit.script or torch.jit.trace"
            )


def _graph(module: Any) -> str:
    return str(module.inlined_graph) if hasattr(module, "forward") else ""
