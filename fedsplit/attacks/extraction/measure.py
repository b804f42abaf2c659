"""The extraction attack measured: one run, looked at as its budget grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsplit.attacks.extraction.attack import Closed, Extraction, closed_share
from fedsplit.emulators.build import (
    Emulator,
    adapter_state,
    build_emulator,
    load_adapters,
    plug_in,
)
from fedsplit.emulators.compression.structure import Model
from fedsplit.emulators.lm import check_tokens
from fedsplit.emulators.planning.plan import EmulatorPlan
from fedsplit.errors import AttackError
from fedsplit.evaluation.perplexity import TextLoss, text_loss


@dataclass(frozen=True)
class Task:
    """Private work that the owner tuned adapters for.

    Attributes:
        adapters: the tuned ones, by their names in the full model.
        tokens: the work's held-out ids (n,).
    """

    adapters: Mapping[str, Tensor]
    tokens: Tensor


@dataclass(frozen=True)
class Look:
    """What the attack had reached with part of its budget.

    Attributes:
        steps: done.
        tokens: of public text run so far, repeats counted.
        queried: of these sent to the full model.
        public: the gap on held-out public text, adapters as they were sent.
        task: the gap between the owner's tuned emulator and the plug-in; None without a task.
    """

    steps: int
    tokens: int
    queried: int
    public: Closed
    task: Closed | None

    def to_json(self) -> dict[str, Any]:
        """Return one flat row."""
        row: dict[str, Any] = {
            "steps": self.steps,
            "tokens": self.tokens,
            "queried_tokens": self.queried,
        }
        for name, closed in (("public", self.public), ("task", self.task)):
            if closed is None:
                continue
            low, high = closed.interval or (None, None)
            row |= {
                f"{name}_full": closed.full,
                f"{name}_emulator": closed.emulator,
                f"{name}_attacked": closed.attacked,
                f"{name}_closed": closed.share,
                f"{name}_low": low,
                f"{name}_high": high,
            }
        return row


def measure(
    attack: Extraction,
    emulator: Emulator,
    base: Model,
    public: Tensor,
    held_out: Tensor,
    *,
    marks: Sequence[int] = (),
    task: Task | None = None,
    window: int = 128,
    control: bool = False,
    on_look: Callable[[Look], None] | None = None,
) -> list[Look]:
    """Run an attack and measure it at some steps and at its end.

    Args:
        attack: with its budget.
        emulator: as it was sent (not changed).
        base: the full model: what is measured against, and the service where the attack queries.
            As it was afterwards.
        public: ids (N, T) of the attacker's text.
        held_out: ids (n,) of public text that the attacker did not train on.
        marks: steps to look at, besides the last.
        task: what the owner tuned adapters for.
        window: of the losses, tokens; intervals are over half-windows.
        control: train the full model's own blocks outside A instead of the emulator's.  What that
            closes beyond 1 is adaptation to the public text, which needs no extraction.
        on_look: called with each look as it is made.

    Raises:
        AttackError: a mark is outside the budget, or the attack cannot be run.
        DataError: tokens are not ids of the right shape.
    """
    check_tokens("public", public)
    outside = [m for m in marks if not 0 <= m <= attack.steps]
    if outside:
        raise AttackError(f"mark={outside[0]}: must be in 0..{attack.steps} steps")

    def loss(model: Model, ids: Tensor) -> TextLoss:
        return text_loss(model, ids, window=window)

    full, sent = loss(base, held_out), loss(emulator.model, held_out)
    task_full = task_sent = None
    if task is not None:
        with _Swapped(emulator, task.adapters):
            task_sent = loss(emulator.model, task.tokens)
        before = plug_in(base, task.adapters, emulator.plan)
        try:
            task_full = loss(base, task.tokens)
        finally:
            plug_in(base, before, emulator.plan)
    victim = emulator
    if control:
        plan = EmulatorPlan.with_adapters(emulator.plan.num_layers, emulator.plan.adapters)
        victim = build_emulator(base, plan, base_digest=emulator.base_digest)
    looks: list[Look] = []

    def look(step: int, model: Model, own: Emulator) -> None:
        reached = closed_share(full, sent, loss(model, held_out), seed=attack.seed)
        work = None
        if task is not None and task_full is not None and task_sent is not None:
            with _Swapped(own, task.adapters):
                work = closed_share(
                    task_full, task_sent, loss(model, task.tokens), seed=attack.seed
                )
        tokens = step * min(attack.batch_size, len(public)) * public.shape[1]
        looks.append(Look(step, tokens, tokens if attack.queries else 0, reached, work))
        if on_look is not None:
            on_look(looks[-1])

    attack.run(
        victim,
        public,
        teacher=base if attack.queries else None,
        look=look,
        marks=[*marks, attack.steps],
    )
    return looks


class _Swapped:
    """Other adapters in an emulator, for as long as it takes to measure."""

    def __init__(self, emulator: Emulator, state: Mapping[str, Tensor]) -> None:
        self._emulator, self._state = emulator, state

    def __enter__(self) -> None:
        self._before = adapter_state(self._emulator)
        with torch.no_grad():
            load_adapters(self._emulator, self._state)

    def __exit__(self, *_: object) -> None:
        load_adapters(self._emulator, self._before)
