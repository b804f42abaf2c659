"""One round's sessions: who is expected, waves of those really connected, and what came of it.

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
from fedsplit.wire.authentication import Hello
from fedsplit.wire.link import Link

from ..rounds.report import NEVER, RoundReport, natural
from ..sessions.owner_session import OwnerSession
from .cohort import Cohort
from .round_context import RoundContext

log = logging.getLogger(__name__)


class Round:
    """Collects the sessions of one round and steps them, wave by wave.

    Args:
        context: the round.
        cohort: steps the top.
        make_session: link and HELLO -> the owner's session.
        bundle: the bottom's files.

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
        self._expected = set(context.nodes)
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

    def ask(self, nodes: Iterable[int]) -> None:
        """Take note that these nodes are being sent their offer; only now are they waited for."""
        with self._change:
            self.context.asked += nodes
            self._last_change = time.monotonic()
            self._change.notify_all()

    def admit(self, link: Link, hello: Hello) -> None:
        """Take a session whose token was accepted; greets it in a thread of its own.

        Raises:
            SessionError: the session is not one of this round's.
        """
        with self._change:
            if (
                hello.round != self.context.number
                or hello.mode != self.context.mode
                or self._stopped
            ):
                raise SessionError(
                    f"session for {hello.mode} round {hello.round}: the server is at "
                    f"{self.context.mode} round {self.context.number}"
                )
            if hello.node not in self._expected:
                raise SessionError("session of an owner that was not asked in this round")
        threading.Thread(target=carried(self.greet), args=(link, hello), daemon=True).start()

    def greet(self, link: Link, hello: Hello, *, welcomed: bool = False) -> None:
        """Welcome one owner and line it up; a failure is recorded and costs only that owner."""
        name = f"node {hello.node}"  # its own name is not its own yet
        try:
            member = self._make_session(link, hello)
            name = member.name
            member.greet(self._bundle.files, self._bundle.digest, welcomed=welcomed)
        except FedsplitError as error:
            link.fail(error)
            self.lose(hello.node, name, error)
            return
        with self._change:
            if self._stopped:
                link.fail(SessionError(f"round {self.context.number} is over"))
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

    def stop_waiting(self, node: int, reason: str) -> None:
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
            awaited = (self._expected & set(self.context.asked)) | self._busy.keys()
            return not self._stopped and not awaited.isdisjoint(nodes)

    def abandon(self, nodes: Iterable[int], reason: str) -> None:
        """End what these still have to do; they are lost."""
        for node in nodes:
            self.stop_waiting(node, reason)
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
            context = self.context
            if threads := context.config.output.threads:
                torch.set_num_threads(threads)
            torch.manual_seed(context.seed)
            if context.resume is not None:
                torch.set_rng_state(context.resume.rng)
            while wave := self._next_wave():
                names = [m.name for m in wave]
                self.report.waves.append(names)
                if len(context.nodes) > context.wave_size:
                    told = ", ".join(names)
                    log.info("wave %d of %d: %s", context.wave + 1, context.wave_count, told)
                self._run_wave(wave, min(context.wave, context.wave_count - 1))
                context.wave += 1
        except Exception as error:  # the main thread must hear of it, whatever it is
            log.exception("round %d failed", self.context.number)
            self.report.error = f"{type(error).__name__}: {error}"
        finally:
            with self._change:
                self._stopped = True
                left = self._ready
                self._ready = []
            for member in left:
                member.link.fail(SessionError("the round ended"))

    def _run_wave(self, wave: list[OwnerSession], index: int) -> None:
        context, report = self.context, self.report
        resume = context.resume.position if context.resume else None
        try:
            if context.mode == "train":
                self._cohort.train(
                    wave,
                    context.config.session.schedule,
                    lambda part: context.progress((index + part) / context.wave_count),
                    report.cohort,
                    resume if resume and index == resume.wave else None,
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
                if self.context.mode == "train":
                    report.targets[member.name] = member.targets
                if member.finished:
                    report.finished.append(member.name)
                else:
                    member.link.fail(SessionError("the round failed"))

    def _next_wave(self) -> list[OwnerSession]:
        """Wait for the next wave and return it sorted by owner; empty when the round is over."""
        size = self.context.wave_size
        with self._change:
            while self._expected or self._ready:
                missing = self._expected & set(self.context.asked)
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
