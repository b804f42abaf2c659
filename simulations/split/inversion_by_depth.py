"""The kind ``sap-depth``: what inversion attackers read from behind k blocks, with noise or not.

Split-and-Privatize, arXiv 2312.15603, section 4 (embedding inversion over split points).  The
attackers know the initial bottom, public text and the law of the noise (``privacy.*`` of the run);
the owners' text is SST-2.

A row is an attacker's: ``k``, ``mechanism``, ``level``, ``attacker``, ``success``, ``accuracy``,
``seed`` and more.  ``level`` is the noise level in the mechanism's own unit, as it was built for
``k`` blocks (:attr:`fedsplit.privacy.Mechanism.level`: eta of ``dchi``, one over the unit of length
of the bottom's output; epsilon of ``gaussian`` and the budget of ``pac``, nats per token); None
without noise.  ``noise_ratio`` and ``eta`` are as set; 0: the other one is.  ``accuracy`` is what
a sweep measured of the same cell (:mod:`simulations.split.known_accuracy`), where
``options.accuracy`` names its folder; None where it has no such cell.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fedsplit.attacks import ATTACKS, Attack, Public, Truth, View, make_attack
from fedsplit.attacks.inversion.learned import padded_ids
from fedsplit.data import docstrings_are_public, load_splits
from fedsplit.errors import check
from fedsplit.models.anatomy import probe
from fedsplit.models.splitting.halves import Bottom, split
from fedsplit.owners.data_source import reading
from fedsplit.privacy import build_mechanism, mechanism_type
from fedsplit.privacy.denoising.candidates import MatrixCandidates
from fedsplit.privacy.denoising.ngram import NgramModel
from fedsplit.privacy.mechanisms.base import Mechanism, clip_rows
from fedsplit.privacy.public_text import public_texts
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.registry import pick
from fedsplit.seeding import numpy_generator
from simulations.core.cells import CellStore, Row, product, run_cells
from simulations.core.run_folder import RunFolder
from simulations.core.setting import ExperimentSetting
from simulations.core.settings import Experiment, read_options
from simulations.core.tables import grouped, make_table
from simulations.split.known_accuracy import KnownAccuracy

LONE = "white box: the initial bottom; each token alone, and public text's mean states"
OPTIONS: dict[str, Any] = {
    "seeds": 3,
    "depths": [0, 1, 2, 3, 4, 5],
    "attacks": ["nearest", "optimisation", "learned", "token_states", "text_search"],
    "samples": 100,
    "optimisation-samples": 6,
    "optimisation-steps": 150,
    "shortlist": 0,
    "learned-steps": 80,
    "search-samples": 8,
    "public": "",
    "public-samples": 3000,
    "accuracy": "",
}


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment; finished cells are kept if it is killed."""
    options = read_options(experiment.options, OPTIONS)
    for name in options["attacks"]:
        pick(ATTACKS, name, "attack")
    check(options["samples"] >= 2, "options.samples", options["samples"], ">= 2 (texts)")
    store = CellStore.open(folder, experiment.config, options, ("seeds", "depths", "accuracy"))
    setting = DepthSetting(experiment.config, options)
    known = KnownAccuracy(options["accuracy"], experiment.config)
    keys = product(k=map(int, options["depths"]), seed=range(options["seeds"]))

    def recorded(rows: Sequence[Row]) -> dict[str, list[Row]]:
        return {"rows": [setting.told(row, known) for row in rows]}

    rows = run_cells(experiment, folder, console, store, keys, setting.cell, recorded)
    console.print(table(recorded(rows)["rows"], options["attacks"]))


