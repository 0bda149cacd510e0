"""One call of attention as a value: what it was given, without what came out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What a layer of a model handed to attention.

    Parameters
    ----------
    query : Tensor
        `(B, H, Lq, D)`; with `query_rows`, `(B, H, R, D)`.
    key : Tensor
        `(B, Hk, Lk, D)`; `H` is a multiple of `Hk`, as in grouped-query attention.
    value : Tensor
        `(B, Hk, Lk, Dv)`.
    layer : str
        The qualified name of the module that called.
    attn_mask : Tensor, optional
        bool or bias that broadcasts to `(B, H, Lq, Lk)`, as for `mra_attention.scaled_dot_product_attention`.
    is_causal, window_size, causal_alignment, scale, softcap, sinks, alibi_slopes
        As for `mra_attention.scaled_dot_product_attention`.
    query_padding_mask : Tensor, optional
        bool `(B, Lq)`, True where the query is valid, as for `mra_attention.scaled_dot_product_attention`; not sampled
        with `query_rows`.
    query_rows : Tensor, optional
        int64 `(R,)`, ascending: which of the `query_length` queries were kept; None for all.
    query_length : int, optional
        `Lq`; by default the length of `query`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    layer: str = ""
    attn_mask: Tensor | None = None
    is_causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    causal_alignment: Literal["upper_left", "lower_right"] = "upper_left"
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    query_rows: Tensor | None = None
    query_length: int | None = None
    query_padding_mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.query_length is None:
            object.__setattr__(self, "query_length", self.query.shape[-2])

    def arguments(self) -> dict[str, Any]:
        """Return what `mra_attention.scaled_dot_product_attention` takes beside query, key and value.

        Raises
        ------
        ValueError
            If only some of the queries were kept.
        """
        if self.query_rows is not None:
            raise ValueError(
                f"layer {self.layer!r} has {len(self.query_rows)} of {self.query_length} queries; attention needs all: "
                "capture it without sampling queries"
            )
        names = ("attn_mask", "is_causal", "window_size", "causal_alignment", "scale", "softcap", "sinks")
        given = {name: getattr(self, name) for name in (*names, "alibi_slopes", "query_padding_mask")}
        return given | {"enable_gqa": self.query.shape[-3] != self.key.shape[-3]}
