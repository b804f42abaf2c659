"""Multiple-choice tasks as files: YAML in the harness' own format, and JSON lines or CSV beside it.

A task file of lm-evaluation-harness may name Python functions (``!function``), other files, data
sets that bring code, and templates that run in an unprotected Jinja.  A task file here is data: a
few known keys, data files in its own folder, and a prompt that may fill in fields and nothing else.
What is written here also runs under the harness by itself.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsplit import storage
from fedsplit.data.choices import question_of
from fedsplit.errors import ConfigError, DataError
from fedsplit.evaluation.prompts import Prompt

Doc = dict[str, Any]
SUFFIXES = (".jsonl", ".csv", ".json")
MAX_YAML, MAX_DATA = 1 << 16, 1 << 28
METRICS = ("acc", "acc_norm", "acc_bytes", "exact_match")
KEYS = {
    *("task", "dataset_path", "dataset_kwargs", "test_split", "fewshot_split", "output_type"),
    *("doc_to_text", "doc_to_choice", "doc_to_target", "description", "target_delimiter"),
    *("fewshot_delimiter", "num_fewshot", "metric_list", "metadata"),
}
# The harness' own prompts for these data sets, so that figures compare with published ones.
QUESTION = "Question: {{question}}\nAnswer:"
PROMPTS = {"openbookqa": "{{question}}"}


@dataclass(frozen=True)
class LocalTask:
    """One multiple-choice task, read and checked.

    Attributes:
        name: of the task.
        docs: what is asked; each has ``choices`` (texts) and ``answer`` (an index, or all right
            ones).
        examples: for few-shot prompts.
        prompt: the text before the answer.
        metrics: of :data:`METRICS`.
        description: once, before everything.
        target_delimiter: between prompt and answer.
        fewshot_delimiter: between examples.
        shots: examples in the prompt, where the caller does not say.
        source: the file.
    """

    name: str
    docs: tuple[Doc, ...]
    examples: tuple[Doc, ...] = ()
    prompt: Prompt = field(default_factory=lambda: Prompt(QUESTION))
    metrics: tuple[str, ...] = ("acc", "acc_norm")
    description: str = ""
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"
    shots: int = 0
    source: str = ""


def find_tasks(path: str | Path) -> list[LocalTask]:
    """Return the tasks of a YAML file, a data file, or a folder of either.

    Data files without YAML (``NAME_test.jsonl``, ``NAME_train.jsonl``) are read with the prompts
    that :func:`write_tasks` would give them.

    Raises:
        DataError: nothing usable is there, or a file is not what it must be.
    """
    path = Path(path)
    if path.is_file():
        return [read_task(path)] if path.suffix in (".yaml", ".yml") else [_from_data(path)]
    if not path.is_dir():
        raise DataError(f"{path}: must be a task file or a folder of them")
    yamls = sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
    if yamls:
        return [read_task(one) for one in yamls]
    data = [p for p in sorted(path.iterdir()) if p.suffix in SUFFIXES and _split(p) == "test"]
    if not data:
        raise DataError(f"{path}: must hold task files (.yaml) or NAME_test{'|'.join(SUFFIXES)}")
    return [_from_data(one) for one in data]


def write_tasks(data: str | Path, folder: str | Path) -> list[Path]:
    """Make a task of every ``NAME_test`` file in a folder: YAML and JSON lines in a new folder.

    Returns:
        The YAML files.

    Raises:
        DataError: see :func:`find_tasks`; or the folder is in use or cannot be written.
    """
    data, folder = Path(data), Path(folder)
    tests = [p for p in sorted(data.iterdir()) if p.suffix in SUFFIXES and _split(p) == "test"]
    if not tests:
        raise DataError(f"{data}: must hold NAME_test with {', '.join(SUFFIXES)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: must be empty or not there")
    made = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for task in (_from_data(one) for one in tests):
            files = {"test": _write_rows(folder / f"{task.name}_test.jsonl", task.docs)}
            if task.examples:
                name = folder / f"{task.name}_train.jsonl"
                files["train"] = _write_rows(name, task.examples)
            made.append(folder / f"{task.name}.yaml")
            made[-1].write_text(_yaml(task, files), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error}") from None
    return made


def read_task(path: Path) -> LocalTask:
    """Read a YAML task file and its data.

    Raises:
        DataError: names the file and what in it is not as it must be.
    """
    config = _read_yaml(path)
    unknown = sorted(config.keys() - KEYS)
    if unknown:
        raise DataError(f"{path}: key {unknown[0]!r}: must be one of {', '.join(sorted(KEYS))}")
    if config.get("output_type") != "multiple_choice":
        kind = config.get("output_type")
        raise DataError(f"{path}: output_type={kind!r}: must be 'multiple_choice'")
    name = str(config.get("task", ""))
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
        raise DataError(f"{path}: task={name!r}: must be letters, digits, '_', '.', '-'")
    texts = ("description", "target_delimiter", "fewshot_delimiter")
    for key in ("doc_to_text", *texts):
        if not isinstance(config.get(key, ""), str):
            raise DataError(f"{path}: {key}: must be text")
    shots = config.get("num_fewshot") or 0
    if not isinstance(shots, int) or isinstance(shots, bool) or not 0 <= shots <= 100:
        raise DataError(f"{path}: num_fewshot={shots!r}: must be in 0..100")
    splits = {
        split: _read_rows(file, config, path) for split, file in _data_files(path, config).items()
    }
    test, few = config.get("test_split", "test"), config.get("fewshot_split")
    for split in (test, *([few] if few is not None else [])):
        if split not in splits:
            raise DataError(f"{path}: split {split!r}: must be one of {', '.join(splits)}")
    task = LocalTask(
        name=name,
        docs=splits[test],
        examples=splits[few] if few is not None else (),
        prompt=_prompt(path, config, splits[test]),
        metrics=_metrics(path, config.get("metric_list")),
        shots=shots,
        source=str(path),
        **{key: config[key] for key in texts if key in config},
    )
    return _checked(task)


def _prompt(path: Path, config: Mapping[str, Any], docs: Sequence[Doc]) -> Prompt:
    text = config.get("doc_to_text", QUESTION)
    if docs and text in docs[0]:  # the harness reads a bare field's name as that field
        text = f"{{{{{text}}}}}"
    try:
        return Prompt(text)
    except ConfigError as error:
        raise DataError(f"{path}: doc_to_text: {error}") from None


def _checked(task: LocalTask) -> LocalTask:
    if not task.docs:
        raise DataError(f"{task.source}: 0 questions: must be >= 1")
    for doc in (*task.docs, *task.examples):
        try:
            task.prompt.fill(doc)
        except ConfigError as error:
            raise DataError(f"{task.source}: doc_to_text: {error}") from None
    many = any(isinstance(doc["answer"], list) for doc in task.docs)
    wrong = set(task.metrics) - {"exact_match"} if many else set()
    if wrong:
        raise DataError(f"{task.source}: {min(wrong)}: several right answers need exact_match")
    return task


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        # Tags such as !function name code; the safe loader knows none of them.
        config = yaml.safe_load(storage.read_bounded(path, MAX_YAML).decode())
    except storage.FileTooLarge as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: must be a readable UTF-8 file: {error}") from None
    except yaml.constructor.ConstructorError as error:
        tag = re.search(r"tag '?([^' ]+)", str(error))
        shown = tag.group(1) if tag else "a tag"
        raise DataError(f"{path}: {shown}: a task file must not name code") from None
    except yaml.YAMLError as error:
        line = str(error).splitlines()[0]
        raise DataError(f"{path}: must be YAML: {line}") from None
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise DataError(f"{path}: must be a table of named settings")
    return config


def _data_files(path: Path, config: Mapping[str, Any]) -> dict[str, Path]:
    """Return the data file of each split: in the task file's own folder, and nowhere else."""
    if config.get("dataset_path") not in ("json", "csv"):
        raise DataError(
            f"{path}: dataset_path={config.get('dataset_path')!r}: must be 'json' or 'csv' (tasks "
            "on a hub go by the harness' own names)"
        )
    kwargs = config.get("dataset_kwargs")
    files = kwargs.get("data_files") if isinstance(kwargs, dict) else None
    if not isinstance(kwargs, dict) or set(kwargs) != {"data_files"} or not isinstance(files, dict):
        raise DataError(f"{path}: dataset_kwargs: must be data_files: {{SPLIT: FILE}}, no more")
    found = {}
    for split, name in files.items():
        plain = isinstance(name, str) and Path(name).name == name and Path(name).suffix in SUFFIXES
        if not plain or (path.parent / name).is_symlink():
            raise DataError(f"{path}: data_files.{split}={name!r}: must be a file in its folder")
        found[str(split)] = path.parent / name
    return found