@dataclass
class DepthSetting(ExperimentSetting):
    """The private texts, and what the attacker has."""

    _laws: dict[int, Mechanism] = field(default_factory=dict)

    @cached_property
    def deepest(self) -> Bottom:
        """The bottom of the deepest split; shallower states are caught on the way."""
        k = max(int(k) for k in self.options["depths"])
        return split(self.loaded.model, k, verify=False)[0].eval()

    @cached_property
    def private(self) -> list[Tensor]:
        """All private texts' ids."""
        kind, asked = reading(self.config.data, labelled=False)
        train, _ = load_splits(kind, **asked)
        return self.token_ids(train.texts)

    @cached_property
    def public(self) -> list[Tensor]:
        """The attacker's texts' ids."""
        texts = public_texts(
            self.options["public"], docstrings=docstrings_are_public(self.config.data.kind)
        )
        ids = [x for x in self.token_ids(texts) if len(x) > 3]
        order = numpy_generator(0, "depth", "public").permutation(len(ids))
        return [ids[i] for i in order[: self.options["public-samples"]]]

    @cached_property
    def public_states(self) -> list[list[Tensor]]:
        """Per depth, the public texts' states."""
        return states(self.deepest, self.public)

    @cached_property
    def frequent(self) -> Tensor:
        """The ids most frequent in public text, specials included; 0 asked for: all."""
        language = NgramModel([x.tolist() for x in self.public], self.deepest.vocab)
        prior = torch.from_numpy(language.unigram(np.arange(self.deepest.vocab)))
        wanted = self.options["shortlist"] or len(prior)
        return prior.argsort(descending=True)[:wanted]

    def cell(self, k: int, seed: int) -> list[Row]:
        """Attack one depth with one seed's texts; a row per attacker."""
        rng = numpy_generator(self.config.seed + seed, "depth", "private")
        order = rng.permutation(len(self.private))[: self.options["samples"]]
        truth = [self.private[i] for i in order]
        received, mechanism = self.sent(states(self.deepest, truth)[k], k, seed)
        special = {int(i) for i in self.loaded.tokenizer.all_special_ids}
        # One for all attackers: what the learned one teaches, the search after it need not teach.
        public = replace(self.knowledge(k, special), mechanism=mechanism)
        rows = []
        for name in self.options["attacks"]:
            began = time.perf_counter()
            attack = self.attack(name, seed)
            view = View(rows=received, public=public, seed=seed)
            knowledge = ""
            if k > 0 and name == "nearest":  # behind blocks the candidates are lone tokens
                lone, means = self.lone_candidates(k)
                view.rows = [x - means[: len(x)] for x in received]
                view.public = replace(public, candidate_set=MatrixCandidates(lone))
                knowledge = LONE
            result = attack.run(view, Truth(ids=truth))
            samples = int(result.extra["samples"])
            row = {
                "k": k,
                "mechanism": mechanism.name,
                "level": level_of(mechanism),
                "noise_ratio": self.config.privacy.noise_ratio,
                "eta": self.config.privacy.eta,
                "attacker": name,
                "seed": seed,
                "success": result.success,
                **dict(zip(("low", "high"), result.interval, strict=True)),
                "empirical_privacy": result.empirical_privacy,
                "top10": result.top10,
                "seconds": time.perf_counter() - began,
                "tokens": result.tokens,
                "samples": samples,
                "baseline": result.baseline,
                "knowledge": knowledge or result.knowledge,
            }
            if name == "optimisation":  # others are tried where a row makes them likely
                ids = torch.cat(truth[:samples])
                scored = ids[~torch.isin(ids, torch.tensor(sorted(special)))]
                row["frequent"] = float(torch.isin(scored, self.frequent).double().mean())
            rows.append(row)
        return rows

    def told(self, row: Row, known: KnownAccuracy) -> Row:
        """Return a cell's row as it is recorded: with the accuracy that is known of the cell.

        Cells of earlier versions called the attacker ``attack`` and had no level.
        """
        k, seed = int(row["k"]), int(row["seed"])
        found = {"attacker" if name == "attack" else name: value for name, value in row.items()}
        if "level" not in found:
            found["level"] = level_of(self.law(k)) if self._protects else None
        return {**found, "accuracy": known.of(k, self.config.seed + seed)}

    @property
    def _protects(self) -> bool:
        return mechanism_type(self.config.privacy).protects()

    def law(self, k: int) -> Mechanism:
        """Return the run's mechanism as it is built for ``k`` blocks; one for every seed."""
        if k not in self._laws:
            bottom = split(self.loaded.model, k, verify=False)[0].eval()
            vocabulary, tokenizer = bottom.vocab, self.loaded.tokenizer
            privacy = self.config.privacy
            self._laws[k] = build_mechanism(privacy, bottom, vocabulary, tokenizer)
        return self._laws[k]

    def sent(self, clean: list[Tensor], k: int, seed: int) -> tuple[list[Tensor], Mechanism]:
        """Return what leaves of clean states under the run's mechanism, and the mechanism."""
        law = self.law(k)
        if not law.protects():
            return clean, law
        secret = OwnerSecret.for_simulation(self.config.seed + seed, "depth")
        rows = [
            law.privatise(clip_rows(x, law.row_clip), secret.stream("depth", i))
            for i, x in enumerate(clean)
        ]
        return rows, law

    def attack(self, name: str, seed: int) -> Attack:
        """Return a row of the attacks' table with this experiment's budget."""
        o = self.options
        budget = {"steps": o["optimisation-steps"], "samples": o["optimisation-samples"]}
        own: dict[str, dict[str, Any]] = {
            "optimisation": {**budget, "shortlist": o["shortlist"], "batch": 12},
            "learned": {"steps": o["learned-steps"]},
            "exact_search": {"samples": o["search-samples"]},
            "text_search": {"samples": o["search-samples"]},
        }
        return make_attack(name, seed, own)

    def knowledge(self, k: int, special: set[int]) -> Public:
        """Return what every attacker knows of a split at ``k``."""
        return Public(
            bottom=split(self.loaded.model, k, verify=False)[0].eval(),
            public_ids=[x.tolist() for x in self.public],
            special_ids=frozenset(special),
            states=self.public_states[k],
        )

    @cached_property
    def _lone(self) -> list[Tensor]:
        """Per depth, each token's state when it is a text of its own, ``(V, d)``."""
        tokenizer = self.loaded.tokenizer
        frame = tokenizer("", add_special_tokens=True)["input_ids"]
        middle = len(frame) // 2
        ids = [
            torch.tensor([*frame[:middle], v, *frame[middle:]]) for v in range(self.deepest.vocab)
        ]
        return [
            torch.stack([x[middle] for x in depth]) for depth in states(self.deepest, ids, 1024)
        ]

    def lone_candidates(self, k: int) -> tuple[Tensor, Tensor]:
        """Return lone tokens' states less their mean, ``(V, d)``, and public means, ``(P, d)``.

        Public text's mean at each position takes out what position and blocks add to every token.
        """
        longest = self.config.model.max_tokens
        total = torch.zeros(longest, self._lone[k].shape[1])
        count = torch.zeros(longest, 1)
        for x in self.public_states[k]:
            total[: len(x)] += x
            count[: len(x)] += 1
        means = total / count.clamp(min=1)
        means[count[:, 0] < 20] = total.sum(0) / count.sum()  # few texts are that long
        lone = self._lone[k]
        weight = NgramModel([x.tolist() for x in self.public], len(lone)).unigram(
            np.arange(len(lone))
        )
        centre = torch.from_numpy(np.exp(weight)).float() @ lone
        return lone - centre, means


