"""A tuned top that answers its owners' texts, and generates for them, over their own streams.

A session is one owner's question: a file of texts for a classifier, or one text that a language
model continues.  What comes in is what training took in: representations after the owner's
mechanism.  The text, its tokens and the answer's meaning stay with the owner; a generated token is
chosen by the owner, and comes back as one more privatised representation.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.errors import FedsplitError, FrameError, SessionError
from fedsplit.models.splitting.cached_decoding import CachedTop
from fedsplit.models.splitting.halves import Top
from fedsplit.models.splitting.heads import select_positions
from fedsplit.observe import carried
from fedsplit.tasks import task_of
from fedsplit.wire.authentication import Hello
from fedsplit.wire.codecs import decode_rows
from fedsplit.wire.frames import Frame, Kind
from fedsplit.wire.link import Link
from fedsplit.wire.serving import MODE

from ..sessions.length_buckets import LengthBuckets
from ..sessions.owner_keys import OwnerNames
from ..sessions.owner_session import Batch, OwnerSession
from ..sessions.representation_cache import RepresentationCache
from ..split_tuning.cohort import pad_rows
from ..split_tuning.model import SplitModel
from .batcher import Batcher

log = logging.getLogger(__name__)


@dataclass
class ServingReport:
    """What was served so far."""

    sessions: int = 0
    failed: int = 0
    texts: int = 0
    tokens: int = 0
    owners: set[str] = field(default_factory=set)


class InferenceServer:
    """Takes serving sessions; each runs in a thread of its own, the top in one.

    Args:
        config: the run's settings.
        model: what answers; its top is frozen.
    """

    def __init__(
        self,
        config: RunConfig,
        model: SplitModel,
    ) -> None:
        self.config = config
        self.report = ServingReport()
        self._top = top = frozen(model.top)
        self._bundle = model.bundle
        self._positions, self._tail = model.positions, model.tail
        self._denoise = model.denoise
        self._buckets = LengthBuckets(top)
        self.names = OwnerNames()
        self._open: Counter[int] = Counter()
        self._lock = threading.Lock()
        tokens = self._positions == "all" if self._positions else task_of(config).per_token
        self._per_token = tokens
        self.batcher = Batcher(
            self._forward,
            max_batch=config.serving.max_batch,
            max_wait_ms=config.serving.max_wait_ms,
            per_token=tokens,
        )

    def start(self) -> None:
        """Nothing to begin with: sessions come when owners ask."""

    @property
    def digest(self) -> str:
        """Of the bottom that owners must run."""
        return self._bundle.digest

    def close(self) -> None:
        """Stop answering."""
        self.batcher.close()

    def admit(self, link: Link, hello: Hello) -> None:
        """Take a session whose token was accepted.

        Raises:
            SessionError: not a serving session, another owner's name, or too many open.
        """
        if hello.mode != MODE:
            raise SessionError(f"session for {hello.mode}: this run serves, mode {MODE}")
        self.names.claim(hello.node, hello.owner)
        most = self.config.serving.sessions
        with self._lock:
            if self._open[hello.node] >= most:
                raise SessionError(f"open sessions of this owner={most + 1}: must be <= {most}")
            self._open[hello.node] += 1
            self.report.sessions += 1
            self.report.owners.add(hello.owner)
        threading.Thread(target=carried(self._serve), args=(link, hello), daemon=True).start()

    def _serve(self, link: Link, hello: Hello) -> None:
        try:
            session = self._session(link, hello)
            session.handshake(self._bundle.files, self._bundle.digest)
            if not task_of(self.config).labelled:
                self._generate(link, session)
            else:
                self._classify(session)
        except FedsplitError as error:
            log.warning("session of %s: %s: %s", hello.owner, type(error).__name__, error)
            link.fail(error)
            with self._lock:
                self.report.failed += 1
        except Exception as error:  # a thread's own end must not be silent, nor tell internals
            log.exception("session of %s failed", hello.owner)
            link.fail(SessionError(f"{type(error).__name__} at the server"))
            with self._lock:
                self.report.failed += 1
        finally:
            with self._lock:
                self._open[hello.node] -= 1

    def _session(self, link: Link, hello: Hello) -> OwnerSession:
        return OwnerSession(
            link,
            hello,
            RepresentationCache(),
            self.config,
            width=self._top.hidden_size,
            joint=True,  # nothing that is asked is kept
        )

    # ---- classification ---------------------------------------------------------------------

    def _classify(self, session: OwnerSession) -> None:
        session.start(self.config.session.window)
        while True:
            batch = session.batch()
            answers = self.batcher.answer(batch.rows, self.config.session.deadline_s)
            session.send_logits(batch, answers)
            with self._lock:
                self.report.texts += len(batch.slots)
                self.report.tokens += sum(batch.lengths)
            if batch.last:
                session.finish()
                return

    def _forward(self, rows: Sequence[Tensor]) -> Tensor:
        """Return what goes down, per text or token: logits, or what the owner's head reads."""
        hidden, mask = pad_rows(self._denoise.once(rows) if self._denoise is not None else rows)
        if self._positions:
            states = self._top.hidden_states(hidden, mask, tail=self._tail)
            return select_positions(states, mask, self._positions).float().cpu()
        answer = self._buckets.tokens if self._per_token else self._buckets
        logits: Tensor = answer(hidden, mask)
        return logits.float().cpu()

    # ---- generation -------------------------------------------------------------------------

    def _generate(self, link: Link, session: OwnerSession) -> None:
        """Continue one text: every BATCH is its next piece, every LOGITS follows its last token."""
        decoder = CachedTop(self._top)
        deadline_s = self.config.session.deadline_s
        link.send(Kind.START, {"window": 1})
        steps = 0
        while True:
            frame = link.recv(deadline_s)
            if frame.kind is Kind.DONE:
                link.send(Kind.BYE, {"reason": "done"})
                return
            piece = self._piece(frame, steps, decoder.seen)

            def step(hidden: Tensor = piece) -> Tensor:
                return decoder.step(hidden[None])

            logits = self.batcher.alone(step, deadline_s).cpu()
            session.send_logits(Batch(steps, [steps], [piece], False), logits)
            steps += 1
            with self._lock:
                self.report.tokens += int(piece.shape[0])

    def _piece(self, frame: Frame, step: int, seen: int) -> Tensor:
        """Return one piece (t, d), checked.

        Raises:
            FrameError: out of order, of another width, not finite, or longer than the bounds.
        """
        if frame.kind is not Kind.BATCH or frame["step"] != step:
            raise FrameError(f"{frame.kind.name} frame: must be BATCH of step {step}, or DONE")
        if frame["slots"] != [step] or frame["fresh"] != [step] or len(frame["lengths"]) != 1:
            raise FrameError(f"BATCH of a text: must bring piece {step} and nothing else")
        length = frame["lengths"][0]
        left = self.config.model.max_tokens + self.config.serving.new_tokens - seen
        if not 1 <= length <= left:
            raise FrameError(f"BATCH of {length} tokens after {seen}: must be in [1, {left}]")
        if frame["dim"] != self._top.hidden_size:
            raise FrameError(f"BATCH width {frame['dim']}: must be {self._top.hidden_size}")
        return decode_rows(frame.body, (length, self._top.hidden_size), frame["codec"])


def frozen(top: Top) -> Top:
    """Put ``top`` into evaluation mode, without gradients, and return it."""
    for parameter in top.parameters():
        parameter.requires_grad_(False)
    return top.eval()
