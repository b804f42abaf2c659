"""Evidence: one signed record per round, each chained to the one before by its hash.

A line of the file is a JSON object ``{"version", "round", "subject", "action", "weights",
"previous", "signer", "report", "details", "hash", "signature"}``: ``hash`` is the SHA-256 of the
record's canonical bytes (everything but hash and signature), ``previous`` the hash of the line
before (64 zeros in the first), ``signature`` an Ed25519 signature of the hash.

Guarantee: without the key no line can be changed, removed from the middle, reordered or inserted
without :func:`verify` naming the first broken line.  What breaks it: the key's holder can rewrite
everything, and the last lines can be cut off; give the newest hash to the other party each round
(:attr:`Chain.head`) and pass it as ``head``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from torch import Tensor

from fedsplit import storage
from fedsplit.errors import LineageError
from fedsplit.fingerprints.evidence.public_file import canonical_json
from fedsplit.fingerprints.gate.lineage_gate import LineageReport

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
    """Return a gate's report as plain JSON values."""
    body = asdict(report)
    body["parts"] = dict(report.parts)
    return body


class StateDigest:
    """SHA-256 over named tensors, each read again only when it changed."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def update(self, tensors: Iterable[tuple[str, Tensor]], changed: Iterable[str]) -> str:
        """Return the digest of all tensors seen so far.

        Args:
            tensors: names and tensors of the whole state.
            changed: names that may differ from the last call.
        """
        again = set(changed)
        for name, tensor in tensors:
            if name in self._known and name not in again:
                continue
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            form = f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode()
            digest = hashlib.sha256(form)
            digest.update(flat.numpy().data)
            self._known[name] = digest.hexdigest()
        text = "".join(f"{n}:{d}\n" for n, d in sorted(self._known.items()))
        return hashlib.sha256(text.encode()).hexdigest()


class Chain:
    """A chain that is being written, from its beginning or where an earlier run left it.

    Args:
        path: the file; what it holds already is verified first and must be this key's.
        key: signs every record.

    Attributes:
        quarantined: owner -> reason, as the last record of an earlier run says.

    Raises:
        LineageError: naming the first line of an existing file that is broken or another signer's.
    """

    def __init__(self, path: str | Path, key: Ed25519PrivateKey) -> None:
        self.path = Path(path)
        self.signer = key.public_key().public_bytes_raw().hex()
        self._key = key
        self.head, self.count = START, 0
        self.quarantined: dict[str, str] = {}
        if self.path.exists():
            for record in read(self.path, signer=self.signer):
                self.head, self.count = record.hash, record.line
                self.quarantined = dict(record.body["details"].get("quarantined", {}))

    def append(
        self,
        round_number: int,
        report: LineageReport | None,
        *,
        weights: str,
        action: str,
        details: Mapping[str, Any] | None = None,
        subject: str = "aggregate",
    ) -> str:
        """Add one record; return the new head, to be given to the other party.

        Args:
            round_number: federated round.
            report: the gate's; None if the weights could not be judged (``details`` says why).
            weights: digest of the checked weights.
            action: "accept", "reject", "stop" or "warn".
            details: what else was found, such as each owner's verdict, as JSON's values.
            subject: "aggregate", or the owner whose update was checked.

        Raises:
            LineageError: if the record cannot be written.
        """
        body: dict[str, Any] = {
            "version": VERSION,
            "round": int(round_number),
            "subject": subject,
            "action": action,
            "weights": weights,
            "previous": self.head,
            "signer": self.signer,
            "report": {"verdict": "not_shown"} if report is None else report_body(report),
            "details": dict(details or {}),
        }
        digest = hashlib.sha256(canonical_json(body)).hexdigest()
        signature = self._key.sign(bytes.fromhex(digest)).hex()
        line = json.dumps(body | {"hash": digest, "signature": signature}, sort_keys=True)
        try:
            storage.append(self.path, line.encode() + b"\n")
        except OSError as error:
            why = error.strerror or error
            raise LineageError(f"{self.path}: cannot be written: {why}") from error
        self.head, self.count = digest, self.count + 1
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
    try:
        opened = Path(path).open("rb")  # noqa: SIM115 - closed by the with below
    except OSError as error:
        raise LineageError(f"{path}: cannot be read: {error.strerror or error}") from error
    with opened as handle:
        lines = iter(lambda: handle.readline(MAX_LINE + 1), b"")
        for number, raw in enumerate(lines, start=1):
            where = f"{path}:{number}"
            if len(raw) > MAX_LINE:
                raise LineageError(f"{where}: longer than {MAX_LINE} bytes")
            try:
                body = json.loads(raw.decode("utf-8"))
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
            except (
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                OverflowError,
                RecursionError,
            ) as error:
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
