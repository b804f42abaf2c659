"""The head as two more files of a bundle, for an owner that keeps it (U-shape).

``head.json`` says where the final hidden states enter, ``head.safetensors`` holds the weights.  The
family's code is laid out from the bundle's own ``config.json``; as with the bottom, nothing in the
files is executed or can name code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from fedsplit.errors import FedsplitError, ModelError
from fedsplit.models.anatomy import probe
from fedsplit.models.bundle.bottom import (
    FORMAT,
    MAX_LAYERS,
    Bundle,
    _check_about,
    _check_shapes,
    _fill,
    _tensors,
    lay_out_whole,
    shipped_config,
)
from fedsplit.models.bundle.bounded_json import dump_json, parse_json
from fedsplit.models.modes import evaluating
from fedsplit.models.splitting.equivalence import padded_batch, relative_difference
from fedsplit.models.splitting.halves import Upper
from fedsplit.models.splitting.heads import Head
from fedsplit.models.splitting.structure import Pass, Slot, ZeroEmbedding, cut

HEAD_FILES = ("head.json", "head.safetensors")
AUTO: dict[str, Any] = {
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "causal-lm": AutoModelForCausalLM,
}
MAX_CLASSES = 100_000
MAX_WIDTH = 1 << 20


def with_head(bundle: Bundle, head: Head) -> Bundle:
    """Return ``bundle`` with the files of ``head``; its digest covers them.

    Args:
        bundle: of the bottom that was cut from the same model.
        head: from :func:`fedsplit.models.splitting.heads.detach_head`.

    Raises:
        ModelError: if an owner could not rebuild the head from the files.
    """
    about = {
        "format": FORMAT,
        "task": head.task,
        "labels": head.num_labels,
        "source": head.source,
        "tuple_length": head.tuple_length,
        "width": head.hidden_size,
    }
    if head.blocks:
        about |= {"blocks": head.blocks, "config": shipped_config(head.model)}
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in _tensors(head.model).items()}
    known = _tensors(_lay_out_head(bundle, about)).keys()
    tensors = {n: t for n, t in tensors.items() if n in known}
    files = {"head.json": dump_json(about), "head.safetensors": safetensors.torch.save(tensors)}
    whole = Bundle({**bundle.files, **files})
    _check_same(head, unpack_head(whole))
    return whole


def without_head(bundle: Bundle) -> Bundle:
    """Return the bottom's files alone: what a representation depends on."""
    return Bundle({n: b for n, b in bundle.files.items() if n not in HEAD_FILES})


def unpack_head(source: Bundle | str | Path) -> Head | None:
    """Rebuild the head of a bundle in float32, on the CPU, in evaluation mode.

    Args:
        source: a bundle or the folder of one.  May be hostile: everything is checked.

    Returns:
        The head, every float parameter marked as trainable; None if the bundle has none.

    Raises:
        ModelError: if anything is not as it must be; names the file and the bound.
    """
    bundle = source if isinstance(source, Bundle) else Bundle.load(source)
    present = [name for name in HEAD_FILES if name in bundle.files]
    if not present:
        return None
    if len(present) != len(HEAD_FILES):
        raise ModelError(f"bundle: must hold both of {', '.join(HEAD_FILES)} or neither")
    about = parse_json("head.json", bundle.files["head.json"])
    model = _lay_out_head(bundle, about)
    try:
        tensors = safetensors.torch.load(bundle.files["head.safetensors"])
    except Exception as error:
        raise ModelError(f"head.safetensors: not a safetensors file: {error}") from error
    try:
        _check_shapes(model, tensors)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ModelError(f"{name}: must be finite")
        if not any(t.is_floating_point() for t in tensors.values()):
            raise ModelError("0 weights: must be >= 1")
        _fill(model, tensors)
        torch.nn.Module.to(model, torch.float32)  # transformers' own .to() has no useful types
        return _attach(model, about)
    except FedsplitError as error:
        reason = str(error).replace("bottom.safetensors: ", "")
        raise ModelError(f"head.safetensors: {reason}") from error
    except Exception as error:
        raise ModelError(f"head.json: no head runs from it: {error}") from error


