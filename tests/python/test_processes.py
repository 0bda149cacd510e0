"""Forked children and concurrent callers compute the same bits, and nobody hangs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SETUP = """
import os, threading, torch
from mra_attention import scaled_dot_product_attention
torch.set_num_threads(2)
query, key, value = (torch.randn(1, 4, 1024, 64) for _ in range(3))
call = lambda: scaled_dot_product_attention(query, key, value)
expected = call()
"""

FORK = """
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(call(), expected) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(call(), expected)
"""

CONCURRENT = """
equal = []
call_often = lambda: equal.extend(torch.equal(call(), expected) for _ in range(10))
callers = [threading.Thread(target=call_often) for _ in range(4)]
for caller in callers:
    caller.start()
for caller in callers:
    caller.join()
assert equal == [True] * 40
"""


def run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SETUP + code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_child_after_use():
    run(FORK)


def test_concurrent_callers():
    run(CONCURRENT)
