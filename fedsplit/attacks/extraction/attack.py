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
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from fedsplit.data.batches import epoch_batches
from fedsplit.emulators.build import Emulator
from fedsplit.emulators.compression.linears import LowRankLinear, QuantisedLinear
from fedsplit.emulators.compression.structure import (
    Model,
    evaluating,
    frozen,
    tiny_logits,
    with_blocks,
)
from fedsplit.emulators.lm import check_tokens, lm_loss, logits_of
from fedsplit.emulators.planning.plan import DROP, HARMONIZER
from fedsplit.errors import AttackError, UnsupportedModelError, check
from fedsplit.evaluation.perplexity import TextLoss
from fedsplit.models.anatomy import probe
from fedsplit.models.layout.projections import layout_of
from fedsplit.models.splitting.structure import mirror
from fedsplit.seeding import derive_seed, numpy_generator

Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class Extraction:
    """An owner who trains the emulator's middle on public text.

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
    """

    steps: int = 200
    batch_size: int = 8
    lr: float = 3e-4
    queries: bool = False
    regrow: bool = False
    bf16: bool = False
    seed: int = 0

    name: ClassVar[str] = "extraction"
    budget: ClassVar[tuple[str, ...]] = ("steps", "batch_size", "regrow")

    def __post_init__(self) -> None:
        check(self.steps >= 1, "steps", self.steps, ">= 1")
        check(self.batch_size >= 1, "batch_size", self.batch_size, ">= 1 (blocks)")
        check(self.lr > 0, "lr", self.lr, "> 0")

    @property
    def knowledge(self) -> str:
        """What the attacker has."""
        more = ", the full model's logits for it" if self.queries else ""
        return f"the emulator, public text{more}"

    def run(
        self,
        emulator: Emulator,
        public: Tensor,
        *,
        teacher: Model | None = None,
        look: Callable[[int, Model, Emulator], None] | None = None,
        marks: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> Model:
        """Return the attacked emulator's model; ``emulator`` is left as it was.

        Args:
            emulator: what the owner was sent.
            public: ids (N, T) of public text.
            teacher: the full model, as a service; only with ``queries``.
            look: called with (steps done, attacked model, its emulator) at each mark; the emulator
                shares its adapters with the model, so other adapters can be tried and put back.
            marks: steps at which to look, 0 among them for the start.
            progress: called with (step, loss).

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
        size = min(self.batch_size, len(public))
        per_epoch = len(public) // size
        seed = derive_seed(self.seed, "attacks.extraction")
        device = next(model.parameters()).device
        seen = sorted(set(marks))
        if look is not None and 0 in seen:
            look(0, model, own)
        with evaluating(model):
            for step in range(1, self.steps + 1):
                epoch, place = divmod(step - 1, per_epoch)
                order = epoch_batches(len(public), size, seed, epoch)[place]
                ids = public[torch.from_numpy(order)].to(device)
                half = torch.autocast(device.type, torch.bfloat16) if self.bf16 else nullcontext()
                with half:
                    loss = self._loss(model, teacher, ids)
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * min(1.0, step / max(1.0, self.steps / 20))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                if progress is not None:
                    progress(step, float(loss.detach()))
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
    """Let gradients reach the float weights of every block outside A, and no others."""
    mine = {id(p) for p in emulator.adapter_parameters().values()}
    inside = [p for block in probe(model).blocks for p in block.parameters()]
    chosen = {id(p): p for p in inside if p.is_floating_point() and id(p) not in mine}
    if not chosen:
        raise AttackError(f"emulator {emulator.method!r}: must have float weights outside A")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return list(chosen.values())


def regrown(emulator: Emulator) -> Model:
    """Return the emulator's model at the full model's size, computing what it did.

    Low-rank and quantised matrices become plain ones.  Wherever the plan has no block of full size
    there is a new one: a copy of the nearest whole block, with the projections onto the residual
    stream set to zero (a harmonizer stays, with the new block behind it).

    Args:
        emulator: its adapters stay the very same tensors; other parts may be changed.

    Raises:
        AttackError: if nothing is missing.
        UnsupportedModelError: if the family's blocks have no such projections, or the new model
            computes something else.
    """
    before = tiny_logits(emulator.model)
    plan, anatomy = emulator.plan, probe(emulator.model)
    widened = sum(_plain_matrices(block) for block in anatomy.blocks)
    where = {position: index for index, position in enumerate(plan.positions)}
    blocks: list[nn.Module] = []
    places: list[int] = []
    for position, role in enumerate(plan.roles):
        if role != DROP:
            blocks.append(anatomy.blocks[where[position]])
            places.append(where[position])
        if role in (DROP, HARMONIZER):
            near = min(
                (i for i in plan.positions if plan.roles[i] != HARMONIZER),
                key=lambda i: (abs(i - position), i),
            )
            blocks.append(_silent_copy(anatomy.blocks[where[near]], emulator))
            places.append(where[near])
    made = emulator.model
    if len(blocks) > len(anatomy.blocks):
        made = with_blocks(made, [mirror(block) for block in blocks], places).eval()
    elif not widened:
        raise AttackError("regrow: the emulator has its full size: must lack something")
    after = tiny_logits(made)
    if before is None or after is None or not torch.allclose(before, after, atol=1e-4, rtol=1e-3):
        kind = emulator.base_config.get("model_type")
        raise UnsupportedModelError(f"regrow: a {kind} at full size computes something else")
    return made


def _plain_matrices(block: nn.Module) -> int:
    """Replace low-rank and quantised layers by plain ones, in place; return how many."""
    found = [
        (name, module)
        for name, module in block.named_modules()
        if isinstance(module, LowRankLinear | QuantisedLinear)
    ]
    for name, module in found:
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        plain.weight = nn.Parameter(module.weight.detach().clone())
        if module.bias is not None:
            plain.bias = nn.Parameter(module.bias.detach().clone())
        parent, _, child = name.rpartition(".")
        setattr(block.get_submodule(parent), child, plain)
    return len(found)


def _silent_copy(block: nn.Module, emulator: Emulator) -> nn.Module:
    layout = layout_of(emulator.model.config)
    fresh = copy.deepcopy(block)
    for site in (layout.o, layout.down):
        module = fresh.get_submodule(site.weight.rpartition(".")[0])
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
    return fresh


@dataclass(frozen=True)
class Closed:
    """What share of a gap was closed.

    Attributes:
        full: mean loss of the full model (nats a token); likewise the next two.
        emulator: of the emulator as it was sent.
        attacked: of the emulator after the attack.
        share: (emulator - attacked) / (emulator - full); None where the emulator is not clearly
            worse than the full model (the gap's own 95 % interval reaches 0): there is nothing to
            close.
        interval: 95 % interval of the share over blocks.
    """

    full: float
    emulator: float
    attacked: float
    share: float | None
    interval: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        low_high = None if self.interval is None else list(self.interval)
        return {**vars(self), "interval": low_high}


def closed_share(
    full: TextLoss, emulator: TextLoss, attacked: TextLoss, *, draws: int = 2000, seed: int = 0
) -> Closed:
    """Compare three losses of the same blocks of text.

    The interval is a percentile bootstrap over blocks, all three losses of a block together.

    Raises:
        AttackError: if the blocks are not the same, or less than two.
    """
    tokens = full.block_tokens
    for other in (emulator, attacked):
        if not np.array_equal(other.block_tokens, tokens):
            raise AttackError("losses: must be of the same blocks of one text")
    if len(tokens) < 2:
        raise AttackError(f"blocks={len(tokens)}: must be >= 2, for an interval")
    gap = emulator.block_nats - full.block_nats
    gain = emulator.block_nats - attacked.block_nats
    spread = float(stats.t.ppf(0.975, len(gap) - 1)) * float(gap.std(ddof=1)) / len(gap) ** 0.5
    share: float | None = None
    interval: tuple[float, float] | None = None
    if float(gap.mean()) > spread:
        rng = numpy_generator(seed, "attacks", "extraction")
        weight = rng.multinomial(len(gap), np.full(len(gap), 1.0 / len(gap)), size=draws)
        shares = (weight @ gain) / (weight @ gap)
        share = float(gain.sum() / gap.sum())
        interval = (float(np.quantile(shares, 0.025)), float(np.quantile(shares, 0.975)))
    return Closed(full.nats, emulator.nats, attacked.nats, share, interval)
