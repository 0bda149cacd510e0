"""Forked children, worker processes and concurrent callers compute the same bits, and nobody hangs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from mra_attention._native import threads

# NumPy compares: in a forked child torch's own parallel operators hang, torch.equal too.
SETUP = """
import multiprocessing, os, threading, numpy, torch
from mra_attention import scaled_dot_product_attention
torch.set_num_threads(2)
torch.manual_seed(0)
query, key, value = (torch.randn(1, 4, LENGTH, 64, dtype=DTYPE) for _ in range(3))
call = lambda: scaled_dot_product_attention(query, key, value).view(torch.int16)
def same(*_):
    return numpy.array_equal(call().numpy(), expected)
expected = call().numpy()
"""

FORK = """
child = os.fork()
if child == 0:
    os._exit(0 if same() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert same()
"""

MULTIPROCESSING = """
with multiprocessing.get_context("fork").Pool(2) as workers:
    assert all(workers.map(same, range(4)))
assert same()
"""

DATA_LOADER = """
class Items(torch.utils.data.Dataset):
    __len__ = lambda self: 4
    __getitem__ = same
assert all(flag for batch in torch.utils.data.DataLoader(Items(), num_workers=2) for flag in batch)
assert same()
"""

CONCURRENT = """
equal = []
call_often = lambda: equal.extend(same() for _ in range(10))
callers = [threading.Thread(target=call_often) for _ in range(4)]
for caller in callers:
    caller.start()
for caller in callers:
    caller.join()
assert equal == [True] * 40
"""

# A process whose torch never had more than one thread starts none for attention either.
ONE_THREAD = """
import re, torch
from mra_attention import scaled_dot_product_attention
threads = lambda: int(re.search(r"Threads:\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.set_num_threads(1)
before = threads()
scaled_dot_product_attention(*[torch.randn(1, 4, 2048, 64)] * 3)
assert threads() == before, (before, threads())
torch.set_num_threads(2)
scaled_dot_product_attention(*[torch.randn(1, 4, 2048, 64)] * 3)
assert threads() == before + 1, (before, threads())
"""

THREADS_THAT_ARE_NOT_THERE = """
import ctypes, os, torch
ctypes.CDLL = lambda *_: object()
for value in ("omp", "torch"):
    os.environ["MRA_ATTENTION_THREADS"] = value
    try:
        import mra_attention
    except (ValueError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}")
"""

POOLS = ["torch", "rayon"] if threads.THREADS_OF == "torch" else ["rayon"]


def run(code: str, threads_of: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "MRA_ATTENTION_THREADS": threads_of, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("threads_of", POOLS)
def test_concurrent_callers_and_forked_children_after_use(threads_of: str):
    setup = "import torch; DTYPE, LENGTH = torch.float32, 1024\n" + SETUP
    run(setup + CONCURRENT + (FORK + MULTIPROCESSING + DATA_LOADER if hasattr(os, "fork") else ""), threads_of)


@pytest.mark.parametrize("threads_of", POOLS)
def test_bfloat16_on_tiles(threads_of: str):
    """Every thread configures the tiles of its own."""
    setup = "import torch; DTYPE, LENGTH = torch.bfloat16, 128\n" + SETUP
    run(setup + CONCURRENT + (FORK if hasattr(os, "fork") else ""), threads_of, MRA_ATTENTION_ISA="portable-amx")


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="threads are counted in /proc")
@pytest.mark.parametrize("threads_of", POOLS)
def test_set_num_threads_is_obeyed(threads_of: str):
    run(ONE_THREAD, threads_of)


def test_threads_that_are_not_there():
    printed = run(THREADS_THAT_ARE_NOT_THERE, "").splitlines()
    assert len(printed) == 2
    assert printed[0].startswith("ValueError: MRA_ATTENTION_THREADS='omp'")
    assert printed[1].startswith("RuntimeError: MRA_ATTENTION_THREADS='torch'")
