"""The kind ``attributes``: who wrote it, read from what left, beside what the task makes of it.

Split-and-Privatize, arXiv 2312.15603, section 4 (attribute inference attack).  The server pools
each text's received vectors and, since it has the top, those that the untuned top makes of them;
the same features serve its attack (a logistic classifier for the private attribute) and the task
(one for the label).  Noise is drawn per token, so pooling averages much of it away.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedsplit.attacks import Truth, View, make_attack
from fedsplit.attacks.inversion.learned import padded, represent
from fedsplit.attacks.membership.attribute import known_part, pool
from fedsplit.config.privacy import PrivacyConfig
from fedsplit.data import TextDataset, load_dataset
from fedsplit.errors import ConfigError, DataError, check
from fedsplit.models.splitting.halves import Bottom, Top, split
from fedsplit.privacy import MECHANISMS, Mechanism, build_mechanism, representation_norm
from fedsplit.privacy.perturb import SamplePerturber
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.registry import pick
from fedsplit.seeding import numpy_generator
from simulations.core.cells import CellStore, Row, product, run_cells
from simulations.core.run_folder import RunFolder
from simulations.core.setting import ExperimentSetting
from simulations.core.settings import Experiment, read_options
from simulations.core.tables import grouped, make_table, mean, with_interval

OPTIONS: dict[str, Any] = {
    "seeds": 3,
    "data": ["isear", "womens-clothing"],
    "depths": [0, 3],
    "mechanisms": ["none", "dchi:10", "dchi:8", "gaussian:8"],
    "samples": 1200,
    "known-share": 0.6,
}


@dataclass(frozen=True)
class Source:
    """One data set with a private attribute.

    Attributes:
        file: below ``data.path``.
        label: column of the task.
        attribute: column of the attribute.
        group: column that says who wrote a text; empty where nobody can be told.
    """

    file: str
    label: str
    attribute: str
    group: str

    def attributes(self, values: Sequence[Any]) -> list[int]:
        """Return the private attribute as 0 or 1; -1 where it is not known."""
        if self.attribute == "sex_code":
            return [{"1": 0, "2": 1}.get(str(v), -1) for v in values]
        known = sorted(v for v in values if isinstance(v, int | float))
        middle = known[len(known) // 2]  # at least the median, or younger
        return [int(v >= middle) if isinstance(v, int | float) else -1 for v in values]


# name -> where, and what is private
SOURCES: dict[str, Source] = {
    "isear": Source("isear/isear.jsonl", "label", "sex_code", "subject"),
    "womens-clothing": Source("womens_clothing/womens_clothing.jsonl", "recommended", "age", ""),
}


@dataclass(frozen=True)
class Texts:
    """The texts of one cell."""

    ids: list[Tensor]
    labels: list[int]
    attribute: list[int]
    groups: list[str]


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment; finished cells are kept if it is killed."""
    options = read_options(experiment.options, OPTIONS)
    for name in options["data"]:
        pick(SOURCES, name, "data")
    check(options["samples"] >= 50, "options.samples", options["samples"], ">= 50 (texts)")
    store = CellStore.open(folder, experiment.config, options, ("seeds", "data", "depths"))
    setting = AttributeSetting(experiment.config, options)
    keys = product(
        data=options["data"], k=map(int, options["depths"]), seed=range(options["seeds"])
    )
    make = partial(setting.cell, levels=noise_levels(options["mechanisms"]))
    console.print(table(run_cells(experiment, folder, console, store, keys, make)))


def noise_levels(mechanisms: Sequence[str]) -> list[tuple[str, float]]:
    """Return (mechanism, eta) pairs from ``none``, ``dchi:8`` ...; no noise has no level.

    Raises:
        ConfigError: for anything else.
    """
    levels = []
    for text in mechanisms:
        name, _, level = str(text).partition(":")
        if not level and name in MECHANISMS and MECHANISMS[name].level is None:
            levels.append((name, 0.0))
            continue
        if name not in MECHANISMS or MECHANISMS[name].level is None:
            raise ConfigError(f"options.mechanisms={text!r}: must be none, or MECHANISM:ETA")
        try:
            eta = float(level)
        except ValueError:
            eta = 0.0
        check(eta > 0, f"options.mechanisms {text!r}: eta", level, "> 0 (1/length units)")
        levels.append((name, eta))
    return levels


