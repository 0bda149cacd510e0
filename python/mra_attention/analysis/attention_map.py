"""Attention matrices as a value, for those who have the weights and not the queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """The weights of a layer.

    Parameters
    ----------
    weights : Tensor
        Floating point `(B, H, Lq, Lk)`, not negative: a row for each query. Query `t` is at position `t` of the keys.
    layer : str
        The name of the layer.
    visible : Tensor, optional
        bool, broadcasts to `(B, H, Lq, Lk)`: which keys a query sees; by default all. Null models need it, since a
        weight may be 0 without being hidden. For causal attention `torch.ones(L, L, dtype=torch.bool).tril()`.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If shapes do not fit, weights are negative or not finite, a hidden pair has a weight, or `visible` is missing
        and all weights above the diagonal are 0.
    """

    weights: Tensor
    layer: str = ""
    visible: Tensor | None = None

    def __post_init__(self) -> None:
        weights, visible = self.weights, self.visible
        if not weights.is_floating_point():
            raise TypeError(f"weights of layer {self.layer!r} must be floating point, got {weights.dtype}")
        if weights.dim() != 4:
            raise ValueError(f"weights of layer {self.layer!r} must be (B, H, Lq, Lk), got {tuple(weights.shape)}")
        if not bool(((weights >= 0) & weights.isfinite()).all()):
            raise ValueError(f"weights of layer {self.layer!r} must be finite and not negative")
        if visible is None:
            square = weights.shape[-2] == weights.shape[-1] > 1
            if square and not bool(weights.triu(1).any()):
                raise ValueError(
                    f"weights of layer {self.layer!r} are 0 above the diagonal; say by visible what a query sees: for "
                    "causal attention torch.ones(L, L, dtype=torch.bool).tril(), else torch.ones(L, L, "
                    "dtype=torch.bool)"
                )
            return
        if visible.dtype is not torch.bool:
            raise TypeError(f"visible of layer {self.layer!r} must be bool, got {visible.dtype}")
        try:
            seen = visible.expand(weights.shape)
        except RuntimeError as error:
            raise ValueError(
                f"visible of layer {self.layer!r} must broadcast to {tuple(weights.shape)}, got {tuple(visible.shape)}"
            ) from error
        if bool(weights.masked_fill(seen, 0.0).any()):
            raise ValueError(f"visible of layer {self.layer!r} hides pairs that have a weight")
