"""One app's run: its config, its lines in the log stream, its processes and how it ended."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fedsplit.deploy.flower_commands import find_command
from fedsplit.errors import ConfigError, RunError, check
from simulations.core.settings import flatten
from simulations.runtime.child_processes import LogLine, tail_text

Scalar = bool | int | float | str

APP_COMMANDS = ("flwr-simulation", "flwr-serverapp")
STARTED = re.compile(r"Successfully started run (\d+)")
ACTOR = re.compile(r"^\((?:ClientAppActor|OwnerHostActor|raylet|pid|autoscaler)\b[^)]*\) ?(.*)$")


@dataclass(frozen=True)
class FlowerRun:
    """A run that ended.

    Attributes:
        run_id: Flower's number of the run.
        status: ``finished:completed``; the others only reach a caller inside a ``RunError``.
        duration_s: seconds from submission to the end, start-up of the app's processes included.
        details: Flower's explanation of the status, or an empty string.
        flower: the run's row of ``flwr ls --format json`` (times, traffic, compute seconds).
    """

    run_id: int
    status: str
    duration_s: float
    details: str = ""
    flower: Mapping[str, Any] = field(default_factory=dict)


def app_run_config(app_dir: Path) -> dict[str, Scalar]:
    """Return the run config that the app in ``app_dir`` declares, flat, with dotted keys.

    Raises:
        ConfigError: if the folder holds no Flower app.
    """
    path = app_dir / "pyproject.toml"
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        app = document["tool"]["flwr"]["app"]
    except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
        raise ConfigError(
            f"app_dir={str(app_dir)!r}: must hold a pyproject.toml with [tool.flwr.app] ({error!r})"
        ) from error
    return dict(flatten(app.get("config", {})))


def check_run_config(app_dir: Path, run_config: Mapping[str, Scalar]) -> None:
    """Check that ``run_config`` overrides what the app declares: Flower ignores any other key.

    Raises:
        ConfigError: for an unknown key, or a value that is not a bool, int, float or str.
    """
    known = app_run_config(app_dir)
    for key, value in run_config.items():
        if key not in known:
            raise ConfigError(
                f"run_config[{key!r}]: must be a key of [tool.flwr.app.config] in "
                f"{app_dir / 'pyproject.toml'}, which are {', '.join(sorted(known)) or 'none'}"
            )
        check(type(value) in (bool, int, float, str), key, value, "a bool, int, float or str")
        if type(value) is int:
            check(-(2**63) <= value < 2**63, key, value, "a signed 64-bit integer")


def flwr_json(
    arguments: Sequence[str], *, env: Mapping[str, str], cwd: Path, timeout_s: float
) -> dict[str, Any]:
    """Run ``flwr ARGUMENTS --format json`` and return what it answers.

    Raises:
        RunError: if it fails, takes too long or answers no JSON.
    """
    command = f"flwr {' '.join(arguments)}"
    try:
        done = subprocess.run(
            [find_command("flwr"), *arguments, "--format", "json"],
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{command}: no answer within {timeout_s:.0f} s") from error
    try:
        answer = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        answer = {}
    if done.returncode != 0 or not isinstance(answer, dict) or not answer.get("success"):
        output = (done.stdout + done.stderr).splitlines()
        raise RunError(f"{command}: exit code {done.returncode}\n{tail_text(output)}")
    return answer


def started_run(text: str) -> int | None:
    """Return the number of the run that ``flwr run`` says it started, if this is that line."""
    found = STARTED.search(text)
    return int(found.group(1)) if found else None


def route_app_line(text: str) -> LogLine:
    """Name the component of a line that came through the log stream."""
    found = ACTOR.match(text)
    return LogLine("clientapp", found.group(1)) if found else LogLine("serverapp", text)


def app_processes(superlink_pid: int) -> set[psutil.Process]:
    """Return the processes that run a ServerApp or a simulation under the SuperLink."""
    found = set()
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(superlink_pid).children(recursive=True):
            if any(name in part for part in process.cmdline()[:2] for name in APP_COMMANDS):
                found.add(process)
    return found


def end_tree(process: psutil.Process) -> None:
    """Kill a process and everything it started that is still its descendant."""
    with contextlib.suppress(psutil.Error):
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.Error):
                each.kill()
