"""``fedsplit predict``: an owner's own texts, answered by the model owner's tuned top."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedsplit import storage
from fedsplit.commands.options import Home, check_output, owner_home
from fedsplit.errors import ConfigError
from fedsplit.observe import printable
from fedsplit.observe.console import console

FILES = (".csv", ".jsonl")


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(predict)


def predict(
    text: Annotated[str, typer.Argument(help="one text; leave out with --file")] = "",
    file: Annotated[
        Path | None,
        typer.Option(help="texts: CSV, JSON lines, Parquet, lines of plain text; words: CoNLL too"),
    ] = None,
    column: Annotated[str, typer.Option(help="column with the text")] = "text",
    delimiter: Annotated[str, typer.Option(help="of a CSV file; default: found")] = "",
    header: Annotated[
        bool, typer.Option(help="whether a CSV file begins with its columns' names")
    ] = True,
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
    """Ask a serving model: classes for texts, tags for words, or a continuation of one text.

    The bottom and the noise are here, the top at the model owner; your policy and ledger apply.
    """
    from fedsplit.attacks.measuring import measure
    from fedsplit.data import parse_class_names
    from fedsplit.data.dataset import check_text
    from fedsplit.owners.serving.generation import sampler
    from fedsplit.owners.serving.inference import ask, generate, tag
    from fedsplit.owners.serving.offers import serving_config
    from fedsplit.tasks import task_of, task_type

    # Before anything leaves: what was asked counts against the owner's rules, answered or not.
    check_output("--out", out, FILES)
    if text:
        check_text("text", text)
    root = owner_home(home)
    config = serving_config(root)
    model = config.model
    if not task_type(model.task).labelled:
        if file is not None or not text:
            raise ConfigError("predict with a generating model: must be given one text, no --file")
        if out is not None:
            raise ConfigError("--out: must be left out, a continuation is printed")
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
            raise ConfigError(
                f"--chat: must be left out, {model.task} answers with {task_type(model.task).words}"
            )
        outputs, named = task_of(config).outputs, task_of(config).named
        names = parse_class_names(classes or model.label_names, "--classes") if named else ()
        if names and len(names) != outputs:
            raise ConfigError(f"--classes: must be {outputs} names, not {len(names)}")
        words = task_type(model.task).form == "words"
        places, texts = _texts(text, file, column, words, delimiter, header)
        asked = [number for number, one in enumerate(texts) if one.strip()]
        wanted = [texts[number] for number in asked]
        if words:
            tagged, task, answered = tag(root, wanted, measure)
        else:
            scores, task, answered = ask(root, wanted, measure)
        rows = [_row(*row, task.answer_columns) for row in zip(places, texts, strict=True)]
        if words:
            answers = [task.answer_words(*one, names) for one in tagged]
        else:
            answers = task.answers(scores, names)
        for number, answer in zip(asked, answers, strict=True):
            rows[number] |= answer
        for cut in answered.cut:
            rows[asked[cut]]["cut"] = True
        if out is not None:
            _write(out, rows, task.answer_columns)
            console.print(f"{len(rows)} answers: {out}")
        else:
            console.print(_table(rows, task.answer_columns))
        if len(asked) < len(rows):
            console.print(f"{len(rows) - len(asked)} of {len(rows)} rows are blank: no answer")
        if answered.cut:
            console.print(
                f"{len(answered.cut)} texts are longer than the run's model.max-tokens="
                f"{model.max_tokens}: their ends were not read (column cut)"
            )
    console.print(
        f"sent {answered.tokens} tokens as {answered.bytes_up / 1e3:.1f} kB of representations; "
        f"{answered.mechanism}",
        style="dim",
        highlight=False,
    )


def _texts(
    text: str, file: Path | None, column: str, words: bool, delimiter: str, header: bool
) -> tuple[list[str], list[str]]:
    """Return (where each text is, texts), a blank one for each blank row."""
    if bool(text) == (file is not None):
        raise ConfigError("predict: must be given either one text or --file")
    if file is None:
        return ["text"], [text]
    from fedsplit.data import read_rows

    table = read_rows(str(file), column, words=words, delimiter=delimiter, header=header)
    return [place.removeprefix(f"{file}:") for place in table.places], list(table.texts)


def _row(place: str, text: str, columns: Sequence[str]) -> dict[str, Any]:
    return {"row": place, "text": text, **dict.fromkeys(columns), "cut": False}


def _table(rows: list[dict[str, Any]], columns: Sequence[str]) -> Table:
    table = Table("row", "text", *columns)
    for row in rows[:200]:
        short = row["text"] if len(row["text"]) <= 80 else row["text"][:77] + "..."
        if row[columns[0]] is None:
            table.add_row(row["row"], *[""] * (1 + len(columns)))
            continue
        table.add_row(row["row"], short, *(_cell(row[column], 3) for column in columns))
    if len(rows) > 200:
        table.caption = f"the first 200 of {len(rows)}; --out writes all"
    return table


def _cell(value: object, digits: int) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _write(path: Path, rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            storage.replacing(path, durable=False) as draft,
            open(draft, "w", encoding="utf-8", newline="") as file,
        ):
            if path.suffix == ".jsonl":
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            else:
                writer = csv.writer(file)
                writer.writerow(["row", "text", *columns, "cut"])
                for r in rows:
                    known = r[columns[0]] is not None
                    answer = [_cell(r[column], 6) if known else "" for column in columns]
                    writer.writerow([r["row"], r["text"], *answer, int(r["cut"])])
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be written: {error}") from None
