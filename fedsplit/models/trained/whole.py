"""The whole model that a split run trained: base, bottom, top and head in one Hugging Face model.

Guarantee: the model's logits are those of bottom then top; checked on a padded batch before
anything is returned.  LoRA's and IA3's factors are multiplied into the weights, a head that was
tied to an embedding and trained apart from it is untied, bottleneck adapters stay modules beside
the weights (no Hugging Face class has them).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fedsplit.config import ModelConfig, TrainConfig
from fedsplit.errors import ModelError, RunError, UnsupportedModelError
from fedsplit.models.adapters.bottleneck import NAME as BOTTLENECK
from fedsplit.models.adapters.files import save_adapter, save_peft
from fedsplit.models.adapters.lora import saved_name
from fedsplit.models.adapters.method import any_of
from fedsplit.models.adapters.methods import BlockTuning, MethodSettings
from fedsplit.models.adapters.trainable import (
    make_trainable,
    method_options,
    trained_without_head,
)
from fedsplit.models.anatomy import probe, text_config
from fedsplit.models.loading import LoadedModel, load
from fedsplit.models.splitting.equivalence import check_equivalence
from fedsplit.models.splitting.halves import Bottom, Top, split
from fedsplit.models.splitting.heads import Head, detach_head, head_parameters
from fedsplit.models.trained import FILE
from fedsplit.models.trained.weights import (
    NAMES,
    Trained,
    load_owners,
    read_trained,
    usual_settings,
)
from fedsplit.tasks import task_type

ABOUT = "export.json"
PEFT_TASKS = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
}
HEAD, TAIL = "client-head", "client-tail"  # label protections with which owners hold the head


@dataclass
class PeftForm:
    """Adapters of a top in PEFT's own terms, for the whole model.

    Attributes:
        config: PEFT's, with the whole model's module names.
        tensors: by their names below the whole model.
    """

    config: Any
    tensors: dict[str, torch.Tensor]


@dataclass
class WholeModel:
    """What a split run trained, as one model.

    Attributes:
        loaded: the model with everything in it, and the base's tokenizer and digest.
        bottom: what owners ran; shares the model's tensors.
        top: what the server ran.
        settings: of the run, as far as they decide what the tensors mean.
        owners: names of the tensors that owners trained together.
        peft: the top's adapters, if PEFT can express them.
        tuning: bottleneck adapters in the model; None: the run had none.
    """

    loaded: LoadedModel
    bottom: Bottom
    top: Top
    settings: dict[str, str]
    owners: list[str]
    peft: PeftForm | None
    tuning: BlockTuning | None

    def write(self, folder: Path) -> dict[str, Any]:
        """Write ``model/``, ``adapter/`` where there is one, and ``export.json``, which says so.

        Returns:
            The content of ``export.json``.

        Raises:
            RunError: the disk cannot be written.
        """
        about: dict[str, Any] = {
            "base": self.loaded.source,
            "base_digest": self.loaded.digest,
            "settings": self.settings,
            "holders": self.holders(),
            "model": "model",
            "adapter": None,
        }
        model = self.loaded.model
        state = {n: t for n, t in model.state_dict().items() if f".{BOTTLENECK}." not in n}
        try:
            if self.tuning is not None:
                form = save_adapter(self.tuning, model, folder / "adapter", str(folder / "model"))
                about["adapter"] = {"format": form, "on": "model"}
            elif self.peft is not None:
                save_peft(
                    self.peft.config,
                    self.peft.tensors,
                    folder / "adapter",
                    self.loaded.source,
                    task=PEFT_TASKS[self.top.task],
                )
                about["adapter"] = {"format": "peft", "on": self.loaded.source}
            model.save_pretrained(folder / "model", state_dict=state)
            self.loaded.tokenizer.save_pretrained(folder / "model")
            (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {folder}: {error}") from None
        return about

    def holders(self) -> dict[str, str]:
        """Return who trained each part, so whose consent its publication needs."""
        parts = {"bottom": "the base's, as everybody received it", "top": "the server"}
        if any(not name.startswith("head.") for name in self.owners):
            parts["bottom"] = "the owners together (averaged)"
        if any(name.startswith("head.") for name in self.owners):
            parts["head"] = "the owners together (averaged)"
        return parts


def whole_of_run(folder: Path, base: str = "") -> WholeModel:
    """Return the whole model that a split run's folder stands for.

    Args:
        folder: the run's ``output.dir``.
        base: where the base is, if not where the run had it.

    Raises:
        ModelError: the checkpoint is damaged, of another base, or every owner kept a tail of its
            own: there is no one model then.
        UnsupportedModelError: the parts do not go together in one model of this family.
    """
    trained, found = read_trained(folder / FILE)
    settings = usual_settings() | found
    try:
        name, task = base or settings["model.name"], settings["model.task"]
        k, method = int(settings["split.k"]), settings["train.method"]
        labels, protection = int(settings["model.labels"]), settings["labels.protection"]
        digest = settings["base"]
        train = TrainConfig(
            method=method,
            lora_rank=int(settings["train.lora-rank"]),
            lora_alpha=float(settings["train.lora-alpha"]),
            lora_targets=settings["train.lora-targets"],
            lora_form=settings["train.lora-form"],
        )
    except (KeyError, ValueError) as error:
        raise ModelError(f"{folder / FILE}: does not say what it belongs to: {error}") from None
    about = ModelConfig(task=task, labels=labels, label_names=settings[NAMES])
    names = task_type(task).of(about).announced(about) if task_type(task).named else ()
    loaded = load(
        name, task, num_labels=task_type(task).outputs_of(labels), label_names=names or None
    )
    if loaded.digest != digest:
        raise ModelError(f"{name}: digest {loaded.digest}: must be {digest}, the run's base")
    parts, tail = protection.split("+"), 0
    if TAIL in parts:
        if settings.get("labels.tail-weights") == "own":
            raise ModelError(f"{folder}: every owner kept its own last blocks: there is no whole")
        tail = int(settings["labels.tail-blocks"])
    apart = TAIL in parts or HEAD in parts
    return assemble(loaded, trained, k, train, tail=tail if apart else None, settings=settings)


def assemble(
    loaded: LoadedModel,
    trained: Trained,
    k: int,
    train: TrainConfig,
    *,
    tail: int | None = None,
    settings: Mapping[str, str] | None = None,
) -> WholeModel:
    """Put what was trained into a base model.

    Args:
        loaded: the base; changed in place.
        trained: a split run's checkpoint.
        k: blocks in the bottom.
        train: what of the top was trained.
        tail: last blocks that owners held beside the head; None: the head was the server's.
        settings: of the run, to be told again.

    Raises:
        ModelError: ``trained`` does not fit the base and method.
        UnsupportedModelError: the parts do not go together in one model of this family.
    """
    model = loaded.model
    bottom, top = split(model, k, verify=False)
    head = None if tail is None else detach_head(top, blocks=tail, share=True)
    in_head = head_parameters(top)
    head_names = {n for n, p in top.model.named_parameters() if id(p) in in_head}
    trainable = make_trainable(top, train.method, **method_options(train))
    if head is not None:
        trainable = trained_without_head(trainable)
    trainable.load(trained.top)
    load_owners(trained.owners, bottom, head)
    injected = getattr(top.model, "peft_config", None)
    peft = None
    if injected and not tail and all(n.startswith("head.") for n in trained.owners):
        peft = _peft_form(top, injected["default"], head_names)
    blocks = list(probe(top.model).blocks)
    owners = {id(m) for block in blocks[len(blocks) - (tail or 0) :] for m in block.modules()}
    for layer in list(top.model.modules()):
        # What the server's method added to blocks that the owners ran was in no forward pass.
        if id(layer) not in owners and hasattr(layer, "base_layer") and hasattr(layer, "merge"):
            merge: Any = layer.merge
            merge()
    _give_copies_back(model, top)
    tuning = _bottlenecks(model, top, tail or 0) if train.method == "adapter" else None
    check_equivalence(model, bottom, top if head is None else _Above(top, head))
    return WholeModel(
        loaded, bottom, top, dict(settings or {}), sorted(trained.owners), peft, tuning
    )


class _Above(nn.Module):
    """What ran above the bottom where owners held the head, or a tail."""

    def __init__(self, top: Top, head: Head) -> None:
        super().__init__()
        self.top, self.head = top, head

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Map (B, T, d) to logits."""
        states = self.top.hidden_states(hidden, mask, tail=self.head.blocks)
        logits: torch.Tensor = self.head(states, mask)
        return logits


