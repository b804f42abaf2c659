"""What of a top is trained: everything, the head, or a small part of each block.

Every method starts as the identity: a freshly made trainable top computes what the top computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedsplit.config import TrainConfig
from fedsplit.config.groups import LORA_FORMS
from fedsplit.errors import ConfigError, check, one_of
from fedsplit.models.adapters.bottleneck import add_adapters
from fedsplit.models.adapters.lora import check_targets, chosen_projections
from fedsplit.models.adapters.method import any_of, load_named
from fedsplit.models.anatomy import probe
from fedsplit.models.splitting.halves import Top
from fedsplit.models.splitting.heads import head_parameters
from fedsplit.registry import pick
from fedsplit.seeding import derive_seed


@dataclass(frozen=True)
class PlainOptions:
    """Options of "all", "head" and "bitfit": none but the common seed (unused by them)."""

    seed: int = 0


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank updates of every projection inside the blocks (peft).

    Attributes:
        rank: of each update.
        alpha: the update is scaled by alpha / rank.
        dropout: on the update's input, in training.
        targets: last parts of the names of the projections that get one, separated by commas;
            empty: all.
        form: ``lora``, ``rslora`` (scaled by alpha over the root of the rank, arXiv 2312.03732) or
            ``dora`` (arXiv 2402.09353).
        seed: of the down projections (the up projections start at zero).
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = ""
    form: str = "lora"
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("form", self.form, LORA_FORMS)
        check(isinstance(self.rank, int) and self.rank >= 1, "rank", self.rank, "an integer >= 1")
        check(self.alpha > 0, "alpha", self.alpha, "> 0")
        check(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")


@dataclass(frozen=True)
class AdapterOptions:
    """A residual bottleneck after each block: h + up(gelu(down(norm(h)))).

    Attributes:
        width: of the bottleneck.
        seed: of the down projections (the up projections start at zero).
    """

    width: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        good = isinstance(self.width, int) and self.width >= 1
        check(good, "width", self.width, "an integer >= 1")


class Trainable:
    """The trainable part of a top; everything else in it is frozen.

    Attributes:
        top: the top itself (with whatever modules the method added).
        method: name of the method.
    """

    def __init__(self, top: Top, method: str) -> None:
        self.top = top
        self.method = method
        self._named = {n: p for n, p in top.named_parameters() if p.requires_grad}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield name and parameter, each tied tensor once; names are the top's."""
        yield from self._named.items()

    def parameters(self) -> list[nn.Parameter]:
        """Return what an optimizer should update."""
        return list(self._named.values())

    @property
    def share(self) -> float:
        """Trainable parameters as a fraction of the top's, both counted once."""
        total = sum(p.numel() for p in self.top.parameters())
        return sum(p.numel() for p in self._named.values()) / total

    def state(self) -> dict[str, Tensor]:
        """Return copies on the CPU of the trainable tensors, by name, and of nothing else."""
        return {n: p.detach().to("cpu", copy=True) for n, p in self._named.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the trainable tensors from :meth:`state` of an equal top; all of them or none.

        Raises:
            ModelError: if a name is missing or unknown, or a tensor has another shape, is not
                floating point or not finite.
        """
        load_named(self._named, state, "state", f"names of method {self.method!r}")


def make_trainable(top: Top, method: str, **options: Any) -> Trainable:
    """Freeze ``top`` but for what ``method`` trains; adds the method's modules to it.

    Args:
        top: changed in place.
        method: a row of :data:`TRAINABLE`.  A classifier's head is trained by every method; a
            language model's by "all" and "head" only (and its bias, if any, by "bitfit").
        **options: fields of the method's options class.

    Raises:
        ConfigError: if method or option is unknown or out of range, the top already carries
            adapters, or the method finds nothing to train in it.
        UnsupportedModelError: if the head cannot be told from the rest.
    """
    row = pick(TRAINABLE, method, "trainable")
    known = {f.name for f in fields(row.options)}
    for name in options:
        check(name in known, f"{method} option", name, f"one of {', '.join(sorted(known))}")
    settings = row.options(**options)
    if getattr(top, "_adapted", None):
        raise ConfigError(f"trainable={method!r}: the top already carries {top._adapted!r}")
    head = head_parameters(top)
    used = used_parameters(top)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(settings.seed, "models.trainable", method))
        chosen = row.choose(top, settings, head, used)
    if row.adds:
        object.__setattr__(top, "_adapted", method)
        if top.task != "causal-lm":
            chosen |= head
    for parameter in top.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    result = Trainable(top, method)
    if not result.parameters():
        raise ConfigError(f"trainable={method!r}: {type(top.model).__name__} has nothing to train")
    return result


def method_options(train: TrainConfig) -> dict[str, Any]:
    """Return the options of a run's method, as its settings say."""
    if train.method != "lora":
        return {}
    return {
        "rank": train.lora_rank,
        "alpha": train.lora_alpha,
        "dropout": train.lora_dropout,
        "targets": train.lora_targets,
        "form": train.lora_form,
    }


def trained_without_head(trainable: Trainable) -> Trainable:
    """Return what the server trains where the head is the owners'."""
    head = head_parameters(trainable.top)
    for parameter in trainable.parameters():
        parameter.requires_grad_(id(parameter) not in head)
    return Trainable(trainable.top, trainable.method)


def used_parameters(top: Top) -> set[int]:
    """Return the ids of the parameters from which the top's logits are computed.

    All of the blocks' count: which experts of a mixture run depends on the data.
    """
    return top.learn_outputs() | {id(p) for p in probe(top.model).blocks.parameters()}


def _all(top: Top, options: PlainOptions, head: set[int], used: set[int]) -> set[int]:
    return {id(p) for p in top.parameters() if p.is_floating_point()} & used


def _head(top: Top, options: PlainOptions, head: set[int], used: set[int]) -> set[int]:
    return set(head)


def _bitfit(top: Top, options: PlainOptions, head: set[int], used: set[int]) -> set[int]:
    biases = {id(p) for n, p in top.named_parameters() if n.endswith("bias")} & used
    inside = {id(p) for p in probe(top.model).blocks.parameters()}
    if not biases & inside:
        raise ConfigError(
            f"trainable='bitfit': the blocks of {type(top.model).__name__} have no biases; "
            "use lora, ia3 or adapter"
        )
    return biases | (head if top.task != "causal-lm" else set())


def _lora(top: Top, options: LoraOptions, head: set[int], used: set[int]) -> set[int]:
    from peft import LoraConfig

    return _inject(
        top,
        lambda targets: LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,  # type: ignore[arg-type]
            lora_dropout=options.dropout,
            target_modules=any_of(targets),
            fan_in_fan_out=_transposed(top, targets),
            bias="none",
            use_rslora=options.form == "rslora",
            use_dora=options.form == "dora",
        ),
        options.targets,
    )


