"""The docs: links that resolve, names that exist, settings that are real."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
SETTING = re.compile(r"`([a-z]+\.[a-z-]+)(?: = ([^`]+))?`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    targets = {link.partition("#")[0] for link in LINK.findall(page.read_text())}
    relative = [t for t in targets if t and not re.match(r"[a-z]+:", t)]
    assert [t for t in relative if not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_of_the_project_that_a_page_names_is_there(page: Path) -> None:
    if page.name == "CHANGELOG.md":  # it names what was, too
        return
    named = set(
        re.findall(r"`((?:fedsplit|strategies|simulations|tests)/[\w/.-]+)`", page.read_text())
    )
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_pictures_of_the_architecture_name_files_that_exist() -> None:
    pictures = re.findall(r"```\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.DOTALL)
    assert len(pictures) == 4
    named = set(re.findall(r"[\w/]+/\w+\.py", "".join(pictures)))
    assert len(named) > 20
    for name in named:
        assert any((ROOT / top / name).is_file() for top in ("fedsplit", "strategies")), name


def test_the_paper_index_names_functions_that_exist() -> None:
    found = re.findall(r"`([\w/]+\.py)(?::([\w.]+))?`", (ROOT / "docs/paper_index.md").read_text())
    assert len(found) > 20
    for path, name in found:
        scope: ast.AST = ast.parse((ROOT / path).read_text())
        for part in filter(None, name.split(".")):
            named = {n.name: n for n in ast.iter_child_nodes(scope) if hasattr(n, "name")}
            assert part in named, f"{path}:{name}: not defined there"
            scope = named[part]


def test_the_settings_page_advises_what_a_run_accepts() -> None:
    known = RunConfig().to_flat()
    text = (ROOT / "docs/settings.md").read_text()
    advised = [found for found in SETTING.findall(text) if not found[0].endswith(".toml")]
    assert len(advised) > 40
    for key, given in advised:
        assert key in known, f"docs/settings.md: {key}: no such setting"
        if not given:
            continue
        kind = type(known[key])
        value = given == "true" if kind is bool else kind(given.strip('"'))
        assert "one of" not in refusal({key: value}), f"docs/settings.md: {key}"


def refusal(settings: dict[str, Any]) -> str:
    """Return why settings are refused alone: often they only go together with another."""
    try:
        RunConfig.from_flat(settings)
    except ConfigError as error:
        return str(error)
    return ""


def test_the_site_loads_nothing_from_elsewhere() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in text
    assert not re.findall(r"https?://(?!localhost)\S+", text)


@pytest.mark.parametrize("page", sorted((ROOT / "docs/results").glob("*.md")), ids=lambda p: p.name)
def test_every_results_page_names_the_commits_it_was_measured_at(page: Path) -> None:
    text = page.read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    of_commands = [section for section in sections[1:] if section.startswith("`")]
    unnamed = [s.splitlines()[0] for s in of_commands if "Measured at commit `" not in s]
    assert not unnamed, "results.json names the commit under versions"


def test_every_commit_that_a_page_names_is_in_the_history() -> None:
    if not (ROOT / ".git").exists() or (ROOT / ".git/shallow").exists():
        pytest.skip("no history here")
    hexes = {text for page in PAGES for text in re.findall(r"`([0-9a-f]{7,40})`", page.read_text())}
    named = sorted(text for text in hexes if not text.isdigit() and not text.isalpha())
    git = ["git", "-C", str(ROOT), "cat-file", "--batch-check"]
    asked = "".join(f"{commit}^{{commit}}\n" for commit in named)
    told = subprocess.run(git, input=asked, capture_output=True, text=True, check=True).stdout
    assert [line for line in told.splitlines() if " commit " not in line] == []
