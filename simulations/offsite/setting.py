"""What the experiments on offsite tuning share: one base, one text, and what is made once.

Centralised, on the union of the owners' text: a federation with one local step per round takes the
same steps (a test of the strategy holds that), so what differs between rows is the emulator alone.
An importance run, settled harmonizers, full fine-tuning and the bounds are made once for a seed and
kept in the run's folder, so that a killed experiment pays for them once.  The first two depend on
no private text, the others on no emulator: with ``options.prepared`` a folder of all of them serves
many experiments.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsplit.data import docstrings_are_public
from fedsplit.emulators import Compressor, Material
from fedsplit.emulators.compressors.scaleot import ScaleOT
from fedsplit.emulators.importance.files import Importance, ImportanceSettings
from fedsplit.emulators.importance.run import LayerReplace
from fedsplit.emulators.lm import LabelledBlocks, pack
from fedsplit.emulators.planning.trial import TrialRow, Tuning, fully_tuned, loss_of, tuned_in_full
from fedsplit.emulators.planning.trial import trial as run_trial
from fedsplit.models.loading import LoadedModel, load
from fedsplit.models.positions import check_length
from fedsplit.owners.data_source import simulated_shares
from fedsplit.owners.offsite.owner import blocks_of_sets
from fedsplit.privacy.public_text import public_texts
from fedsplit.seeding import derive_seed
from simulations.core.cells import CellStore
from simulations.core.setting import ExperimentSetting
from simulations.offsite.prepared import Prepared, base_facts, digest
from strategies.base_model import DTYPES

# Option: the folder of importance runs, settled harmonizers and bounds; "": the run's own.  Rows
# tell the seconds that they once took.
PREPARED = "prepared"
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
    PREPARED: "",
}


@dataclass
class OffsiteSetting(ExperimentSetting):
    """Base, texts, importance runs and baselines of one experiment on offsite tuning.

    Attributes:
        prepared: folder of importance runs, settled harmonizers and bounds; empty: the run's own.
    """

    prepared: str = ""
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
            half = max(1, len(self.public) // 2)
            halves = self.public[:half], self.public[half:]
            model, base = self.loaded.model, self.loaded.digest
            run = LayerReplace(model, *halves, self._importance_settings(seed), base_digest=base)
            self._importance[seed] = self._kept(f"importance-{seed}", self._about(seed), run.run)
        return self._importance[seed]

    def settled(self, seed: int, compressor: ScaleOT) -> tuple[ScaleOT, Importance, float]:
        """Return ``compressor`` with its harmonizers settled, and the seconds of all it needed.

        Harmonizers do not depend on beta: they are settled once for a seed, A and alpha.
        """
        importance, seconds = self.importance(seed)
        o = self.options
        how = {"settle_steps": o["settle-steps"], "bf16": o["bf16"], "seed": seed}
        plain = {"beta": 0.0, "attention": True, "ffn": False, "truncation": "weights"}
        asked = replace(compressor, **plain, **how)  # type: ignore[arg-type]
        key = (seed, asked)
        if key not in self._settled:
            material = self.material(importance)
            plan = asked.plan(self.loaded.model, material)
            about = {**self._about(seed), "settled": asdict(asked), "plan": plan.to_json()}
            replaced = "-".join(str(i) for i, r in enumerate(plan.roles) if r == "harmonizer")
            make = partial(asked.settled, self.loaded.model, material)
            self._settled[key] = self._kept(f"settled-{seed}-{replaced or 'none'}", about, make)
        ready, more = self._settled[key]
        return replace(compressor, settle_steps=0, seed=seed), ready, seconds + more

    def _kept(
        self, name: str, about: Mapping[str, Any], make: Callable[[], Importance]
    ) -> tuple[Importance, float]:
        """Return an importance run from the folder of them, or make and keep it."""
        if self._runs is None:
            began = time.perf_counter()
            return make(), time.perf_counter() - began
        return self._runs.importance(name, about, make)

    @cached_property
    def _runs(self) -> Prepared | None:
        folder = Path(self.prepared) if self.prepared else self.folder
        return None if folder is None else Prepared(folder, self.loaded)

    @cached_property
    def _base(self) -> dict[str, Any]:
        """What everything here depends on beside its own text and schedule."""
        return {**base_facts(self.loaded), "dtype": self.config.model.dtype}

    def _about(self, seed: int) -> dict[str, Any]:
        """Return everything that a seed's importance run depends on."""
        return {
            **self._base,
            "public": digest(self.public),
            "schedule": asdict(self._importance_settings(seed)),
        }

    def _importance_settings(self, seed: int) -> ImportanceSettings:
        o = self.options
        return ImportanceSettings(
            steps=o["importance-steps"], bf16=o["bf16"], seed=derive_seed(seed) % 2**31
        )

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
        """Return a loss that no emulator has a part in, found again in the run or with others."""
        shared = self._shared_losses
        if shared is None or self.store.find(key) is not None:
            return float(self.store.rows(key, lambda: [{"nats": make()}])[0]["nats"])
        return float(shared.rows(key, lambda: [{"nats": make()}])[0]["nats"])

    @cached_property
    def _shared_losses(self) -> CellStore | None:
        """Losses of the base and of what is tuned in it, kept with the importance runs."""
        if not self.prepared or self._runs is None:
            return None
        train, held_out = self.private
        about = {
            **self._base,
            "private": digest(train.ids, train.labels, held_out.ids, held_out.labels),
            "schedule": {**asdict(self.tuning(0)), "seed": None},  # the seed is in the cell's key
        }
        return self._runs.losses(about)


def perplexity_of(nats: float) -> float:
    """Return exp, bounded: an untrained or broken emulator must not overflow a results file."""
    return math.exp(min(nats, 50.0))
