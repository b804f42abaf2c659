"""The pages as a browser shows them: no error, nothing beyond the edge, light and dark.

Needs Chromium (Debian's package of that name).
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from simulations.report.comparison import write_comparison
from simulations.report.page import write_report
from tests.simulations.report.runs import failed_run, split_run, table_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTHS = (360, 1280)
# What lies beyond the page's edge, or beyond its own drawing's; tables may scroll in their frame.
LOOK = """
const found = {};
for (const frame of document.querySelectorAll("iframe")) {
  const inside = frame.contentDocument, root = inside.documentElement, beyond = [];
  const edge = root.clientWidth;
  if (root.scrollWidth > edge) beyond.push(`page ${root.scrollWidth} > ${edge}`);
  for (const x of inside.querySelectorAll("section, h1, p, li, figure, .error, svg")) {
    const box = x.getBoundingClientRect();
    if (box.right > edge + 1 || box.left < -1) beyond.push(`${x.tagName} ${box.right}`);
  }
  for (const x of inside.querySelectorAll("svg text")) {
    const box = x.getBoundingClientRect(), svg = x.ownerSVGElement.getBoundingClientRect();
    if (box.right > svg.right + 2 || box.left < svg.left - 2 || box.bottom > svg.bottom + 2)
      beyond.push(`text ${x.textContent}`);
  }
  const colours = getComputedStyle(inside.body);
  found[frame.id] = {beyond, paper: colours.backgroundColor, ink: colours.color,
                     drawn: inside.querySelectorAll("svg").length};
}
document.body.innerHTML = "";
document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def show(folder: Path, pages: dict[str, str], *more: str) -> tuple[dict[str, Any], list[str]]:
    """Return (what was found by page and width, what the console said)."""
    frames = "".join(
        f'<iframe id="{name} {width}" width="{width}" height="2000" style="border:0" '
        f'srcdoc="{html.escape(page)}"></iframe>'
        for name, page in pages.items()
        for width in WIDTHS
    )
    wrapped = f"<!doctype html><body>{frames}<script>onload = () => {{{LOOK}}}</script></body>"
    (folder / "frames.html").write_text(wrapped, encoding="utf-8")
    done = subprocess.run(
        [
            *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--enable-logging=stderr", "--virtual-time-budget=10000", "--window-size=1400,2000"),
            *(f"--user-data-dir={folder / 'profile'}", *more, f"file://{folder / 'frames.html'}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    match = re.search("FOUND(.*)END", done.stdout, re.DOTALL)
    assert match is not None, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(match[1])), said


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("runs")
    split, noisier = split_run(folder / "split"), split_run(folder / "other", eta=6.0)
    many = split_run(folder / "many", owners=30, name="a-hospital-with-a-long-name")
    runs = [split, noisier, many, failed_run(folder / "failed"), table_run(folder / "table")]
    found = {run.name: write_report(run).read_text(encoding="utf-8") for run in runs}
    compared = write_comparison(runs, folder / "compare.html")
    return {**found, "compare": compared.read_text(encoding="utf-8")}


def test_no_error_and_nothing_beyond_the_edge(pages: dict[str, str], tmp_path: Path) -> None:
    found, said = show(tmp_path, pages)
    assert not said
    assert len(found) == len(pages) * len(WIDTHS)
    assert {name: row["beyond"] for name, row in found.items() if row["beyond"]} == {}
    assert found["split 360"]["drawn"] >= 5  # who held what, privacy, two curves, lineage
    assert found["compare 360"]["drawn"] >= 3


def test_a_dark_screen_gets_a_dark_page(pages: dict[str, str], tmp_path: Path) -> None:
    def light(colour: str) -> float:
        return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3

    only = {"split": pages["split"]}
    bright, _ = show(tmp_path, only)
    dark, _ = show(tmp_path, only, "--force-dark-mode")
    assert light(bright["split 360"]["paper"]) > 200 > 100 > light(bright["split 360"]["ink"])
    assert light(dark["split 360"]["paper"]) < 60 < 180 < light(dark["split 360"]["ink"])


def test_an_error_or_a_wide_page_would_be_seen(tmp_path: Path) -> None:
    bad = "<!doctype html><p style='width: 500px'>x</p><script>undefined.x</script>"
    found, said = show(tmp_path, {"bad": bad})
    assert any("TypeError" in line for line in said)
    assert found["bad 360"]["beyond"]
    assert not found["bad 1280"]["beyond"]
