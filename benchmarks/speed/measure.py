"""The measurements of `make bench`. Each returns rows for the table."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from mra_attention import KVCache, _core
from mra_attention import scaled_dot_product_attention as mra
from torch import Tensor, nn

from .accuracy import error_on_real_data
from .cases import BFLOAT16_CASES, CASES, EVERYTHING, MASKED_CASES, Case, MaskedCase
from .checks import check_causal, check_forward, check_gradients, check_masked, relative_error
from .timing import interleaved

TOLERANCE = 1e-5
"""Relative error in float32 against float64 of the same formulas."""


@dataclass
class Row:
    """One line of the table: `ratio` is `peer` / `ours` in time, or what `unit` says."""

    name: str
    peer: float | None
    ours: float
    ratio: float
    wanted: str
    holds: bool | None
    unit: str = "ms"
    error: float | None = None
    """Relative error on real queries, keys and values with the same arguments."""
    share: float | None = None
    """Of forward passes, the products of exact blocks as a share of the peak of the threads, in per cent."""


def inputs(
    heads: int, length: int, head_dim: int, *, grad: bool = False, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return standard-normal query, key and value (1, heads, length, head_dim)."""
    torch.manual_seed(0)
    return [torch.randn(1, heads, length, head_dim).to(dtype).requires_grad_(grad) for _ in range(3)]


def step(attention: Callable[..., Tensor], tensors: list[Tensor], grad_out: Tensor) -> Callable[[], object]:
    """Return a call of forward and backward."""
    return lambda: torch.autograd.grad(attention(*tensors), tensors, grad_out)


def against_sdpa(case: Case, seconds: float) -> Row:
    """Time a case and SDPA in turns, after a check of the result."""
    tensors = inputs(case.heads, case.length, case.head_dim, grad=case.backward, dtype=case.dtype)
    detached = [x.detach() for x in tensors]
    (check_causal if case.causal else check_forward)(*detached, case.keywords, case.tolerance)

    def ours(*args: Tensor) -> Tensor:
        return mra(*args, is_causal=case.causal, **case.keywords)

    def peer(*args: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*args, is_causal=case.causal)

    if case.backward:
        grad_out = torch.randn_like(tensors[0])
        check_gradients(tuple(detached), grad_out, case.keywords, case.tolerance, causal=case.causal)
        calls = {"peer": step(peer, tensors, grad_out), "ours": step(ours, tensors, grad_out)}
    else:
        calls = {"peer": lambda: peer(*tensors), "ours": lambda: ours(*tensors)}
    times = interleaved(calls, seconds=seconds)
    ratio = times["peer"] / times["ours"]
    error = None if case.dtype == torch.bfloat16 else error_on_real_data(causal=case.causal, **case.keywords)
    wanted, holds = f">= {case.aim:g}x", ratio >= case.aim
    if case.dtype == torch.bfloat16:
        wanted, holds = f"{wanted} with AMX", holds if _core.isa() == "amx" else None
    row = Row(case.name, 1e3 * times["peer"], 1e3 * times["ours"], ratio, wanted, holds, error=error)
    if case.keywords is EVERYTHING and not case.backward and case.dtype == torch.float32:
        row.share = _share(case.heads * case.length**2, case.head_dim, times["ours"])
    return row


@functools.cache
def _peak() -> float:
    """Return the rate of multiply-adds on registers alone, of one thread, in FLOP/s."""
    return 1e9 * _core.kernel_rates()[0]


def _share(pairs: int, head_dim: int, seconds: float) -> float:
    """Return the share of the peak, in per cent, at which the two products of these pairs are computed."""
    return 100 * 4 * pairs * head_dim / seconds / (_peak() * torch.get_num_threads())


def against_masked_sdpa(case: MaskedCase, seconds: float) -> Row:
    """Time a case and SDPA with the same mask in turns, after a check of the result."""
    tensors = inputs(case.heads, case.length, case.head_dim, grad=case.backward)
    mask = case.mask()
    keywords = case.keywords(mask)
    check_masked(tuple(x.detach() for x in tensors), mask, keywords, TOLERANCE, backward=case.backward)

    def ours(*args: Tensor) -> Tensor:
        return mra(*args, **keywords)

    def peer(*args: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*args, attn_mask=mask)

    if case.backward:
        grad_out = torch.randn_like(tensors[0])
        calls = {"peer": step(peer, tensors, grad_out), "ours": step(ours, tensors, grad_out)}
    else:
        calls = {"peer": lambda: peer(*tensors), "ours": lambda: ours(*tensors)}
    times = interleaved(calls, seconds=seconds)
    ratio = times["peer"] / times["ours"]
    name = f"{case.name}, L {case.length}, H {case.heads}"
    row = Row(name, 1e3 * times["peer"], 1e3 * times["ours"], ratio, f">= {case.aim:g}x", ratio >= case.aim)
    if not case.backward:
        row.share = _share(case.heads * int(mask.sum()), case.head_dim, times["ours"])
    return row