@torch.no_grad()
def states(bottom: Bottom, ids: Sequence[Tensor], batch: int = 64) -> list[list[Tensor]]:
    """Return what leaves at every split up to the bottom's own, ``[k][sample] -> (T_i, d)``.

    One pass: what block k receives is what a bottom of k blocks sends.
    """
    caught: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args[0] if args else kwargs["hidden_states"]).float())

    blocks = list(probe(bottom.model).blocks)[: bottom.k]
    handles = [b.register_forward_pre_hook(keep, with_kwargs=True) for b in blocks]
    out: list[list[Tensor]] = [[torch.empty(0)] * len(ids) for _ in range(bottom.k + 1)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    try:
        for at in range(0, len(order), batch):
            group = order[at : at + batch]
            tokens = padded_ids([ids[i] for i in group])
            lengths = torch.tensor([len(ids[i]) for i in group])
            mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
            caught.clear()
            last = bottom(tokens, mask).float()
            for k, hidden in enumerate([*caught[: bottom.k], last]):
                for i, h in zip(group, hidden, strict=True):
                    out[k][i] = h[: len(ids[i])].clone()
    finally:
        for handle in handles:
            handle.remove()
    return out


def level_of(mechanism: Mechanism) -> float | None:
    """Return a mechanism's level in its own unit; None: it has none."""
    if mechanism.level is None:
        return None
    return float(mechanism.describe()[mechanism.level.setting])


def table(rows: Sequence[Row], attacks: Sequence[str]) -> Table:
    """Return the share of tokens recovered per depth, mean over seeds with its range.

    With an accuracy where one is known.
    """

    def shown(mine: Sequence[Row], name: str) -> str:
        shares = [100 * r["success"] for r in mine if r["attacker"] == name]
        return f"{fmean(shares):.1f} % ({min(shares):.1f} to {max(shares):.1f})"

    def accuracy(mine: Sequence[Row]) -> str:
        known = {r["seed"]: 100 * r["accuracy"] for r in mine if r["accuracy"] is not None}
        return f"{fmean(known.values()):.1f} %" if known else "-"

    return make_table(
        ("blocks at the owner", *attacks, "accuracy"),
        (
            (k, *(shown(mine, name) for name in attacks), accuracy(mine))
            for (k,), mine in sorted(grouped(rows, "k").items())
        ),
        title="Tokens recovered, mean (range)",
    )
