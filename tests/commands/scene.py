"""What a reader has: own files, models, a run in ``runs/demo``, another in ``runs/mine``.

Federated runs are carried out in this process, with real owners and sessions and without Ray.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from safetensors.torch import save_file
from typer.testing import CliRunner

from fedsplit.cli import app_cli
from fedsplit.client import dispatch as _dispatch  # owners' threads must not all import it
from fedsplit.config import RunConfig
from fedsplit.emulators import adapter_state, make_compressor
from fedsplit.emulators.compressors.base import Material
from fedsplit.emulators.files import save_emulator
from fedsplit.models import load
from fedsplit.models.adapters.methods import MethodSettings
from simulations.__main__ import app as simulations_app
from simulations.runtime.federated import owner_environment, read_server, simulation_config
from simulations.runtime.ledgers import sent_by_owners
from simulations.runtime.local_grid import LocalGrid
from simulations.runtime.local_run import environment, run_strategy
from tests.commands.table import How
from tests.tiny_models import WORDS, save_tiny_bert, save_tiny_llama

assert _dispatch
APPS = {"fedsplit": app_cli, "python -m simulations": simulations_app}


def simulate_here(config: RunConfig, folder: Path, **_: Any) -> tuple[RunConfig, dict[str, Any]]:
    """Carry out a run as ``simulate`` does, in this process; the owners' homes stay."""
    config = simulation_config(config, 2, folder / "server")
    with environment(owner_environment(folder / "homes")):
        run_strategy(config, LocalGrid(config, config.data.owners, run_id=1))
    content = read_server(folder / "server")
    content["sent"] = sent_by_owners(folder / "homes")
    return config, content


def command(text: str, how: How) -> Result:
    """Carry out one command in the current folder."""
    program, words = words_of(text, how)
    return CliRunner().invoke(APPS[program], words)


def words_of(text: str, how: How) -> tuple[str, list[str]]:
    """Return (program, arguments) of a command, with the scene's files in their places."""
    for name in sorted(how.places, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(name)}", how.places[name], text)
    program = next(name for name in APPS if text.startswith(f"{name} "))
    return program, shlex.split(f"{text.removeprefix(program)} {how.more}")


@contextmanager
def scene(folder: Path) -> Iterator[None]:
    """Make the files in ``folder`` and work there."""
    save_tiny_bert(folder / "bert", classes=5)
    save_tiny_llama(folder / "llama")
    save_tiny_llama(folder / "wide", width=48)  # its portrait is a sketch
    lines = [" ".join(WORDS[(7 * n + i) % len(WORDS)] for i in range(9)) for n in range(80)]
    for name in ("held_out.txt", "public.txt", "other.txt"):
        (folder / name).write_text("\n".join(lines) + "\n")
    rows = [{"text": line, "label": n % 2} for n, line in enumerate(lines)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["body", "stars"])
        writer.writerows([line, n % 5 + 1] for n, line in enumerate(lines * 2))
    quiz = [{"question": "w1", "choices": ["w2", "w3 w4"], "answer": n % 2} for n in range(3)]
    (folder / "quiz_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz))
    settings = RunConfig.from_flat({"privacy.mechanism": "dchi", "privacy.eta": 8.0}).to_flat()
    told = [f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in settings.items()]
    (folder / "run.toml").write_text("".join(told))
    _offsite_run(folder / "offsite", folder / "llama")
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _offsite_run(folder: Path, base: Path) -> None:
    """Make a run's folder as offsite tuning leaves it."""
    loaded = load(base, "causal-lm")
    emulator = make_compressor("layerdrop", adapters=(0, 2), keep=1).build(loaded.model, Material())
    folder.mkdir()
    save_emulator(emulator, folder / "emulator", tokenizer=loaded.tokenizer)
    about = {k: v for k, v in asdict(MethodSettings()).items() if k != "seed"}
    state = {name: 1.1 * tensor for name, tensor in adapter_state(emulator).items()}
    metadata = {"round": "1", "method": json.dumps(about)}
    save_file(state, folder / "adapters.safetensors", metadata=metadata)


def check_result(done: Result, how: How, what: object) -> None:
    """Hold an exit code against those that are answers."""
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise AssertionError(f"{what}: {done.exception!r}\n{done.output}") from done.exception
    assert done.exit_code in how.codes, f"{what}: exit code {done.exit_code}\n{done.output}"


def skip_without(how: How) -> None:
    """Skip what needs a package that is not installed."""
    if how.needs:
        pytest.importorskip(how.needs)