def sparse_against_full(seconds: float) -> Row:
    """Sparse mode leaves out the coarse level, so it must not be slower."""
    tensors = inputs(8, 4096, 64)
    check_forward(*tensors, {"mode": "sparse"}, TOLERANCE)
    times = interleaved({"peer": lambda: mra(*tensors), "ours": lambda: mra(*tensors, mode="sparse")}, seconds=seconds)
    ratio = times["peer"] / times["ours"]
    error = error_on_real_data(mode="sparse")
    name = "sparse against full, L 4096"
    return Row(name, 1e3 * times["peer"], 1e3 * times["ours"], ratio, ">= 1x", ratio >= 1, error=error)


def decoding(seconds: float) -> Row:
    """Time one step of decoding with 65536 tokens in the cache: append a token, attend to all.

    The steps are those of successive tokens, the last ones of the sequence over and over, so one in 32 completes a
    block. Between two of them SDPA reads all keys and values: what a step needs comes from memory, as in a model of
    many layers.
    """
    length, block_size, least = 65536, 32, 15
    queries, keys, values = inputs(8, length, 64)
    query, key, value = (x[:, :, -1:].clone() for x in (queries, keys, values))
    cache = KVCache(1, 8, 64, max_length=length)
    cache.append(keys, values)

    def ours() -> Tensor:
        if cache.length == length:
            cache.crop(length - block_size)
        cache.append(key, value)
        return cache.attend(query, blocks_per_row=8, score="mean")

    def peer() -> Tensor:  # SDPA finds the new token already in its place
        return F.scaled_dot_product_attention(query, keys, values)

    with torch.no_grad():
        everything = cache.attend(query, blocks_per_row=2**20)
        error = relative_error(everything, peer())
        if not error <= TOLERANCE:
            raise AssertionError(f"decoding with every block: error {error:.1e} > {TOLERANCE:.1e}")
        times = interleaved({"peer": peer, "ours": ours}, seconds=seconds)
    ratio = times["peer"] / times["ours"]
    name = "decoding step, 65536 tokens, 8 blocks"
    return Row(name, 1e3 * times["peer"], 1e3 * times["ours"], ratio, f">= {least}x", ratio >= least)


def share_of_peak() -> Row:
    """Compare the products of the exact level with fused multiply-adds on registers alone, on one thread."""
    peak, products, with_softmax = _core.kernel_rates()
    share = 100 * products / peak
    name = f"products, share of FMA peak (with softmax {100 * with_softmax / peak:.0f} %)"
    return Row(name, peak, products, share, ">= 50 %", share >= 50, unit="GF/s")


def growth(seconds: float) -> Row:
    """Compare the time at 16 times the length with the time at 4096 tokens."""
    short, long = inputs(8, 4096, 64), inputs(8, 65536, 64)
    times = interleaved({"short": lambda: mra(*short), "long": lambda: mra(*long)}, seconds=seconds)
    factor = times["long"] / times["short"]
    name = "growth, L 4096 to 65536 (times)"
    return Row(name, 1e3 * times["short"], 1e3 * times["long"], factor, "<= 28", factor <= 28)


def overhead(seconds: float) -> Row:
    """Time a call that computes next to nothing."""
    tensors = inputs(1, 32, 64)
    with torch.no_grad():
        calls = {"peer": lambda: F.scaled_dot_product_attention(*tensors), "ours": lambda: mra(*tensors)}
        times = interleaved(calls, seconds=seconds, least=1000)
    extra = 1e6 * (times["ours"] - times["peer"])
    peer, ours = (1e6 * times[name] for name in ("peer", "ours"))
    return Row("call, L 32, H 1 (us more)", peer, ours, extra, "<= +25 us", extra <= 25, unit="us")


class Layer(nn.Module):
    """A pre-norm encoder layer, 768 wide with 12 heads."""

    def __init__(self, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList([nn.LayerNorm(768), nn.LayerNorm(768)])
        self.qkv, self.out = nn.Linear(768, 3 * 768), nn.Linear(768, 768)
        self.mlp = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, 768) to (B, L, 768)."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, 12, 64)).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norms[1](x))


