"""Throwing damaged input at every parser: it is accepted, or refused by an error made on purpose.

Each case is drawn from (seed, parser, number) alone, so one that fails can be tried again alone.
A case breaks a bound if the parser raises anything but a :class:`FedsplitError`, needs more than
``SLOWEST_S`` of processor time, or lets the process's peak memory grow by over ``MOST_BYTES``.
A case that hangs for ``HANG_S`` ends the whole run with all threads' stacks.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import random
import resource
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from typer import Option

from fedsplit.errors import FedsplitError, RunError, check
from simulations.bench.figures import JsonPath
from simulations.core.tables import make_table
from simulations.fuzz import files as fuzz_files
from simulations.fuzz import lineage as fuzz_lineage
from simulations.fuzz import owner as fuzz_owner
from simulations.fuzz import wire as fuzz_wire
from simulations.fuzz.cases import Cases

SLOWEST_S = 2.0
HANG_S = 120.0
MOST_BYTES = 96 << 20  # PyTorch and the allocator grow in large pieces

# Parser -> (how its cases are made, its share of all cases in 1/1000).
PARSERS: dict[str, tuple[Callable[[Path], Cases], int]] = {
    "frames": (fuzz_wire.frames, 200),
    "tensor bodies": (fuzz_wire.codecs, 90),
    "files in slices": (fuzz_wire.transfers, 40),
    "hello and tokens": (fuzz_wire.hellos, 80),
    "session tickets": (fuzz_wire.tickets, 15),
    "session offers": (fuzz_wire.offers, 80),
    "serving offers": (fuzz_wire.serving_offers, 40),
    "owners' replies": (fuzz_wire.replies, 80),
    "frames in messages": (fuzz_wire.packed_frames, 50),
    "run settings": (fuzz_wire.settings, 50),
    "training session": (fuzz_wire.owner_sessions, 40),
    "bottom bundle": (fuzz_files.bottoms, 10),
    "head bundle": (fuzz_files.heads, 8),
    "emulator folder": (fuzz_files.emulators, 10),
    "checkpoint": (fuzz_files.checkpoints, 20),
    "server state": (fuzz_files.states, 15),
    "peft adapter": (fuzz_files.adapters, 5),
    "weights folder": (fuzz_lineage.weight_folders, 10),
    "encoder file": (fuzz_lineage.encoders, 2),
    "onnx generator": (fuzz_lineage.generators, 5),
    "lineage evidence": (fuzz_lineage.evidences, 40),
    "fingerprint file": (fuzz_lineage.fingerprints, 30),
    "ledger": (fuzz_owner.ledgers, 20),
    "owner.toml": (fuzz_owner.policies, 40),
    "kept offer": (fuzz_owner.serving_offers, 10),
    "app bundle": (fuzz_owner.apps, 15),
    "transcript": (fuzz_files.transcripts, 10),
    "run folder (watch)": (fuzz_files.run_folders, 20),
}


@dataclass
class Outcome:
    """What became of one parser's cases.

    Attributes:
        parser: a row of ``PARSERS``.
        cases: tried.
        accepted: still sound after the damage.
        refused: error type -> how many.
        failed: (case, what was raised or broken), the first few.
        failures: how many there were.
        slowest_s: processor time of the slowest case.
        growth_bytes: by how much peak memory grew over all cases.
        seconds: all of it, damaging included.
    """

    parser: str
    cases: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[int, str]] = field(default_factory=list)
    failures: int = 0
    slowest_s: float = 0.0
    growth_bytes: int = 0
    seconds: float = 0.0


def fuzz_parser(
    name: str, make: Callable[[Path], Cases], numbers: Iterable[int], seed: int, scratch: Path
) -> Outcome:
    """Try a parser's cases of those numbers; ``scratch`` is an empty folder of its own."""
    outcome = Outcome(name)
    draw = make(scratch)
    began = time.perf_counter()
    peak = _peak()
    for number in numbers:
        case = draw(random.Random(f"{seed}/{name}/{number}"))
        outcome.cases += 1
        if outcome.cases % 64 == 1:
            faulthandler.dump_traceback_later(HANG_S, exit=True)
        start = time.thread_time()
        try:
            case()
            outcome.accepted += 1
        except FedsplitError as error:
            outcome.refused[type(error).__name__] += 1
        except Exception as error:
            _fail(outcome, number, f"{type(error).__name__}: {error}", error)
        took = time.thread_time() - start
        outcome.slowest_s = max(outcome.slowest_s, took)
        if took > SLOWEST_S:
            _fail(outcome, number, f"{took:.1f} s: must be <= {SLOWEST_S:g} s")
        if number and (grown := _peak() - peak) > 0:
            peak += grown
            outcome.growth_bytes += grown
            if grown > MOST_BYTES:
                _fail(outcome, number, f"{grown >> 20} MiB more: must be <= {MOST_BYTES >> 20}")
        elif not number:
            peak = _peak()  # the first case loads what the parser needs
    faulthandler.cancel_dump_traceback_later()
    outcome.seconds = time.perf_counter() - began
    return outcome


