"""Settings and outcome of an importance run, and both on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.emulators.compression.structure import Model
from fedsplit.emulators.importance.harmonizer import Harmonizer, make_harmonizers
from fedsplit.emulators.importance.replace_policy import REWARDS
from fedsplit.emulators.pair_files import MAX_JSON, read_pair, write_pair
from fedsplit.emulators.planning.plan import check_fraction
from fedsplit.errors import ConfigError, ModelError, check, one_of
from fedsplit.models.bundle.bounded_json import parse_json
from fedsplit.models.loading import weights_digest

NAME = "importance"
OBJECTIVES = ("fidelity", "loss")


@dataclass(frozen=True)
class ImportanceSettings:
    """How an importance run goes.

    Attributes:
        steps: gradient steps of the harmonizers.
        batch_size: token blocks in a step, and in a reward.
        group: adjacent blocks in a group.
        replace: share of each group replaced in a draw (rounded; never the whole model).
        width: of the harmonizers; 0: d/8.
        lr: of the harmonizers (Adam), falling linearly to a tenth.
        rl_every: gradient steps between score updates.
        rl_draws: subsets K compared in one update, on one batch of D^V.
        rl_lr: step of the scores.
        objective: what harmonizers learn and draws are judged by: "fidelity", KL(full || replaced)
            over the next token, or "loss", the language-model loss as ScaleOT has it.  Harmonizers
            that may lower the loss learn D^T's domain, most of all next to the head, and the
            scores then call those blocks unimportant whose harmonizers learned most of it.
        reward: "exp", exp(-loss) as IST has it, whose size depends on the loss (use an rl_lr of
            the order of exp(loss)), or "standardised": (-loss_k - mean) / std, whose size does not.
        hidden_weight: weight of matching each harmonizer's output to its block's on the same
            input, mean(((T - S) / rms(T))^2); 0: off, and the blocks need not run.
        cost_batches: batches of D^V on which each block's cost is measured at the end; 0: none.
        bf16: autocast to bfloat16 (the frozen model and the harmonizers stay as they are).
        seed: of draws, batches and harmonizers.
    """

    steps: int = 400
    batch_size: int = 8
    group: int = 4
    replace: float = 0.5
    width: int = 0
    lr: float = 2e-3
    rl_every: int = 10
    rl_draws: int = 3
    rl_lr: float = 1.0
    objective: str = "fidelity"
    reward: str = "standardised"
    hidden_weight: float = 0.0
    cost_batches: int = 4
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("batch_size", 1),
            ("group", 2),
            ("width", 0),
            ("rl_every", 1),
            ("rl_draws", 2),
            ("cost_batches", 0),
        ):
            value = getattr(self, name)
            check(type(value) is int and value >= least, name, value, f"an integer >= {least}")
        check_fraction("replace", self.replace)
        check(self.replace > 0, "replace", self.replace, "> 0")
        check(self.lr > 0, "lr", self.lr, "> 0")
        check(self.rl_lr > 0, "rl_lr", self.rl_lr, "> 0")
        check(self.hidden_weight >= 0, "hidden_weight", self.hidden_weight, ">= 0")
        one_of("objective", self.objective, OBJECTIVES)
        one_of("reward", self.reward, REWARDS)


@dataclass
class Importance:
    """The outcome of an importance run.

    Attributes:
        scores: (L,) a high score means "keep this block".
        harmonizers: one for each block, trained.
        settings: of the run.
        base_digest: of the model it was made with.
        step: gradient steps done; ``settings.steps`` when finished.
        history: (step, training loss) every ``rl_every`` steps.
        costs: (L,) KL(full || the model with this block alone replaced), in nats a token of D^V
            with the trained harmonizers; empty before the run's end.  What scores estimate from
            rewards of draws, measured (ours): no noise of draws, and comparable between groups.
    """

    scores: tuple[float, ...]
    harmonizers: list[Harmonizer]
    settings: ImportanceSettings
    base_digest: str
    step: int
    history: list[tuple[int, float]]
    costs: tuple[float, ...] = ()


def named_harmonizers(harmonizers: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """Return the parameters as "<position>.<name>"."""
    return {f"{i}.{n}": p for i, h in enumerate(harmonizers) for n, p in h.named_parameters()}


def settings_of(about: Mapping[str, Any]) -> ImportanceSettings:
    """Read the settings in a saved run.

    Raises:
        ModelError: if they are not settings.
    """
    raw = about.get("settings")
    known = {f.name for f in fields(ImportanceSettings)}
    if not isinstance(raw, dict) or set(raw) != known:
        raise ModelError(f"{NAME}.json: settings={raw!r}: must have the keys {sorted(known)}")
    try:
        return ImportanceSettings(**raw)
    except (TypeError, ConfigError) as error:
        raise ModelError(f"{NAME}.json: {error}") from error


def save_importance(
    importance: Importance, folder: str | Path, extra: Mapping[str, Tensor] | None = None
) -> None:
    """Write an importance run: ``importance.json`` and ``importance.<step>.safetensors``."""
    named = named_harmonizers(importance.harmonizers)
    tensors = {f"harmonizer.{n}": p.detach() for n, p in named.items()}
    tensors["scores"] = torch.tensor(importance.scores, dtype=torch.float64)
    about = {
        "format": 1,
        "step": importance.step,
        "layers": len(importance.scores),
        "scores": list(importance.scores),
        "settings": asdict(importance.settings),
        "base_digest": importance.base_digest,
        "history": [list(x) for x in importance.history[-4096:]],
        "costs": list(importance.costs),
    }
    write_pair(Path(folder), NAME, {**tensors, **(extra or {})}, about)


def load_importance(
    folder: str | Path, model: Model, *, base_digest: str | None = None
) -> Importance:
    """Read an importance run of ``model``.

    Raises:
        ModelError: if a file is damaged, or the run was made with another base.
    """
    tensors, about = read_pair(Path(folder), NAME)
    settings = settings_of(about)
    digest = weights_digest(model) if base_digest is None else base_digest
    return importance_of(
        tensors, about, make_harmonizers(model, settings.width, settings.seed), digest
    )


def load_scores(path: str | Path, model: Model, *, base_digest: str | None = None) -> Importance:
    """Read scores and costs of an importance run of ``model``, without its harmonizers.

    The file is the run's ``importance.json``, alone: a few kilobytes that choose A and the blocks
    to be replaced.  The harmonizers are new, each the identity (its block dropped), so an emulator
    that replaces blocks must settle them.

    Raises:
        ModelError: if the file is damaged, of a run that has measured no costs, or of another base
            or another number of blocks.
    """
    path = Path(path)
    if not path.is_file() or path.stat().st_size > MAX_JSON:
        raise ModelError(f"{path}: must be a file of at most {MAX_JSON} bytes")
    about = parse_json(path.name, path.read_bytes())
    settings = settings_of(about)
    if type(about.get("step")) is not int:
        raise ModelError(f"{path}: step={about.get('step')!r}: must be an integer")
    digest = weights_digest(model) if base_digest is None else base_digest
    new = make_harmonizers(model, settings.width, settings.seed)
    tensors = {f"harmonizer.{n}": p.detach() for n, p in named_harmonizers(new).items()}
    for name in ("scores", "costs"):
        values = about.get(name)
        good = isinstance(values, list) and len(values) == len(new)
        if not good or not all(type(v) in (int, float) and math.isfinite(v) for v in values or ()):
            raise ModelError(f"{path}: {name}: must be {len(new)} finite numbers")
    tensors["scores"] = torch.tensor(about["scores"], dtype=torch.float64)
    return importance_of(tensors, {**about, "history": []}, new, digest)


def importance_of(
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    harmonizers: list[Harmonizer],
    base_digest: str,
) -> Importance:
    """Fill ``harmonizers`` from a saved run and return it.

    Raises:
        ModelError: if it is of another base, or a tensor is missing or of another shape.
    """
    if about.get("base_digest") != base_digest:
        raise ModelError(
            f"{NAME}.json: base_digest={about.get('base_digest')!r}: must be this model's "
            f"{base_digest!r}"
        )
    scores = tensors.get("scores")
    if scores is None or scores.shape != (len(harmonizers),):
        raise ModelError(f"scores: must be a tensor ({len(harmonizers)},)")
    with torch.no_grad():
        for name, parameter in named_harmonizers(harmonizers).items():
            tensor = tensors.get(f"harmonizer.{name}")
            if tensor is None or tensor.shape != parameter.shape:
                shape = None if tensor is None else tuple(tensor.shape)
                raise ModelError(
                    f"harmonizer.{name}: shape {shape}: must be {tuple(parameter.shape)}"
                )
            parameter.copy_(tensor)
    history = [(int(a), float(b)) for a, b in about.get("history", [])]
    costs = tuple(float(x) for x in about.get("costs", []))
    if len(costs) not in (0, len(harmonizers)):
        raise ModelError(f"{NAME}.json: costs: {len(costs)}: must be {len(harmonizers)} or none")
    return Importance(
        tuple(scores.tolist()),
        harmonizers,
        settings_of(about),
        base_digest,
        int(about["step"]),
        history,
        costs,
    )
