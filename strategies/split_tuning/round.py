"""One round's sessions: who is expected, waves of those really connected, and what came of it.

There is no barrier over all sampled owners: a simulation runs only as many at once as it has actor
slots, so waiting for more would wait for ever.  A wave starts when it is full, when everyone still
expected is there, or when nobody new has come for ``wait_s`` seconds.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from fedsplit.errors import FedsplitError, SessionError
from fedsplit.observe import carried
from fedsplit.wire.authentication import Hello
from fedsplit.wire.link import Link

from ..sessions.owner_session import Member
from .cohort import Cohort, CohortReport

if TYPE_CHECKING:
    from .run_checkpoint import Begin

log = logging.getLogger(__name__)

NEVER = "never connected"
HUNG_UP = "SessionError: session closed: peer closed"


@dataclass
class RoundReport:
    """What one round's sessions came to."""

    mode: str
    cohort: CohortReport = field(default_factory=CohortReport)
    waves: list[list[str]] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    frames: int = 0
    row_bytes: int = 0
    row_tokens: int = 0
    targets: dict[str, float] = field(default_factory=dict)
    error: str = ""

    def lose(self, node: int, name: str | None, reason: str) -> None:
        """Record an owner that is known by its reply; what its session said comes first."""
        lost = self.cohort.lost
        if lost.get(f"node {node}", "").startswith(NEVER):
            del lost[f"node {node}"]
        key = name or f"node {node}"
        if lost.get(key, "").startswith(HUNG_UP):
            del lost[key]  # whether its last words or the end of its stream came first is chance
        lost.setdefault(key, reason)

    def miss(self, node: int, name: str | None, reason: str) -> None:
        """Record an owner that never replied, unless its session has told why."""
        if not self.cohort.lost.keys() & {f"node {node}", name}:
            self.cohort.lost[name or f"node {node}"] = reason

    def call(self, names: Mapping[int, str]) -> None:
        """Call lost nodes by their owners' names where those are known."""
        known = {f"node {node}": name for node, name in names.items()}
        self.cohort.lost = {known.get(k, k): why for k, why in self.cohort.lost.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the report, JSON-able."""
        row = {k: v for k, v in vars(self).items() if k != "cohort"}
        return {**row, **vars(self.cohort)}


def natural(name: str) -> tuple[Any, ...]:
    """Return a key that sorts owner-2 before owner-10."""
    return tuple(int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name))


class Round:
    """Collects the sessions of one round and steps them, wave by wave.

    Args:
        number: server round, from 1.
        mode: ``train`` or ``evaluate``.
        nodes: node ids that were sent an offer.
        cohort: steps the top.
        make_member: session -> member.
        bundle: the bottom's files and digest.
        wave: members stepped together at most; 0 = all.
        wait_s: see the module's text.
        schedule: ``parallel`` or ``sequential``.
        progress: share of the round that is done -> share of the run.
        threads: CPU threads for the top's compute; 0 = leave.
        seed: seeds dropout for this round.
        begin: where an interrupted run had come to in this round.
    """

    def __init__(
        self,
        number: int,
        mode: str,
        nodes: Iterable[int],
        cohort: Cohort,
        make_member: Callable[[Link, Hello], Member],
        bundle: tuple[dict[str, bytes], str],
        *,
        wave: int,
        wait_s: float,
        schedule: str,
        progress: Callable[[float], float],
        threads: int,
        seed: int,
        begin: Begin | None = None,
    ) -> None:
        self.number = number
        self.mode = mode
        self.report = RoundReport(mode)
        self._expected = set(nodes)
        self._asked: set[int] = set()
        self._total = len(self._expected)
        self._cohort = cohort
        self._make_member = make_member
        self._bundle = bundle
        self._wave = wave or self._total
        self._wait_s = wait_s
        self._schedule = schedule
        self._progress = progress
        self._threads = threads
        self._seed = seed
        self.begin = begin
        self.wave = begin.place.wave if begin else 0
        self.waves = begin.place.waves if begin else max(1, -(-self._total // self._wave))
        if begin is not None:
            self.report.cohort = replace(begin.report, lost=dict(begin.report.lost))
        self._ready: list[Member] = []
        self._busy: dict[int, Member] = {}  # by node: lined up, or being stepped
        self._change = threading.Condition()
        self._last_change = time.monotonic()
        self._stopped = False
        self._thread: threading.Thread | None = None

    # ---- sessions come in -------------------------------------------------------------------

    def ask(self, nodes: Iterable[int]) -> None:
        """Take note that these nodes are being sent their offer; only now are they waited for."""
        with self._change:
            self._asked |= set(nodes)
            self._last_change = time.monotonic()
            self._change.notify_all()

    def admit(self, link: Link, hello: Hello) -> None:
        """Take a session whose token was accepted; greets it in a thread of its own.

        Raises:
            SessionError: the session is not one of this round's.
        """
        with self._change:
            if hello.round != self.number or hello.mode != self.mode or self._stopped:
                raise SessionError(
                    f"session for {hello.mode} round {hello.round}: the server is at "
                    f"{self.mode} round {self.number}"
                )
            if hello.node not in self._expected:
                raise SessionError("session of an owner that was not asked in this round")
        threading.Thread(target=carried(self.greet), args=(link, hello), daemon=True).start()

    def greet(self, link: Link, hello: Hello, *, welcomed: bool = False) -> None:
        """Welcome one owner and line it up; a failure is recorded and costs only that owner."""
        name = f"node {hello.node}"  # its own name is not its own yet
        try:
            member = self._make_member(link, hello)
            name = member.name
            member.greet(*self._bundle, welcomed=welcomed)
        except FedsplitError as error:
            link.fail(error)
            self.lose(hello.node, name, error)
            return
        with self._change:
            if self._stopped:
                link.fail(SessionError(f"round {self.number} is over"))
                return
            self._expected.discard(hello.node)
            self._busy[hello.node] = member
            self._ready.append(member)
            self._last_change = time.monotonic()
            self._change.notify_all()

    def lose(self, node: int, name: str, error: Exception) -> None:
        """Record an owner that will not take part."""
        with self._change:
            self._expected.discard(node)
            self.report.cohort.lost[name] = f"{type(error).__name__}: {error}"
            log.warning("owner %s left out: %s", name, self.report.cohort.lost[name])
            self._last_change = time.monotonic()
            self._change.notify_all()

    def hear(self, node: int, reason: str) -> None:
        """Stop waiting for an owner whose reply has come before its session."""
        with self._change:
            if node in self._expected:
                self._expected.discard(node)
                self.report.cohort.lost[f"node {node}"] = f"{NEVER}: {reason}"
                log.warning("owner at node %d is not waited for: %s", node, reason)
                self._change.notify_all()

    def waits_for(self, nodes: set[int]) -> bool:
        """Return whether one of these is expected, lined up or being stepped."""
        with self._change:
            awaited = (self._expected & self._asked) | self._busy.keys()
            return not self._stopped and not awaited.isdisjoint(nodes)

    def give_up(self, nodes: Iterable[int], reason: str) -> None:
        """End what these still have to do; they are lost."""
        for node in nodes:
            self.hear(node, reason)
            with self._change:
                member = self._busy.get(node)
            if member is not None:
                member.link.fail(SessionError(reason))

    # ---- and are stepped --------------------------------------------------------------------

    def start(self) -> None:
        """Run the waves in a background thread."""
        self._thread = threading.Thread(target=self.run, name="round", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Run wave after wave until nobody is expected any more."""
        try:
            if self._threads:
                torch.set_num_threads(self._threads)
            torch.manual_seed(self._seed)
            if self.begin is not None:
                torch.set_rng_state(self.begin.rng)
            while wave := self._next_wave():
                names = [m.name for m in wave]
                self.report.waves.append(names)
                if self._total > self._wave:
                    log.info("wave %d of %d: %s", self.wave + 1, self.waves, ", ".join(names))
                self._run_wave(wave, min(self.wave, self.waves - 1), self.waves)
                self.wave += 1
        except Exception as error:  # the main thread must hear of it, whatever it is
            log.exception("round %d failed", self.number)
            self.report.error = f"{type(error).__name__}: {error}"
        finally:
            with self._change:
                self._stopped = True
                left = self._ready
                self._ready = []
            for member in left:
                member.link.fail(SessionError("the round ended"))

    def _run_wave(self, wave: list[Member], index: int, waves: int) -> None:
        report = self.report
        try:
            if self.mode == "train":
                self._cohort.train(
                    wave,
                    self._schedule,
                    lambda part: self._progress((index + part) / waves),
                    report.cohort,
                    self.begin.place if self.begin and index == self.begin.place.wave else None,
                )
            else:
                self._cohort.evaluate(wave, report.cohort)
        finally:
            with self._change:
                for member in wave:
                    self._busy.pop(member.hello.node, None)
            for member in wave:
                traffic = member.link.traffic
                report.bytes_up += traffic.bytes_in
                report.bytes_down += traffic.bytes_out
                report.frames += traffic.frames_in + traffic.frames_out
                report.row_bytes += member.row_bytes
                report.row_tokens += member.tokens_received
                if self.mode == "train":
                    report.targets[member.name] = member.targets
                if member.finished:
                    report.finished.append(member.name)
                else:
                    member.link.fail(SessionError("the round failed"))

    def _next_wave(self) -> list[Member]:
        """Wait for the next wave and return it sorted by owner; empty when the round is over."""
        with self._change:
            while self._expected or self._ready:
                missing = self._expected & self._asked
                want = min(self._wave, len(missing) + len(self._ready))
                left_s = self._last_change + self._wait_s - time.monotonic()
                patient = left_s > 0
                if self._ready and (len(self._ready) >= want or not patient):
                    if len(self._ready) < want:
                        log.warning("wave of %d owners, %d were expected", len(self._ready), want)
                    break
                if missing and not patient:
                    for node in missing:
                        self.report.cohort.lost[f"node {node}"] = f"{NEVER} ({self._wait_s:g} s)"
                    self._expected -= missing
                    continue
                self._change.wait(left_s if patient else None)
            # Arrival decides who is in a wave, never the order of its gradients.
            self._ready.sort(key=lambda m: natural(m.name))
            wave, self._ready = self._ready[: self._wave], self._ready[self._wave :]
            self._last_change = time.monotonic()
            return wave

    def join(self, timeout_s: float) -> RoundReport:
        """Wait for the last wave and return the report.

        Raises:
            SessionError: if it does not end within ``timeout_s``.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise SessionError(f"round {self.number} did not end within {timeout_s:g} s")
        return self.report