def whole_name(top: Top, name: str) -> str:
    """Return the whole model's name of a parameter or module of ``top.model``."""
    path = probe(top.model).blocks_path + "."
    if not name.startswith(path):
        return name
    number, _, rest = name.removeprefix(path).partition(".")
    return f"{path}{int(number) + top.k}.{rest}"


def _give_copies_back(model: PreTrainedModel, top: Top) -> None:
    """Put what the top had a copy of, and trained apart from the bottom's, into the whole."""
    own = {id(p) for p in model.parameters()}
    named = dict(model.named_parameters(remove_duplicate=False))
    outputs = probe(model).output_embeddings
    for name, parameter in top.model.named_parameters(remove_duplicate=False):
        place = whole_name(top, name)
        if id(parameter) in own or place not in named or torch.equal(named[place], parameter):
            continue
        if outputs is None or model.get_submodule(place.rpartition(".")[0]) is not outputs:
            raise UnsupportedModelError(
                f"{place}: both halves hold it and trained it apart: no one model has both"
            )
        outputs.weight = nn.Parameter(parameter.detach().clone())
        for config in (model.config, text_config(model)):
            config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}


def _bottlenecks(model: PreTrainedModel, top: Top, tail: int) -> BlockTuning:
    anatomy = probe(model)
    blocks = {
        f"{anatomy.blocks_path}.{i}.": anatomy.blocks[i]
        for i in range(top.k, anatomy.num_layers - tail)
    }
    named = {whole_name(top, n): p.detach() for n, p in top.model.named_parameters()}
    inside = tuple(f"{prefix}{BOTTLENECK}." for prefix in blocks)
    state = {name: tensor for name, tensor in named.items() if name.startswith(inside)}
    width = next(len(t) for n, t in state.items() if n.endswith("down.bias"))
    tuning = BlockTuning(model, blocks, MethodSettings("bottleneck", width=width))
    tuning.load(state)
    for block in blocks.values():
        block.train(False)
    return tuning


