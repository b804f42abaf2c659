"""Evidence: one signed record per round, each chained to the one before by its hash.

A line of the file is a JSON object ``{"round", "previous", "report", ..., "hash", "signature"}``:
``hash`` is the SHA-256 of the record's canonical bytes (everything but hash and signature),
``previous`` the hash of the line before (64 zeros in the first), ``signature`` an Ed25519 signature
of the hash.

Guarantee: without the key no line can be changed, removed from the middle, reordered or inserted
without :func:`verify` naming the first broken line.  What breaks it: the key's holder can rewrite
everything, and the last lines can be cut off; give the newest hash to the other party each round
(it is in the reply to :func:`append`) and pass it as ``head``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from fedsplit.errors import LineageError
from fedsplit.fingerprints.gate import LineageReport
from fedsplit.fingerprints.public_file import canonical_json

VERSION = 1
START = "0" * 64
MAX_LINE = 1 << 20


@dataclass(frozen=True)
class Record:
    """One verified line."""

    line: int
    round: int
    subject: str
    verdict: str
    hash: str
    body: Mapping[str, Any]


def report_body(report: LineageReport) -> dict[str, Any]:
    """A gate's report as plain JSON values."""
    body = asdict(report)
    body["parts"] = dict(report.parts)
    return body


def append(
    path: str | Path,
    key: Ed25519PrivateKey,
    *,
    round_number: int,
    subject: str,
    report: LineageReport,
    weights: str,
    action: str,
) -> str:
    """Add one record; return its hash, to be given to the other party.

    Args:
        round_number: federated round.
        subject: "aggregate", or the owner whose update was checked.
        report: the gate's report.
        weights: digest of the checked weights.
        action: "accept", "reject", "stop", "warn" or "quarantine".

    Raises:
        LineageError: if the file's last line is damaged.
    """
    where = Path(path)
    previous = START
    if where.exists():
        lines = where.read_text().splitlines()
        if lines:
            try:
                previous = str(json.loads(lines[-1])["hash"])
            except (ValueError, KeyError, TypeError) as error:
                raise LineageError(f"{where}:{len(lines)}: damaged record: {error!r}") from error
    body: dict[str, Any] = {
        "version": VERSION,
        "round": int(round_number),
        "subject": subject,
        "action": action,
        "weights": weights,
        "previous": previous,
        "signer": key.public_key().public_bytes_raw().hex(),
        "report": report_body(report),
    }
    digest = hashlib.sha256(canonical_json(body)).hexdigest()
    signature = key.sign(bytes.fromhex(digest)).hex()
    line = json.dumps(body | {"hash": digest, "signature": signature}, sort_keys=True)
    with where.open("a", encoding="utf-8") as handle:
        handle.write(line + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    return digest


def read(path: str | Path, *, signer: str | None = None) -> Iterator[Record]:
    """Yield verified records in order.

    Args:
        signer: hexadecimal public key that must have signed every line; None takes the first
            line's.

    Raises:
        LineageError: naming the first line that is damaged, unsigned or out of the chain.
    """
    previous = START
    with Path(path).open(encoding="utf-8") as handle:
        for number, text in enumerate(handle, start=1):
            where = f"{path}:{number}"
            if len(text) > MAX_LINE:
                raise LineageError(f"{where}: {len(text)} characters, must be <= {MAX_LINE}")
            try:
                body = json.loads(text)
                digest, signature = body.pop("hash"), body.pop("signature")
                signer = signer or str(body["signer"])
                found = hashlib.sha256(canonical_json(body)).hexdigest()
                if body["version"] != VERSION:
                    raise LineageError(f"{where}: version={body['version']!r}, must be {VERSION}")
                if found != digest:
                    raise LineageError(f"{where}: contents were changed (hash does not fit)")
                if body["previous"] != previous:
                    raise LineageError(
                        f"{where}: does not follow line {number - 1}: a record before it was "
                        f"removed, inserted or moved"
                    )
                if body["signer"] != signer:
                    raise LineageError(f"{where}: signed by {body['signer']}, must be {signer}")
                Ed25519PublicKey.from_public_bytes(bytes.fromhex(signer)).verify(
                    bytes.fromhex(signature), bytes.fromhex(digest)
                )
                record = Record(
                    number,
                    int(body["round"]),
                    str(body["subject"]),
                    str(body["report"]["verdict"]),
                    digest,
                    body,
                )
            except InvalidSignature as error:
                raise LineageError(f"{where}: the signature does not fit") from error
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise LineageError(f"{where}: damaged record: {error!r}") from error
            previous = digest
            yield record


def verify(path: str | Path, *, signer: str | None = None, head: str | None = None) -> int:
    """Check a whole chain offline; return the number of records.

    Args:
        head: hash that the last record must have, to notice a cut-off end.

    Raises:
        LineageError: naming the first broken line, or the missing end.
    """
    count, last = 0, START
    for record in read(path, signer=signer):
        count, last = record.line, record.hash
    if head is not None and last != head:
        raise LineageError(
            f"{path}:{count}: ends at {last[:12]}, must end at {head[:12]}: later records are "
            f"missing"
        )
    return count
