"""Many owners in one process, for ``bench service``: they ask a serving session server and time it.

What they send was made before: an owner's own work (its bottom, its noise, its ledger) is on its
own machine in reality, and must not compete here with the server that is measured.  Every owner is
a thread with a gRPC channel, token and session of its own, and has one question out at a time.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.errors import FedsplitError
from fedsplit.owners.handshake import hello, open_stream
from fedsplit.wire.codecs import encode_rows
from fedsplit.wire.frames import Kind
from fedsplit.wire.link import Link
from fedsplit.wire.messages import SessionOffer

PATIENCE_S = 600.0


class ReplayedOwner:
    """One owner with its offer; it asks about ``texts``, numbers of ``rows``, (T_i, d) each."""

    def __init__(self, offer: SessionOffer, rows: list[Tensor], texts: list[int]) -> None:
        self.offer = offer
        self.latencies: list[float] = []
        self.error = ""
        self._bodies = [encode_rows(rows[text], "bf16") for text in texts]
        self._lengths = [int(rows[text].shape[0]) for text in texts]
        self._width = int(rows[0].shape[1])
        self._link: Link | None = None

    def connect(self) -> None:
        """Open the session, up to the server's START."""
        config = RunConfig()
        link = open_stream(self.offer, config, {})
        link.send(Kind.HELLO, hello(self.offer, f"owner-{self.offer.node}"))
        link.expect(Kind.WELCOME, PATIENCE_S)
        steps = len(self._bodies)
        link.send(Kind.READY, {"batches": steps, "samples": steps, "mechanism": "replayed"})
        link.expect(Kind.START, PATIENCE_S)
        self._link = link

    def ask(self) -> None:
        """Ask everything, and take the time from a question to its answer."""
        try:
            assert self._link is not None
            for step, body in enumerate(self._bodies):
                header = {
                    "step": step,
                    "slots": [step],
                    "fresh": [step],
                    "lengths": [self._lengths[step]],
                    "codec": "bf16",
                    "dim": self._width,
                    "last": step + 1 == len(self._bodies),
                }
                began = time.perf_counter()
                self._link.send(Kind.BATCH, header, body)
                self._link.expect(Kind.LOGITS, PATIENCE_S)
                self.latencies.append(time.perf_counter() - began)
            steps = len(self._bodies)
            self._link.send(Kind.DONE, {"samples": steps, "steps": steps})
            self._link.expect(Kind.BYE, PATIENCE_S)
            self._link.close()
        except FedsplitError as error:
            self.error = f"{type(error).__name__}: {error}"


def main() -> None:
    """Connect, say so, wait for a line, ask, and print what it took; told by one line of JSON."""
    torch.set_num_threads(1)
    told: dict[str, Any] = json.loads(sys.stdin.readline())
    rows = load_file(Path(told["rows"]))
    texts = [rows[str(index)] for index in range(len(rows))]
    offer = SessionOffer(**{**told["offer"], "ca": b""})
    owners = []
    for node, token in told["tokens"].items():
        own = replace(offer, node=int(node), token=token)
        steps = [(int(node) * 31 + step) % len(texts) for step in range(told["steps"])]
        owners.append(ReplayedOwner(own, texts, steps))
    for owner in owners:
        owner.connect()
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    with ThreadPoolExecutor(max(1, len(owners))) as pool:
        list(pool.map(ReplayedOwner.ask, owners))
    found = {
        "seconds": time.perf_counter() - began,
        "latencies": [latency for owner in owners for latency in owner.latencies],
        "errors": [owner.error for owner in owners if owner.error],
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
