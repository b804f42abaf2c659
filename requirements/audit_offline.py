"""Look the pinned set up in a checkout of the PyPA advisory database, where no index can be asked.

    git clone https://github.com/pypa/advisory-database
    python requirements/audit_offline.py advisory-database

Prints what applies to a pinned version and not withdrawn, and exits with 1 then; names the commit's
date, because advisories published later are unknown to it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

PINNED = Path(__file__).with_name("pinned.txt")
LINE = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;]+)")


def pinned(text: str) -> dict[str, Version]:
    """Return package -> version of a requirements file."""
    found = (LINE.match(line.strip()) for line in text.splitlines())
    return {canonicalize_name(m[1]): Version(m[2]) for m in found if m}


def applies(version: Version, affected: Mapping[str, Any]) -> bool:
    """Whether one ``affected`` entry of an OSV record covers ``version``."""
    if str(version.public) in affected.get("versions", ()):
        return True
    for span in affected.get("ranges", ()):
        if span.get("type") != "ECOSYSTEM":
            continue
        inside = False
        events = [next(iter(event.items())) for event in span["events"]]
        for kind, text in sorted(events, key=lambda e: _version(e[1])):
            bound = _version(text)
            if kind == "introduced" and version >= bound:
                inside = True
            elif (kind == "fixed" and version >= bound) or (
                kind == "last_affected" and version > bound
            ):
                inside = False
        if inside:
            return True
    return False


def _version(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:  # what no version reaches must not hide a finding
        return Version("99999")


def records(database: Path, package: str) -> list[dict[str, Any]]:
    """Return a package's advisories that were not withdrawn."""
    folder = database / "vulns" / package
    loaded = [yaml.safe_load(path.read_text("utf-8")) for path in sorted(folder.glob("*.yaml"))]
    return [record for record in loaded if not record.get("withdrawn")]


def findings(database: Path, pins: Mapping[str, Version]) -> Iterator[str]:
    """Yield a line for each advisory that applies to a pinned version."""
    for package, version in sorted(pins.items()):
        for record in records(database, package):
            mine = [a for a in record["affected"] if _name(a) == package]
            if any(applies(version, a) for a in mine):
                names = ", ".join([record["id"], *record.get("aliases", ())])
                yield f"{package} {version}: {names}"


def _name(affected: Mapping[str, Any]) -> str:
    return canonicalize_name(affected.get("package", {}).get("name", ""))


def main(arguments: list[str]) -> int:
    """Print the findings; 0: none, 1: some, 2: not a database."""
    if len(arguments) != 1 or not (Path(arguments[0]) / "vulns").is_dir():
        print("usage: audit_offline.py CHECKOUT-OF-pypa/advisory-database", file=sys.stderr)
        return 2
    database = Path(arguments[0])
    pins = pinned(PINNED.read_text("utf-8"))
    known = {name: len(found) for name in pins if (found := records(database, name))}
    asked = ["git", "-C", str(database), "log", "-1", "--format=%cs"]
    date = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    print(
        f"{len(pins)} packages, {len(known)} of them with {sum(known.values())} advisories; "
        f"database of {date or 'unknown date'}"
    )
    lines = list(findings(database, pins))
    print("\n".join(lines) or "none applies to a pinned version")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
