"""Distilling the full model into an emulator's middle (Offsite-Tuning, 2302.04870, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.data.batches import epoch_batches
from fedsplit.emulators.build import Emulator, freeze_but_adapters
from fedsplit.emulators.lm import check_tokens, lm_loss, logits_of
from fedsplit.emulators.plan import ADAPTER, HARMONIZER, KEEP, ROLES
from fedsplit.emulators.structure import Model, evaluating, first, frozen
from fedsplit.emulators.supernet import relative_mismatch
from fedsplit.errors import ConfigError, check
from fedsplit.models.anatomy import probe
from fedsplit.seeding import derive_seed


@dataclass(frozen=True)
class Distil:
    """How a distillation goes.

    Attributes:
        steps: of Adam.
        batch_size: token blocks in a step.
        lr: falling linearly to a tenth.
        hidden_weight: of mean(((T - S) / rms(T))^2) on the last middle output.
        lm_weight: of the language-model loss.
        roles: whose blocks learn; A never does.
        seed: of the order of the batches.
    """

    steps: int = 100
    batch_size: int = 8
    lr: float = 3e-4
    hidden_weight: float = 1.0
    lm_weight: float = 1.0
    roles: tuple[str, ...] = (KEEP, HARMONIZER)
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.steps >= 1, "steps", self.steps, ">= 1")
        check(self.batch_size >= 1, "batch_size", self.batch_size, ">= 1 (blocks)")
        check(self.lr > 0, "lr", self.lr, "> 0")
        for name in ("hidden_weight", "lm_weight"):
            check(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        check(self.hidden_weight + self.lm_weight > 0, "weights", (0, 0), "not both 0")
        for role in self.roles:
            check(role in ROLES and role != ADAPTER, "roles", role, "roles outside A")


def distil(
    emulator: Emulator,
    teacher: Model,
    tokens: Tensor,
    settings: Distil | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train the emulator's middle against the full model, in place; A stays the base's.

    The teacher runs without a key/value cache and frozen; its flags are left as they were.

    Args:
        emulator: changed in place.
        teacher: the base it was built from.
        tokens: task-independent ids (N, T).
        settings: None: the defaults.
        progress: called with (step, loss) after each step.

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
    middle = [i for i, p in enumerate(plan.positions) if plan.roles[p] != ADAPTER][-1]
    device = next(emulator.model.parameters()).device
    size = min(settings.batch_size, len(tokens))
    per_epoch, losses = len(tokens) // size, []
    seed = derive_seed(settings.seed, "emulators.distil")
    try:
        emulator.model.requires_grad_(False)
        parameters = _floats([inside[i] for i in learning])
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(parameters, lr=settings.lr)
        with (
            frozen(teacher),
            evaluating(emulator.model),
            _Last(inside[middle]) as mine,
            _Last(above[plan.positions[middle]]) as theirs,
        ):
            for step in range(settings.steps):
                order = epoch_batches(len(tokens), size, seed, step // per_epoch)
                ids = tokens[torch.from_numpy(order[step % per_epoch])].to(device)
                loss = _loss(emulator.model, teacher, ids, mine, theirs, settings)
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * (1 - 0.9 * step / settings.steps)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(float(loss.detach()))
                if progress is not None:
                    progress(step + 1, losses[-1])
    finally:
        emulator.model.zero_grad(set_to_none=True)
        freeze_but_adapters(emulator)
    emulator.details["distil"] = asdict(settings) | {"roles": list(settings.roles)}
    return losses


def _loss(
    student: Model, teacher: Model, ids: Tensor, mine: _Last, theirs: _Last, settings: Distil
) -> Tensor:
    logits = logits_of(student, ids)
    loss = settings.lm_weight * lm_loss(logits, ids)
    if settings.hidden_weight > 0:
        with torch.no_grad():
            teacher.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        loss = loss + settings.hidden_weight * relative_mismatch(theirs.hidden(), mine.hidden())
    return loss


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