def _peft_form(top: Top, injected: Any, head: set[str]) -> PeftForm:
    """Return a top's LoRA or IA3 as PEFT would save it for the whole model."""
    layers = {n for n, m in top.model.named_modules() if hasattr(m, "base_layer")}
    targets = sorted(whole_name(top, name) for name in layers)
    settings: dict[str, Any] = {name: getattr(injected, name) for name in _fields(injected)}
    settings["target_modules"] = any_of(targets)
    if "feedforward_modules" in settings:
        inner = sorted(
            whole_name(top, n) for n in layers if top.model.get_submodule(n).is_feedforward
        )
        settings["feedforward_modules"] = any_of(inner) if inner else []
    tensors = {
        saved_name(whole_name(top, name)): parameter.detach().clone()
        for name, parameter in top.model.named_parameters()
        if ".lora_" in name or ".ia3_" in name
    }
    if top.task != "causal-lm":
        settings["modules_to_save"] = sorted({whole_name(top, n).rpartition(".")[0] for n in head})
        tensors |= {
            whole_name(top, n): p.detach().clone()
            for n, p in top.model.named_parameters()
            if n in head
        }
    return PeftForm(type(injected)(**settings), tensors)


def _fields(injected: Any) -> tuple[str, ...]:
    """Return the settings of an injected adapter that say what it computes."""
    common = ("fan_in_fan_out",)
    lora = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias")
    return (*common, *lora) if hasattr(injected, "r") else (*common, "feedforward_modules")
