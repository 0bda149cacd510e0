"""`torch.nn.MultiheadAttention` with the attention of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import MRAConfig, MRASettings, Unpack, configure, with_settings
from .multi_head import multi_head_attention_forward


def check_heads(config: MRAConfig, num_heads: int, module: str = "") -> None:
    """Check that budgets for each head are as many as the heads; `module` is what the error names."""
    for rates in config.budgets():
        if len(rates) not in (1, num_heads):
            of = f" of {module}" if module else ""
            raise ValueError(
                f"blocks_per_row must be one number, or one for each of the {num_heads} heads{of}, got {len(rates)}"
            )


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with multi-resolution attention: the same parameters, `state_dict` and `forward`.

    Parameters
    ----------
    embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        As for `torch.nn.MultiheadAttention`.
    config : MRAConfig, optional
        How attention is approximated. It can be replaced later, as the attribute `config`; it is not part of the
        `state_dict`.
    **settings
        Fields of `MRAConfig`; they take the place of those of `config`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        If a setting is not accepted, or the number of budgets in `blocks_per_row` is not that of the heads.

    Notes
    -----
    Three things differ from torch. `need_weights` is False by default, and True raises: the matrix of weights is never
    computed. `is_causal=True` needs no `attn_mask` beside it. And the fused inference path of
    `torch.nn.TransformerEncoderLayer`, which would read the weights of this module and compute torch's attention, is
    not taken; `torch.nn.TransformerEncoder` says so in a warning unless it is made with `enable_nested_tensor=False`.

    In cross-attention, where query and key are not one tensor, every token chooses blocks for itself, since a decoder's
    tokens must not learn from later ones: `pool_queries` counts in self-attention only. A `grid` is refused there.

    Definition: docs/definitions.md, sections 2 to 4. Deterministic, as `scaled_dot_product_attention`.

    Examples
    --------
    >>> import torch
    >>> from mra_attention.nn import MultiheadAttention
    >>> attention = MultiheadAttention(256, 4, batch_first=True, blocks_per_row=2)
    >>> x = torch.randn(1, 1000, 256)
    >>> attention(x, x, x)[0].shape
    torch.Size([1, 1000, 256])
    """

    config: MRAConfig
    embed_dim: int
    num_heads: int

    @with_settings
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        config: MRAConfig | None = None,
        **settings: Unpack[MRASettings],
    ) -> None:
        super().__init__(  # pyright: ignore[reportUnknownMemberType]  torch has no types here
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.use(configure(config, settings))

    def use(self, config: MRAConfig) -> None:
        """Take a config, and keep torch's encoder layers from computing this module's attention themselves."""
        check_heads(config, self.num_heads)
        self.config = config
        # Every version of torch looks at this before its fused path, and at nothing else that could be changed here
        # without a change of parameters or hooks.
        self._qkv_same_embed_dim = False

    def _has_separate_weights(self) -> bool:
        weight: Any = self.in_proj_weight
        return weight is None

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = not self._has_separate_weights()
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Return the attention of the projected inputs, and None in place of its weights.

        Parameters
        ----------
        query : Tensor
            `(B, Lq, embed_dim)` with `batch_first`, otherwise `(Lq, B, embed_dim)`; or `(Lq, embed_dim)`.
        key, value : Tensor
            The same with `Lk`, and with `kdim` and `vdim`.
        key_padding_mask : Tensor, optional
            `(B, Lk)` or `(Lk,)`: bool, True where the key is padding, or a bias that is added to the logits.
        need_weights : bool, default False
            True is refused.
        attn_mask : Tensor, optional
            `(Lq, Lk)` or `(B * num_heads, Lq, Lk)`: bool, True where the query may not attend to the key, or a bias
            that is added to the logits.
        average_attn_weights : bool, default True
            Without meaning, since there are no weights, as in torch with `need_weights=False`.
        is_causal : bool, default False
            Whether query `t` sees the keys up to `t` only. `attn_mask` is then taken for the causal mask, as in torch,
            and may be left out.

        Returns
        -------
        tuple of Tensor and None
            The output has the shape and the dtype of `query`.

        Raises
        ------
        ValueError
            If `need_weights` is True, shapes do not fit together, or there is a `grid` and query and key are not one
            tensor.
        TypeError, NotImplementedError
            As `scaled_dot_product_attention`: for dtypes, layouts and devices that are not accepted.
        """
        return multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            self.training,
            key_padding_mask,
            need_weights,
            attn_mask,
            self._has_separate_weights(),
            self.q_proj_weight,
            self.k_proj_weight,
            self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            batch_first=self.batch_first,
            config=self.config,
        )

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the module."""
        return f"{self.embed_dim}, {self.num_heads}, batch_first={self.batch_first}, {self.config}"
