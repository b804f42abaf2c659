"""``python -m simulations``: named experiments, one's own, and benchmarks."""

from __future__ import annotations

import functools
import importlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from click import Command, Context
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from fedsplit.observe.console import console, run_command_line
from fedsplit.registry import pick
from simulations.bench.figures import Overrides

if TYPE_CHECKING:
    from simulations.core.settings import Experiment

RayAddress = Annotated[
    str, typer.Option(help="a Ray cluster to run on, HOST:PORT; default: this machine")
]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

# benchmark -> module whose ``run(console, ...)`` measures and prints
BENCHMARKS = {
    "split": "bench.split",
    "fingerprint": "bench.fingerprint",
    "inversion": "bench.inversion",
    "service": "bench.service",
    "policy": "bench.policy",
    "secagg": "bench.secagg",
    "fuzz": "fuzz.run",
    "emulator": "bench.emulator",
    "memory": "bench.memory",
    "gpu": "bench.gpu_check",
    "scale": "bench.scale",
}


class Benchmarks(TyperGroup):
    """The commands of :data:`BENCHMARKS`; a module loads when its command is asked for."""

    def list_commands(self, ctx: Context) -> list[str]:
        """Return the benchmarks' names."""
        return list(BENCHMARKS)

    def get_command(self, ctx: Context, cmd_name: str) -> Command | None:
        """Return a benchmark's command: the options are those of its ``run``."""
        if cmd_name not in BENCHMARKS:
            return None
        carry_out = importlib.import_module(f"simulations.{BENCHMARKS[cmd_name]}").run

        @functools.wraps(carry_out)
        def command(**options: Any) -> None:
            carry_out(console, **options)

        whole = inspect.signature(carry_out, eval_str=True)
        _, *parameters = whole.parameters.values()
        command.__signature__ = whole.replace(parameters=parameters)  # type: ignore[attr-defined]
        one = typer.Typer(add_completion=False)
        one.command(cmd_name)(command)
        return typer.main.get_command(one)


bench = typer.Typer(
    cls=Benchmarks, no_args_is_help=True, help="Speed and memory, as ratios within one run."
)
app.add_typer(bench, name="bench")


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
    ray_address: RayAddress = "",
) -> None:
    """Run one experiment and write results.json, config.toml and logs to its folder."""
    from simulations.core.settings import load_experiment

    _carry_out(load_experiment(experiment, _on_cluster(set_, ray_address)), out, force=force)


def _on_cluster(overrides: list[str] | None, address: str) -> list[str]:
    """Return the overrides with the cluster's address; a kind that runs on none refuses it."""
    return [*(overrides or []), *([f"options.ray-address={address}"] if address else [])]


def _carry_out(loaded: Experiment, out: Path | None, *, force: bool) -> None:
    from simulations.core.kinds import KINDS
    from simulations.core.run_folder import RunFolder, default_folder

    carry_out = pick(KINDS, loaded.kind, "kind")
    path = out or default_folder(loaded.name)
    console.print(Text(f"{loaded.name}:", "bold"), loaded.about)
    folder = RunFolder(path, name=loaded.name, kind=loaded.result_kind, force=force)
    try:
        with folder:
            try:
                carry_out(loaded, folder, console)
            except KeyboardInterrupt:
                console.print(f"\ninterrupted; what was done is in {path}")
                raise
    finally:
        page = _page_of(path)
    console.print(f"results: {path / 'results.json'}{page}")


def _page_of(path: Path) -> str:
    """Return where the run's page is; the run's own error is what must be seen, if it has one."""
    from simulations.report.page import write_report

    try:
        return f", and as a page: {write_report(path)}"
    except Exception as error:  # a finished run does not depend on how it is shown
        return f"; no page: {type(error).__name__}: {error}"


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="a run's folder")]) -> None:
    """Write a run's page again: results, settings and pictures in one HTML file."""
    from simulations.report.page import write_report

    console.print(f"page: {write_report(folder)}")


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="the folders of two or more runs")],
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("compare.html"),
) -> None:
    """Compare runs on one page: figures, curves, privacy, and the settings that differ."""
    from simulations.report.comparison import write_comparison

    console.print(f"page: {write_comparison(folders, out)}")


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
    ray_address: RayAddress = "",
) -> None:
    """Run an experiment over axes of settings and seeds; a killed sweep continues in its folder."""
    from simulations.core.settings import load_experiment
    from simulations.sweep.plan import as_sweep, parse_axis

    loaded = load_experiment(experiment, _on_cluster(set_, ray_address))
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


def main() -> None:
    """Run the command line; errors made on purpose end with one line and exit code 1."""
    run_command_line(app)


if __name__ == "__main__":
    main()
