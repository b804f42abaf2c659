"""Loading pretrained models: safetensors only, no remote code, reproducible new heads, a digest."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging as hf_logging

from fedsplit.errors import ConfigError, ModelError, UnsupportedModelError, check
from fedsplit.models.anatomy import probe, text_config
from fedsplit.models.places import place_of
from fedsplit.registry import pick
from fedsplit.seeding import derive_seed
from fedsplit.tasks import Task, task_type

log = logging.getLogger(__name__)

HEADS: dict[str, Any] = {
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "causal-lm": AutoModelForCausalLM,
}
"""Head -> transformers' class of models with it; a task names its own."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be split.

    Attributes:
        model: in evaluation mode, on the device asked for.
        tokenizer: has a pad token (the end-of-sequence token where the checkpoint had none).
        digest: sha256 (hex) of the base model's weights as loaded; see :func:`weights_digest`.
            New heads are left out, so one checkpoint loaded for two tasks has one digest.
        source: what was asked for.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    source: str


def local_tokenizer(folder: str | Path) -> Any:
    """Return the tokenizer of a model folder; nothing is fetched.

    Raises:
        ModelError: the folder has none that can be read.
    """
    with _naming(folder), _quiet():
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    _check_vocabulary(tokenizer, str(folder))
    return tokenizer


def load(
    name_or_path: str | Path,
    task: str,
    *,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attn: str | None = None,
    seed: int = 0,
    dropout: float | None = None,
    expected_sha256: str | None = None,
    revision: str | None = None,
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        name_or_path: a folder, a ``.gguf`` file, a hub name, or ``package:NAME``, see
            :func:`fedsplit.models.places.place_of`.
        task: a row of :data:`fedsplit.tasks.TASKS`.
        num_labels: numbers that a text is answered with; None: the checkpoint's own, or
            ``len(label_names)``.
        label_names: their names, in order of the class index.
        dtype: of the weights.
        device: where the model is put.
        attn: attention implementation (``"eager"``, ``"sdpa"``); None: transformers' choice.
        seed: of a new classification head (same seed, same weights).
        dropout: probability for every dropout of the model; None leaves the checkpoint's.
        expected_sha256: of the folder's ``model.safetensors``, or of the GGUF file; checked before
            loading.
        revision: of a hub model.

    Raises:
        ConfigError: if the task or a value is not a known one.
        UnsupportedModelError: if a causal language model is asked of an encoder-only family.
        ModelError: if there is no such model, it has no safetensors or no tokenizer, a file is
            damaged, weights are missing or of another shape, or the digest differs; names the
            place.
    """
    kind = task_type(task)
    check(dropout is None or 0.0 <= dropout < 1.0, "dropout", dropout, "None or in [0, 1)")
    labels = label_settings(kind, num_labels, label_names)
    found = describe(name_or_path, kind.head, labels, expected_sha256, revision)
    auto, where, tokenizer = found.auto, found.where, found.tokenizer
    options: dict[str, Any] = {"trust_remote_code": False, "revision": revision}
    with _naming(name_or_path), _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "models.loading", "head"))
        model, info = auto.from_pretrained(
            where,
            use_safetensors=True,
            dtype=dtype,
            attn_implementation=attn,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, with the shapes
            **labels,
            **options,
        )
    new = {str(key) for key in info["missing_keys"]}
    _check_complete(model, kind.head, new, str(name_or_path))
    new |= _new_head(model, info["mismatched_keys"], str(name_or_path))
    give_pad_token(model, tokenizer, str(name_or_path))
    if dropout is not None:
        set_dropout(model, dropout)
    digest = weights_digest(model, leave_out=new)
    model = model.to(device).eval()
    return LoadedModel(model, tokenizer, digest, str(name_or_path))


@dataclass(frozen=True)
class Described:
    """What is known of a model before its weights are read.

    Attributes:
        where: folder or hub name to read from, held against its digest.
        auto: transformers' Auto class of the task.
        config: of the model, with the task's labels.
        tokenizer: as it came.
    """

    where: str
    auto: Any
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase


def describe(
    name_or_path: str | Path,
    head: str,
    labels: dict[str, Any],
    expected_sha256: str | None = None,
    revision: str | None = None,
) -> Described:
    """Find a model and read its configuration and tokenizer; see :func:`load`."""
    auto = pick(HEADS, head, "head")
    where = _located(str(name_or_path), expected_sha256)
    options: dict[str, Any] = {"trust_remote_code": False, "revision": revision}
    with _naming(name_or_path), _quiet():
        config = AutoConfig.from_pretrained(where, **labels, **options)
        if head == "causal-lm":
            check_causal(config, str(name_or_path))
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        _check_vocabulary(tokenizer, str(name_or_path))
    return Described(where, auto, config, tokenizer)


def weights_digest(model: PreTrainedModel, *, leave_out: set[str] = frozenset()) -> str:  # type: ignore[assignment]
    """Return the sha256 (hex) over the base model's weights: names, dtypes, shapes and bytes.

    The head is not part of it; nor are the parameters named in ``leave_out`` (as in ``model``).
    """
    base = model.base_model
    prefix = "" if base is model else next(n for n, m in model.named_modules() if m is base) + "."
    sha = hashlib.sha256()
    for name, tensor in sorted(base.state_dict().items()):
        if prefix + name in leave_out:
            continue
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(f"{name}\0{flat.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(memoryview(flat.view(torch.uint8).numpy()))
    return sha.hexdigest()


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every ``nn.Dropout`` of ``model``, and every float ``*drop*`` attribute and setting."""
    holders: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        holders[id(module)] = module
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            holders[id(config)] = config
    # Attention code reads its probability from an attribute or the configuration, not a module.
    for holder in holders.values():
        for name, value in list(vars(holder).items()):
            if "drop" in name and isinstance(value, float):
                setattr(holder, name, probability)


def label_settings(
    task: type[Task], num_labels: int | None, label_names: Sequence[str] | None
) -> dict[str, Any]:
    """Return a classifier's classes as settings of transformers; empty: the checkpoint's own.

    Raises:
        ConfigError: classes of another task, fewer than two, or names of another number.
    """
    if num_labels is None and label_names is None:
        return {}
    check(task.labelled, "num_labels", num_labels, f"None for task {task.name!r}")
    count = num_labels if num_labels is not None else len(label_names or ())
    least = task.outputs_of(2) or 1
    check(count >= least, "num_labels", count, f">= {least}")
    settings: dict[str, Any] = {"num_labels": count}
    if task.problem:
        settings["problem_type"] = task.problem
    if label_names is not None:
        names = [str(name) for name in label_names]
        check(len(names) == count, "label_names", names, f"{count} names, one for each class")
        settings["id2label"] = dict(enumerate(names))
        settings["label2id"] = {name: i for i, name in enumerate(names)}
    return settings


def _located(name: str, expected_sha256: str | None) -> str:
    """Return the folder or hub name to read from, checked against the expected digest."""
    place = place_of(name, sha256=expected_sha256 or "")
    where = name if place is None else str(place.folder)
    if expected_sha256 is not None and (place is None or not place.gguf_sha256):
        _check_file(where, expected_sha256)
    return where


def _check_file(where: str, expected: str) -> None:
    file = Path(where) / "model.safetensors"
    if not file.is_file():
        raise ModelError(f"{file}: expected_sha256 needs this file")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected.lower():
        raise ModelError(f"{file}: sha256 {found}: must be {expected.lower()}")


def check_causal(config: PreTrainedConfig, source: str) -> None:
    """Refuse a model that does not predict a text's next token.

    Raises:
        UnsupportedModelError: names the family, and the task that it is for.
    """
    kind = str(config.model_type)
    bidirectional = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    )
    if bidirectional or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"{source}: model_type={kind!r} is not a decoder: task 'causal-lm' needs one; use "
            "'sequence-classification'"
        )


