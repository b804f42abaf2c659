"""The offline audit finds what applies, and only that."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    pytest.importorskip("yaml")
    place = ROOT / "requirements" / "audit_offline.py"
    spec = importlib.util.spec_from_file_location("audit_offline", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("events", "hit"),
    [
        ([{"introduced": "0"}], True),
        ([{"introduced": "0"}, {"fixed": "2.0"}], False),
        ([{"introduced": "0"}, {"fixed": "2.0.1"}], True),
        ([{"introduced": "0"}, {"last_affected": "2.0"}], True),
        ([{"introduced": "0"}, {"last_affected": "1.9"}], False),
        ([{"introduced": "2.1"}], False),
        ([{"introduced": "0"}, {"fixed": "1.0"}, {"introduced": "2.0"}], True),
    ],
)
def test_a_range_covers_a_version(
    audit: ModuleType, events: list[dict[str, str]], hit: bool
) -> None:
    entry = {"ranges": [{"type": "ECOSYSTEM", "events": events}]}
    assert audit.applies(Version("2.0"), entry) is hit


def test_findings_name_package_version_and_advisory(audit: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "vulns" / "some-package"
    folder.mkdir(parents=True)
    record = """
id: PYSEC-1
aliases: [CVE-1]
affected: [{package: {name: Some.Package, ecosystem: PyPI}, versions: ['1.0', '1.1']}]
"""
    (folder / "PYSEC-1.yaml").write_text(record)
    (folder / "PYSEC-2.yaml").write_text(record.replace("SEC-1", "SEC-2") + "withdrawn: 2024\n")
    pins = audit.pinned("# text\nsome_package[extra]==1.1\nother==2 ; python_version > '3'\n")
    assert list(audit.findings(tmp_path, pins)) == ["some-package 1.1: PYSEC-1, CVE-1"]
    assert list(audit.findings(tmp_path, audit.pinned("some-package==1.2"))) == []


def test_the_pinned_set_is_read_whole(audit: ModuleType) -> None:
    text = (ROOT / "requirements" / "pinned.txt").read_text()
    lines = [x for x in text.splitlines() if x.strip() and not x.startswith("#")]
    assert len(audit.pinned(text)) == len(lines)
