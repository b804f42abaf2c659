"""Fuzz cases for what an owner reads: its ledger, rules, kept offers, and apps under review."""

from __future__ import annotations

import io
import json
import random
import re
import zipfile
from pathlib import Path
from typing import Any

from fedsplit.config import RunConfig
from fedsplit.deploy.review import facts_of
from fedsplit.owners.app_digest import digest_of_bundle
from fedsplit.owners.ledger.chain import GENESIS, Ledger, canonical, chained, read_ledger
from fedsplit.owners.policy.description import TEMPLATE
from fedsplit.owners.policy.rules import Policy
from fedsplit.owners.serving.offers import FILE, save_offer, take_offer
from fedsplit.wire.messages import SessionOffer
from fedsplit.wire.serving import ServingOffer
from simulations.fuzz.cases import Cases, cases_of, file_cases, folder_cases, resealed
from simulations.fuzz.damage import damaged_json, damaged_text, flipped


def ledgers(scratch: Path) -> Cases:
    """Fuzz an owner's ledger with lines damaged, cut off, or another's with good hashes."""
    folder = scratch / "home"
    folder.mkdir(exist_ok=True)
    with Ledger(folder) as ledger:
        for kind in ("hello", "ready", "slots"):
            entry = {"kind": kind, "bytes": 3, "run": "7", "owner": "a"}
            ledger.append(lambda _, entry=entry: entry)  # type: ignore[misc]
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    first = json.loads(files["ledger.jsonl"].splitlines()[0])
    body = {k: v for k, v in first.items() if k != "hash"}

    def hashed(found: Any) -> Any:
        return found | {"hash": chained(GENESIS, canonical(found))}

    def draw(rng: random.Random) -> dict[str, bytes]:
        found = dict(files)
        way = rng.randrange(3)
        if way == 0:
            found["ledger.jsonl"] = flipped(found["ledger.jsonl"], rng)
        elif way == 1:
            line = resealed(body, rng, hashed, compact=True)
            found = {"ledger.jsonl": line + b"\n"}
        else:
            name = rng.choice(sorted(found))
            found[name] = flipped(found[name], rng)
        return found

    def parse(folder: Path) -> None:
        try:
            for _ in read_ledger(folder):
                pass
        finally:
            Ledger(folder).close()

    return folder_cases(folder, draw, parse)


def policies(_: Path) -> Cases:
    """Fuzz owner.toml."""
    sound = re.sub(r"(?m)^# (?=\w+ = )", "", TEMPLATE.read_text())  # with its suggestions in force
    sound = sound.replace("...", "ab" * 32)
    Policy.parse(sound.encode(), "owner.toml")

    def draw(rng: random.Random) -> bytes:
        content = damaged_text(sound, rng).encode("utf-8", "surrogatepass")
        return flipped(sound.encode(), rng) if rng.random() < 0.2 else content

    return cases_of(draw, lambda content: Policy.parse(content, "owner.toml"))


def serving_offers(scratch: Path) -> Cases:
    """Fuzz an owner's kept offer of a serving model."""
    session = SessionOffer(7, 5, 0, "predict", "stream", "", "127.0.0.1:1", b"", "", "ab")
    save_offer(scratch, ServingOffer(session, ("a.1.b",)), RunConfig().to_flat(), {"x": 1})
    sound = json.loads((scratch / FILE).read_bytes())

    return file_cases(
        scratch / FILE,
        lambda rng: damaged_json(sound, rng).encode("utf-8", "surrogatepass"),
        lambda _: take_offer(scratch),
    )


def apps(_: Path) -> Cases:
    """Fuzz app bundles, whose digest an owner compares and whose facts a reviewer reads."""
    project = """[project]
name = "x"
[tool.flwr.app.components]
clientapp = "fedsplit.client_app:app"
"""

    def packed(text: str) -> bytes:
        found = io.BytesIO()
        with zipfile.ZipFile(found, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("pyproject.toml", text.encode("utf-8", "surrogatepass"))
            archive.writestr("strategies/x.py", "x = 1\n" * 50)
        return found.getvalue()

    sound = packed(project)

    def draw(rng: random.Random) -> bytes:
        inside = rng.random() < 0.4
        return packed(damaged_text(project, rng)) if inside else flipped(sound, rng)

    return cases_of(draw, lambda data: (digest_of_bundle(data), facts_of(data)))
