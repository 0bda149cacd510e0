"""What all tests share: random numbers that repeat, memory that shows when nobody wrote to it, numbers of threads."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

# Read when torch is imported. Compiled graphs on disk name our operators but not their schemas: old ones would be run.
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("fast", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.register_profile("slow", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


# Tests of what is optional are left out where that is not installed.
collect_ignore_glob = [] if importlib.util.find_spec("transformers") else ["test_transformers*"]


@pytest.fixture(autouse=True, scope="session")
def _poison_new_memory():
    """Let torch fill what `torch.empty` and its relatives return: NaN in floats, the largest value in integers.

    The outputs of the operators are allocated that way, so an element that no kernel writes is seen.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """One thread, since as many tests run at once as there are cores; `@pytest.mark.threads(3)` asks for more."""
    marker = request.node.get_closest_marker("threads")
    torch.set_num_threads(1 if marker is None else marker.args[0])


@pytest.fixture(autouse=True)
def seed() -> int:
    """Start every test with the same random numbers; the value is the seed."""
    value = 0
    torch.manual_seed(value)
    return value


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of the benchmarks, which are not installed, by its name in their folder."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"benchmarks.{name}")

    return load
