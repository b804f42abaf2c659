"""Distilling the full model into an emulator's middle (Offsite-Tuning, 2302.04870, section 4.2).

With its defaults this is Offsite-Tuning's: the last middle output and the language-model loss.
ScaleOT's harmonizers are settled with other losses (ours): the hidden states that enter each run of
A's blocks, and the full model's own next-token distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.emulators.build import Emulator, freeze_but_adapters
from fedsplit.emulators.compression.structure import Model, first
from fedsplit.emulators.importance.supernet import relative_mismatch
from fedsplit.emulators.lm import check_tokens, divergence, lm_loss, logits_of, step_blocks
from fedsplit.emulators.planning.plan import ADAPTER, HARMONIZER, KEEP, ROLES, EmulatorPlan
from fedsplit.errors import ConfigError, check, one_of
from fedsplit.models.anatomy import probe
from fedsplit.models.modes import evaluating, frozen
from fedsplit.seeding import derive_seed

PLACES = ("last", "inputs")


@dataclass(frozen=True)
class Distil:
    """How a distillation goes.

    Attributes:
        steps: of Adam.
        batch_size: token blocks in a step.
        lr: falling linearly to a tenth.
        warmup: first steps, in which it rises to that line.
        hidden_weight: of mean(((T - S) / rms(T))^2), the mean over the places of ``hidden_at``.
        lm_weight: of the language-model loss.
        logit_weight: of KL(teacher || student) over the next token, in nats a token.
        hidden_at: "last": the last middle output; "inputs": what enters each run of A's blocks,
            and the last middle output.
        roles: whose blocks learn; A never does.
        bf16: autocast to bfloat16 (weights stay as they are).
        seed: of the order of the batches.
    """

    steps: int = 100
    batch_size: int = 8
    lr: float = 3e-4
    warmup: int = 0
    hidden_weight: float = 1.0
    lm_weight: float = 1.0
    logit_weight: float = 0.0
    hidden_at: str = "last"
    roles: tuple[str, ...] = (KEEP, HARMONIZER)
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.steps >= 1, "steps", self.steps, ">= 1")
        check(self.batch_size >= 1, "batch_size", self.batch_size, ">= 1 (blocks)")
        check(self.lr > 0, "lr", self.lr, "> 0")
        check(self.warmup >= 0, "warmup", self.warmup, ">= 0")
        weights = (self.hidden_weight, self.lm_weight, self.logit_weight)
        for name, value in zip(("hidden", "lm", "logit"), weights, strict=True):
            check(value >= 0, f"{name}_weight", value, ">= 0")
        check(sum(weights) > 0, "weights", weights, "not all 0")
        one_of("hidden_at", self.hidden_at, PLACES)
        for role in self.roles:
            check(role in ROLES and role != ADAPTER, "roles", role, "roles outside A")


def distil(
    emulator: Emulator,
    teacher: Model,
    tokens: Tensor,
    settings: Distil | None = None,
) -> list[float]:
    """Train the emulator's middle against the full model, in place; A stays the base's.

    The teacher runs without a key/value cache and frozen; its flags are left as they were.

    Args:
        emulator: changed in place.
        teacher: the base it was built from.
        tokens: task-independent ids (N, T).
        settings: None: the defaults.

    Returns:
        The loss of each step.

    Raises:
        ConfigError: if no block has one of the roles.
        DataError: if tokens are not ids (N, T).
    """
    settings = settings or Distil()
    check_tokens("tokens", tokens)
    plan = emulator.plan
    learning = [i for i, p in enumerate(plan.positions) if plan.roles[p] in settings.roles]
    if not learning:
        raise ConfigError(f"roles={settings.roles}: must be those of some block of {plan.roles}")
    inside, above = probe(emulator.model).blocks, probe(teacher).blocks
    places = _places(plan, settings.hidden_at) if settings.hidden_weight > 0 else []
    device = next(emulator.model.parameters()).device
    losses: list[float] = []
    seed = derive_seed(settings.seed, "emulators.distil")
    try:
        emulator.model.requires_grad_(False)
        parameters = _floats([inside[i] for i in learning])
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(parameters, lr=settings.lr)
        with ExitStack() as stack:
            stack.enter_context(frozen(teacher))
            stack.enter_context(evaluating(emulator.model))
            pairs = [
                (
                    stack.enter_context(_Last(above[plan.positions[i]])),
                    stack.enter_context(_Last(inside[i])),
                )
                for i in places
            ]
            for step in range(settings.steps):
                ids = step_blocks(tokens, settings.batch_size, seed, step).to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
                    loss = _loss(emulator.model, teacher, ids, pairs, settings)
                rate = settings.lr * (1 - 0.9 * step / settings.steps)
                if step < settings.warmup:
                    rate *= (step + 1) / (settings.warmup + 1)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(float(loss.detach()))
    finally:
        emulator.model.zero_grad(set_to_none=True)
        freeze_but_adapters(emulator)
    emulator.details["distil"] = asdict(settings) | {"roles": list(settings.roles)}
    return losses


def _loss(
    student: Model,
    teacher: Model,
    ids: Tensor,
    pairs: Sequence[tuple[_Last, _Last]],
    settings: Distil,
) -> Tensor:
    target = None
    with torch.no_grad():
        if settings.logit_weight > 0:
            target = logits_of(teacher, ids)  # (B, T, V)
        elif pairs:
            teacher.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    logits = logits_of(student, ids)
    loss = logits.new_zeros((), dtype=torch.float32)
    if settings.lm_weight > 0:
        loss = loss + settings.lm_weight * lm_loss(logits, ids)
    if target is not None:
        loss = loss + settings.logit_weight * divergence(target, logits)
    if pairs:
        apart = [relative_mismatch(theirs.hidden(), mine.hidden()) for theirs, mine in pairs]
        loss = loss + settings.hidden_weight * torch.stack(apart).mean()
    return loss


def _places(plan: EmulatorPlan, hidden_at: str) -> list[int]:
    """Return the indices of the emulator's blocks outside A whose outputs are matched."""
    roles = [plan.roles[p] for p in plan.positions]
    outside = [i for i, role in enumerate(roles) if role != ADAPTER]
    if hidden_at == "last":
        return outside[-1:]
    enter = [i for i in outside if i + 1 < len(roles) and roles[i + 1] == ADAPTER]
    return sorted({*enter, outside[-1]})


def _floats(blocks: list[nn.Module]) -> list[nn.Parameter]:
    found = {id(p): p for b in blocks for p in b.parameters() if p.is_floating_point()}
    return list(found.values())


class _Last:
    """Remembers a block's last output."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._output: Any = None

    def __enter__(self) -> _Last:
        self._handle = self._block.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self._output = first(output)

    def hidden(self) -> Tensor:
        """Return the hidden states (B, T, d)."""
        assert isinstance(self._output, Tensor)
        return self._output
