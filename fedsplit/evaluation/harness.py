"""Tasks through lm-evaluation-harness: local task files, and its own names with a hub.

The harness builds prompts and metrics; the likelihoods are ours
(:mod:`fedsplit.evaluation.likelihood`).  Of a 0/1 metric the interval is Wilson's over questions.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsplit.errors import ConfigError, DataError, FedsplitError, check
from fedsplit.evaluation.likelihood import Likelihood
from fedsplit.evaluation.task_files import Doc, LocalTask
from fedsplit.statistics import mean_half_width, wilson_interval

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: its name.
        metric: such as ``acc`` (highest summed log-likelihood) or ``acc_norm`` (the same per
            character of the answer).
        value: the mean over questions.
        interval: 95 % interval over questions; None where the harness gives only an aggregate.
        n: questions.
        chance: of guessing among the choices; None where there is no such thing.
        shots: examples in the prompt.
    """

    task: str
    metric: str
    value: float
    interval: tuple[float, float] | None
    n: int
    chance: float | None
    shots: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        low_high = None if self.interval is None else list(self.interval)
        return {**vars(self), "interval": low_high}


def run_tasks(
    likelihood: Likelihood,
    tokenizer: Any,
    tasks: Sequence[LocalTask | str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[TaskScore]:
    """Evaluate a model on tasks.

    Args:
        likelihood: of the model.
        tokenizer: the model's.
        tasks: local ones, and names that the harness knows (their data come from a hub).
        limit: first so many questions of each task; none: all.
        shots: examples in each prompt; none: each task's own number.
        seed: of which examples.
        progress: called with (done, all) continuations.

    Raises:
        ConfigError: the harness is not installed, a name is unknown, a number out of range.
        DataError: a task's data cannot be had.
    """
    check(limit is None or limit >= 1, "limit", limit, ">= 1 (questions) or none")
    check(shots is None or 0 <= shots <= 100, "shots", shots, "in 0..100")
    names = [t if isinstance(t, str) else t.name for t in tasks]
    check(len(names) >= 1, "tasks", names, "at least one")
    twice = sorted({n for n in names if names.count(n) > 1})
    check(not twice, "tasks", twice, "each named once")
    evaluator = _evaluator()
    from fedsplit.evaluation.harness_model import HarnessModel

    with _quiet():
        ready = _ready(tasks, shots, seed)
        try:
            found = evaluator.evaluate(
                HarnessModel(likelihood, tokenizer, progress),
                ready,
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        except ValueError as error:  # a task that runs code, needs pictures, has no questions ...
            if isinstance(error, FedsplitError):
                raise
            raise ConfigError(
                f"tasks {', '.join(names)}: refused by the harness: {error}"
            ) from None
    return _scores(found, ready["tasks"])


def _ready(tasks: Sequence[LocalTask | str], shots: int | None, seed: int) -> dict[str, Any]:
    """Return the harness' own form of the tasks, ready to run."""
    made: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    hub = [t for t in tasks if isinstance(t, str)]
    if hub:
        for part, content in _from_hub(hub).items():
            made.setdefault(part, {}).update(content)
    for task in tasks:
        if isinstance(task, LocalTask):
            made["tasks"][task.name] = _configured(task)
    for name, task in made["tasks"].items():
        own = task.get_config("num_fewshot")
        count = shots if shots is not None and own != 0 else own or 0
        if count and isinstance(task.fewshot_docs(), Docs) and len(task.fewshot_docs()) <= count:
            raise DataError(f"{name}: {len(task.fewshot_docs())} examples: must be > shots={count}")
        task.set_config(key="num_fewshot", value=count)
        task.set_fewshot_seed(seed=seed)
    return made


class Docs(list[Doc]):
    """Questions as the harness wants a data set: a list that names its columns."""

    @property
    def features(self) -> Mapping[str, None]:
        """The columns."""
        return dict.fromkeys(self[0] if self else ())


def _configured(task: LocalTask) -> Any:
    from lm_eval.api.task import ConfigurableTask

    def prompt(doc: Doc) -> str:
        return task.prompt.fill(doc)

    splits = {"test": Docs(task.docs)}
    if task.examples:
        splits["train"] = Docs(task.examples)
    # Functions of ours instead of templates: the harness would render those unprotected.
    return ConfigurableTask(
        config={
            "task": task.name,
            "custom_dataset": lambda **_: splits,
            "test_split": "test",
            "fewshot_split": "train" if task.examples else None,
            "output_type": "multiple_choice",
            "doc_to_text": prompt,
            "doc_to_choice": _choices,
            "doc_to_target": _answer,
            "description": task.description.replace("{", "").replace("}", ""),
            "target_delimiter": task.target_delimiter,
            "fewshot_delimiter": task.fewshot_delimiter,
            # None: the caller may choose; the harness takes a 0 in a task as final.
            "num_fewshot": task.shots or None,
            "metric_list": [
                {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in task.metrics
            ],
        }
    )


def _choices(doc: Doc) -> list[str]:
    return list(doc["choices"])


def _answer(doc: Doc) -> Any:
    return doc["answer"]


def _from_hub(names: list[str]) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    known = set(manager.all_tasks)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(
            f"task={unknown[0]!r}: must be a task file, a folder of them, or a task of the harness"
        )
    try:
        return dict(manager.load(names))
    except Exception as error:  # whatever a data set's reader raises; all of it ends the same way
        text = str(error).strip().splitlines() or [""]
        raise DataError(
            f"task {', '.join(names)}: its data cannot be had ({type(error).__name__}: {text[0]}); "
            "without a hub use local task files"
        ) from error


def _scores(found: Any, tasks: Mapping[str, Any]) -> list[TaskScore]:
    scores = []
    for name, samples in found["samples"].items():
        shots = int(tasks[name].get_config("num_fewshot") or 0) if name in tasks else 0
        first = samples[0]
        filters = {s["filter"] for s in samples}
        chosen = [s for s in samples if s["filter"] == min(filters)]
        for metric in first["metrics"]:
            values = [s[metric] for s in chosen]
            plain = all(isinstance(v, bool | int | float | np.number) for v in values)
            if plain:
                mean, interval = mean_interval(np.asarray(values, dtype=np.float64))
            else:  # pairs that only the harness' own aggregation understands
                mean = float(found["results"][name].get(f"{metric},{min(filters)}", math.nan))
                interval = None
            chance = None
            if metric.startswith("acc"):
                chance = float(np.mean([_guess(s) for s in chosen]))
            scores.append(TaskScore(name, metric, mean, interval, len(values), chance, shots))
    return scores


def _guess(sample: Mapping[str, Any]) -> float:
    return 1.0 / max(1, len(sample["arguments"]))


def mean_interval(
    values: np.ndarray[Any, np.dtype[np.float64]],
) -> tuple[float, tuple[float, float]]:
    """Return the mean and its 95 % interval: Wilson's for 0 and 1, else Student's.

    A single value that is neither has the interval of that value alone.
    """
    n, mean = len(values), float(values.mean())
    if bool(np.isin(values, (0.0, 1.0)).all()):
        return mean, wilson_interval(mean, n)
    if n < 2:
        return mean, (mean, mean)
    half = mean_half_width(values)
    return mean, (mean - half, mean + half)


def _evaluator() -> Any:
    try:
        from lm_eval import evaluator
    except ImportError as error:
        raise ConfigError(
            f"tasks: lm-evaluation-harness is needed ({error}): pip install 'fedsplit[evaluate]'"
        ) from None
    return evaluator


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and remarks of the harness: progress is shown by the caller."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
