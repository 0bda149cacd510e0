"""The native module works with every torch and every Python: it links neither."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mra_attention import _core

MODULE = Path(_core.__file__)

# Of the names with an underscore, those that CPython's Misc/stable_abi.toml lists.
STABLE_ABI_WITH_UNDERSCORE = {
    "_Py_DecRef",
    "_Py_EllipsisObject",
    "_Py_FalseStruct",
    "_Py_IncRef",
    "_Py_NoneStruct",
    "_Py_NotImplementedStruct",
    "_Py_TrueStruct",
}

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files with readelf: Linux only")


def dynamic_section() -> str:
    readelf = shutil.which("readelf")
    assert readelf is not None, "readelf (package binutils) is needed to look into the native module"
    return subprocess.run([readelf, "--dynamic", "--wide", MODULE], capture_output=True, text=True, check=True).stdout


def libraries() -> list[str]:
    return [line.split("[")[1].rstrip("]") for line in dynamic_section().splitlines() if "(NEEDED)" in line]


def test_the_file_name_says_abi3():
    assert MODULE.parent.name == "mra_attention"
    assert ".abi3." in MODULE.name or MODULE.suffix == ".pyd"


@linux_only
def test_it_needs_only_the_system():
    system = ("libc.so", "libm.so", "libgcc_s.so", "libpthread.so", "libdl.so", "librt.so", "ld-linux")
    needed = libraries()
    assert any(name.startswith("libc.so") for name in needed), f"readelf was misread: {needed}"
    assert [name for name in needed if not name.startswith(system)] == []


@linux_only
def test_it_has_no_search_path():
    assert "RUNPATH" not in dynamic_section()
    assert "RPATH" not in dynamic_section()


@linux_only
def test_it_uses_no_python_symbol_outside_the_stable_abi():
    readelf = shutil.which("readelf")
    assert readelf is not None
    listed = subprocess.run(
        [readelf, "--dyn-syms", "--wide", MODULE], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    undefined = {line.split()[7].split("@")[0] for line in listed if " UND " in line and len(line.split()) > 7}
    python = {name for name in undefined if name.startswith(("Py", "_Py"))}
    assert python, "no Python symbol was found"
    assert {name for name in undefined if "torch" in name.lower() or "c10" in name} == set()
    assert {name for name in python if name.startswith("_Py")} <= STABLE_ABI_WITH_UNDERSCORE
