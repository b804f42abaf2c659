"""One round's sessions: who is expected, waves of those really connected, and their steps.

There is no barrier over all sampled owners: a simulation runs only as many at once as it has actor
slots, so waiting for more would wait for ever.  A wave starts when it is full, when everyone still
expected is there, or when nobody new has come for ``session.wave-wait-s`` seconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

import torch

from fedsplit.errors import FedsplitError, SessionError
from fedsplit.models.bundle.bottom import Bundle
from fedsplit.observe import carried
from fedsplit.seeding import derive_seed
from fedsplit.wire.authentication import Hello
from fedsplit.wire.link import Link

from ..rounds.report import NEVER, RoundReport, natural
from ..rounds.round_context import Position, RoundContext
from ..sessions.owner_session import OwnerSession
from .cohort import Cohort

log = logging.getLogger(__name__)


class SessionRound:
    """Collects the sessions of one round and steps them, wave by wave.

    Args:
        context: the round; is told how far it is and what came of it.
        cohort: steps the top.
        make_session: (link, who opened it) -> owner's session.
        bundle: the bottom's files, for owners that lack them.

    Attributes:
        wait_s: longest wait for the next owner of a wave.
    """

    def __init__(
        self,
        context: RoundContext,
        cohort: Cohort,
        make_session: Callable[[Link, Hello], OwnerSession],
        bundle: Bundle,
    ) -> None:
        self.context = context
        self.report = context.report
        self.wait_s = context.config.session.wave_wait_s
        self._expected = set(context.expected)
        self._cohort = cohort
        self._make_session = make_session
        self._bundle = bundle
        self._ready: list[OwnerSession] = []
        self._busy: dict[int, OwnerSession] = {}  # by node: lined up, or being stepped
        self._change = threading.Condition()
        self._last_change = time.monotonic()
        self._stopped = False
        self._thread: threading.Thread | None = None

    # ---- sessions come in -------------------------------------------------------------------

    def mark_asked(self, nodes: Iterable[int]) -> None:
        """Take note that these nodes are being sent their offer; only now are they waited for."""
        with self._change:
            self.context.asked |= set(nodes)
            self._last_change = time.monotonic()
            self._change.notify_all()

    def admit(self, link: Link, hello: Hello) -> None:
        """Take a session whose token was accepted; shakes hands in a thread of its own.

        Raises:
            SessionError: the session is not one of this round's.
        """
        number, mode = self.context.number, self.context.mode
        with self._change:
            if hello.round != number or hello.mode != mode or self._stopped:
                raise SessionError(
                    f"session for {hello.mode} round {hello.round}: the server is at "
                    f"{mode} round {number}"
                )
            if hello.node not in self._expected:
                raise SessionError("session of an owner that was not asked in this round")
        threading.Thread(target=carried(self.handshake), args=(link, hello), daemon=True).start()

    def handshake(self, link: Link, hello: Hello, *, welcomed: bool = False) -> None:
        """Welcome one owner and line it up; a failure is recorded and costs only that owner."""
        name = f"node {hello.node}"  # its own name is not its own yet
        try:
            session = self._make_session(link, hello)
            name = session.name
            session.handshake(self._bundle.files, self._bundle.digest, welcomed=welcomed)
        except FedsplitError as error:
            link.fail(error)
            self.lose(hello.node, name, error)
            return
        with self._change:
            if self._stopped:
                link.fail(SessionError(f"round {self.context.number} is over"))
                return
            self._expected.discard(hello.node)
            self._busy[hello.node] = session
            self._ready.append(session)
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

    def stop_expecting(self, node: int, reason: str) -> None:
        """Stop waiting for the session of an owner that will not open one."""
        with self._change:
            if node in self._expected:
                self._expected.discard(node)
                self.report.cohort.lost[f"node {node}"] = f"{NEVER}: {reason}"
                log.warning("owner at node %d is not waited for: %s", node, reason)
                self._change.notify_all()

    def is_waiting_for(self, nodes: set[int]) -> bool:
        """Return whether one of these is expected, lined up or being stepped."""
        with self._change:
            awaited = (self._expected & self.context.asked) | self._busy.keys()
            return not self._stopped and not awaited.isdisjoint(nodes)

    def abandon(self, nodes: Iterable[int], reason: str) -> None:
        """End what these still have to do; they are lost."""
        for node in nodes:
            self.stop_expecting(node, reason)
            with self._change:
                session = self._busy.get(node)
            if session is not None:
                session.link.fail(SessionError(reason))

    # ---- and are stepped --------------------------------------------------------------------

    def start(self) -> None:
        """Run the waves in a background thread."""
        self._thread = threading.Thread(target=self.run, name="round", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Run wave after wave until nobody is expected any more."""
        context = self.context
        config, size, total = context.config, context.wave_size, len(context.expected)
        try:
            if config.output.threads:
                torch.set_num_threads(config.output.threads)
            torch.manual_seed(derive_seed(config.seed, "dropout", context.mode, context.number))
            if context.resume is not None:
                torch.set_rng_state(context.resume.rng)
            while wave := self._next_wave():
                names = [m.name for m in wave]
                self.report.waves.append(names)
                at = context.position
                if total > size:
                    log.info("wave %d of %d: %s", at.wave + 1, at.waves, ", ".join(names))
                self._run_wave(wave)
                context.position = Position(wave=at.wave + 1, waves=at.waves)
        except Exception as error:  # the main thread must hear of it, whatever it is
            log.exception("round %d failed", context.number)
            self.report.error = f"{type(error).__name__}: {error}"
        finally:
            with self._change:
                self._stopped = True
                left = self._ready
                self._ready = []
            for session in left:
                session.link.fail(SessionError("the round ended"))

    def _run_wave(self, wave: list[OwnerSession]) -> None:
        report, training = self.report, self.context.mode == "train"
        try:
            if training:
                self._cohort.train(wave, self.context)
            else:
                self._cohort.evaluate(wave, self.context)
        finally:
            with self._change:
                for session in wave:
                    self._busy.pop(session.hello.node, None)
            for session in wave:
                traffic = session.link.traffic
                report.bytes_up += traffic.bytes_in
                report.bytes_down += traffic.bytes_out
                report.frames += traffic.frames_in + traffic.frames_out
                report.row_bytes += session.row_bytes
                report.row_tokens += session.tokens_received
                if training:
                    report.targets[session.name] = session.targets
                report.most[session.name] = session.samples, session.rows_answered
                if session.finished:
                    report.finished.append(session.name)
                else:
                    session.link.fail(SessionError("the round failed"))

    def _next_wave(self) -> list[OwnerSession]:
        """Wait for the next wave and return it sorted by owner; empty when the round is over."""
        size = self.context.wave_size
        with self._change:
            while self._expected or self._ready:
                missing = self._expected & self.context.asked
                want = min(size, len(missing) + len(self._ready))
                left_s = self._last_change + self.wait_s - time.monotonic()
                patient = left_s > 0
                if self._ready and (len(self._ready) >= want or not patient):
                    if len(self._ready) < want:
                        log.warning("wave of %d owners, %d were expected", len(self._ready), want)
                    break
                if missing and not patient:
                    for node in missing:
                        self.report.cohort.lost[f"node {node}"] = f"{NEVER} ({self.wait_s:g} s)"
                    self._expected -= missing
                    continue
                self._change.wait(left_s if patient else None)
            # Arrival decides who is in a wave, never the order of its gradients.
            self._ready.sort(key=lambda m: natural(m.name))
            wave, self._ready = self._ready[:size], self._ready[size:]
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
                raise SessionError(
                    f"round {self.context.number} did not end within {timeout_s:g} s"
                )
        return self.report
