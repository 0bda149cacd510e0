"""One pass of a decoder over a long text: its time, the part of attention in it, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LOSS_TOKENS = 256
"""Tokens whose logits are made at once: 268 MB with 262144 words, where 8192 tokens would take 8.6 GB."""


@dataclass
class Prefill:
    """What a pass took, in seconds, and its loss in nats per token."""

    seconds: float
    attention_seconds: float
    loss: float


class Stopwatch:
    """The seconds spent inside a function."""

    seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its calls timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += perf_counter() - start

        return timed


@contextmanager
def timed_attention(name: str) -> Iterator[Stopwatch]:
    """Time the attention functions of all layers that have this `attn_implementation`."""
    stopwatch = Stopwatch()
    ALL_ATTENTION_FUNCTIONS[name] = stopwatch.around(ALL_ATTENTION_FUNCTIONS[name])
    try:
        yield stopwatch
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]  # it lay above the one that is registered


@torch.inference_mode()
def hidden_states(model: Any, tokens: Tensor) -> Tensor:
    """Return what the output layer of a causal language model gets, (L, width), for tokens (L,)."""
    return model.model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]


@torch.inference_mode()
def loss(hidden: Tensor, output_layer: Callable[[Tensor], Tensor], tokens: Tensor) -> float:
    """Return the mean cross-entropy of the next token, for hidden states (L, width) and tokens (L,)."""
    total = 0.0
    for inputs, targets in zip(hidden[:-1].split(LOSS_TOKENS), tokens[1:].split(LOSS_TOKENS), strict=True):
        total += F.cross_entropy(output_layer(inputs), targets, reduction="sum").item()
    return total / (len(tokens) - 1)


def prefill(model: Any, tokens: Tensor) -> Prefill:
    """Run a causal language model of transformers with the attention implementation that it has.

    The time is that of the layers, without the output layer and without a cache.
    """
    with timed_attention(model.config._attn_implementation) as stopwatch:
        start = perf_counter()
        hidden = hidden_states(model, tokens)
        seconds = perf_counter() - start
    return Prefill(seconds, stopwatch.seconds, loss(hidden, model.lm_head, tokens))
