"""Every instruction set of this CPU computes right results, and one that is required must be there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mra_attention
import pytest
import torch
from mra_attention import _core

TWINS = ["portable-bf16", "portable-amx"]
"""What computes, slowly and on any machine, what the levels that multiply bfloat16 as it is compute."""

CHECKED = "bfloat16 and (test_head_dimensions or test_large_logits)"

REQUIRED = [name for name in os.environ.get("MRA_ATTENTION_REQUIRE_ISA", "").split(",") if name]


def report(isa: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mra_attention"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "MRA_ATTENTION_ISA": isa},
    )


@pytest.mark.parametrize("isa", sorted({*_core.available_isas(), *REQUIRED, *TWINS}))
def test_the_variable_picks_the_instruction_set(isa: str):
    done = report(isa)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (f"instruction set  {isa} ", mra_attention.__version__, torch.__version__, "threads"):
        assert words in done.stdout
    assert "self-check passed" in done.stdout


@pytest.mark.parametrize("isa", TWINS)
def test_bfloat16_has_the_error_of_torch(isa: str):
    """The twins have the budget of the levels that they stand for: docs/definitions.md, section 7."""
    arguments = [str(Path(__file__).with_name("test_sdpa_parity.py")), "-q", "-p", "no:cacheprovider", "-k", CHECKED]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "MRA_ATTENTION_ISA": isa},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_instruction_set_that_is_not_there():
    done = report("mmx")
    assert done.returncode != 0
    assert 'MRA_ATTENTION_ISA="mmx": this CPU has portable' in done.stderr
