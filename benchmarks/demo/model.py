"""A pre-norm transformer encoder over bytes whose attention function is an argument."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .text import MASK_TOKEN, VOCABULARY_SIZE

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Called as ``torch.nn.functional.scaled_dot_product_attention(query, key, value)`` is."""

WIDTH = 128
NUM_HEADS = 4
HEAD_DIM = WIDTH // NUM_HEADS
NUM_LAYERS = 3
HIDDEN_WIDTH = 2 * WIDTH
ROTARY_BASE = 10_000.0
LOCAL_BIAS = 1.5


class Attention(nn.Module):
    """The bare attention call, a module of its own so that hooks can time it and read its inputs."""

    def __init__(self, function: AttentionFunction) -> None:
        super().__init__()
        self.function = function

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend; all of shape (batch, heads, length, head dim)."""
        return self.function(query, key, value)


class EncoderLayer(nn.Module):
    """Self-attention and a two-layer perceptron, each normalised before and added after."""

    def __init__(self, function: AttentionFunction) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.attention = Attention(function)
        self.attention_output = nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN_WIDTH), nn.GELU(), nn.Linear(HIDDEN_WIDTH, WIDTH)
        )

    def forward(self, states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Map states of shape (batch, length, width) to the same shape."""
        projected = self.query_key_value(self.attention_norm(states))
        query, key, value = projected.unflatten(-1, (3, NUM_HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        attended = self.attention(rotate(query, cosines, sines), rotate(key, cosines, sines), value)
        states = states + self.attention_output(attended.transpose(1, 2).flatten(-2))
        return states + self.perceptron(states)


class Encoder(nn.Module):
    """Logits of the masked bytes; the initial weights come from torch's global random state."""

    cosines: Tensor
    sines: Tensor

    def __init__(self, function: AttentionFunction, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY_SIZE, WIDTH)
        self.layers = nn.ModuleList(EncoderLayer(function) for _ in range(NUM_LAYERS))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, MASK_TOKEN))
        cosines, sines = rotary_tables(length)
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)
        self.apply(_initialise)

    def forward(self, inputs: Tensor, masked: Tensor) -> Tensor:
        """Return logits of shape (number of masked positions, 256), in the order of ``inputs[masked]``."""
        states = self.embedding(inputs)
        for layer in self.layers:
            states = layer(states, self.cosines, self.sines)
        return self.head(states[masked])


def rotary_tables(length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary position angles, each (length, head dim)."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = (torch.arange(length)[:, None] * frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(vectors: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn each pair of coordinates by the angle of its position, so that dot products see relative positions."""
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cosines + torch.cat((-second, first), dim=-1) * sines


def _initialise(module: nn.Module) -> None:
    """Small normal weights, zero biases, and equal biases of query and key.

    Rotated, two equal constant vectors have a dot product that falls with their distance: every head starts by looking
    at the bytes around, and is free to learn otherwise. From zero biases a run of 300 steps ends where byte frequencies
    alone would have it.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, EncoderLayer):
        nn.init.constant_(module.query_key_value.bias[: 2 * WIDTH], LOCAL_BIAS)
