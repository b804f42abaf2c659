"""A tuned model's answers beside labels: of a split run's folder, or of what it was exported to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from fedsplit.config import ModelConfig, RunConfig
from fedsplit.data import (
    DATASETS,
    TextDataset,
    load_dataset,
    names_digest,
    only_split,
    parse_class_names,
)
from fedsplit.errors import ConfigError, DataError, ModelError, UnsupportedModelError, check
from fedsplit.models.positions import learned_positions
from fedsplit.models.trained import FILE, SERVER, server_folder
from fedsplit.models.trained.whole import ABOUT, whole_of_run
from fedsplit.owners.samples import Samples, tokenise_set
from fedsplit.owners.split.schedule import evaluation_steps
from fedsplit.registry import pick
from fedsplit.statistics import wilson_interval
from fedsplit.sums import add_up
from fedsplit.tasks import Task, task_of, task_type

BATCH = 16
USUAL_TOKENS = 512
_TOKENS = "model.max-tokens"


@dataclass(frozen=True)
class Labelled:
    """Where texts and labels are, as ``data.*`` of a run has it.

    Attributes:
        path: file, folder or hub name.
        kind: a row of :data:`fedsplit.data.DATASETS`; empty: what the task's data usually is.
        text_column, label_column, delimiter, header: see :class:`fedsplit.data.table.Request`.
        split: of a folder; empty: the one to test on, or the only one.
        classes: the owners' own names of the classes, where the run announced none.
        limit: first texts; 0: all.
    """

    path: str
    kind: str = ""
    text_column: str = "text"
    label_column: str = "label"
    delimiter: str = ""
    header: bool = True
    split: str = ""
    classes: str = ""
    limit: int = 0


@dataclass(frozen=True)
class TunedModel:
    """A whole model and what its run said of it."""

    source: str
    model: Any
    tokenizer: Any
    settings: ModelConfig


def tuned_model(place: str, base: str = "", max_tokens: int = 0) -> TunedModel:
    """Return the model of a split run's folder, or of a folder of ``fedsplit export``.

    Args:
        place: the folder, an experiment's that has it as ``server/``, or the ``model`` in it.
        base: where a run's base is now; empty: where the run had it.
        max_tokens: longest text; 0: the run's, else the model's positions, 512 at most.

    Raises:
        ModelError: it is neither, or damaged.
        ConfigError: a base for an exported model, or more tokens than the model has positions.
    """
    named = Path(place).expanduser()
    if (run := server_folder(named, FILE)) is not None:
        whole = whole_of_run(run, base)
        loaded, settings = whole.loaded, whole.settings
    else:
        exported = server_folder(named, ABOUT)
        if exported is None and named.name == "model" and (named.parent / ABOUT).is_file():
            exported = named.parent
        if exported is None:
            raise ModelError(
                f"{place}: must be a split run's folder ({FILE}, in it or in its {SERVER}/) or one "
                f"that `fedsplit export` wrote ({ABOUT}), to be evaluated with --data"
            )
        if base:
            raise ConfigError(f"--base: must not be given with {place}, which has the whole model")
        loaded, settings = _exported(exported)
    about = _settings(settings, place)
    most = learned_positions(loaded.model)
    tokens = max_tokens or int(settings.get(_TOKENS) or min(most or USUAL_TOKENS, USUAL_TOKENS))
    check(most is None or tokens <= most, "--max-tokens", tokens, f"<= {most}, its positions")
    about = replace(about, max_tokens=tokens)
    model: Any = loaded.model
    return TunedModel(place, model.eval(), loaded.tokenizer, about)


def _exported(folder: Path) -> tuple[Any, dict[str, str]]:
    """Return (model and tokenizer, the run's settings) of an exported folder."""
    from fedsplit.models.adapters.files import attach_saved
    from fedsplit.models.loading import load

    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        settings = {str(k): str(v) for k, v in about["settings"].items()}
        task, adapter = settings["model.task"], about.get("adapter") or {}
        on_model = adapter.get("on") == "model"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / ABOUT}: cannot be read: {error!r:.200}") from None
    loaded = load(folder / "model", task)
    if on_model:  # bottleneck adapters: no Hugging Face class has them
        attach_saved(loaded.model, folder / "adapter")
    return loaded, settings


def _settings(found: dict[str, str], place: str) -> ModelConfig:
    try:
        return ModelConfig(
            task=found["model.task"],
            labels=int(found["model.labels"]),
            label_names=found.get("model.label-names", ""),
            label_range=found.get("model.label-range", ""),
        )
    except (KeyError, ValueError) as error:
        raise ModelError(f"{place}: does not say what it answers: {error!r}") from None