def _metrics(path: Path, given: Any) -> tuple[str, ...]:
    if given is None:
        return ("acc", "acc_norm")
    found = []
    for entry in given if isinstance(given, list) else [given]:
        name = entry.get("metric") if isinstance(entry, dict) else None
        # The harness fetches an unknown metric, code and all, from a hub.
        if name not in METRICS or entry.get("aggregation", "mean") != "mean":
            raise DataError(f"{path}: metric {entry!r}: must be the mean of {', '.join(METRICS)}")
        found.append(str(name))
    return tuple(dict.fromkeys(found))


def _read_rows(file: Path, config: Mapping[str, Any], source: Path) -> tuple[Doc, ...]:
    names = {key: config.get(f"doc_to_{key}", default) for key, default in _FIELDS.items()}
    for key, name in names.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise DataError(f"{source}: doc_to_{key}={name!r}: must be a field's name")
    docs = []
    for place, row in rows(file):
        doc: Doc = {k: v for k, v in row.items() if isinstance(v, str | int | float)}
        doc["choices"], doc["answer"] = row.get(names["choice"]), row.get(names["target"])
        docs.append(_check_doc(doc, place))
    return tuple(docs)


_FIELDS = {"choice": "choices", "target": "answer"}


def rows(file: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of a JSON lines, JSON (a list of objects) or CSV file.

    Lists in CSV are JSON texts.

    Raises:
        DataError: the file is missing, too large or malformed; names the line.
    """
    try:
        text = storage.read_bounded(file, MAX_DATA).decode("utf-8-sig")
    except storage.FileTooLarge as error:
        raise DataError(f"{file}: {error.strerror}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: must be a readable UTF-8 file: {error}") from None
    place = str(file)
    try:
        if file.suffix == ".csv":
            for number, row in enumerate(csv.DictReader(text.splitlines()), 2):
                place = f"{file}:{number}"
                yield place, {k: _unpacked(v) for k, v in row.items() if k and v is not None}
            return
        parsed = (
            enumerate(json.loads(text), 1)
            if file.suffix == ".json"
            else (
                (number, json.loads(line))
                for number, line in enumerate(text.splitlines(), 1)
                if line.strip()
            )
        )
        number = 0
        for number, row in parsed:
            place = f"{file}:{number}"
            if not isinstance(row, dict):
                raise DataError(f"{place}: must be an object, not {type(row).__name__}")
            yield place, row
    except (ValueError, RecursionError, csv.Error, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{place}: must be {file.suffix[1:].upper()}: {error}") from None


def _unpacked(value: str) -> Any:
    if value.startswith("["):
        return json.loads(value)
    return int(value) if re.fullmatch(r"\d{1,9}", value) else value


def _check_doc(doc: Doc, place: str) -> Doc:
    choices, answer = doc["choices"], doc["answer"]
    good = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
    if not good or not 1 <= len(choices) <= 100:
        raise DataError(f"{place}: choices={choices!r}: must be 1 to 100 texts, none empty")
    indices = answer if isinstance(answer, list) else [answer]
    inside = all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i < len(choices) for i in indices
    )
    if not indices or not inside:
        raise DataError(f"{place}: answer={answer!r}: must be in 0..{len(choices) - 1}")
    return doc


def _split(path: Path) -> str:
    for split in ("test", "train"):
        if path.stem.endswith(f"_{split}"):
            return split
    return ""


def _from_data(path: Path) -> LocalTask:
    """Read a task from data alone: question with choices and answer, or with answers."""
    stem = path.stem.removesuffix("_test")
    name = re.sub(r"[^A-Za-z0-9_.]+", "_", stem).lower()
    docs = tuple(_question(row, place) for place, row in rows(path))
    train = path.with_name(f"{stem}_train{path.suffix}")
    examples = (
        tuple(_question(row, place) for place, row in rows(train))
        if train != path and train.is_file()
        else ()
    )
    free = any(isinstance(doc["answer"], list) for doc in docs)
    task = LocalTask(
        name=f"{name}_local",
        docs=docs,
        examples=examples,
        prompt=Prompt(PROMPTS.get(name, QUESTION)),
        metrics=("exact_match",) if free else ("acc", "acc_norm"),
        source=str(path),
    )
    return _checked(task)


def _question(row: Mapping[str, Any], place: str) -> Doc:
    answers, question = row.get("answers"), row.get("question")
    if answers is None or "choices" in row:
        asked = question_of(place, row)
        choices = list(asked.choices)
        return _check_doc(
            {"question": asked.question, "choices": choices, "answer": asked.answer}, place
        )
    if not isinstance(question, str) or not question:
        raise DataError(f"{place}: question={question!r}: must be a text")
    if not isinstance(answers, list) or not all(isinstance(a, str) and a for a in answers):
        raise DataError(f"{place}: answers={answers!r}: must be texts, none empty")
    kept: list[str] = []
    # An answer that begins with another right one is greedy only if that one is.
    for answer in sorted(answers):
        if not kept or not answer.startswith(kept[-1]):
            kept.append(answer)
    doc: Doc = {"question": question, "choices": kept, "answer": list(range(len(kept)))}
    return _check_doc(doc, place)


def _write_rows(path: Path, docs: Sequence[Doc]) -> str:
    lines = (json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs)
    path.write_text("".join(lines), encoding="utf-8")
    return path.name


def _yaml(task: LocalTask, files: Mapping[str, str]) -> str:
    import yaml

    config: dict[str, Any] = {
        "task": task.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": dict(files)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": task.prompt.text,
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in task.metrics
        ],
        "metadata": {"version": 1.0},
    }
    if "train" in files:
        config["fewshot_split"] = "train"
    return str(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