@dataclass
class AttributeSetting(ExperimentSetting):
    """The model and the data; ``data.path`` is the folder with the sources."""

    _data: dict[str, TextDataset] = field(default_factory=dict)

    def texts(self, data: str, seed: int) -> Texts:
        """Draw the texts of one cell, only those whose attribute is known.

        Raises:
            DataError: if the file is missing or has no such attribute.
        """
        source = SOURCES[data]
        if data not in self._data:
            path = Path(self.config.data.path) / source.file
            if not path.exists():
                raise DataError(f"{path}: missing; --set data.path= the folder with {source.file}")
            columns = tuple(c for c in (source.attribute, source.group) if c)
            self._data[data] = load_dataset(
                "file", path=str(path), label_column=source.label, columns=columns
            )
        whole = self._data[data]
        attribute = source.attributes(whole.columns[source.attribute])
        known = [i for i, a in enumerate(attribute) if a >= 0]
        rng = numpy_generator(self.config.seed + seed, "attributes", data)
        groups = [str(g) for g in whole.columns[source.group]] if source.group else []
        rows = sorted(int(i) for i in rng.permutation(known)[: self.options["samples"]])
        return Texts(
            ids=self.token_ids([whole.texts[i] for i in rows]),
            labels=[whole.labels[i] for i in rows],
            attribute=[attribute[i] for i in rows],
            groups=[groups[i] if groups else str(i) for i in rows],
        )

    def cell(self, data: str, k: int, seed: int, levels: Sequence[tuple[str, float]]) -> list[Row]:
        """Measure one data set, depth and seed under every mechanism."""
        texts = self.texts(data, seed)
        bottom, top = split(self.loaded.model, k, verify=False)
        bottom.eval()
        top.eval()
        clean = represent(bottom, texts.ids)
        rows = []
        for name, eta in levels:
            began = time.perf_counter()
            mechanism = self._mechanism(name, eta, bottom)
            perturber = SamplePerturber(
                mechanism, OwnerSecret.for_simulation(seed, "attributes"), f"attributes k={k}"
            )
            sent = [perturber.perturb(x, i) for x, i in zip(clean, texts.ids, strict=True)]
            seen = [torch.cat(pair, dim=1) for pair in zip(sent, through(top, sent), strict=True)]
            about: Row = {"data": data, "attribute": SOURCES[data].attribute, "mechanism": name}
            about |= {"eta": eta or None, "k": k, "seed": seed}
            found = measure(texts, seen, self.options["known-share"], seed)
            rows.append({**about, **found, "seconds": time.perf_counter() - began})
        return rows

    def _mechanism(self, name: str, eta: float, bottom: Bottom) -> Mechanism:
        """Return a mechanism whose mean noise norm is that of d_chi at ``eta``."""
        vocabulary = bottom.vocab
        ratio = bottom.hidden_size / eta / representation_norm(bottom, vocabulary) if eta else 0.0
        config = PrivacyConfig(mechanism=name, noise_ratio=ratio)
        return build_mechanism(config, bottom, vocabulary, self.loaded.tokenizer)


@torch.no_grad()
def through(top: Top, sent: Sequence[Tensor], batch: int = 64) -> list[Tensor]:
    """Return the untuned top's final hidden states, per sample ``(T_i, d)``."""
    out: list[Tensor] = [torch.empty(0)] * len(sent)
    order = sorted(range(len(sent)), key=lambda i: len(sent[i]))
    for at in range(0, len(order), batch):
        group = order[at : at + batch]
        x, mask = padded([sent[i].float() for i in group])
        hidden = top.hidden_states(x, mask).float()
        for i, h in zip(group, hidden, strict=True):
            out[i] = h[: len(sent[i])].clone()
    return out


def measure(texts: Texts, seen: Sequence[Tensor], known_share: float, seed: int) -> Row:
    """Return the attack's figures and the task's, from the same features and the same split."""
    pooled = [x.unsqueeze(0) for x in pool(seen)]  # both classifiers read one vector per text
    attack = make_attack("attribute", seed)
    found, task = (
        attack.run(View(rows=pooled, known=part, groups=texts.groups), Truth(labels=labels))
        for part, labels in (
            (known_part(target, texts.groups, known_share, seed), torch.tensor(target))
            for target in (texts.attribute, texts.labels)
        )
    )
    return {
        **with_interval("auc", found.extra["auc"], found.extra["auc_interval"]),
        **with_interval("accuracy", found.success, found.interval),
        "majority": found.baseline,
        "task_accuracy": task.success,
        "task_low": task.interval[0],
        "task_high": task.interval[1],
        "task_majority": task.baseline,
        "tested": found.tokens,
    }


def table(rows: Sequence[Row]) -> Table:
    """Return means over seeds."""
    shares = ("accuracy", "majority", "task_accuracy", "task_majority")
    return make_table(
        ("data", "k", "mechanism", "eta", "AUC", "accuracy", "majority", "task", "task majority"),
        (
            (
                *key,
                None if eta is None else f"{eta:g}",
                f"{mean(mine, 'auc'):.3f}",
                *(f"{100 * mean(mine, name):.1f} %" for name in shares),
            )
            for (*key, eta), mine in grouped(rows, "data", "k", "mechanism", "eta").items()
        ),
        title="Private attribute from pooled representations, mean over seeds",
        left=4,
    )
