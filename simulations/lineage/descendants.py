"""Descendants of a base model: made once, kept in the run's folder, read back if the run resumes.

Every recipe really runs on real text: full fine-tuning, LoRA merged into the weights, further
training on other text at a higher rate, a vocabulary extended and trained, pruning, quantisation.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedsplit import storage
from fedsplit.data import docstrings as docstring_source
from fedsplit.data.table import Request
from fedsplit.emulators.lm import divergence, logits_of
from fedsplit.errors import ConfigError, check
from fedsplit.fingerprints.evasion.editor import Editor
from fedsplit.fingerprints.evasion.transforms import pruning
from fedsplit.models.anatomy import probe
from fedsplit.models.loading import LoadedModel, load
from fedsplit.models.modes import evaluating
from fedsplit.seeding import derive_seed, torch_generator

CHARACTERS = 600_000
HELD_OUT = 0.1
MADE = "made.json"


@dataclass(frozen=True)
class Training:
    """How long and how hard a model is trained.

    Attributes:
        steps: optimizer steps (AdamW, ten steps of warm-up, gradients clipped at 1).
        lr: learning rate.
        batch: windows in a step.
        length: tokens in a window.
        seed: of the windows drawn.
    """

    steps: int = 150
    lr: float = 3e-4
    batch: int = 8
    length: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.steps >= 0, "steps", self.steps, ">= 0")
        check(0 < self.lr < 1, "lr", self.lr, "in (0, 1)")
        check(self.batch >= 1, "batch", self.batch, ">= 1 (windows)")
        check(self.length >= 2, "length", self.length, ">= 2 (tokens)")


class Windows:
    """One text as windows of ``length`` tokens: random ones to train on, fixed held-out ones.

    The last tenth of the text is held out; ``seed`` is that of the random windows.

    Raises:
        ConfigError: if the text has too few tokens.
    """

    def __init__(self, tokenizer: Any, text: str, length: int, seed: int) -> None:
        cut = int(len(text) * (1 - HELD_OUT))
        self.text, self.length = text, length
        self.train, self.held_out = (
            torch.tensor(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])
            for part in (text[:cut], text[cut:])
        )
        for name, ids in (("training", self.train), ("held-out", self.held_out)):
            check(len(ids) > 2 * length, f"{name} tokens", len(ids), f"> {2 * length}")
        self._generator = torch_generator(seed, "lineage-windows")

    def batch(self, count: int) -> Tensor:
        """Return random training windows, (count, length)."""
        starts = torch.randint(
            0, len(self.train) - self.length, (count,), generator=self._generator
        )
        return self.train[starts[:, None] + torch.arange(self.length)]

    def perplexity(self, model: nn.Module, windows: int = 32) -> float:
        """Return exp of the mean held-out loss (nats per token), on evenly spaced windows."""
        most = len(self.held_out) - self.length
        starts = torch.linspace(0, most, windows).long()
        ids = self.held_out[starts[:, None] + torch.arange(self.length)]
        with torch.no_grad():
            losses = [
                float(cast(Any, model)(input_ids=part, labels=part).loss)
                for part in torch.split(ids, 16)
            ]
        return math.exp(min(50.0, sum(losses) / len(losses)))


def train(
    model: nn.Module,
    windows: Windows,
    plan: Training,
    *,
    parameters: Iterable[nn.Parameter] | None = None,
    penalty: Callable[[], Tensor] | None = None,
    teacher: nn.Module | None = None,
    after: Callable[[int], None] | None = None,
) -> None:
    """Train ``parameters`` (None: everything) in place.

    The loss is that of the next token; with a ``teacher`` it is the divergence from the teacher's
    next-token distribution (distillation, Hinton et al. 2015, arXiv 1503.02531).  ``penalty`` is
    added to every step's loss; ``after`` is called with the steps done, after each.
    """
    trained = [p for p in (parameters or model.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.lr, weight_decay=0.0)
    model.train()
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * min(1.0, (step + 1) / 10)
        ids = windows.batch(plan.batch)
        if teacher is None:
            loss = cast(Any, model)(input_ids=ids, labels=ids).loss
        else:
            with evaluating(teacher), torch.no_grad():
                target = logits_of(teacher, ids)
            loss = divergence(target, logits_of(model, ids))
        if penalty is not None:
            loss = loss + penalty()
        optimizer.zero_grad()
        torch.autograd.backward([loss])
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if after is not None:
            after(step + 1)
    model.eval()


class _LowRank(nn.Module):
    """W -> W + 2 B A with B = 0 at first: LoRA as a parametrisation, so that removing it merges."""

    def __init__(self, shape: tuple[int, int], rank: int, generator: torch.Generator) -> None:
        super().__init__()
        first = torch.randn(rank, shape[1], generator=generator) / math.sqrt(shape[1])
        self.a = nn.Parameter(first)
        self.b = nn.Parameter(torch.zeros(shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 2.0 * self.b @ self.a


def train_lora(model: Any, windows: Windows, plan: Training, rank: int = 8) -> None:
    """Train rank-``rank`` updates of every matrix inside the blocks and merge them."""
    generator = torch_generator(plan.seed, "lineage-lora")
    layers: list[Any] = [
        m for m in probe(model).blocks.modules() if getattr(getattr(m, "weight", 0), "ndim", 0) == 2
    ]
    model.requires_grad_(False)
    for layer in layers:
        adapter = _LowRank(tuple(layer.weight.shape), rank, generator)
        parametrize.register_parametrization(layer, "weight", adapter)
    own = [p for n, p in model.named_parameters() if n.endswith((".a", ".b"))]
    train(model, windows, plan, parameters=own)
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    model.requires_grad_(True)


def quantise(model: Any, bits: int, group: int = 32) -> None:
    """Round every matrix inside the blocks to ``bits`` bits, symmetric, a scale per group.

    Raises:
        ConfigError: for bits outside 2 ... 8.
    """
    check(2 <= bits <= 8, "bits", bits, "in 2..8")
    most = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for parameter in probe(model).blocks.parameters():
            if parameter.dim() != 2:
                continue
            size = group if parameter.shape[1] % group == 0 else parameter.shape[1]
            grouped = parameter.view(parameter.shape[0], -1, size)
            scale = grouped.abs().amax(2, keepdim=True).clamp_min(1e-12) / most
            parameter.copy_(((grouped / scale).round() * scale).view_as(parameter))


def extend_vocabulary(model: Any, tokenizer: Any, text: str, count: int = 64) -> int:
    """Add the text's most frequent long words as tokens of their own; return how many."""
    known = tokenizer.get_vocab()
    words = Counter(re.findall(r"[A-Za-z]{5,}", text)).most_common(4 * count)
    new = [word for word, _ in words if word not in known][:count]
    added = int(tokenizer.add_tokens(new))
    rows = max(model.get_input_embeddings().num_embeddings, len(tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(0, "lineage-vocabulary"))
        model.resize_token_embeddings(rows, mean_resizing=False)
    return added


@dataclass(frozen=True)
class Texts:
    """What descendants are trained on: ``tuning`` for most, ``other`` for further training."""

    tuning: str
    other: str


RATES = {"lora": 2.0, "further-trained": 3.0}
"""Learning rate of a recipe, in units of the plan's."""


@dataclass(frozen=True)
class Recipe:
    """One way to make a descendant: its relation, and what is done to a copy of the base."""

    relation: str
    make: Callable[[LoadedModel, Windows, Training], None]


def _further(loaded: LoadedModel, windows: Windows, plan: Training) -> None:
    train(loaded.model, windows, replace(plan, steps=2 * plan.steps))


def _vocabulary(loaded: LoadedModel, windows: Windows, plan: Training) -> None:
    extend_vocabulary(loaded.model, loaded.tokenizer, windows.text)
    train(loaded.model, Windows(loaded.tokenizer, windows.text, plan.length, plan.seed), plan)


def _pruned(loaded: LoadedModel, _w: Windows, _p: Training) -> None:
    pruning(Editor(loaded.model), torch_generator(0, "pruning"), share=0.3)


RECIPES: dict[str, Recipe] = {
    "fine-tuned": Recipe("fine-tuned", lambda loaded, w, p: train(loaded.model, w, p)),
    "lora": Recipe("lora", lambda loaded, w, p: train_lora(loaded.model, w, p)),
    "further-trained": Recipe("further-trained", _further),
    "vocabulary": Recipe("vocabulary", _vocabulary),
    "pruned": Recipe("pruned", _pruned),
    "quantised-8": Recipe("quantised", lambda loaded, _w, _p: quantise(loaded.model, 8)),
    "quantised-4": Recipe("quantised", lambda loaded, _w, _p: quantise(loaded.model, 4)),
}


class ModelStore:
    """Models made in this run's folder, each whole or not there at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def keep(
        self, name: str, settings: Mapping[str, Any], make: Callable[[], tuple[LoadedModel, Any]]
    ) -> tuple[LoadedModel, dict[str, Any]]:
        """Return the model ``name`` and its facts (JSON), made unless kept with ``settings``."""
        path = self.folder / name
        wanted = json.loads(json.dumps(dict(settings)))
        found = _facts(path / MADE)
        if found is None or found["settings"] != wanted:
            loaded, facts = make()
            weights = {n: p.detach().contiguous() for n, p in loaded.model.named_parameters()}
            found = {"settings": wanted, "facts": facts}
            with storage.new_folder(path, mode=0o777) as draft:
                loaded.model.config.save_pretrained(draft)
                save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
                loaded.tokenizer.save_pretrained(draft)
                (draft / MADE).write_text(json.dumps(found, indent=2) + "\n")
                shutil.rmtree(path, ignore_errors=True)
        return load(path, "causal-lm"), dict(found["facts"])

    def descendant(
        self, base: Path, name: str, texts: Texts, plan: Training
    ) -> tuple[LoadedModel, dict[str, Any]]:
        """Make or read the descendant ``name`` (a row of :data:`RECIPES`) of a base."""

        def make() -> tuple[LoadedModel, dict[str, Any]]:
            loaded = load(base, "causal-lm")
            text = texts.other if name == "further-trained" else texts.tuning
            windows = Windows(loaded.tokenizer, text, plan.length, plan.seed)
            before = windows.perplexity(loaded.model)
            RECIPES[name].make(loaded, windows, replace(plan, lr=rate * plan.lr))
            facts: dict[str, Any] = {"perplexity_before": before}
            if name != "vocabulary":  # its tokens are others, so a perplexity per token says little
                facts["perplexity_after"] = windows.perplexity(loaded.model)
            return loaded, facts

        digest, rate = load(base, "causal-lm").digest, RATES.get(name, 1.0)
        size = len(texts.tuning), len(texts.other)
        settings = {"base": digest, "recipe": name, "text": size, "rate": rate, **asdict(plan)}
        return self.keep(f"{base.name}-{name}", settings, make)


def _facts(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"settings", "facts"} <= found.keys() else None


def read_texts(tuning: str = "", other: str = "") -> Texts:
    """Read text files; by default the second half of the standard library's docstrings, its code.

    Raises:
        ConfigError: if a file cannot be read.
    """
    prose = _file("text", tuning) if tuning else docstrings(second=True)
    code = _file("other", other) if other else _source_code()
    return Texts(prose[:CHARACTERS], code[:CHARACTERS])


def _file(option: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"options.{option}={path!r}: must be a text file: {error}") from error


def docstrings(*, second: bool) -> str:
    """Return one half of the standard library's docstrings, a line each (every other one)."""
    texts = docstring_source.read(Request(label_column=""), "train").texts
    return "\n".join(texts[int(second) :: 2])


def _source_code() -> str:
    parts: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if sum(map(len, parts)) > CHARACTERS:
            break
        parts.append(path.read_text(encoding="utf-8", errors="replace"))
    return "\n".join(parts)