def _check_complete(model: PreTrainedModel, head: str, new: set[str], source: str) -> None:
    """Check that only a classification head (and its pooler) is missing from a checkpoint."""
    base = model.base_model
    known = {f"{n}." for n, m in model.named_modules() if m is base and n}
    prefix = next(iter(known), "")
    bad = sorted(
        k for k in new if head == "causal-lm" or (k.startswith(prefix) and "pooler" not in k)
    )
    if bad:
        shown = ", ".join(bad[:5]) + (" ..." if len(bad) > 5 else "")
        raise ModelError(f"{source}: {len(bad)} weights are missing from the checkpoint: {shown}")


def _new_head(model: PreTrainedModel, mismatched: Iterable[Any], source: str) -> set[str]:
    """Return the head's weights that were made anew, as the checkpoint's are of another size.

    Raises:
        ModelError: a weight outside the head of a classifier is; names it with both shapes.
    """
    base = model.base_model
    prefix = next((f"{name}." for name, m in model.named_modules() if m is base and name), "")
    found = {}
    for key, there, wanted in mismatched:
        shapes = f"{key}: shape {tuple(there)} in the checkpoint: must be {tuple(wanted)}"
        if not prefix or str(key).startswith(prefix) or not hasattr(model, "num_labels"):
            raise ModelError(f"{source}: {shapes}")
        found[str(key)] = shapes
    if found:
        log.warning(
            "%s: the checkpoint's head is for another number of classes than %d, so a new one is "
            "made (%s)",
            source,
            model.num_labels,
            "; ".join(found.values()),
        )
    return set(found)


def _check_vocabulary(tokenizer: Any, source: str) -> None:
    """Refuse a tokenizer that transformers invents for a model whose tokenizer files are missing.

    It has special tokens alone, so every word would be unknown, and training go on regardless.
    """
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    if not set(tokenizer.get_vocab()) - special:
        raise ModelError(
            f"{source}: the tokenizer has {len(special)} special tokens and no other: the model "
            "must come with its tokenizer's files (tokenizer.json and tokenizer_config.json)"
        )


def give_pad_token(model: PreTrainedModel, tokenizer: Any, source: str) -> None:
    """Give a tokenizer and a model's configuration a pad token where they have none.

    Raises:
        ModelError: there is no end token to take, or the tokenizer has more tokens than the
            embedding has rows.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{source}: the tokenizer has neither a pad nor an eos token")
        tokenizer.pad_token = tokenizer.eos_token
    if text_config(model).pad_token_id is None:
        text_config(model).pad_token_id = tokenizer.pad_token_id
        model.config.pad_token_id = tokenizer.pad_token_id
    rows = getattr(probe(model).input_embeddings, "num_embeddings", None)
    if isinstance(rows, int) and len(tokenizer) > rows:
        raise ModelError(f"{source}: {len(tokenizer)} tokens: must be <= {rows} embedding rows")


@contextmanager
def _naming(source: str | Path) -> Iterator[None]:
    """Turn whatever the readers of config, tokenizer and weights raise into a ModelError."""
    try:
        yield
    except (ModelError, ConfigError, UnsupportedModelError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:500]
        raise ModelError(f"{source}: cannot be loaded ({type(error).__name__}): {text}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars and reports of a new head: what matters is checked and raised here."""
    level = hf_logging.get_verbosity()
    bar = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
