"""``fedsplit evaluate``: perplexity and multiple-choice accuracy of a model or a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedsplit import storage
from fedsplit.commands.options import check_output
from fedsplit.observe.console import console


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(evaluate)
    app.command("make-tasks")(make_tasks)


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="a model's folder, an emulator's, or a run's of split or offsite tuning"
        ),
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="task file, folder of them or of data, or a name of the harness"),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text for the perplexity")] = None,
    adapter: Annotated[
        str, typer.Option(help="put on the model: a PEFT folder or a run's adapters.safetensors")
    ] = "",
    base: Annotated[str, typer.Option(help="with a run's folder: the full model")] = "",
    limit: Annotated[int, typer.Option(help="first N questions and text windows; 0: all")] = 0,
    shots: Annotated[int, typer.Option(help="examples in the prompt; -1: the task's own")] = -1,
    window: Annotated[int, typer.Option(help="longest context of the perplexity, tokens")] = 512,
    seed: Annotated[int, typer.Option(help="of which examples are shown")] = 0,
    data: Annotated[
        str, typer.Option(help="texts with labels, for a split run's or an exported folder")
    ] = "",
    data_kind: Annotated[
        str, typer.Option(help="file, tagged, choices, hub; default: by the run's task")
    ] = "",
    text_column: Annotated[str, typer.Option(help="with --data; several with commas")] = "text",
    label_column: Annotated[str, typer.Option(help="with --data")] = "label",
    delimiter: Annotated[str, typer.Option(help="of CSV files in --data; default: found")] = "",
    header: Annotated[
        bool, typer.Option(help="whether CSV files in --data begin with their columns' names")
    ] = True,
    split: Annotated[str, typer.Option(help="of a folder in --data; default: to test on")] = "",
    classes: Annotated[
        str, typer.Option(help="names of the classes, where only the owners named them")
    ] = "",
    max_tokens: Annotated[
        int, typer.Option(help="longest text of --data; 0: the run's model.max-tokens")
    ] = 0,
    out: Annotated[Path | None, typer.Option(help="also write the figures as JSON")] = None,
) -> None:
    """Measure how good a model is: one of its own, or what a split or offsite run tuned.

    An offsite run's folder gives the papers' columns, a split run's the model that it tuned (a
    language model). With --data: loss and scores of what a split run tuned, on texts with labels.
    Nothing is fetched unless the model or a task is asked for by a hub's name.
    """
    from fedsplit.commands.evaluation.subjects import is_local, subjects
    from fedsplit.errors import check

    check_output("--out", out)
    check(limit >= 0, "--limit", limit, ">= 0")
    check(shots >= -1, "--shots", shots, ">= 0, or -1")
    check(max_tokens >= 0, "--max-tokens", max_tokens, ">= 0")
    asked = bool(tasks) or text is not None
    check(asked or bool(data), "--tasks, --text, --data", (tasks, text, data), "at least one")
    if data:
        check(not asked, "--data", data, "without --tasks and --text, which are for texts alone")
        check(not adapter, "--adapter", adapter, "left out with --data")
        from fedsplit.commands.evaluation.labels import (
            Labelled,
            measure_labelled,
            tables,
            tuned_model,
        )

        given = Labelled(
            data,
            data_kind,
            text_column,
            label_column,
            delimiter,
            header,
            split,
            classes,
            limit,
        )
        found = measure_labelled(tuned_model(model, base, max_tokens), given)
        for table in tables(found):
            console.print(table)
        if out is not None:
            _write(out, {"schema": 1, "model": model, "data": vars(given), **found})
        return
    local = [t for t in tasks or [] if Path(t).expanduser().exists()]
    if len(local) == len(tasks or []) and is_local(model) and (not base or is_local(base)):
        # Before transformers and datasets are imported: they read these once.
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
            os.environ.setdefault(name, "1")
    from fedsplit.evaluation.task_files import find_tasks

    chosen: list[Any] = []
    for name in tasks or []:
        chosen += find_tasks(Path(name).expanduser()) if name in local else [name]
    words = None if text is None else read_text(text, "--text")
    settings = {
        "limit": limit,
        "shots": shots,
        "window": window,
        "seed": seed,
        "text": None if text is None else str(text),
        "tasks": tasks or [],
    }
    rows = []
    for subject in subjects(model, adapter, base):
        rows.append(_measure(subject, chosen, words, settings))
    console.print(_table(rows))
    if out is not None:
        _write(out, {"schema": 1, "settings": settings, "models": rows})


def make_tasks(
    data: Annotated[Path, typer.Argument(help="folder with NAME_test.jsonl (NAME_train.jsonl)")],
    folder: Annotated[Path, typer.Argument(help="new folder for the task files")],
) -> None:
    """Make task files for `evaluate --tasks` (and for the harness itself) from question files.

    A row is question, choices, answer (an index); or question, answers (all that are right).
    """
    from fedsplit.evaluation.task_files import write_tasks

    for path in write_tasks(data, folder):
        console.print(str(path), highlight=False, soft_wrap=True)


def _measure(
    subject: Any, tasks: list[Any], words: str | None, settings: dict[str, Any]
) -> dict[str, Any]:
    from fedsplit.evaluation.harness import run_tasks
    from fedsplit.evaluation.likelihood import Likelihood
    from fedsplit.evaluation.perplexity import text_ids, text_loss

    limit = settings["limit"] or None
    row: dict[str, Any] = {
        "label": subject.label,
        "source": subject.source,
        "parameters": subject.parameters,
        "text": None,
        "tasks": [],
    }
    with console.status(f"{subject.label} ...") as status:
        if words is not None:
            ids = text_ids(subject.tokenizer, [words])
            found = text_loss(subject.model, ids, window=settings["window"], blocks=limit)
            row["text"] = found.to_json()
        if tasks:
            likelihood = Likelihood(subject.model)

            def show(done: int, whole: int) -> None:
                status.update(f"{subject.label}: {done} of {whole} answers")

            scores = run_tasks(
                likelihood,
                subject.tokenizer,
                tasks,
                limit=limit,
                shots=None if settings["shots"] < 0 else settings["shots"],
                seed=settings["seed"],
                progress=show,
            )
            row["tasks"] = [score.to_json() for score in scores]
            row["prefix_cache"] = likelihood.cached
    return row


def _table(rows: list[dict[str, Any]]) -> Table:
    """Measures as rows, models as columns."""
    table = Table(title="95 % intervals below each figure", title_justify="left")
    table.add_column("")
    for row in rows:
        table.add_column(row["label"], justify="right")
    table.add_row("parameters", *(f"{r['parameters'] / 1e6:.2f} M" for r in rows))
    if all(r["text"] for r in rows):
        table.add_row("perplexity", *(f"{r['text']['perplexity']:.2f}" for r in rows))
        table.add_row("nats a token", *(_figure(r["text"], "nats_per_token", 3) for r in rows))
    for number, score in enumerate(rows[0]["tasks"]):
        chance = "" if score["chance"] is None else f", chance {100 * score['chance']:.0f} %"
        name = f"{score['task']} {score['metric']}\n(n = {score['n']}{chance})"
        table.add_row(name, *(_percent(r["tasks"][number]) for r in rows))
    return table


def _figure(row: dict[str, Any], key: str, digits: int) -> str:
    if row["interval"] is None:
        return f"{row[key]:.{digits}f}"
    low, high = row["interval"]
    return f"{row[key]:.{digits}f}\n{low:.{digits}f} to {high:.{digits}f}"


def _percent(score: dict[str, Any]) -> str:
    if score["interval"] is None:
        return f"{score['value']:.4g}"
    low, high = score["interval"]
    return f"{100 * score['value']:.1f} %\n{100 * low:.1f} to {100 * high:.1f}"


def read_text(path: Path, option: str) -> str:
    """Return a text file's content.

    Raises:
        DataError: it cannot be read, is not UTF-8 or is too large.
    """
    from fedsplit.errors import DataError
    from fedsplit.privacy.public_text import MAX_BYTES

    try:
        text = storage.read_bounded(path, MAX_BYTES).decode("utf-8-sig")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except storage.FileTooLarge:
        raise DataError(f"{option} {path}: must be <= {MAX_BYTES} bytes") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{option} {path}: must be a readable UTF-8 file: {error}") from None


def _write(path: Path, content: dict[str, Any]) -> None:
    from fedsplit.errors import ConfigError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write(path, json.dumps(content, indent=2, allow_nan=False) + "\n", durable=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--out {path}: cannot be written: {error}") from None
