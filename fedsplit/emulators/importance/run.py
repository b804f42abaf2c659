"""Importance of blocks by Dynamic LayerReplace (ScaleOT, arXiv 2412.09812, stage 1).

Two processes alternate on two task-independent sets of token blocks while the model stays frozen:
gradient descent trains the harmonizers on D^T, reinforcement updates the scores on D^V.  One run
serves emulators of every size.

**A high score means "keep this block".**  p_i = sigmoid(s_i) weighs block i when the kept half of
its group is drawn; the blocks of a kept set whose network did better than the other draws gain.

The paper's update formulas are not known to us.  The score update is the one of IST by the same
first author: s_i += lr A_k p_i (1 - p_i) for the blocks i of subset k.  The grouping into adjacent
blocks, one draw for a whole batch, and all defaults are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsplit.emulators.compression.structure import Model
from fedsplit.emulators.importance.files import (
    NAME,
    Importance,
    ImportanceSettings,
    importance_of,
    named_harmonizers,
    save_importance,
    settings_of,
)
from fedsplit.emulators.importance.harmonizer import make_harmonizers
from fedsplit.emulators.importance.replace_policy import draw_kept, updated_scores
from fedsplit.emulators.importance.supernet import Net, supernet
from fedsplit.emulators.lm import check_tokens, divergence, lm_loss, logits_of, step_blocks
from fedsplit.emulators.pair_files import read_pair
from fedsplit.errors import ConfigError, check
from fedsplit.models.anatomy import probe
from fedsplit.models.loading import weights_digest
from fedsplit.models.modes import frozen
from fedsplit.seeding import derive_seed, torch_generator


@dataclass(frozen=True)
class Progress:
    """What a progress callback is told after each step: the loss, and the scores so far."""

    step: int
    steps: int
    loss: float
    scores: tuple[float, ...]


class LayerReplace:
    """One importance run; a :meth:`run` may stop at any step and be taken up again.

    Reproducible: every draw and batch follows from (seed, step), so a resumed run gives the scores
    and harmonizers of an uninterrupted one, bit for bit on the same machine.
    """

    def __init__(
        self,
        model: Model,
        train: Tensor,
        valid: Tensor,
        settings: ImportanceSettings | None = None,
        *,
        base_digest: str | None = None,
        resume: str | Path | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            model: frozen throughout, left as it was.
            train: D^T, ids (N, T), task-independent.
            valid: D^V, ids (N', T), other texts than D^T.
            settings: of a new run; with ``resume`` they must be the saved ones or None.
            base_digest: of the model if known.
            resume: folder of :meth:`save`.

        Raises:
            ConfigError: if settings and model do not fit, or differ from those saved.
            DataError: if the tokens are not ids (N, T).
            ModelError: if the saved run is damaged or of another base.
        """
        self.train, self.valid = check_tokens("train", train), check_tokens("valid", valid)
        self.base_digest = weights_digest(model) if base_digest is None else base_digest
        self.model = model
        saved = None if resume is None else read_pair(Path(resume), NAME)
        if saved is not None:
            old = settings_of(saved[1])
            if settings not in (None, old):
                raise ConfigError(f"settings={settings}: must be the saved run's {old}")
            settings = old
        self.settings = settings or ImportanceSettings()
        anatomy = probe(model)
        layers = anatomy.num_layers
        check(layers >= 2, "layers", layers, ">= 2 (one to keep, one to replace)")
        self.harmonizers = make_harmonizers(model, self.settings.width, self.settings.seed)
        self._named = named_harmonizers(self.harmonizers)
        self.optimizer = torch.optim.Adam(self._named.values(), lr=self.settings.lr)
        self.scores = torch.zeros(layers, dtype=torch.float64)
        self.step = 0
        self.history: list[tuple[int, float]] = []
        self.costs: tuple[float, ...] = ()
        if saved is not None:
            self._restore(*saved)

    def run(
        self,
        steps: int | None = None,
        *,
        progress: Callable[[Progress], None] | None = None,
        checkpoint: str | Path | None = None,
        every: int = 100,
    ) -> Importance:
        """Go on for ``steps`` gradient steps (None: to the end) and return the state then.

        Args:
            steps: how many at most.
            progress: called after each step.
            checkpoint: folder for :meth:`save` each ``every`` steps and at the end.
            every: steps between checkpoints.
        """
        settings = self.settings
        last = settings.steps if steps is None else min(self.step + steps, settings.steps)
        weight = settings.hidden_weight
        with frozen(self.model), supernet(self.model, self.harmonizers, weight) as net:
            for harmonizer in self.harmonizers:
                harmonizer.requires_grad_(True)
            while self.step < last:
                loss = self._gradient_step(net)
                self.step += 1
                if self.step % settings.rl_every == 0:
                    self._score_step(net)
                    self.history.append((self.step, loss))
                if progress is not None:
                    told = Progress(self.step, settings.steps, loss, tuple(self.scores.tolist()))
                    progress(told)
                if checkpoint is not None and self.step % every == 0 and self.step < last:
                    self.save(checkpoint)
            if self.step == settings.steps and settings.cost_batches and not self.costs:
                self.costs = self._measured_costs(net)
        if checkpoint is not None:
            self.save(checkpoint)
        return self.result()

    def result(self) -> Importance:
        """Return scores and harmonizers as they are now (the harmonizers are the run's own)."""
        return Importance(
            tuple(self.scores.tolist()),
            self.harmonizers,
            self.settings,
            self.base_digest,
            self.step,
            list(self.history),
            self.costs,
        )

    def save(self, folder: str | Path) -> None:
        """Write the whole state to ``folder``, replacing an earlier one of this run."""
        save_importance(self.result(), folder, self._moments())

    def _batch(self, tokens: Tensor, purpose: str, number: int) -> Tensor:
        seed = derive_seed(self.settings.seed, "layer-replace", purpose)
        rows = step_blocks(tokens, self.settings.batch_size, seed, number)
        return rows.to(next(self.model.parameters()).device)

    def _precision(self, ids: Tensor) -> AbstractContextManager[Any]:
        return torch.autocast(ids.device.type, torch.bfloat16, enabled=self.settings.bf16)

    def _target(self, net: Net, ids: Tensor) -> Tensor | None:
        """Return the full model's logits (B, T, V), None where the objective needs none."""
        if self.settings.objective == "loss":
            return None
        net.keep(range(len(self.scores)))
        with torch.no_grad(), self._precision(ids):
            return logits_of(net.model, ids)

    def _objective(self, net: Net, ids: Tensor, target: Tensor | None) -> Tensor:
        logits = logits_of(net.model, ids)
        return lm_loss(logits, ids) if target is None else divergence(target, logits)

    def _gradient_step(self, net: Net) -> float:
        settings = self.settings
        generator = torch_generator(settings.seed, "layer-replace", "train", self.step)
        kept = draw_kept(self.scores, settings.group, settings.replace, generator)
        ids = self._batch(self.train, "train", self.step)
        target = self._target(net, ids)
        net.keep(kept)
        with self._precision(ids):
            loss = self._objective(net, ids, target)
            total = loss + settings.hidden_weight * net.mismatch()
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * (1 - 0.9 * self.step / settings.steps)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def _score_step(self, net: Net) -> None:
        settings = self.settings
        number = self.step // settings.rl_every - 1
        ids = self._batch(self.valid, "valid", number)
        target = self._target(net, ids)
        subsets, losses = [], []
        for k in range(settings.rl_draws):
            generator = torch_generator(settings.seed, "layer-replace", "score", number, k)
            subsets.append(draw_kept(self.scores, settings.group, settings.replace, generator))
            net.keep(subsets[-1])
            with self._precision(ids):
                losses.append(float(self._objective(net, ids, target)))
        self.scores = updated_scores(self.scores, subsets, losses, settings.rl_lr, settings.reward)

    @torch.no_grad()
    def _measured_costs(self, net: Net) -> tuple[float, ...]:
        settings, layers = self.settings, range(len(self.scores))
        totals = [0.0] * len(layers)
        for number in range(settings.cost_batches):
            ids = self._batch(self.valid, "costs", number)
            with self._precision(ids):
                net.keep(layers)
                full = logits_of(net.model, ids)
                for i in layers:
                    net.keep([j for j in layers if j != i])
                    totals[i] += float(divergence(full, logits_of(net.model, ids)))
        return tuple(total / settings.cost_batches for total in totals)

    def _moments(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                out[f"adam.{key}.{name}"] = value.detach().clone()
        return out

    def _restore(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        saved = importance_of(tensors, about, self.harmonizers, self.base_digest)
        self.scores = torch.tensor(saved.scores, dtype=torch.float64)
        self.step, self.history, self.costs = saved.step, saved.history, saved.costs
        for name, parameter in self._named.items():
            parts = {
                # Adam keeps its count of steps on the CPU and moments beside what is trained.
                key: tensors[f"adam.{key}.{name}"].to("cpu" if key == "step" else parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"adam.{key}.{name}" in tensors
            }
            if parts:
                self.optimizer.state[parameter] = dict(parts)