def read_labelled(data: Labelled, settings: ModelConfig) -> tuple[TextDataset, Task, Sequence[str]]:
    """Return (texts with labels, the task, what its labels mean) for a model's settings.

    Raises:
        ConfigError: an unknown kind, classes that are not the run's, or a task without labels.
        DataError: see :func:`fedsplit.data.load_dataset`.
    """
    if data.classes:
        check(task_type(settings.task).named, "--classes", data.classes, "left out: no classes")
        names = parse_class_names(data.classes, "--classes")
        known = parse_class_names(settings.label_names, "model.label-names")
        count = settings.labels
        check(len(names) == count, "--classes", data.classes, f"{count} names, as the run's")
        good = not known or names_digest(names) == names_digest(known)
        check(good, "--classes", data.classes, f"left out, or the run's: {', '.join(known)}")
        settings = replace(settings, label_names=settings.label_names or data.classes)
    task = task_of(RunConfig(model=settings))
    if not task.labelled and task.form != "choices":
        raise ConfigError(
            f"--data: must be left out with model.task={task.name}, which has no labels: use "
            "--text and --tasks"
        )
    terms = task.agreed(settings, "")
    column = task.column(terms)
    kind = data.kind or {"words": "tagged", "choices": "choices"}.get(task.form, "file")
    pick(DATASETS, kind, "--data-kind")
    found = load_dataset(
        kind,
        path=data.path,
        split=data.split or only_split(kind, data.path),
        text_column=data.text_column,
        label_column=data.label_column if column is not None else "",
        delimiter=data.delimiter,
        header=data.header,
        column=column,
    ).within(terms)
    if data.limit:
        found = found.select(range(min(data.limit, len(found))))
    return found, task, terms


def measure_labelled(tuned: TunedModel, data: Labelled) -> dict[str, Any]:
    """Return loss and scores of a model's answers, JSON-able.

    The scores equal those of scikit-learn, scipy and seqeval on all predictions together; a
    regression's are cut to the range first, as answers are.

    Raises:
        As :func:`read_labelled`.
    """
    texts, task, names = read_labelled(data, tuned.settings)
    most = tuned.settings.max_tokens
    samples = tokenise_set(tuned.tokenizer, texts, task=task, max_tokens=most, every_choice=True)
    loss, count, right, told = 0.0, 0, 0, True
    sums: dict[str, float] = {}
    pooled: list[tuple[Tensor, Tensor]] = []
    together = None if samples.choices is None else samples.choices.sizes
    for step in evaluation_steps(len(samples), BATCH // 2, together):
        slots = [int(slot) for slot in step]
        scores, targets = _scores(tuned.model, task, samples, slots)
        if not task.per_token:
            pooled.append((scores, targets))
        parts, about = [samples.target_count(s) for s in slots], samples.about(slots)
        sums = add_up([sums, task.count(scores, targets, parts, about)])
        averaged = task.averaged(about)
        if averaged is not None:
            own = torch.tensor(averaged).repeat_interleave(torch.tensor(parts))
            scores, targets = scores[own], targets[own]
        loss += float(task.losses(scores, targets).double().sum())
        hits = task.right(scores, targets)
        told = hits is not None
        right += 0 if hits is None else int(hits.sum())
        count += len(targets)
    if not count:
        raise DataError(f"{data.path}: 0 targets: must be >= 1")
    found: dict[str, Any] = {"texts": len(texts), "targets": count, "loss": loss / count}
    if told:
        found["accuracy"] = right / count
        if not task.per_token:
            found["accuracy-interval"] = list(wilson_interval(right / count, count))
    found |= task.scores(sums)
    if pooled:
        exact = task.exact(*(torch.cat(side) for side in zip(*pooled, strict=True)))
        for key in exact:
            found.pop(f"{key}-error", None)
        found |= exact
    cut = sum(length >= most for length in samples.lengths)
    return {
        "task": task.name,
        "max-tokens": most,
        "at-max-tokens": cut,
        "names": list(names) if task.named else [],
        "headline": task.metric,
        "scores": found,
    }


def _scores(
    model: nn.Module, task: Task, samples: Samples, slots: list[int]
) -> tuple[Tensor, Tensor]:
    """Return (rows of output that have a target, targets) of some texts."""
    own = [samples.ids[slot] for slot in slots]
    pad = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
    ids = nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(one) for one in own])
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    with torch.inference_mode():
        rows = model(input_ids=ids, attention_mask=mask).logits.float()
    if task.per_token:
        rows = rows[mask.bool()]
    keep, targets = samples.targets_of(slots)
    rows = rows if keep is None else rows[keep]
    if task.outputs is not None and rows.shape[1] != task.outputs:
        raise UnsupportedModelError(
            f"model with {rows.shape[1]} outputs: must be {task.outputs}, as its run said"
        )
    return task.bounded(rows), targets


def tables(found: dict[str, Any]) -> list[Table]:
    """Return a measurement for people: one figure a row, and one row a class."""
    scores, digits = dict(found["scores"]), 4
    low_high = scores.pop("accuracy-interval", None)
    title = f"{found['task']}, {scores.pop('texts')} texts"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    first = found["headline"]
    for key in sorted(scores, key=lambda name: name != first):
        value = scores[key]
        if isinstance(value, list):
            continue
        shown = f"{value:.{digits}f}" if isinstance(value, float) else f"{value:,}"
        if key == "accuracy" and low_high is not None:
            shown += f"\n{low_high[0]:.{digits}f} to {low_high[1]:.{digits}f}"
        table.add_row(key, shown)
    return [table, *_by_class(found["names"], scores)]


def _by_class(names: list[str], scores: dict[str, Any]) -> list[Table]:
    columns = {
        {"recalls": "recall", "precisions": "precision", "entity-f1-by-type": "entity-F1"}[k]: v
        for k, v in scores.items()
        if k in ("recalls", "precisions", "entity-f1-by-type")
    }
    if not columns:
        return []
    rows = names
    if "entity-F1" in columns:
        from fedsplit.entities import types_of

        rows = list(types_of(names))
    table = Table("", *columns)
    for number, name in enumerate(rows):
        table.add_row(name, *(f"{values[number]:.4f}" for values in columns.values()))
    return [table]
