"""One worker for the top: texts of all owners that wait at the same time share a forward."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsplit.errors import SessionError

log = logging.getLogger(__name__)


@dataclass
class BatcherReport:
    """What the worker did so far.

    Attributes:
        forwards: times that the top ran for texts.
        texts: texts answered.
        steps: pieces of generation answered.
        compute_s: seconds that the top ran.
    """

    forwards: int = 0
    texts: int = 0
    steps: int = 0
    compute_s: float = 0.0


@dataclass
class _Job:
    rows: list[Tensor]
    future: Future[Tensor] = field(default_factory=Future)
    alone: Callable[[], Tensor] | None = None


class Batcher:
    """Answers requests from many threads, one forward at a time.

    Args:
        forward: B tensors (T_i, d) -> answers (B, ...), row per text, or per token of the texts.
        max_batch: texts per forward at most (one request may be larger).
        max_wait_ms: how long the first of a batch waits for others; nobody waits while the top is
            busy anyway.
        depth: requests that may wait; more are refused, so that memory is bounded.
        per_token: whether answers have a row per token.
    """

    def __init__(
        self,
        forward: Callable[[Sequence[Tensor]], Tensor],
        *,
        max_batch: int,
        max_wait_ms: float,
        depth: int = 1024,
        per_token: bool = False,
    ) -> None:
        self._forward = forward
        self._per_token = per_token
        self._max = max_batch
        self._wait = max_wait_ms / 1000
        self._jobs: queue.Queue[_Job | None] = queue.Queue(depth)
        self._left: _Job | None = None
        self.report = BatcherReport()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def answer(self, rows: Sequence[Tensor], timeout_s: float) -> Tensor:
        """Return the answers for one owner's texts (B, ...), or for their tokens.

        Raises:
            SessionError: too many requests wait, or the answer did not come in time.
            FedsplitError: what the top made of it.
        """
        return self._put(_Job(list(rows)), timeout_s)

    def alone(self, step: Callable[[], Tensor], timeout_s: float) -> Tensor:
        """Run something that shares no forward (a step of generation) in the same worker."""
        return self._put(_Job([], alone=step), timeout_s)

    def close(self) -> None:
        """Stop the worker after what it is at."""
        self._jobs.put(None)
        self._thread.join(10.0)

    def _put(self, job: _Job, timeout_s: float) -> Tensor:
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise SessionError("the server is overloaded: too many requests wait") from None
        try:
            return job.future.result(timeout_s)
        except TimeoutError:
            job.future.cancel()
            raise SessionError(f"no answer within {timeout_s:g} s") from None

    def _run(self) -> None:
        while True:
            job = self._left or self._jobs.get()
            self._left = None
            if job is None:
                return
            batch = [job] if job.alone is not None else self._gather(job)
            live = [j for j in batch if j.future.set_running_or_notify_cancel()]
            if not live:
                continue
            began = time.perf_counter()
            try:
                self._serve(live)
            except BaseException as error:  # whoever waits must hear of it
                log.warning("a forward failed: %s: %s", type(error).__name__, error)
                for waiting in live:
                    if not waiting.future.done():
                        waiting.future.set_exception(error)
            self.report.compute_s += time.perf_counter() - began

    def _gather(self, first: _Job) -> list[_Job]:
        batch, texts = [first], len(first.rows)
        until = time.monotonic() + self._wait
        while texts < self._max:
            try:
                job = self._jobs.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                self._jobs.put(None)
                break
            if job.alone is not None or texts + len(job.rows) > self._max:
                self._left = job
                break
            batch.append(job)
            texts += len(job.rows)
        return batch

    def _serve(self, batch: list[_Job]) -> None:
        first = batch[0]
        if first.alone is not None:
            first.future.set_result(first.alone())
            self.report.steps += 1
            return
        rows = [row for job in batch for row in job.rows]
        with torch.inference_mode():
            answers = self._forward(rows)
        self.report.forwards += 1
        self.report.texts += len(rows)
        tokens = self._per_token
        counts = [sum(map(len, job.rows)) if tokens else len(job.rows) for job in batch]
        parts = torch.split(answers, counts)
        for job, part in zip(batch, parts, strict=True):
            job.future.set_result(part)