def _lay_out_head(bundle: Bundle, about: Mapping[str, Any]) -> PreTrainedModel:
    _check_head(about)
    bottom = parse_json("fedsplit.json", bundle.files["fedsplit.json"])
    _check_about(bottom)
    config = parse_json("config.json", bundle.files["config.json"])
    changes = {} if about.get("labels") is None else {"num_labels": about["labels"]}
    blocks = about.get("blocks", 0)
    if blocks:
        config, bottom = about["config"], bottom | {"k": blocks - 1}
    whole = lay_out_whole(config, bottom, AUTO[about["task"]], **changes)
    own = list(probe(whole).blocks)
    inside: list[torch.nn.Module] = own if blocks else [Pass(own[-1], about["tuple_length"])]
    model = cut(whole, inside, slice(-len(inside), None))
    embedding = probe(model).input_embeddings
    assert isinstance(embedding, torch.nn.Embedding), "verified by probe"
    model.set_input_embeddings(ZeroEmbedding(embedding))
    names = {name for name, _ in model.named_modules()}
    source = about.get("source")
    if source is not None and source not in names:
        raise ModelError(f"head.json: source={source!r}: must be a module of this family")
    return model


def _attach(model: PreTrainedModel, about: Mapping[str, Any]) -> Head:
    slot = Slot()
    source = about.get("source")
    if source is None:
        probe(model).blocks[0].register_forward_pre_hook(slot.before, with_kwargs=True)
    else:
        model.get_submodule(source).register_forward_hook(slot.after)
    head = Head(model, slot)
    head.hidden_size, head.source = about["width"], source
    head.tuple_length, head.blocks = about["tuple_length"], about.get("blocks", 0)
    head.learn_outputs()
    if head.num_labels != about.get("labels") or head.task != about["task"]:
        raise ModelError(f"{head.num_labels} classes: must be the announced {about['labels']}")
    return head.eval()


def _check_head(about: Mapping[str, Any]) -> None:
    def number(key: str, low: int, high: int) -> None:
        value = about.get(key)
        if type(value) is not int or not low <= value <= high:
            raise ModelError(f"head.json: {key}={value!r}: must be an integer in {low}..{high}")

    if about.get("format") != FORMAT:
        raise ModelError(f"head.json: format={about.get('format')!r}: must be {FORMAT}")
    if not isinstance(about.get("task"), str) or about["task"] not in AUTO:
        raise ModelError(f"head.json: task={about.get('task')!r}: must be one of {', '.join(AUTO)}")
    number("tuple_length", 0, 8)
    number("width", 1, MAX_WIDTH)
    if "blocks" in about:
        number("blocks", 1, MAX_LAYERS)
        if not isinstance(about.get("config"), dict):
            raise ModelError("head.json: config: must be an object where there are blocks")
    if about["task"] == "causal-lm":
        if about.get("labels") is not None:
            raise ModelError("head.json: labels: must be null for a language model")
    else:
        number("labels", 1, MAX_CLASSES)
    source = about.get("source")
    if source is not None and not (isinstance(source, str) and 0 < len(source) <= 200):
        raise ModelError("head.json: source: must be null or a module's name")


def _check_same(head: Head, again: Upper | None) -> None:
    assert again is not None
    mask = padded_batch(1, torch.device("cpu"))[1]
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(*mask.shape, head.hidden_size, generator=generator)
    with evaluating(head), torch.no_grad():
        expected, got = head(hidden, mask), again(hidden, mask)
    bound = 1e-4 if next(head.parameters()).dtype == torch.float32 else 3e-2
    if expected.shape != got.shape or not relative_difference(expected, got) <= bound:
        raise ModelError(f"{type(head.model).__name__}: its head cannot be rebuilt from a bundle")
