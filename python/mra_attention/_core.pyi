"""The native module: pointers, shapes and strides in, results written in place.

It validates everything that it is given again and raises ValueError (TypeError for a wrong Python type); the
interpreter lock is released while it computes. Only `mra_attention._ops`, and `Plan`, call the functions that take
descriptors.
"""

from collections.abc import Sequence
from typing import Final, Literal, Protocol, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

__all__ = [
    "__version__",
    "append",
    "attend_cache",
    "available_isas",
    "backward",
    "build_info",
    "forward",
    "isa",
    "kernel_rates",
    "refined_blocks",
    "select",
    "use_torch_threads",
]

# (data pointer, sizes, strides in elements, dtype code, the tensor, which is kept alive during the call)
# dtype codes: 0 float32, 1 float64, 2 bfloat16, 3 float16, 4 bool or uint8, 5 int32
_Descriptor: TypeAlias = tuple[int, Sequence[int], Sequence[int], int, object]
# key_mask, query_mask, attn_bias, mask_tiles
_Masks: TypeAlias = tuple[_Descriptor | None, _Descriptor | None, _Descriptor | None, _Descriptor | None]
# alibi_slopes and sinks, float64 (B, H)
_HeadTerms: TypeAlias = tuple[_Descriptor | None, _Descriptor | None]
# Boundaries of packed queries and keys; None for dense tensors.
_Sequences: TypeAlias = tuple[list[int], list[int]] | None

class _Settings(Protocol):
    """What `mra_attention._ops.Settings` explains."""

    @property
    def scale(self) -> float: ...
    @property
    def block_sizes(self) -> Sequence[int]: ...
    @property
    def sparse(self) -> bool: ...
    @property
    def first_order(self) -> bool: ...
    @property
    def coarse_shift(self) -> float: ...
    @property
    def max_score(self) -> bool: ...
    @property
    def pool_queries(self) -> bool: ...
    @property
    def window_left(self) -> int: ...
    @property
    def window_right(self) -> int: ...
    @property
    def lower_right(self) -> bool: ...
    @property
    def softcap(self) -> float | None: ...
    @property
    def blocks_per_row(self) -> list[float]: ...
    @property
    def num_blocks(self) -> int | None: ...
    @property
    def first_blocks(self) -> int | None: ...
    @property
    def diagonal_blocks(self) -> int: ...
    @property
    def local_blocks(self) -> int: ...
    @property
    def dropout_p(self) -> float: ...

class _BuildInfo(TypedDict):
    version: str
    profile: Literal["release", "debug"]
    rustc: str
    target: str

__version__: Final[str]

def select(
    query: _Descriptor,
    key: _Descriptor,
    masks: _Masks,
    head_terms: _HeadTerms,
    plan: _Descriptor,
    *,
    settings: _Settings,
    sequences: _Sequences,
    threads: int,
) -> None: ...
def forward(
    query: _Descriptor,
    key: _Descriptor,
    value: _Descriptor,
    masks: _Masks,
    head_terms: _HeadTerms,
    plan_in: _Descriptor | None,
    plan_out: _Descriptor | None,
    out: _Descriptor,
    lse: _Descriptor | None,
    *,
    settings: _Settings,
    sequences: _Sequences,
    seed: int,
    threads: int,
) -> None: ...
def backward(
    grad_out: _Descriptor,
    grad_lse: _Descriptor | None,
    query: _Descriptor,
    key: _Descriptor,
    value: _Descriptor,
    masks: _Masks,
    head_terms: _HeadTerms,
    plan: _Descriptor,
    out: _Descriptor,
    lse: _Descriptor,
    grad_query: _Descriptor,
    grad_key: _Descriptor,
    grad_value: _Descriptor,
    grad_bias: _Descriptor | None,
    grad_sinks: _Descriptor | None,
    *,
    settings: _Settings,
    sequences: _Sequences,
    seed: int,
    threads: int,
) -> None: ...
def attend_cache(
    query: _Descriptor,
    key: _Descriptor,
    value: _Descriptor,
    key_means: Sequence[_Descriptor],
    value_means: Sequence[_Descriptor],
    head_terms: _HeadTerms,
    out: _Descriptor,
    lse: _Descriptor | None,
    *,
    settings: _Settings,
    offsets: Sequence[int],
    key_lengths: Sequence[int],
    threads: int,
) -> None: ...
def append(
    key: _Descriptor,
    value: _Descriptor,
    stored_key: _Descriptor,
    stored_value: _Descriptor,
    key_means: Sequence[_Descriptor],
    value_means: Sequence[_Descriptor],
    *,
    before: Sequence[int],
    after: Sequence[int],
    block_sizes: Sequence[int],
    threads: int,
) -> None: ...
def refined_blocks(
    query_shape: Sequence[int],
    key_shape: Sequence[int],
    masks: _Masks,
    plan: _Descriptor,
    *,
    settings: _Settings,
    sequences: _Sequences,
) -> list[list[npt.NDArray[np.bool_]]]: ...
def build_info() -> _BuildInfo: ...
def use_torch_threads(address: int) -> None: ...
def kernel_rates() -> tuple[float, float, float]: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
