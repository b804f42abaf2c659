"""``bench secagg``: what a masked sum costs one owner, beside plain averaging.

Every owner and the server of one round run in this process, one after another, with the protocol's
own code and the bytes that its messages carry; no Flower message is sent and nothing is trained.
Seconds are of the processor, which other work on a machine hardly moves.  ``error`` is the largest
difference to the exact mean, and must be within ``error_bound``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from rich.console import Console
from typer import Option

from fedsplit.config import RunConfig
from fedsplit.errors import RunError
from fedsplit.privacy.secure_aggregation.masks import NDArray, new_key
from fedsplit.privacy.secure_aggregation.numbers import Numbers, occasion_of, quantiser_of
from fedsplit.privacy.secure_aggregation.owner import OwnerSide
from fedsplit.wire import secure_sum as wire
from simulations.bench.figures import JsonPath, publish
from simulations.core.settings import numbers
from simulations.core.tables import make_table
from simulations.runtime.machine import machine
from strategies.secure_aggregation.masked_sum import MaskedSum

FEW = 100
"""Neighbours of each owner where there are more owners than that."""
BOUND, TARGETS = 0.1, 10_000
MESSAGES = {"masked": 5, "plain": 1}  # of an owner's round, each with a reply


def run(
    console: Console,
    json_path: JsonPath = None,
    owners: Annotated[str, Option(help="owners of the rounds, with commas")] = "10,100,1000",
    size: Annotated[int, Option(help="weights that an owner trains", min=1)] = 50_000,
    dropouts: Annotated[float, Option(help="share of owners lost while they train")] = 0.05,
) -> dict[str, Any]:
    """Measure bytes and seconds of an owner in a masked sum and in plain averaging."""
    rows = []
    for count in numbers("owners", owners, int):
        rows.append(measure(count, size, dropouts))
        console.print(f"  {count} owners: {rows[-1]['owner_seconds']:.3f} s each")
    figures = {"machine": machine(), "size": size, "messages": MESSAGES, "rows": rows}
    heads = ("owners", "near", "lost", "owner s", "server s", "MB up", "MB down", "error/bound")
    lines = [
        (
            str(r["owners"]),
            str(r["neighbours"]),
            str(r["lost"]),
            f"{r['owner_seconds']:.3f}",
            f"{r['server_seconds']:.2f}",
            f"{r['bytes_up'] / 1e6:.3f}",
            f"{r['bytes_down'] / 1e6:.3f}",
            f"{r['error'] / r['error_bound']:.2f}",
        )
        for r in rows
    ]
    plain = f"{4 * size / 1e6:.3f} MB either way"
    title = f"a masked sum of {size:,} weights (in plain averaging {plain})"
    return publish(console, json_path, figures, [make_table(heads, lines, title=title)])


class Meter:
    """Adds up processor seconds, and the bytes of messages."""

    def __init__(self) -> None:
        self.owners = self.server = self.plain = 0.0
        self.up = self.down = 0

    def sent(self, values: Mapping[str, Any]) -> None:
        """Take note of an owner's message."""
        self.up += _size(values)

    def received(self, values: Mapping[str, Any]) -> None:
        """Take note of a message to an owner."""
        self.down += _size(values)


