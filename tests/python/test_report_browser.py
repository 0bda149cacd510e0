"""A browser shows the page of the report at any width: nothing sticks out, nothing is missing or refused."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from mra_attention.analysis import AttentionCall, report

# As MRA_ATTENTION_REQUIRE_ISA: what is asked for must be there.
IS_REQUIRED = bool(os.environ.get("MRA_ATTENTION_REQUIRE_CHROMIUM"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# A window of Chromium is at least 500 wide; a frame has any width, and the page takes it for that of the window.
FRAME = """<!DOCTYPE html><body style="margin: 0"><iframe style="border: 0; width: {width}px; height: 900px"
srcdoc="{page}"></iframe><script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {{
  const root = frame.contentDocument.documentElement;
  const plots = [...root.querySelectorAll("svg.plot")].map((plot) => plot.getBoundingClientRect().width);
  document.body.dataset.found = JSON.stringify([root.clientWidth, root.scrollWidth, Math.min(...plots), plots.length]);
}});
</script></body>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("report") / "page.html"
    layer = "a_name_without_a_place_where_it_could_be_broken_" * 3
    tensors = torch.randn(3, 1, 2, 100, 8).unbind()
    report([AttentionCall(*tensors, layer=layer)], path, about={"Model": layer}, progress=False)
    return path.read_text(encoding="utf-8")


@pytest.mark.skipif(CHROMIUM is None and not IS_REQUIRED, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1400, 400])
def test_a_browser_shows_it(page: str, width: int, tmp_path: Path) -> None:
    assert CHROMIUM is not None, "MRA_ATTENTION_REQUIRE_CHROMIUM is set, and there is no chromium"
    framed, picture = tmp_path / "framed.html", tmp_path / "picture.png"
    framed.write_text(FRAME.format(width=width, page=html.escape(page)), encoding="utf-8")
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--dump-dom", f"--screenshot={picture}", f"--window-size={width},900", "--virtual-time-budget=2000"),
            *("--enable-logging=stderr", "--v=0", framed.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found is not None, done.stderr
    shown, content, narrowest, plots = json.loads(html.unescape(found[1]))
    assert width - 20 <= shown <= width  # less a scroll bar
    assert content <= shown
    assert plots == page.count('<svg class="plot"')
    assert narrowest >= 200
    # What is refused or fails is a message of the console.
    assert "CONSOLE" not in done.stderr
    assert imread(picture).std() > 0.02  # not one colour