def _ia3(top: Top, options: PlainOptions, head: set[int], used: set[int]) -> set[int]:
    from peft import IA3Config

    def config(targets: list[str]) -> Any:
        # As in the paper (Liu et al. 2022, eq. 1-2): the FFN's inner activation is rescaled, so its
        # down projection is scaled at the input; the others at the output.
        inner = [t for t in targets if _inputs(top.model.get_submodule(t)) > top.hidden_size]
        return IA3Config(
            target_modules=any_of(targets),
            feedforward_modules=any_of(inner) if inner else [],
            fan_in_fan_out=_transposed(top, targets),
        )

    return _inject(top, config)


def _adapter(top: Top, options: AdapterOptions, head: set[int], used: set[int]) -> set[int]:
    return add_adapters(probe(top.model).blocks, top.hidden_size, options.width)


def _inject(top: Top, make_config: Callable[[list[str]], Any], wanted: str = "") -> set[int]:
    """Let peft replace the projections inside the blocks; return the ids of what it added.

    Args:
        top: changed in place.
        make_config: names of the projections -> peft's settings.
        wanted: last parts of their names, separated by commas; empty: all of them.
    """
    from peft import inject_adapter_in_model

    anatomy = probe(top.model)
    targets = [
        f"{anatomy.blocks_path}.{name}"
        for name, module in anatomy.blocks.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    if not targets:
        raise ConfigError(f"{type(top.model).__name__}: its blocks hold no nn.Linear or Conv1D")
    check_targets(targets, wanted, "train.lora-targets")
    targets = chosen_projections(targets, wanted)
    before = {id(p) for p in top.parameters()}
    inject_adapter_in_model(make_config(targets), top.model)
    return {id(p) for p in top.parameters()} - before


def _transposed(top: Top, targets: list[str]) -> bool:
    return all(isinstance(top.model.get_submodule(t), Conv1D) for t in targets)


def _inputs(module: nn.Module) -> int:
    matrix = module.weight
    assert isinstance(matrix, Tensor)
    return int(matrix.shape[0] if isinstance(module, Conv1D) else matrix.shape[1])


@dataclass(frozen=True)
class Method:
    """One way to train a top.

    Attributes:
        options: dataclass of its settings.
        choose: (top, options, ids of head parameters, ids of used parameters) -> ids to train.
        adds: whether it adds modules to the blocks.
    """

    options: type[Any]
    choose: Callable[[Top, Any, set[int], set[int]], set[int]]
    adds: bool


TRAINABLE: dict[str, Method] = {
    "all": Method(PlainOptions, _all, adds=False),
    "head": Method(PlainOptions, _head, adds=False),
    "bitfit": Method(PlainOptions, _bitfit, adds=False),
    "lora": Method(LoraOptions, _lora, adds=True),
    "ia3": Method(PlainOptions, _ia3, adds=True),
    "adapter": Method(AdapterOptions, _adapter, adds=True),
}