def measure(owners: int, size: int, dropouts: float) -> dict[str, Any]:
    """Return the figures of one round.

    Args:
        owners: that take part.
        size: weights of each.
        dropouts: share of them that send no numbers.

    Raises:
        RunError: the sum is not within its stated error.
    """
    near = 0 if owners <= FEW else FEW
    config = RunConfig.from_flat(
        {"secure.aggregation": True, "secure.neighbours": near, "secure.bound": BOUND}
    )
    occasion, layout = occasion_of(config, 1, 1), Numbers({"w": (size,)})
    quantiser, meter = quantiser_of(config, owners), Meter()
    began = time.process_time()
    sides = [OwnerSide(occasion, f"owner-{i}", new_key()) for i in range(owners)]
    adverts = [side.begin() for side in sides]
    meter.owners += time.process_time() - began
    for advert in adverts:
        meter.sent({"advert": advert.to_bytes()})

    began = time.process_time()
    for advert in adverts:
        advert.check(occasion)
    total = MaskedSum.of(occasion, adverts, near, config.secure.threshold)
    places = {advert.name: at for at, advert in enumerate(total.adverts)}
    ordered = sorted(sides, key=lambda side: places[side.name])
    meter.server += time.process_time() - began
    texts = [advert.to_bytes() for advert in total.adverts]
    for at, side in enumerate(ordered):
        told = [total.adverts[n] for n in total.roster.around(at)]
        meter.received(
            {
                "roster": b"".join(total.roster.digests),
                "adverts": [texts[n] for n in total.roster.around(at)],
            }
        )
        began = time.process_time()
        shared = side.share(total.roster, told, lambda advert: True)
        meter.owners += time.process_time() - began
        meter.sent({**wire.pack_table(shared.sealed), "commitment": shared.commitment})
        total.take_shares(at, shared.sealed, shared.commitment)

    lost = set(range(0, owners, max(1, round(1 / dropouts)))) if dropouts else set()
    exact, plain = np.zeros(size), np.zeros(size, np.float32)
    weight = 0
    for at, side in enumerate(ordered):
        changes, targets = _update(at, size)
        sealed = total.shares_for(at)
        meter.received({**wire.pack_table(sealed), "weights": bytes(4 * size)})
        if at in lost:
            continue
        began = time.process_time()
        side.accept(sealed)
        told_numbers = {"targets": float(targets), "loss": 1.0}
        vector = side.mask(layout.encode(quantiser, {"w": changes}, told_numbers))
        meter.owners += time.process_time() - began
        meter.sent({"numbers": vector.tobytes()})
        began = time.process_time()
        total.take_numbers(at, vector, quantiser.dtype, layout.size)
        meter.server += time.process_time() - began
        began = time.process_time()
        plain_bytes = changes.tobytes()
        meter.plain += time.process_time() - began
        plain += np.frombuffer(plain_bytes, np.float32) * np.float32(targets)
        exact += targets * np.clip(changes.astype(np.float64), -BOUND, BOUND)
        weight += targets

    survivors = sorted(total.survivors)
    for at in survivors:
        meter.received({"survivors": wire.pack_places(survivors)})
        began = time.process_time()
        signature = ordered[at].confirm(survivors)
        meter.owners += time.process_time() - began
        meter.sent({"signature": signature})
        total.take_confirmation(at, signature)
    for at in survivors:
        signatures = total.signatures_for(at)
        meter.received(wire.pack_table(signatures))
        began = time.process_time()
        reveals = ordered[at].reveal(signatures)
        meter.owners += time.process_time() - began
        meter.sent(wire.pack_table({n: share for n, (_, share) in reveals.items()}))
        total.take_reveals(at, reveals)
    began = time.process_time()
    summed = layout.decode(quantiser, total.total(), len(survivors))
    meter.server += time.process_time() - began
    error = float(np.abs(summed.changes["w"] - exact / weight).max())
    if not error <= summed.error * (1 + 1e-9) + 1e-15:
        raise RunError(f"masked sum: error={error:g}: must be <= {summed.error:g}")
    return {
        "owners": owners,
        "neighbours": total.roster.degree,
        "threshold": total.roster.threshold,
        "lost": len(lost),
        "owner_seconds": meter.owners / owners,
        "server_seconds": meter.server,
        "bytes_up": meter.up / owners,
        "bytes_down": meter.down / owners,
        "plain_owner_seconds": meter.plain / len(survivors),
        "plain_bytes": 4 * size,
        "error": error,
        "error_bound": summed.error,
    }


def _update(at: int, size: int) -> tuple[NDArray, int]:
    """Return an owner's change and its targets."""
    generator = np.random.default_rng(at)
    return 0.01 * generator.standard_normal(size, np.float32), int(
        generator.integers(TARGETS // 2, 2 * TARGETS)
    )


def _size(values: Mapping[str, Any]) -> int:
    rows = [v if isinstance(v, list) else [v] for v in values.values()]
    return sum(len(x) for row in rows for x in row)
