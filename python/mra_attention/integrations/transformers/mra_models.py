"""The MRA models of Hugging Face transformers, on the CPU."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers.models.mra import modeling_mra

from ...functional import scaled_dot_product_attention

__all__ = ["patch_mra", "unpatch_mra"]

_attention: Any = modeling_mra.MraSelfAttention
_original_forward = _attention.forward

_LEAST_HEAD_DIM = 32
"""The model pads smaller heads with zeros up to this dimension, and its scale is that of the padded ones."""

_HIDDEN = -1e4
"""A number in an additive mask that is at most this one stands for minus infinity."""


def patch_mra() -> AbstractContextManager[Any]:
    """Let `MraModel` and its heads compute attention on a CPU.

    Without a CUDA kernel, `transformers.models.mra` returns zeros from attention. After this call `MraSelfAttention`
    takes CPU tensors to `mra_attention.scaled_dot_product_attention`, in every model, made before or after; tensors on
    other devices go where they went before. A second call changes nothing.

    Returns
    -------
    context manager
        Leaving it undoes this call: `with patch_mra(): ...`. To leave the models patched, drop it.

    Notes
    -----
    The formulas are those of the model's own code ("Multi Resolution Analysis (MRA) for Approximate Self-Attention",
    arXiv 2207.10284), with its configuration: blocks of 32 tokens, of which the blocks of `block_per_row` times
    `max_position_embeddings // 32` are exact, or all if there are fewer; `approx_mode`; the two priors; the scale,
    `1 / sqrt(max(head_dim, 32))`; and no dropout of attention weights, which that code does not apply either. In these
    points it differs:

    - Any length is taken, not only multiples of 32 with at least as many blocks as the budget.
    - In a padded batch every sequence gets what it gets alone, padding on either side. There, masks of a batch are
      mixed up among its items, and padded blocks take part in the scores.
    - The result has the dtype of the model, which need not be float32.
    - Denominators and counts have no `1e-6` added to them. A budget that is too small for the priors and one block of
      each row is raised to these. Equal scores are decided by position.

    `attention_mask` is the padding mask, `(B, L)` with 1 for tokens and 0 for padding, or additive `(B, 1, Q, L)` with
    all rows alike. In any other case the forward pass raises ValueError. Output and gradients are deterministic, as
    those of `scaled_dot_product_attention`. The output at padded positions is 0.

    Examples
    --------
    >>> import torch
    >>> from mra_attention.integrations.transformers import patch_mra
    >>> from transformers import MraConfig, MraModel
    >>> with patch_mra():
    ...     model = MraModel(MraConfig(num_hidden_layers=1))
    ...     model(torch.arange(2, 102)[None]).last_hidden_state.shape
    torch.Size([1, 100, 768])
    """
    undo = ExitStack()
    if _attention.forward is not _forward:
        _attention.forward = _forward
        undo.callback(unpatch_mra)
    return undo


def unpatch_mra() -> None:
    """Undo `patch_mra`: `MraModel` computes attention with its own code again. Without a patch nothing happens.

    Notes
    -----
    Models need not be made anew. On a CPU their attention returns zeros again.
    """
    if _attention.forward is _forward:
        _attention.forward = _original_forward


def _forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
    """Take the place of `MraSelfAttention.forward`, which has the weights and the settings."""
    if not hidden_states.is_cpu:
        return _original_forward(self, hidden_states, attention_mask)
    batch, length, _ = hidden_states.shape
    heads = (batch, length, self.num_attention_heads, self.attention_head_size)
    query, key, value = (
        layer(hidden_states).view(heads).transpose(1, 2) for layer in (self.query, self.key, self.value)
    )
    valid = None if attention_mask is None else _valid_tokens(attention_mask, batch, length)
    context = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if valid is None else valid[:, None, None, :],
        query_padding_mask=valid,
        scale=1 / math.sqrt(max(self.attention_head_size, _LEAST_HEAD_DIM)),
        resolutions=(32, 1),
        num_blocks=max(1, self.num_block),  # 0 if there are less than 32 positions
        mode=self.approx_mode,
        score="mean",
        first_blocks=self.initial_prior_first_n_blocks,
        diagonal_blocks=self.initial_prior_diagonal_n_blocks,
    )
    return (context.transpose(1, 2).flatten(2),)


def _valid_tokens(mask: Tensor, batch: int, length: int) -> Tensor:
    """Return a mask of padding as bool (batch, length), True for tokens."""
    shape = tuple(mask.shape)
    if shape == (batch, length):
        rows = mask[:, None, None, :]
    elif len(shape) == 4 and (shape[0], shape[1], shape[3]) == (batch, 1, length) and shape[2] > 0:
        rows = mask
    else:
        raise ValueError(
            f"attention_mask must be (batch, length) = {(batch, length)}, 1 for tokens and 0 for padding, or "
            f"additive, ({batch}, 1, Q, {length}); got the shape {shape}"
        )
    additive = rows is mask and mask.is_floating_point()
    valid = rows == 0 if additive else rows == 1
    if not torch.compiler.is_compiling():  # a check of values would break the graph
        _check_values(rows, additive)
        if not (valid == valid[:, :, -1:]).all():
            raise ValueError(
                "attention_mask must hide the same keys from every query: MraModel takes padding alone, got a mask "
                f"{shape} whose rows differ"
            )
    return valid[:, 0, -1]


def _check_values(mask: Tensor, additive: bool) -> None:
    expected = f"0 and numbers of at most {_HIDDEN:g}" if additive else "0 and 1"
    accepted = (mask == 0) | (mask <= _HIDDEN if additive else mask == 1)
    if not accepted.all():
        raise ValueError(
            f"attention_mask must have the values {expected} where its shape is {tuple(mask.shape)} and its dtype "
            f"{mask.dtype}, got {mask[~accepted][0].item()!r}"
        )
