"""Stepping the top with a cohort of connected owners: one forward and one backward for all.

With the step's loss L = sum_i (n_i / n) L_i over owners i with n_i targets each, one cohort step
equals a centralised step on the union of the owners' batches.  An owner that fails in the middle of
a step loses its own rows; the others' weights are renormalised and the step goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from fedsplit.config import RunConfig
from fedsplit.errors import FedsplitError
from fedsplit.observe import bound

from ..rounds.report import CohortReport
from ..rounds.round_context import Position, RoundContext
from ..sessions.owner_session import Batch, OwnerSession
from .gradient_bounds import GradientBounds
from .model import SplitModel
from .optimisation import Optimisation
from .top_step import Forward

log = logging.getLogger(__name__)
T = TypeVar("T")


class Cohort:
    """Runs the sessions of connected owners against one top.

    Args:
        model: the cut model.
        forward: computes with its top: answers, or hidden states for the owners' head.
        optimisation: the top's optimizer.
        config: the run's settings.
        on_step: called after every step of training with the round.
    """

    def __init__(
        self,
        model: SplitModel,
        forward: Forward,
        optimisation: Optimisation,
        config: RunConfig,
        on_step: Callable[[RoundContext], None],
    ) -> None:
        self._optimisation = optimisation
        self._config = config
        self._joint = config.split.bottom == "joint"
        self._forward, self._tail = forward, model.tail
        self._per_token = forward.per_token
        self._denoise = model.denoise
        self._denoise_gradients = model.denoise_gradients
        self._on_step = on_step
        self._bounds = GradientBounds(config)

    def train(self, sessions: Sequence[OwnerSession], context: RoundContext) -> None:
        """Train with connected owners, all greeted, in their order."""
        parallel = self._config.session.schedule == "parallel"
        groups = [list(sessions)] if parallel else [[m] for m in sessions]
        resumed = context.resumed_here()
        count = max(len(groups), resumed.groups if resumed else 0)
        began = time.perf_counter()
        self._forward.train(not self._tail)
        context.waiting = [m.name for m in sessions]
        for index, group in enumerate(groups, start=count - len(groups)):
            context.waiting = context.waiting[len(group) :]
            context.position = replace(context.position, group=index, groups=count, step=0, steps=0)
            self._train_group(group, context, resumed)
            self._optimisation.flush(context.progress(1.0))
        context.report.cohort.seconds += time.perf_counter() - began

    def _train_group(
        self, sessions: list[OwnerSession], context: RoundContext, resumed: Position | None
    ) -> None:
        report = context.report.cohort
        window = 1 if self._joint else self._config.session.window
        live = self._each(sessions, lambda m: m.start(window), report)
        steps = max((m.steps for m, _ in live), default=0)
        step = max((m.first for m, _ in live), default=0)
        if resumed is not None and step:  # whoever had the most steps may be gone
            steps = max(steps, resumed.steps)
        while live:
            waited = time.perf_counter()
            batches = self._each([m for m, _ in live], lambda m: m.batch(), report)
            report.waiting_s += time.perf_counter() - waited
            if not batches:
                return
            survivors = self._step(batches, context.progress(step / steps), report)
            ended = [m for m, batch in survivors if batch.last]
            self._each(ended, lambda m: m.finish(), report)
            live = [(m, None) for m, batch in survivors if not batch.last]
            step += 1
            context.live = [m.name for m, _ in live]
            context.position = replace(context.position, step=step, steps=steps)
            self._on_step(context)

    def _step(
        self, batches: list[tuple[OwnerSession, Batch]], progress: float, report: CohortReport
    ) -> list[tuple[OwnerSession, Batch]]:
        """Do one step and return the sessions that are still there, with their batches."""
        clock = time.perf_counter()
        hidden, mask = self._padded(batches)
        texts = [len(batch.rows) for _, batch in batches]
        learn = not self._tail  # with a tail nothing here is trained
        forward = self._forward(hidden, mask, texts, learn=learn, joint=self._joint)
        rows = forward.rows  # (R, C)
        parts = self._parts(batches, rows)
        report.compute_s += time.perf_counter() - clock

        clock = time.perf_counter()
        order = dict(batches)
        sent = self._each(list(order), lambda m: m.send_logits(order[m], parts[m]), report)
        gradients = self._each(
            [m for m, _ in sent],
            lambda m: m.gradient(order[m], tuple(parts[m].shape), withheld=bool(self._tail)),
            report,
        )
        report.waiting_s += time.perf_counter() - clock
        if not gradients:
            return []
        if not self._tail:
            gradients, charged = self._bounds(gradients, parts)
            for session, reason in charged.items():
                if session.name not in report.charged:
                    log.warning("owner %s: %s", session.name, reason)
                report.charged[session.name] = reason

        clock = time.perf_counter()
        total = sum(weight for _, (_, weight) in gradients)
        received = dict(gradients)
        back = None
        if not self._tail:
            pieces = []
            for session in order:
                if session in received:
                    gradient, weight = received[session]
                    if self._denoise_gradients is not None:
                        gradient = self._denoise_gradients(parts[session], gradient, weight)
                    pieces.append(gradient * (weight / total))
                else:  # lost since the forward: its rows contribute nothing
                    pieces.append(torch.zeros(parts[session].shape))
            scale = self._optimisation.scale(total)
            upward = torch.cat(pieces).to(rows)
            self._optimisation.begin()
            back = forward.backward(upward if scale == 1.0 else upward * scale)
            self._optimisation.end(total, progress)
        report.steps += 1
        report.compute_s += time.perf_counter() - clock
        kept = [m for m, _ in gradients]
        if self._joint:
            assert back is not None
            flat = torch.split(back[mask.bool()], [sum(b.lengths) for _, b in batches])
            own = dict(zip(order, flat, strict=True))
            kept = [
                m
                for m, _ in self._each(
                    kept,
                    # The owner steps its own bottom by the gradient of its own mean loss.
                    lambda m: m.send_hidden_gradient(order[m], own[m] * (total / received[m][1])),
                    report,
                )
            ]
        report.samples += sum(len(order[m].slots) for m in kept)
        report.tokens += sum(sum(order[m].lengths) for m in kept)
        return [(m, order[m]) for m in kept]

    def evaluate(self, sessions: Sequence[OwnerSession], context: RoundContext) -> None:
        """Answer the sessions' held-out batches; nothing is learned from them."""
        report, window = context.report.cohort, self._config.session.window
        began = time.perf_counter()
        self._forward.train(False)
        live = [m for m, _ in self._each(sessions, lambda m: m.start(window), report)]
        while live:
            answered = self._answer(self._each(live, lambda m: m.batch(), report), report)
            self._each([m for m, b in answered if b.last], lambda m: m.finish(), report)
            live = [m for m, b in answered if not b.last]
        report.seconds += time.perf_counter() - began

    def _answer(
        self, batches: list[tuple[OwnerSession, Batch]], report: CohortReport
    ) -> list[tuple[OwnerSession, Batch]]:
        """Send each session the logits of its batch, without any gradient."""
        if not batches:
            return []
        with torch.inference_mode():
            hidden, mask = self._padded(batches)
            texts = [len(batch.rows) for _, batch in batches]
            rows = self._forward(hidden, mask, texts, learn=False, joint=False).rows
        order = dict(batches)
        parts = self._parts(batches, rows)
        sent = self._each(list(order), lambda m: m.send_logits(order[m], parts[m]), report)
        report.samples += sum(len(order[m].slots) for m, _ in sent)
        return [(m, order[m]) for m, _ in sent]

    def _padded(self, batches: list[tuple[OwnerSession, Batch]]) -> tuple[Tensor, Tensor]:
        """Return the cohort's representations (B, T, d), denoised if so configured, and mask."""
        rows = [row for _, batch in batches for row in batch.rows]
        if self._denoise is not None:
            keys = [(m.name, m.split, slot) for m, batch in batches for slot in batch.slots]
            rows = self._denoise(keys, rows)
        return pad_rows(rows)

    def _parts(
        self, batches: list[tuple[OwnerSession, Batch]], rows: Tensor
    ) -> dict[OwnerSession, Tensor]:
        """Cut rows into each session's own."""
        counts = [sum(b.lengths) if self._per_token else len(b.slots) for _, b in batches]
        parts = torch.split(rows, counts)
        return dict(zip([m for m, _ in batches], parts, strict=True))

    def _each(
        self,
        sessions: Sequence[OwnerSession],
        action: Callable[[OwnerSession], T],
        report: CohortReport,
    ) -> list[tuple[OwnerSession, T]]:
        """Apply ``action`` to each session; one that fails is told, recorded and left out."""
        done = []
        for session in sessions:
            try:
                done.append((session, action(session)))
            except FedsplitError as error:
                reason = session.parting_reason() or f"{type(error).__name__}: {error}"
                report.lost[session.name] = reason
                with bound(owner=session.name, node=str(session.hello.node)):
                    log.warning("owner %s left out: %s", session.name, report.lost[session.name])
                session.link.fail(error)
        return done


def pad_rows(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return (hidden (B, T, d), mask (B, T)) from B tensors (T_i, d), right-padded with zeros."""
    hidden = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([r.shape[0] for r in rows])
    mask = (torch.arange(hidden.shape[1])[None, :] < lengths[:, None]).long()
    return hidden, mask
