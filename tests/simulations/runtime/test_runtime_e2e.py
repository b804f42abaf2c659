"""The runtime with real Flower and Ray processes and a tiny app."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedsplit.errors import RunError
from simulations.runtime import Deployment, Simulation
from simulations.runtime.child_processes import LogLine
from simulations.runtime.watchdog import MARK_VARIABLE, lives, marked_processes

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "tinyapp"
version = "1.0.0"
description = "replies its partition"
license = "Apache-2.0"
dependencies = ["flwr"]
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "tinyapp.server:app"
clientapp = "tinyapp.client:app"
[tool.flwr.app.config]
nodes = 0
do = "reply"
nested.note = ""
"""
CLIENT = """
import os, time
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.query()
def query(message: Message, context: Context) -> Message:
    partition = int(context.node_config["partition-id"])
    print(f"partition {partition} here", flush=True)
    if context.run_config["do"] == "sleep":
        time.sleep(120)
    if context.run_config["do"] == "fail":
        raise ValueError("owner cannot")
    fact = ConfigRecord({
        "partition": partition,
        "of": int(context.node_config["num-partitions"]),
        "extra": str(context.node_config.get("extra", "")),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "cwd": os.getcwd(),
    })
    return Message(RecordDict({"fact": fact}), reply_to=message)
"""
SERVER = """
import os, signal, time
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()

@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    print("NOTE", repr(config["nested.note"]), os.environ.get("OMP_NUM_THREADS"), flush=True)
    if config["do"] == "die":
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGKILL)
    while len(nodes := list(grid.get_node_ids())) < config["nodes"]:
        time.sleep(0.1)
    content = RecordDict({"c": ConfigRecord({"x": 1})})
    messages = [Message(content, dst_node_id=n, message_type="query") for n in nodes]
    for reply in grid.send_and_receive(messages):
        if reply.has_error():
            raise RuntimeError(f"an owner failed: {reply.error.reason}")
        print("FACT", dict(reply.content["fact"]), flush=True)
"""
NOTE = 'a "quoted" café\n\ttab'


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("app")
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "tinyapp").mkdir()
    (folder / "tinyapp" / "__init__.py").write_text("")
    (folder / "tinyapp" / "client.py").write_text(CLIENT)
    (folder / "tinyapp" / "server.py").write_text(SERVER)
    return folder


def facts(lines: list[LogLine]) -> list[dict[str, object]]:
    """Return what the clients replied, by partition."""
    found = [x.text for x in lines if x.component == "serverapp" and x.text.startswith("FACT ")]
    return sorted((ast.literal_eval(x[5:]) for x in found), key=lambda fact: fact["partition"])


@pytest.mark.e2e
def test_simulation_runs_an_app_and_leaves_nothing(app: Path, tmp_path: Path) -> None:
    lines: list[LogLine] = []
    with Simulation(3, log_dir=tmp_path, server_threads=2, client_threads=1) as federation:
        mark, roots = federation.processes.mark, list(federation.processes.folders)
        run = federation.run(
            app, {"nodes": 3, "nested.note": NOTE}, timeout_s=200, on_line=lines.append
        )
        assert marked_processes(mark)

    assert run.status == "finished:completed"
    assert run.run_id > 0
    assert 0 < run.duration_s < 100
    assert [fact["partition"] for fact in facts(lines)] == [0, 1, 2]
    assert {fact["of"] for fact in facts(lines)} == {3}
    assert {fact["threads"] for fact in facts(lines)} == {"1"}
    assert LogLine("serverapp", f"NOTE {NOTE!r} 2") in lines
    for partition in range(3):
        assert LogLine("clientapp", f"partition {partition} here") in lines
    assert "FACT" in (tmp_path / "serverapp.log").read_text()
    assert "partition 0 here" in (tmp_path / "clientapps.log").read_text()
    assert "SuperLink" in (tmp_path / "superlink.log").read_text()
    assert marked_processes(mark) == []
    assert not any(root.exists() for root in roots)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with Deployment(
        2,
        node_configs=[{"extra": "a b"}, {}],
        node_auth=True,
        log_dir=tmp_path_factory.mktemp("log"),
        server_threads=2,
        client_threads=1,
    ) as federation:
        mark, roots = federation.processes.mark, list(federation.processes.folders)
        yield federation
    assert marked_processes(mark) == []
    assert not any(root.exists() for root in roots)


