"""Extraction: how far an owner can train the emulator back toward the model that it stands for.

An offsite-tuning owner has the emulator [A, E*] for good.  What protects the model is that E* is
worse than E; this attack asks for how long.  The owner trains E* on public text, either by the
language-model loss alone, or, where the full model can be queried (a service that returns
logits), by the divergence from its answers (distillation, Hinton et al. 2015, arXiv 1503.02531).
A stays as it is, so tuned adapters can be put in afterwards.  With ``regrow`` the owner first gives
the emulator its full size back, by what its plan says: matrices of low rank or few bits become
plain ones, and missing blocks are copies of the nearest block that begin as the identity.

Success is the **closed share** of the gap on text that the attack did not train on:
(emulator - attacked) / (emulator - full) in nats a token, paired over blocks of that text.  It is
not bounded by 1: on text near its training text an attacked emulator can beat the full model,
which was never tuned on it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsplit.attacks.base import Attack, Truth, View
from fedsplit.attacks.extraction.gap import Closed, closed_share
from fedsplit.attacks.extraction.regrow import regrown
from fedsplit.attacks.scoring import AttackResult
from fedsplit.emulators.build import (
    Emulator,
    adapter_state,
    build_emulator,
    load_adapters,
    plug_in,
)
from fedsplit.emulators.compression.structure import Model
from fedsplit.emulators.lm import check_tokens, lm_loss, logits_of, step_blocks
from fedsplit.emulators.planning.plan import EmulatorPlan
from fedsplit.errors import AttackError, check
from fedsplit.evaluation.perplexity import TextLoss, text_loss
from fedsplit.models.anatomy import probe
from fedsplit.models.modes import evaluating, frozen
from fedsplit.seeding import derive_seed


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


@dataclass(frozen=True)
class Gap:
    """What an extraction is measured on.

    Attributes:
        base: the full model; as it was afterwards.
        held_out: ids (n,) of public text that the attacker did not train on.
        task: what the owner tuned adapters for.
    """

    base: Model
    held_out: Tensor
    task: Task | None = None


@dataclass(frozen=True)
class Extraction(Attack):
    """An owner who trains the emulator's middle, and a changed head, on public text.

    Attributes:
        steps: of AdamW; the budget, with ``batch_size`` blocks each.
        batch_size: token blocks in a step.
        lr: after a warm-up of a twentieth of the steps, constant (so that one run shows every
            smaller budget).
        queries: whether each block is also sent to the full model, whose logits are then the only
            target.
        regrow: start from :func:`regrown`.
        bf16: autocast to bfloat16 (weights stay as they are).
        seed: of the order of the blocks.
        window: tokens of the losses' windows; intervals are over half-windows.
        marks: steps at which the gap is measured, besides the last.
        control: train the full model's own blocks outside A instead of the emulator's.  What that
            closes beyond 1 is adaptation to the public text, which needs no extraction.
    """

    steps: int = 200
    batch_size: int = 8
    lr: float = 3e-4
    queries: bool = False
    regrow: bool = False
    bf16: bool = False
    seed: int = 0
    window: int = 128
    marks: tuple[int, ...] = ()
    control: bool = False

    name: ClassVar[str] = "extraction"
    reads: ClassVar[str] = "the emulator's gap"
    needs: ClassVar[tuple[str, ...]] = ("emulator", "text")
    budget: ClassVar[tuple[str, ...]] = ("steps", "batch_size", "queries", "regrow")

    def __post_init__(self) -> None:
        check(self.steps >= 1, "steps", self.steps, ">= 1")
        check(self.batch_size >= 1, "batch_size", self.batch_size, ">= 1 (blocks)")
        check(self.lr > 0, "lr", self.lr, "> 0")
        outside = [m for m in self.marks if not 0 <= m <= self.steps]
        if outside:
            raise AttackError(f"mark={outside[0]}: must be in 0..{self.steps} steps")

    @property
    def knowledge(self) -> str:
        more = ", the full model's logits for it" if self.queries else ""
        return f"the emulator, public text{more}"

    def run(
        self,
        view: View,
        truth: Truth,
        *,
        on_look: Callable[[Look], None] | None = None,
    ) -> AttackResult:
        """Train an emulator toward its model, and say what share of the gap is closed.

        ``detail`` of the result holds every :class:`Look`; its success is the last one's share on
        public text (0 where there is no gap to close).

        Args:
            view: with the emulator, the attacker's text and, with ``queries``, the model's answers.
            truth: its ``gap`` is a :class:`Gap`.
            on_look: called with each look as it is made.

        Raises:
            AttackError: the attack cannot be run, or the truth is of another kind.
            DataError: tokens are not ids of the right shape.
        """
        self.check(view)
        gap = truth.gap
        if not isinstance(gap, Gap) or view.text is None:
            raise AttackError("truth.gap: must be what the extraction is measured on")
        start = time.perf_counter()
        looks = measure(self, view.emulator, gap, view.text, view.teacher, on_look)
        last = looks[-1].public
        return AttackResult(
            name=self.name,
            success=last.share or 0.0,
            interval=last.interval or (0.0, 0.0),
            tokens=looks[-1].tokens,
            baseline=0.0,
            knowledge=self.knowledge,
            seconds=time.perf_counter() - start,
            extra={"rows": [look.to_json() for look in looks]},
            detail=tuple(looks),
        )

    def train(
        self,
        emulator: Emulator,
        public: Tensor,
        *,
        teacher: Model | None = None,
        look: Callable[[int, Model, Emulator], None] | None = None,
        marks: Sequence[int] = (),
    ) -> Model:
        """Return the attacked emulator's model; ``emulator`` is left as it was.

        Args:
            emulator: what the owner was sent.
            public: ids (N, T) of public text.
            teacher: the full model, as a service; only with ``queries``.
            look: called with (steps done, attacked model, its emulator) at each mark; the emulator
                shares its adapters with the model, so other adapters can be tried and put back.
            marks: steps at which to look, 0 among them for the start.

        Raises:
            AttackError: a teacher is missing or was given without ``queries``, or nothing outside A
                can be trained.
            DataError: ``public`` is not ids (N, T).
            UnsupportedModelError: blocks cannot be given back in this family.
        """
        if self.queries == (teacher is None):
            raise AttackError(f"queries={self.queries}: must go with a full model that answers")
        check_tokens("public", public)
        own = copy.deepcopy(emulator)
        model = regrown(own) if self.regrow else own.model
        parameters = _outside_adapters(model, own)
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.01)
        seed = derive_seed(self.seed, "attacks.extraction")
        device = next(model.parameters()).device
        seen = sorted(set(marks))
        if look is not None and 0 in seen:
            look(0, model, own)
        with evaluating(model):
            for step in range(1, self.steps + 1):
                ids = step_blocks(public, self.batch_size, seed, step - 1).to(device)
                half = torch.autocast(device.type, torch.bfloat16) if self.bf16 else nullcontext()
                with half:
                    loss = self._loss(model, teacher, ids)
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * min(1.0, step / max(1.0, self.steps / 20))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                if look is not None and step in seen:
                    look(step, model, own)
        optimizer.zero_grad(set_to_none=True)
        return model

    def _loss(self, model: Model, teacher: Model | None, ids: Tensor) -> Tensor:
        logits = logits_of(model, ids)
        if teacher is None:
            return lm_loss(logits, ids)
        with torch.no_grad(), frozen(teacher):
            answers = torch.log_softmax(logits_of(teacher, ids).float(), -1)
        own = torch.log_softmax(logits.float(), -1)  # (B, T, V)
        pair = own.flatten(0, 1), answers.flatten(0, 1)
        return F.kl_div(*pair, reduction="batchmean", log_target=True)


def _outside_adapters(model: Model, emulator: Emulator) -> list[nn.Parameter]:
    """Let gradients reach the float weights of every block outside A, and what else was changed.

    An emulator says which weights outside its blocks are not the base's (``details["changed"]``);
    the others need no training.
    """
    mine = {id(p) for p in emulator.adapter_parameters().values()}
    inside = [p for block in probe(model).blocks for p in block.parameters()]
    named = dict(emulator.model.named_parameters())
    inside += [named[name] for name in emulator.details.get("changed", ()) if name in named]
    chosen = {id(p): p for p in inside if p.is_floating_point() and id(p) not in mine}
    if not chosen:
        raise AttackError(f"emulator {emulator.method!r}: must have float weights outside A")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return list(chosen.values())


def measure(
    attack: Extraction,
    emulator: Emulator,
    gap: Gap,
    public: Tensor,
    teacher: Model | None = None,
    on_look: Callable[[Look], None] | None = None,
) -> list[Look]:
    """Run an attack and measure it at its marks and at its end; see :meth:`Extraction.run`."""
    check_tokens("public", public)
    base, held_out, task = gap.base, gap.held_out, gap.task

    def loss(model: Model, ids: Tensor) -> TextLoss:
        return text_loss(model, ids, window=attack.window)

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
    if attack.control:
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

    attack.train(
        victim,
        public,
        teacher=teacher,
        look=look,
        marks=[*attack.marks, attack.steps],
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
