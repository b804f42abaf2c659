"""``fedsplit predict``: an owner's own texts, answered by the model owner's tuned top."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedsplit import storage
from fedsplit.commands.options import Home, owner_home
from fedsplit.errors import ConfigError, DataError
from fedsplit.observe import printable
from fedsplit.observe.console import console


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(predict)


def predict(
    text: Annotated[str, typer.Argument(help="one text; leave out with --file")] = "",
    file: Annotated[
        Path | None, typer.Option(help="texts: CSV, JSON lines, Parquet, or plain text")
    ] = None,
    column: Annotated[str, typer.Option(help="column with the text")] = "text",
    out: Annotated[
        Path | None, typer.Option(help="write answers here (.csv or .jsonl) instead of a table")
    ] = None,
    classes: Annotated[
        str, typer.Option(help="names of the classes, in order, separated by commas")
    ] = "",
    new_tokens: Annotated[int, typer.Option(help="longest continuation (generating models)")] = 64,
    temperature: Annotated[float, typer.Option(help="0 = the most probable token")] = 0.0,
    top_p: Annotated[float, typer.Option(help="nucleus of the sampling")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the sampling; -1 = the operating system's")] = -1,
    chat: Annotated[
        bool, typer.Option("--chat", help="the text is a question: lay it out by the chat template")
    ] = False,
    system: Annotated[str, typer.Option(help="with --chat: the system's message")] = "",
    home: Home = None,
) -> None:
    """Ask a serving model: classes for texts, or a continuation of one text.

    The bottom and the noise are here, the top at the model owner; your policy and ledger apply.
    """
    from fedsplit.attacks.measuring import measure
    from fedsplit.owners.serving.generation import sampler
    from fedsplit.owners.serving.inference import classify, generate
    from fedsplit.owners.serving.offers import serving_config

    root = owner_home(home)
    task = serving_config(root).model.task
    if task == "causal-lm":
        if file is not None or not text:
            raise ConfigError("predict with a generating model: must be given one text, no --file")
        choose = sampler(temperature, top_p, None if seed < 0 else seed)
        end = "\n" if chat else ""
        console.print(text, end=end, style="dim", highlight=False)

        def show(piece: str) -> None:
            shown = printable(piece, keep="\n\t", most=len(piece))
            console.print(shown, end="", highlight=False)

        _, answered = generate(
            root,
            text,
            choose=choose,
            most=new_tokens,
            on_text=show,
            chat=chat,
            system=system,
            measure=measure,
        )
        console.print()
    else:
        if chat:
            raise ConfigError(f"--chat: must be left out, {task} answers with classes")
        texts = _texts(text, file, column)
        probabilities, answered = classify(root, texts, measure)
        names = [n.strip() for n in classes.split(",")] if classes else []
        if names and len(names) != probabilities.shape[1]:
            count = probabilities.shape[1]
            raise ConfigError(f"--classes: must be {count} names, not {len(names)}")
        rows = _rows(texts, probabilities, names)
        if out is not None:
            _write(out, rows)
            console.print(f"{len(rows)} answers: {out}")
        else:
            console.print(_table(rows))
    console.print(
        f"sent {answered.tokens} tokens as {answered.bytes_up / 1e3:.1f} kB of representations; "
        f"{answered.mechanism}",
        style="dim",
        highlight=False,
    )


def _texts(text: str, file: Path | None, column: str) -> list[str]:
    if bool(text) == (file is not None):
        raise ConfigError("predict: must be given either one text or --file")
    if file is None:
        return [text]
    from fedsplit.data import load_splits

    loaded, test = load_splits("file", path=str(file), text_column=column, label_column="")
    if test is not None:
        raise DataError(f"{file}: must be one file, not a folder with a test split")
    return list(loaded.texts)


def _rows(texts: list[str], probabilities: Any, names: list[str]) -> list[dict[str, Any]]:
    rows = []
    for text, row in zip(texts, probabilities.tolist(), strict=True):
        best = max(range(len(row)), key=row.__getitem__)
        rows.append(
            {
                "text": text,
                "class": names[best] if names else best,
                "probability": row[best],
                "probabilities": row,
            }
        )
    return rows


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("text", "class", "probability")
    for row in rows[:200]:
        short = row["text"] if len(row["text"]) <= 80 else row["text"][:77] + "..."
        table.add_row(short, str(row["class"]), f"{row['probability']:.3f}")
    if len(rows) > 200:
        table.caption = f"the first 200 of {len(rows)}; --out writes all"
    return table


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    try:
        with (
            storage.replacing(path, durable=False) as draft,
            open(draft, "w", encoding="utf-8", newline="") as file,
        ):
            if path.suffix == ".jsonl":
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            elif path.suffix == ".csv":
                writer = csv.writer(file)
                writer.writerow(["text", "class", "probability"])
                writer.writerows([r["text"], r["class"], f"{r['probability']:.6f}"] for r in rows)
            else:
                raise ConfigError(f"--out {path}: must end with .csv or .jsonl")
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be written: {error}") from None
