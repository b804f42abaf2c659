"""What the experiments on offsite tuning share: one base, one text, and what is made once.

Centralised, on the union of the owners' text: a federation with one local step per round takes the
same steps (a test of the strategy holds that), so what differs between rows is the emulator alone.
An importance run, settled harmonizers, full fine-tuning and the bounds are made once for a seed and
kept in the run's folder, so that a killed experiment pays for them once.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from fedsplit.data import docstrings_are_public
from fedsplit.emulators import Compressor, Material
from fedsplit.emulators.compressors.scaleot import ScaleOT
from fedsplit.emulators.importance.files import (
    Importance,
    ImportanceSettings,
    load_importance,
    save_importance,
)
from fedsplit.emulators.importance.run import LayerReplace
from fedsplit.emulators.lm import LabelledBlocks, pack
from fedsplit.emulators.planning.trial import TrialRow, Tuning, fully_tuned, loss_of, tuned_in_full
from fedsplit.emulators.planning.trial import trial as run_trial
from fedsplit.errors import FedsplitError
from fedsplit.models.loading import LoadedModel, load
from fedsplit.models.positions import check_length
from fedsplit.owners.data_source import simulated_shares
from fedsplit.owners.offsite.owner import blocks_of_sets
from fedsplit.privacy.public_text import public_texts
from fedsplit.seeding import derive_seed
from simulations.core.setting import ExperimentSetting
from strategies.base_model import DTYPES

# Options of every experiment on offsite tuning; an experiment adds its own.
COMMON: dict[str, Any] = {
    "seeds": 3,
    "steps": 150,
    "batch": 16,
    "lr": 3e-4,
    "bf16": True,
    "held-out": 64,
    "adapters": 4,
    "alpha": 0.25,
    "beta": 0.75,
    "settle-steps": 200,
    "importance-steps": 400,
    "rank-by": "costs",
    "public-blocks": 4096,
}


@dataclass
class OffsiteSetting(ExperimentSetting):
    """Base, texts, importance runs and baselines of one experiment on offsite tuning."""

    _importance: dict[int, tuple[Importance, float]] = field(default_factory=dict)
    _settled: dict[tuple[int, ScaleOT], tuple[Importance, float]] = field(default_factory=dict)

    @cached_property
    def loaded(self) -> LoadedModel:
        """The base model and its tokenizer."""
        m = self.config.model
        # Eager attention: for blocks this short it trains 2-3 times faster under autocast.
        loaded = load(
            m.name,
            "causal-lm",
            dtype=DTYPES[m.dtype],
            dropout=0.0,
            attn="eager",
            expected_sha256=m.sha256 or None,
        )
        check_length(loaded.model, self.config.offsite.block, "offsite.block")
        return loaded

    @cached_property
    def private(self) -> tuple[LabelledBlocks, LabelledBlocks]:
        """The owners' training blocks and their held-out ones, as a run of offsite tuning has them.

        Every next token of plain text is to be predicted, of conversations the completions alone.
        """
        shares = simulated_shares(self.config.data, self.config.seed, False)
        tokenizer, length = self.loaded.tokenizer, self.config.offsite.block
        parts = [blocks_of_sets(tokenizer, *share, length) for share in shares]
        held = self.options["held-out"]
        each = max(1, held // len(parts))
        return (
            LabelledBlocks(
                torch.cat([p.train for p in parts]), torch.cat([p.train_labels for p in parts])
            ),
            LabelledBlocks(
                torch.cat([p.test[:each] for p in parts])[:held],
                torch.cat([p.test_labels[:each] for p in parts])[:held],
            ),
        )

    @cached_property
    def public(self) -> Tensor:
        """Public text as blocks (N, T)."""
        length = self.config.offsite.block
        wanted = self.options["public-blocks"] * length
        ids: list[int] = []
        for text in public_texts(
            self.config.offsite.public, docstrings=docstrings_are_public(self.config.data.kind)
        ):
            ids += self.loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) >= wanted:
                break
        return pack(torch.tensor(ids[:wanted]), length)

    def tuning(self, seed: int) -> Tuning:
        """Return how adapters are tuned: the same for every method."""
        o = self.options
        return Tuning(
            steps=o["steps"], batch_size=o["batch"], lr=o["lr"], bf16=o["bf16"], seed=seed
        )

    def material(self, importance: Importance | None) -> Material:
        """Return what a compressor may use: public text and what was made of it."""
        return Material(self.public, importance, self.loaded.digest)

    def importance(self, seed: int) -> tuple[Importance, float]:
        """Return the seed's importance run and its seconds; one run serves many emulators."""
        if seed not in self._importance:
            o, model, digest = self.options, self.loaded.model, self.loaded.digest
            settings = ImportanceSettings(
                steps=o["importance-steps"], bf16=o["bf16"], seed=derive_seed(seed) % 2**31
            )
            half = max(1, len(self.public) // 2)
            halves = self.public[:half], self.public[half:]
            self._importance[seed] = self._kept(
                f"importance-{seed}",
                {"what": "importance", "seed": seed},
                lambda: LayerReplace(model, *halves, settings, base_digest=digest).run(),
            )
        return self._importance[seed]

    def settled(self, seed: int, compressor: ScaleOT) -> tuple[ScaleOT, Importance, float]:
        """Return ``compressor`` with its harmonizers settled, and the seconds of all it needed.

        Harmonizers do not depend on beta: they are settled once for a seed, A and alpha.
        """
        importance, seconds = self.importance(seed)
        o = self.options
        how = {"settle_steps": o["settle-steps"], "bf16": o["bf16"], "seed": seed}
        asked = replace(compressor, beta=0.0, attention=True, ffn=False, **how)
        key = (seed, asked)
        if key not in self._settled:
            material = self.material(importance)
            plan = asked.plan(self.loaded.model, material)
            about = {"what": "settled", "seed": seed, "plan": plan.to_json()}
            replaced = "-".join(str(i) for i, r in enumerate(plan.roles) if r == "harmonizer")
            make = partial(asked.settled, self.loaded.model, material)
            self._settled[key] = self._kept(f"settled-{seed}-{replaced or 'none'}", about, make)
        ready, more = self._settled[key]
        return replace(compressor, settle_steps=0, seed=seed), ready, seconds + more

    def _kept(
        self, name: str, about: Mapping[str, Any], make: Callable[[], Importance]
    ) -> tuple[Importance, float]:
        """Return an importance run from the run's folder, or make and keep it."""
        began = time.perf_counter()
        if self.folder is None:
            return make(), time.perf_counter() - began
        # Other settings in the same folder must not find it.
        settings = json.dumps([self.config.to_flat(), self.options], sort_keys=True, default=str)
        where = self.folder / f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
        made: list[Importance] = []

        def timed() -> list[dict[str, Any]]:
            made.append(make())
            seconds = time.perf_counter() - began
            save_importance(made[0], where)
            return [{"seconds": seconds}]

        rows = self.store.rows(about, timed)
        if not made:
            try:
                model, digest = self.loaded.model, self.loaded.digest
                made.append(load_importance(where, model, base_digest=digest))
            except FedsplitError:  # the cell is there and its files are not: made again, as quick
                made.append(make())
        return made[0], float(rows[0]["seconds"])

    def full_zero_shot(self) -> float:
        """Return the base's held-out loss in nats."""
        return self._loss({"what": "zero-shot"}, lambda: self.measured(self.loaded.model))

    def full_ft(self, seed: int) -> float:
        """Return the held-out loss after tuning the whole model."""
        train, held_out = self.private
        return self._loss(
            {"what": "full-ft", "seed": seed},
            lambda: fully_tuned(self.loaded.model, train, held_out, self.tuning(seed)),
        )

    def bound(self, seed: int, adapters: Sequence[int]) -> float:
        """Return the held-out loss after tuning these blocks inside the full model."""
        train, held_out = self.private
        return self._loss(
            {"what": "bound", "seed": seed, "adapters": list(adapters)},
            lambda: tuned_in_full(self.loaded.model, adapters, train, held_out, self.tuning(seed)),
        )

    def trial(self, seed: int, made: Compressor, importance: Importance | None) -> TrialRow:
        """Build an emulator, tune adapters in it, plug them into the base; return the losses."""
        train, held_out = self.private
        return run_trial(
            self.loaded.model,
            made,
            self.material(importance),
            train,
            held_out,
            self.tuning(seed),
            full_zero_shot=self.full_zero_shot(),
            bound=math.nan,
        )[0]

    def measured(self, model: Any) -> float:
        """Return a model's held-out loss in nats."""
        return loss_of(model, self.private[1])

    def _loss(self, key: Mapping[str, Any], make: Callable[[], float]) -> float:
        return float(self.store.rows(key, lambda: [{"nats": make()}])[0]["nats"])


def perplexity_of(nats: float) -> float:
    """Return exp, bounded: an untrained or broken emulator must not overflow a results file."""
    return math.exp(min(nats, 50.0))
