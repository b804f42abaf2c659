"""One offsite-tuning trial: how good is an emulator, and how good are its adapters plugged in?

Centralised, without a federation: what a compressor is worth.  Losses are mean next-token
cross-entropies in nats (their exp is the perplexity).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsplit.emulators.build import Emulator, adapter_state, build_emulator, plug_in
from fedsplit.emulators.compression.structure import Model
from fedsplit.emulators.compressors.base import Compressor, Material
from fedsplit.emulators.lm import LabelledBlocks, lm_loss, logits_of, mean_loss, step_rows
from fedsplit.emulators.planning.plan import EmulatorPlan
from fedsplit.errors import check
from fedsplit.models.anatomy import probe
from fedsplit.models.modes import evaluating
from fedsplit.seeding import derive_seed

Text = Tensor | LabelledBlocks  # ids (N, T), every next one predicted, or some of them


@dataclass(frozen=True)
class Tuning:
    """How adapters, or a whole model, are tuned.

    Attributes:
        steps: of AdamW.
        batch_size: token blocks in a step.
        lr: constant.
        weight_decay: of AdamW.
        clip: bound on the gradient's norm; 0: none.
        bf16: autocast to bfloat16 (weights stay as they are).
        seed: of the order of the batches; the same order for every method.
    """

    steps: int = 150
    batch_size: int = 16
    lr: float = 3e-4
    weight_decay: float = 0.01
    clip: float = 1.0
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.steps >= 1, "steps", self.steps, ">= 1")
        check(self.batch_size >= 1, "batch_size", self.batch_size, ">= 1 (blocks)")
        check(self.lr > 0, "lr", self.lr, "> 0")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, ">= 0")
        check(self.clip >= 0, "clip", self.clip, ">= 0")


@dataclass(frozen=True)
class TrialRow:
    """What one emulator gave; the first five are mean losses in nats.

    Attributes:
        full_zero_shot: the base.
        emulator_zero_shot: the emulator before tuning.
        emulator_ft: the emulator with tuned adapters: what an owner has.
        plug_in: the base with those adapters: what the model owner has.
        adapters_in_full: the base with the same blocks tuned inside it, the attainable bound (NaN
            if it was not asked for).
        emulator_params: stored in the emulator.
        trained_params: in A.
        build_s: seconds to build the emulator (an importance run is not part of it).
        adapters: A's positions.
    """

    full_zero_shot: float
    emulator_zero_shot: float
    emulator_ft: float
    plug_in: float
    adapters_in_full: float
    emulator_params: int
    trained_params: int
    build_s: float
    adapters: tuple[int, ...]

    @property
    def closed(self) -> float:
        """Share of the distance from the base to the bound that the plug-in covers."""
        gain = self.full_zero_shot - self.adapters_in_full
        return (self.full_zero_shot - self.plug_in) / gain

    @property
    def valid(self) -> bool:
        """Whether the plug-in beats the base and the tuned emulator (Offsite-Tuning, sec. 3)."""
        return self.plug_in < min(self.full_zero_shot, self.emulator_ft)


def tune(
    model: Model,
    parameters: Sequence[nn.Parameter],
    tokens: Text,
    settings: Tuning,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train ``parameters`` of ``model`` on the language-model loss, in place; dropout is off.

    Args:
        model: the network.
        parameters: those to train; they must require gradients.
        tokens: ids (N, T), or some of them with labels.
        settings: of the training.
        progress: called with (step, loss) after each step.

    Returns:
        The loss of each step.

    Raises:
        DataError: if tokens are not ids (N, T).
    """
    blocks = LabelledBlocks.of(tokens)
    optimizer = torch.optim.AdamW(
        list(parameters), lr=settings.lr, weight_decay=settings.weight_decay
    )
    device = next(model.parameters()).device
    losses: list[float] = []
    seed = derive_seed(settings.seed, "emulators.tune")
    with evaluating(model):
        for step in range(settings.steps):
            rows = step_rows(len(blocks), settings.batch_size, seed, step)
            ids, labels = blocks.ids[rows].to(device), blocks.labels[rows].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
                loss = lm_loss(logits_of(model, ids), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if settings.clip > 0:
                nn.utils.clip_grad_norm_(list(parameters), settings.clip)
            optimizer.step()
            losses.append(float(loss.detach()))
            if progress is not None:
                progress(step + 1, losses[-1])
    optimizer.zero_grad(set_to_none=True)
    return losses


def loss_of(model: Model, text: Text) -> float:
    """Return the mean loss in nats over ids (N, T), or over the labels of blocks that have some."""
    blocks = LabelledBlocks.of(text)
    return mean_loss(model, blocks.ids, labels=blocks.labels)


def tuned_in_full(
    model: Model, adapters: Sequence[int], train: Text, held_out: Text, settings: Tuning
) -> float:
    """Return the held-out loss after tuning blocks ``adapters`` inside a copy of the full model.

    This is what offsite tuning with those adapters could reach at best.  ``model`` is not changed.
    """
    plan = EmulatorPlan.with_adapters(probe(model).num_layers, adapters)
    whole = build_emulator(model, plan, base_digest="")
    tune(whole.model, list(whole.adapter_parameters().values()), train, settings)
    return loss_of(whole.model, held_out)


def fully_tuned(model: Model, train: Text, held_out: Text, settings: Tuning) -> float:
    """Return the held-out loss after tuning every parameter of a copy of ``model``."""
    whole = copy.deepcopy(model).requires_grad_(True)
    tune(whole, list(whole.parameters()), train, settings)
    return loss_of(whole, held_out)


def trial(
    model: Model,
    compressor: Compressor,
    material: Material,
    train: Text,
    held_out: Text,
    settings: Tuning | None = None,
    *,
    full_zero_shot: float | None = None,
    bound: float | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[TrialRow, Emulator]:
    """Build an emulator, tune its adapters on ``train``, plug them in, measure all of it.

    Args:
        model: the base; as it was before afterwards.
        compressor: a row of ``COMPRESSORS`` with its settings.
        material: what it may use, none of it from ``train`` or ``held_out``.
        train: the owner's ids (N, T), with labels or all of them to be predicted.
        held_out: the same (N', T) for every measured loss.
        settings: of the tuning.
        full_zero_shot: if known already.
        bound: ``adapters_in_full`` if known already; NaN: do not measure it.
        progress: see :func:`tune`.

    Returns:
        The row, and the tuned emulator.
    """
    settings = settings or Tuning()
    started = time.perf_counter()
    emulator = compressor.build(model, material)
    build_s = time.perf_counter() - started
    if full_zero_shot is None:
        full_zero_shot = loss_of(model, held_out)
    zero_shot = loss_of(emulator.model, held_out)
    adapters = emulator.plan.adapters
    tune(emulator.model, list(emulator.adapter_parameters().values()), train, settings, progress)
    tuned = loss_of(emulator.model, held_out)
    before = plug_in(model, adapter_state(emulator), emulator.plan)
    try:
        plugged = loss_of(model, held_out)
    finally:
        plug_in(model, before, emulator.plan)
    if bound is None:
        bound = tuned_in_full(model, adapters, train, held_out, settings)
    row = TrialRow(
        full_zero_shot=full_zero_shot,
        emulator_zero_shot=zero_shot,
        emulator_ft=tuned,
        plug_in=plugged,
        adapters_in_full=bound,
        emulator_params=emulator.parameter_count(),
        trained_params=emulator.trainable_count(),
        build_s=build_s,
        adapters=adapters,
    )
    return row, emulator