def layer(seconds: float) -> Iterator[Row]:
    """Time a whole layer, and compare the ratio with the one that the attention's share of the time predicts."""
    torch.manual_seed(0)
    x = torch.randn(1, 4096, 768)
    layers = {
        "peer": Layer(F.scaled_dot_product_attention),
        "ours": Layer(mra),
        "rest": Layer(lambda q, k, v: v),
    }
    for other in ("ours", "rest"):
        layers[other].load_state_dict(layers["peer"].state_dict())
    heads = torch.randn(1, 4096, 12, 64)

    def training_step(module: Layer) -> Callable[[], object]:
        return lambda: torch.autograd.grad(module(x).square().mean(), list(module.parameters()))

    def attention_step(attention: Callable[..., Tensor]) -> Callable[[], object]:
        q, k, v = (heads.clone().transpose(1, 2).requires_grad_() for _ in range(3))
        return lambda: torch.autograd.grad(attention(q, k, v), (q, k, v), heads.transpose(1, 2))

    def inference(module: Layer) -> Callable[[], object]:
        def call() -> Tensor:
            with torch.no_grad():
                return module(x)

        return call

    def attention_only(attention: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: attention(*[heads.transpose(1, 2)] * 3)

    for name, whole, part in (
        ("layer 768 x 12, L 4096, forward", inference, attention_only),
        ("layer 768 x 12, L 4096, training step", training_step, attention_step),
    ):
        calls = {key: whole(module) for key, module in layers.items()}
        calls |= {"sdpa": part(F.scaled_dot_product_attention), "mra": part(mra)}
        times = interleaved(calls, seconds=seconds)
        predicted = (times["rest"] + times["sdpa"]) / (times["rest"] + times["mra"])
        ratio = times["peer"] / times["ours"]
        wanted = f">= 0.9 x {predicted:.2f}x"
        yield Row(name, 1e3 * times["peer"], 1e3 * times["ours"], ratio, wanted, ratio >= 0.9 * predicted)


_MEMORY = """
import torch, mra_attention
def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024
def run(length):
    tensors = [torch.randn(1, 8, length, 64, requires_grad=True) for _ in range(3)]
    grad_out = torch.randn(1, 8, length, 64)
    before = status("VmRSS:")
    out = mra_attention.scaled_dot_product_attention(*tensors)
    grads = torch.autograd.grad(out, tensors, grad_out)
    results = sum(x.numel() * x.element_size() for x in (out, *grads))
    given = sum(x.numel() * x.element_size() for x in (*tensors, grad_out))
    return (status("VmHWM:") - before - results) / (given + results)
run(1024)
print(run(65536))
"""


def memory() -> Row:
    """Return the peak memory of forward + backward beyond inputs, outputs and gradients, as a share of them."""
    done = subprocess.run([sys.executable, "-c", _MEMORY], check=True, capture_output=True, text=True)
    share = 100 * float(done.stdout)
    return Row("extra peak memory, L 65536 (%)", None, share, share, "<= 25 %", share <= 25, unit="%")


def half_width(seconds: float) -> Row:
    """Compare exact attention in bfloat16 with our own float32; the aim is for CPUs with bfloat16 products."""
    tensors = inputs(8, 2048, 64)
    narrow = [x.bfloat16() for x in tensors]
    check_forward(*narrow, EVERYTHING, 1e-2)
    times = interleaved(
        {"peer": lambda: mra(*tensors, **EVERYTHING), "ours": lambda: mra(*narrow, **EVERYTHING)}, seconds=seconds
    )
    ratio = times["peer"] / times["ours"]
    name, wanted = "bfloat16 against float32, every block, L 2048", ">= 1.5x with AVX-512-BF16"
    return Row(name, 1e3 * times["peer"], 1e3 * times["ours"], ratio, wanted, None)


def measurements(seconds: float) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """Yield the name of each measurement and the function that makes it."""
    for case in CASES:
        yield case.name, lambda case=case: [against_sdpa(case, seconds)]
    for masked in MASKED_CASES:
        yield masked.name, lambda masked=masked: [against_masked_sdpa(masked, seconds)]
    yield "decoding", lambda: [decoding(seconds)]
    yield "peak", lambda: [share_of_peak()]
    yield "sparse", lambda: [sparse_against_full(seconds)]
    yield "bfloat16", lambda: [half_width(seconds)]
    for case in BFLOAT16_CASES:
        yield case.name, lambda case=case: [against_sdpa(case, seconds)]
    yield "growth", lambda: [growth(seconds)]
    yield "memory", lambda: [memory()]
    yield "call", lambda: [overhead(seconds)]
    yield "layer", lambda: list(layer(2 * seconds))
