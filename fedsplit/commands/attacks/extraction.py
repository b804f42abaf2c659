"""``fedsplit attack extraction``: how long an emulator stays worse than the model it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedsplit.commands.options import JsonFile, table_of, write_json
from fedsplit.observe.console import console

if TYPE_CHECKING:
    from fedsplit.attacks import Truth, View
    from fedsplit.attacks.extraction.attack import Look


def register(app: typer.Typer) -> None:
    """Add the command to a group."""
    app.command("extraction")(extraction)


def extraction(
    emulator: Annotated[Path, typer.Argument(help="folder of the emulator, as it is sent")],
    base: Annotated[str, typer.Option(help="the full model, to measure against (and to query)")],
    public: Annotated[Path, typer.Option(help="the attacker's UTF-8 text")],
    held_out: Annotated[
        Path | None, typer.Option(help="public text to measure on; default: the last tenth")
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option(help="adapters.safetensors of a run (full adapters); with --task")
    ] = None,
    task: Annotated[
        Path | None, typer.Option(help="held-out text that the adapters were tuned for")
    ] = None,
    steps: Annotated[int, typer.Option(help="the attacker's training steps")] = 200,
    batch: Annotated[int, typer.Option(help="blocks in a step")] = 8,
    block: Annotated[int, typer.Option(help="tokens in a block")] = 128,
    lr: Annotated[float, typer.Option(help="learning rate")] = 3e-4,
    looks: Annotated[int, typer.Option(help="how often the attack is measured")] = 5,
    windows: Annotated[int, typer.Option(help="measured on so many windows of each text")] = 128,
    queries: Annotated[
        bool, typer.Option("--queries", help="the full model answers queries with its logits")
    ] = False,
    regrow: Annotated[
        bool, typer.Option("--regrow", help="the attacker gives the emulator its full size back")
    ] = False,
    seed: Annotated[int, typer.Option(help="of the attacker's batches")] = 0,
    json_: JsonFile = None,
) -> None:
    """Train an emulator back toward the full model, and say what share of the gap is closed."""
    from fedsplit.attacks import Extraction
    from fedsplit.errors import ConfigError, check

    check(looks >= 1, "--looks", looks, ">= 1")
    check(windows >= 2, "--windows", windows, ">= 2")
    if (adapters is None) != (task is None):
        raise ConfigError("--adapters, --task: must be given together")
    attack = Extraction(
        steps=steps,
        batch_size=batch,
        lr=lr,
        queries=queries,
        regrow=regrow,
        seed=seed,
        window=block,
        marks=tuple(sorted({round(steps * i / looks) for i in range(looks + 1)})),
    )
    view, truth = emulator_case(
        emulator,
        base,
        public,
        held_out=held_out,
        adapters=adapters,
        task=task,
        block=block,
        windows=windows,
        answers=queries,
    )
    with console.status("attacking ...") as status:
        result = attack.run(
            view,
            truth,
            on_look=lambda look: status.update(f"{look.steps} of {steps} steps"),
        )
    console.print(table(result.detail, attack.knowledge))
    method = view.emulator.method
    figures = {"knowledge": attack.knowledge, "method": method, "rows": result.extra["rows"]}
    write_json(json_, figures, indent=2)


def emulator_case(
    emulator: Path,
    base: str,
    public: Path,
    *,
    held_out: Path | None = None,
    adapters: Path | None = None,
    task: Path | None = None,
    block: int = 128,
    windows: int = 128,
    answers: bool = False,
) -> tuple[View, Truth]:
    """Return what an owner with an emulator has, and what an extraction is measured on.

    Args:
        emulator: its folder, as it is sent.
        base: the full model.
        public: the attacker's UTF-8 text.
        held_out: public text to measure on; None: the last tenth of ``public``.
        adapters: tuned ones of a run, with ``task``.
        task: held-out text that they were tuned for.
        block: tokens in a block.
        windows: measured on so many windows of each text.
        answers: whether the full model answers queries.

    Raises:
        ModelError: the emulator is of another base.
        ConfigError: the adapters are not full ones.
    """
    from fedsplit.attacks import Truth, View
    from fedsplit.attacks.extraction.attack import Gap, Task
    from fedsplit.commands.evaluation.evaluate import read_text
    from fedsplit.commands.evaluation.subjects import read_adapters
    from fedsplit.emulators.files import load_emulator
    from fedsplit.emulators.lm import pack
    from fedsplit.errors import ModelError, check
    from fedsplit.evaluation.perplexity import text_ids
    from fedsplit.models import load

    sent, full = load_emulator(emulator), load(base, "causal-lm")
    if sent.base_digest != full.digest:
        raise ModelError(f"--base {base}: digest {full.digest}: must be {sent.base_digest}")
    longest = (windows + 1) * (block // 2)

    def ids(path: Path) -> Any:
        return text_ids(full.tokenizer, [read_text(path, "--public")])

    train = ids(public)
    cut = len(train) - len(train) // 10
    measured = train[cut:] if held_out is None else ids(held_out)
    if held_out is None:
        train = train[:cut]
    work = None
    if adapters is not None and task is not None:
        state, settings = read_adapters(adapters)
        check(settings.method == "full", "--adapters", settings.method, "full adapters")
        work = Task(state, ids(task)[:longest])
    view = View(emulator=sent, text=pack(train, block), teacher=full.model if answers else None)
    return view, Truth(gap=Gap(full.model, measured[:longest], work))


def table(looks: Sequence[Look], knowledge: str) -> Table:
    """Return one row for each look at the attack."""
    title = f"share of the gap closed by an owner with {knowledge} (95 % intervals over blocks)"
    columns = ("steps", "tokens", "text", "full", "emulator", "attacked", "closed")
    shown = table_of(*columns, left=("text",), title=title)
    for look in looks:
        for name, closed in (("public", look.public), ("task", look.task)):
            if closed is None:
                continue
            share = "no gap"
            if closed.share is not None and closed.interval is not None:
                low, high = closed.interval
                share = f"{100 * closed.share:.0f} % ({100 * low:.0f} to {100 * high:.0f})"
            nats = (f"{value:.3f}" for value in (closed.full, closed.emulator, closed.attacked))
            shown.add_row(str(look.steps), str(look.tokens), name, *nats, share)
    return shown