@pytest.mark.e2e
def test_deployment_with_tls_and_node_authentication(deployment: Deployment, app: Path) -> None:
    lines: list[LogLine] = []

    run = deployment.run(
        app, {"nodes": 2, "nested.note": NOTE}, timeout_s=200, on_line=lines.append
    )

    assert run.status == "finished:completed"
    assert [fact["partition"] for fact in facts(lines)] == [0, 1]
    assert [fact["extra"] for fact in facts(lines)] == ["a b", ""]
    assert {fact["threads"] for fact in facts(lines)} == {"1"}
    assert len({fact["cwd"] for fact in facts(lines)}) == 2
    assert LogLine("serverapp", f"NOTE {NOTE!r} 2") in lines
    assert LogLine("supernode-1", "partition 1 here") in lines
    assert len(set(deployment.node_ids)) == 2
    assert (
        "Uvicorn running on https://127.0.0.1" in (deployment.log_dir / "superlink.log").read_text()
    )
    assert deployment.certificates.key.stat().st_mode & 0o077 == 0


@pytest.mark.e2e
def test_failing_app_raises_with_the_end_of_its_log(deployment: Deployment, app: Path) -> None:
    with pytest.raises(RunError) as caught:
        deployment.run(app, {"nodes": 2, "do": "fail"}, timeout_s=200)

    message = str(caught.value)
    assert re.match(r"serverapp: run \d+ is finished:failed after [\d.]+ s: ", message)
    assert str(deployment.log_dir / "serverapp.log") in message
    assert "RuntimeError: an owner failed" in message
    assert "owner cannot" in message
    assert len(message.splitlines()) <= 21 + 4


@pytest.mark.e2e
def test_app_that_is_killed_is_noticed_soon(deployment: Deployment, app: Path) -> None:
    began = time.monotonic()
    with pytest.raises(RunError, match="serverapp: the app's process is gone"):
        deployment.run(app, {"do": "die"}, timeout_s=200)
    assert time.monotonic() - began < 40


@pytest.mark.e2e
def test_run_that_takes_too_long_is_stopped(deployment: Deployment, app: Path) -> None:
    with pytest.raises(RunError, match=r"serverapp: run \d+ did not end in time"):
        deployment.run(app, {"nodes": 99}, timeout_s=8)


@pytest.mark.e2e
def test_error_in_the_callers_callback_ends_the_run(deployment: Deployment, app: Path) -> None:
    def fail(line: LogLine) -> None:
        if line.text.startswith("NOTE"):
            raise LookupError(line.text)

    with pytest.raises(LookupError, match="NOTE"):
        deployment.run(app, {"nodes": 99}, timeout_s=60, on_line=fail)


@pytest.mark.e2e
def test_two_runtimes_side_by_side(tmp_path: Path) -> None:
    with (
        Simulation(2, log_dir=tmp_path / "a") as first,
        Simulation(2, log_dir=tmp_path / "b") as second,
    ):
        assert first.address != second.address
        assert first.processes.ray_root != second.processes.ray_root
        assert first.certificates.ca.read_bytes() != second.certificates.ca.read_bytes()
        second.stop()
        assert marked_processes(first.processes.mark)
    with first:  # can be used again
        assert first.certificates.ca.exists()


@pytest.mark.e2e
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_simulation_leaves_no_process(
    app: Path, tmp_path: Path, number: signal.Signals
) -> None:
    code = f"""
import sys
from pathlib import Path
from simulations.runtime import Simulation

with Simulation(2, log_dir=Path({str(tmp_path)!r})) as federation:
    print(federation.processes.mark, flush=True)
    show = lambda line: print(line.text, flush=True)
    federation.run(Path({str(app)!r}), {{"nodes": 2, "do": "sleep"}}, on_line=show)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop(MARK_VARIABLE, None)
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        # A test run in the background ignores Ctrl-C, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as launcher:
        assert launcher.stdout is not None
        mark = launcher.stdout.readline().strip()
        for line in launcher.stdout:
            if "here" in line:
                break
        started = psutil.Process(launcher.pid).children(recursive=True)
        names = " ".join(process.name() for process in started)
        assert "raylet" in names
        assert "ray::ClientAppActor" in names
        assert len(marked_processes(mark)) > 5
        began = time.monotonic()
        launcher.send_signal(number)
        rest = launcher.stdout.read()
        code_seen = launcher.wait(30)

    assert code_seen in (128 + number, -number, 1), rest
    assert time.monotonic() - began < 20
    assert marked_processes(mark) == []
    assert [process for process in started if lives(process)] == []
    assert "partition" in (tmp_path / "clientapps.log").read_text()