def _fail(outcome: Outcome, number: int, text: str, error: Exception | None = None) -> None:
    outcome.failures += 1
    if len(outcome.failed) < 5:
        where = traceback.extract_tb(error.__traceback__)[-1] if error is not None else None
        at = f" ({Path(where.filename).name}:{where.lineno})" if where is not None else ""
        outcome.failed.append((number, f"{text[:200]}{at}"))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


def fuzz_all(
    cases: int,
    seed: int,
    parsers: Mapping[str, tuple[Callable[[Path], Cases], int]] = PARSERS,
    on_parser: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Try about ``cases`` cases, each parser its share of them and at least one.

    Raises:
        ConfigError: no case.
    """
    check(cases >= 1, "cases", cases, ">= 1")
    whole = sum(share for _, share in parsers.values())
    outcomes = []
    quiet = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # a refusal that is logged is logged a thousand times here
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for index, (name, (make, share)) in enumerate(parsers.items()):
                scratch = Path(folder) / str(index)
                scratch.mkdir()
                count = max(1, -(-cases * share // whole))
                outcomes.append(fuzz_parser(name, make, range(count), seed, scratch))
                on_parser(outcomes[-1])
    finally:
        logging.disable(quiet)
    return outcomes


def run(
    console: Console,
    json_path: JsonPath = None,
    *,
    cases: Annotated[int, Option(help="of all parsers together")] = 100_000,
    seed: Annotated[int, Option(help="the same one draws the same cases")] = 0,
    parser: Annotated[str, Option(help="only this one")] = "",
    case: Annotated[
        int | None, Option(help="only this case of --parser, with its traceback")
    ] = None,
) -> None:
    """Throw damaged input at every parser; none may crash, hang, or take memory without bound."""
    check(not parser or parser in PARSERS, "parser", parser, f"one of {', '.join(PARSERS)}")
    if case is not None:
        check(bool(parser), "parser", parser, "named when a case is")
        with tempfile.TemporaryDirectory() as folder:
            PARSERS[parser][0](Path(folder))(random.Random(f"{seed}/{parser}/{case}"))()
        console.print(f"{parser}, case {case}: accepted")
        return
    chosen = {parser: PARSERS[parser]} if parser else PARSERS
    outcomes = fuzz_all(
        cases, seed, chosen, lambda done: console.print(f"{done.parser}: {done.cases} cases")
    )
    console.print(table(outcomes))
    total = sum(o.cases for o in outcomes)
    failures = sum(o.failures for o in outcomes)
    console.print(f"{total:,} cases, {failures} broke a bound")
    if json_path is not None:
        rows = [{**asdict(o), "refused": dict(o.refused)} for o in outcomes]
        json_path.write_text(json.dumps({"seed": seed, "cases": total, "rows": rows}, indent=1))
    for outcome in outcomes:
        for number, text in outcome.failed:
            console.print(f"{outcome.parser}, case {number}: ", style="red", end="")
            console.print(text)
    if failures:
        raise RunError(f"fuzz: {failures} of {total} cases broke a bound")


def table(outcomes: Iterable[Outcome]) -> Table:
    """Return the outcomes as a table."""
    columns = ("parser", "cases", "accepted", "refused with", "failed", "slowest ms", "grew MiB")
    rows = []
    for o in outcomes:
        refused = ", ".join(f"{kind} {count}" for kind, count in sorted(o.refused.items()))
        counts = (f"{o.cases:,}", f"{o.accepted:,}", refused, o.failures)
        grown = f"{o.growth_bytes / (1 << 20):.0f}"
        rows.append((o.parser, *counts, f"{1000 * o.slowest_s:.0f}", grown))
    return make_table(columns, rows, left=len(columns))
