"""Extra memory of forward and backward, of a process of its own: `python -m benchmarks.long.memory auto 65536 full`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from mra_attention import scaled_dot_product_attention as mra

from .settings import BUDGET, BY_NAME

REPOSITORY = Path(__file__).parents[2]


def extra_memory(name: str, length: int, *, causal: bool) -> int:
    """Return the bytes that forward and backward take beyond inputs, output and gradients, one head of 64 channels."""
    form = "causal" if causal else "full"
    command = [sys.executable, "-m", __name__, name, str(length), form, str(torch.get_num_threads())]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout)


def _status(field: str) -> int:
    with Path("/proc/self/status").open() as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def _run(name: str, length: int, *, causal: bool) -> int:
    tensors = [torch.randn(1, 1, length, 64, requires_grad=True) for _ in range(3)]
    grad_out = torch.randn(1, 1, length, 64)
    before = _status("VmRSS:")
    out = mra(*tensors, is_causal=causal, **BY_NAME[name].keywords(length, BUDGET[causal]))
    grads = torch.autograd.grad(out, tensors, grad_out)
    results = sum(x.numel() * x.element_size() for x in (out, *grads))
    return max(_status("VmHWM:") - before - results, 0)


def main() -> None:
    """Print the bytes."""
    name, length, form, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    _run(name, 1024, causal=form == "causal")  # what is loaded and started once
    print(_run(name, int(length), causal=form == "causal"))


if __name__ == "__main__":
    main()
