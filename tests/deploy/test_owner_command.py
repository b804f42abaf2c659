"""An owner's machine file, its checks, and what a review says."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from fedsplit.cli import app_cli
from fedsplit.deploy.checks import FAIL, OK, WARN, Check, check_machine
from fedsplit.deploy.keys import make_keys
from fedsplit.deploy.node import NodeFile, node_config_text
from fedsplit.deploy.review import bundle_of, facts_of
from fedsplit.deploy.start import pinned_digest, sole, start
from fedsplit.errors import ConfigError
from fedsplit.models import load, pack_bottom, split
from fedsplit.owners.app_digest import digest_of_bundle
from fedsplit.owners.home import OwnerHome
from fedsplit.owners.identity import OwnerIdentity
from fedsplit.owners.secure_aggregation.peers import identity_key, identity_of
from fedsplit.privacy.secret import OwnerSecret
from tests.deploy.runbook import ROOT
from tests.tiny_models import save_tiny_bert

FILE = """
superlink = "localhost:{port}"
ca = "keys/owners/bank/ca.pem"
key = "keys/owners/bank/node.key"
home = "home"
[node]
owner = "bank"
data-path = "data.jsonl"
"""
ROWS = "".join(f'{{"text": "note {i}", "label": {i % 2}}}\n' for i in range(6))
TAGS = '{"tokens": ["a", "b"], "tags": ["O", "O"]}\n{"tokens": ["c"], "tags": ["I-x"]}\n'
TAGGED = 'data-kind = "tagged"\n'
POLICY = '[app]\ndigest = "' + "a" * 64 + '"\n[noise]\nmin_ratio = 2.0\n'


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys", ["localhost"], ["bank"])
    (tmp_path / "node.toml").write_text("\ufeff" + FILE.format(port=1))  # as some editors do
    (tmp_path / "owner.toml").write_text(POLICY)
    (tmp_path / "owner.toml").chmod(0o600)
    (tmp_path / "data.jsonl").write_text(ROWS)
    return tmp_path


def found(etc: Path, *, network: bool = False) -> dict[str, Check]:
    node = NodeFile.load(etc / "node.toml")
    checks = check_machine(node, etc / "owner.toml", network=network)
    worst = sorted(checks, key=lambda x: (OK, WARN, FAIL).index(x.state))
    return {x.name: x for x in worst}


def failed(etc: Path) -> list[str]:
    return [x.name for x in found(etc).values() if x.state == FAIL]


@pytest.fixture
def server(etc: Path) -> Iterator[int]:
    """A TLS server with the federation's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(etc / "keys/server/server.pem", etc / "keys/server/server.key")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def serve() -> None:
            while True:
                try:
                    raw, _ = listening.accept()
                    context.wrap_socket(raw, server_side=True).close()
                except ssl.SSLError:
                    continue
                except OSError:
                    return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield port
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def test_a_ready_machine_is_ready(etc: Path, server: int) -> None:
    (etc / "node.toml").write_text(FILE.format(port=server))
    checks = found(etc, network=True)
    assert {n for n, x in checks.items() if x.state == FAIL} == set()
    assert checks["superlink"].state == OK
    assert "certificate and name verified" in checks["superlink"].text


def test_another_authority_fails_and_silence_warns(etc: Path, server: int) -> None:
    assert found(etc, network=True)["superlink"].state == WARN  # nobody listens on port 1
    (etc / "node.toml").write_text(FILE.format(port=server))
    other = make_keys(etc / "other", ["localhost"])
    shutil.copy(other / "ca.pem", etc / "keys/owners/bank/ca.pem")
    checks = found(etc, network=True)
    assert checks["superlink"].state == FAIL
    assert "is not one that" in checks["superlink"].text


def test_a_certificate_for_another_name_fails(etc: Path, server: int) -> None:
    text = FILE.format(port=server).replace("localhost", "ip6-localhost")
    (etc / "node.toml").write_text(text.replace("ip6-localhost", "127.0.0.2"))
    checks = found(etc, network=True)
    assert checks["superlink"].state in (FAIL, WARN)  # WARN where 127.0.0.2 is not answered
    assert "verified" not in checks["superlink"].text


@pytest.mark.parametrize(
    ("content", "node", "name", "state", "text"),
    [
        (ROWS, "", "data", OK, "6 texts to train on, a share of them is held out"),
        (ROWS, "", "labels", OK, "2 classes in 'label': 0 3, 1 3"),
        (ROWS, "", "lengths", OK, "6 characters in the middle, 6 at most ("),
        (ROWS * 2, "", "data", OK, "; 6 are repeated"),
        (ROWS, 'text-column = "body"', "data", FAIL, "data.jsonl:1: column='body': is missing"),
        (ROWS, 'label-column = "topic"', "labels", OK, "no column 'topic': texts alone"),
        (ROWS, 'label-names = "1, 2"', "labels", FAIL, "label='0': must be one of the agreed"),
        (ROWS, 'label-names = "no, no"', "data", FAIL, "must be names that differ"),
        (ROWS, "header = 1", "data", FAIL, "node config header=1: must be of type bool"),
        (ROWS[:30], "", "data", FAIL, "1 different texts: must be >= 2"),
        (ROWS.replace(": 0", ': "no"'), "", "labels", WARN, "their order is not agreed"),
        (ROWS.replace(": 0", ": null"), "", "labels", FAIL, "data.jsonl:1: label=None"),
        (TAGS, TAGGED, "data", OK, "2 texts to train on"),
        (TAGS, TAGGED + 'label-names = "O, I-x"', "labels", OK, "2 tags of words in 'label': O 2"),
        (TAGS, TAGGED + 'label-names = "O"', "labels", FAIL, "data.jsonl:2: label='I-x'"),
        (TAGS, 'data-kind = "choices"', "data", FAIL, "data.jsonl:1: choices: are missing"),
        (ROWS.replace(": 0", ": 0.5"), "", "labels", WARN, "numbers from 0.5 to 1, for a reg"),
        (ROWS, 'label-range = "0,5"', "labels", OK, "for a regression within 0 to 5"),
        (ROWS, 'label-range = "0,0.7"', "labels", FAIL, "label=1: must be in [0, 0.7]"),
        (ROWS, 'label-range = "0"', "labels", FAIL, "node config label-range='0': must be"),
        (ROWS.replace(": 0", ': ["a", "b"]'), "", "labels", WARN, "sets of 3 classes: 1 3, a 3"),
        (
            ROWS.replace(": 0", ': ["a", "b"]'),
            'label-names = "a, b"',
            "labels",
            FAIL,
            "data.jsonl:2: label='1': must be one of",
        ),
        (
            ROWS.replace("note 3", "no\xe9"),
            "",
            "data",
            FAIL,
            "data.jsonl:4: byte 12: must be UTF-8",
        ),
    ],
)
def test_data_is_read_as_a_run_would(
    etc: Path, content: str, node: str, name: str, state: str, text: str
) -> None:
    (etc / "data.jsonl").write_bytes(content.encode("latin-1"))
    with (etc / "node.toml").open("a") as file:
        file.write(node + "\n")
    check = found(etc)[name]
    assert (check.state, text in check.text) == (state, True), check


def test_lengths_are_those_of_the_last_model(etc: Path, tmp_path: Path) -> None:
    loaded = load(save_tiny_bert(tmp_path / "bert"), "sequence-classification", num_labels=2)
    bottom, _ = split(loaded.model, 0)
    bundle = pack_bottom(bottom, loaded.tokenizer)
    folder = etc / "home" / "bottoms" / bundle.digest
    folder.parent.mkdir(mode=0o700, parents=True)
    (etc / "home").chmod(0o700)
    bundle.save(folder)
    most = loaded.model.config.max_position_embeddings
    rows = [{"text": "w1 w2", "label": 0}, {"text": "w1 " * most, "label": 1}]
    (etc / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check = found(etc)["lengths"]
    assert check.state == WARN
    assert f"{most + 2} at most ({etc / 'data.jsonl'}:2)" in check.text
    assert f"1 are longer than its {most} positions: cut" in check.text


def test_each_fault_is_found(etc: Path) -> None:
    assert failed(etc) == []
    key = etc / "keys/owners/bank/node.key"
    key.chmod(0o640)
    assert failed(etc) == ["node key"]
    key.chmod(0o600)
    (etc / "data.jsonl").unlink()
    assert failed(etc) == ["data"]
    (etc / "data.jsonl").write_text("")
    assert failed(etc) == ["data"]
    (etc / "data.jsonl").write_text(ROWS)
    (etc / "owner.toml").write_text("[noise]\nmin_ratio = 2.0\n")
    assert failed(etc) == ["app digest"]
    (etc / "owner.toml").chmod(0o666)
    assert failed(etc) == ["policy"]
    (etc / "owner.toml").chmod(0o600)
    (etc / "owner.toml").write_text(POLICY)
    (etc / "home").mkdir(mode=0o700)
    (etc / "home/noise.secret").write_bytes(bytes(32))
    (etc / "home/noise.secret").chmod(0o644)
    assert failed(etc) == ["noise secret"]
    (etc / "home/noise.secret").chmod(0o600)
    (etc / "home/ledger.jsonl").write_text("not a ledger\n")
    assert failed(etc) == ["ledger"]


def test_the_check_command_says_it_and_exits(etc: Path) -> None:
    files = ["--node", str(etc / "node.toml"), "--policy", str(etc / "owner.toml"), "--offline"]
    run = CliRunner()
    assert run.invoke(app_cli, ["owner", "check", *files]).exit_code == 0
    (etc / "data.jsonl").unlink()
    told = run.invoke(app_cli, ["owner", "check", *files])
    assert told.exit_code == 1
    assert "is not there" in " ".join(told.stdout.split())


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("superlink = 'nowhere'", "superlink='nowhere': must be host:port"),
        ("superlink = 'h:70000'", "superlink='h:70000'"),
        ("unknown = 1", "unknown=1: must be one of"),
        ("port = -1", "port=-1"),
        ("client-key = 'x'", "client-certificate=None"),
        ("node = 3", "node=3: must be a table"),
        ("node = {owner = 'bank', state-dir = '/x'}", "state-dir='/x': must be left out, home"),
        ("node = {owner = 'bank', session-ca = '/x'}", "session-ca='/x': must be left out, ca"),
        ("node = {owner = 'a b'}", "owner='a b'"),
        ("node = {owner = 'a', x = [1]}", r"x=\[1\]: must be a bool"),
        ('node = {owner = "a", x = "it\'s"}', "without '"),
    ],
)
def test_a_node_file_that_is_none_is_refused_by_name(line: str, named: str, tmp_path: Path) -> None:
    name = line.partition(" ")[0]
    head, _, table = FILE.format(port=1).partition("[node]")
    kept = [x for x in head.splitlines() if not x.startswith(f"{name} ")]
    rest = "" if name == "node" else f"[node]{table}"
    path = tmp_path / "node.toml"
    path.write_text("\n".join([*kept, line, rest]))
    with pytest.raises(ConfigError, match=named):
        NodeFile.load(path)


def test_node_config_survives_flowers_parser(etc: Path) -> None:
    from flwr.common.config import parse_config_args

    config = {"owner": "bank", "data-path": "/a b/c=d.jsonl", "n": 3, "x": 0.5, "yes": True}
    assert parse_config_args([node_config_text(config)]) == config
    whole = NodeFile.load(etc / "node.toml").node_config(etc / "owner.toml")
    assert parse_config_args([node_config_text(whole)]) == whole
    assert whole["data-path"] == str(etc / "data.jsonl")


def test_nothing_starts_without_a_pinned_digest_or_beside_another(etc: Path) -> None:
    node = NodeFile.load(etc / "node.toml")
    assert pinned_digest(etc / "owner.toml") == "a" * 64
    with sole(node.home), pytest.raises(ConfigError, match="runs on it already"):
        start(node, etc / "owner.toml")
    (etc / "owner.toml").write_text("")
    with pytest.raises(ConfigError, match=r"app\.digest: must be set"):
        start(node, etc / "owner.toml")


def test_the_identity_command_prints_the_key_that_other_owners_write_down(etc: Path) -> None:
    asked = ["owner", "identity", "--node", str(etc / "node.toml")]
    first, again = (CliRunner().invoke(app_cli, asked) for _ in range(2))
    assert first.exit_code == 0, first.output
    assert first.output == again.output
    secret = OwnerSecret.load_or_create(etc / "home" / "noise.secret")
    identity = OwnerIdentity("bank", OwnerHome(etc / "home"), secret, {})
    assert first.output.strip() == identity_of(identity)
    key = Ed25519PrivateKey.from_private_bytes(identity_key(identity))
    assert key.public_key().public_bytes_raw().hex() == first.output.strip()


def test_init_writes_a_file_once(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    run = CliRunner()
    assert run.invoke(app_cli, ["owner", "init", str(path)]).exit_code == 0
    assert NodeFile.load(path).owner == "hospital"
    assert isinstance(run.invoke(app_cli, ["owner", "init", str(path)]).exception, ConfigError)


def test_a_review_of_this_projects_app(tmp_path: Path) -> None:
    app = tmp_path / "app"
    shutil.copytree(
        ROOT / "strategies", app / "strategies", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", app)
    bundle = bundle_of(app)
    assert digest_of_bundle(bundle) == digest_of_bundle(bundle_of(app))
    facts = " ".join(facts_of(bundle))
    assert "the copy that you installed" in facts
    assert "hides" not in facts
    (app / "strategies" / "torch.py").write_text("")
    text = (app / "pyproject.toml").read_text()
    text = text.replace('["strategies/**"]', '["strategies/**", "torch/**"]')
    text = text.replace("fedsplit.client_app:app", "strategies.mine:app")
    (app / "pyproject.toml").write_text(text)
    (app / "strategies" / "mine.py").write_text("app = 1\n")
    (app / "torch").mkdir()
    (app / "torch" / "__init__.py").write_text("")
    changed = bundle_of(app)
    assert digest_of_bundle(changed) != digest_of_bundle(bundle)
    facts = " ".join(facts_of(changed))
    assert "NOT the copy" in facts
    assert "hides installed packages of yours: torch" in facts
    with pytest.raises(ConfigError, match="Flower cannot bundle it"):
        bundle_of(tmp_path / "app" / "strategies")


# ---- the processes of a start, with stand-ins for Flower's two commands --------------------------

PROGRAM = """
import sys
from pathlib import Path
from fedsplit.deploy import start
from fedsplit.deploy.node import NodeFile

etc = Path(sys.argv[1])
start.find_command = lambda name: str(etc / name)
if len(sys.argv) > 2:  # the policy has been read elsewhere, by a process that takes seconds
    start.pinned_digest = lambda policy: sys.argv[2]
sys.exit(start.start(NodeFile.load(etc / "node.toml"), etc / "owner.toml"))
"""
STAND_IN = """#!/bin/sh
echo "$PATH" > {etc}/{name}.path
echo "$FEDSPLIT_POLICY $FLWR_HOME $FEDSPLIT_OWNER_PATH" > {etc}/{name}.env
echo "$@" > {etc}/{name}.draft
/bin/mv {etc}/{name}.draft {etc}/{name}.args
{then}
"""


def begin(
    etc: Path, then: str = "exec /bin/sleep 600", *, pinned: tuple[str, ...] = ("a" * 64,)
) -> subprocess.Popen[bytes]:
    for name in ("flower-supernode", "flower-superexec"):
        command = then if name == "flower-supernode" else "exec /bin/sleep 600"
        (etc / name).write_text(STAND_IN.format(etc=etc, name=name, then=command))
        (etc / name).chmod(0o700)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FEDSPLIT_", "FLWR_"))}
    env |= {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(etc), *pinned], env=env)
    until = time.monotonic() + 60
    while process.poll() is None and not (etc / "flower-superexec.args").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="signals and sh")
def test_a_start_told_to_end_ends_everything(etc: Path) -> None:
    process = begin(etc, pinned=())
    runtime = etc / "home" / "flower" / "runtime"
    arguments = (etc / "flower-supernode.args").read_text()
    assert "--isolation process" in arguments
    assert f"--root-certificates {etc / 'keys/owners/bank/ca.pem'}" in arguments
    assert f"state-dir='{etc / 'home'}'" in arguments
    assert "--host 127.0.0.1" in arguments
    assert stat.S_IMODE((runtime / "superexec.secret").stat().st_mode) == 0o600
    # SuperExec finds the guard and nothing else; what it starts gets the owner's PATH back.
    assert (etc / "flower-superexec.path").read_text().strip() == str(runtime / "commands")
    policy, flower, path = (etc / "flower-superexec.env").read_text().split()
    assert (policy, flower) == (str(etc / "owner.toml"), str(etc / "home" / "flower"))
    assert path == os.environ["PATH"]
    process.terminate()
    assert process.wait(60) == 0
    assert not runtime.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals and sh")
@pytest.mark.parametrize(
    ("then", "code"), [("/bin/sleep 1; exit 44", 44), ("/bin/sleep 1; exit 0", 1)]
)
def test_a_supernode_that_ends_ends_the_start_with_a_fault(etc: Path, then: str, code: int) -> None:
    process = begin(etc, then)
    assert process.wait(30) == code
    assert not (etc / "home" / "flower" / "runtime").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells children on Linux alone")
def test_a_start_that_is_killed_leaves_no_supernode(etc: Path) -> None:
    process = begin(etc, "exec /bin/sleep 601")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    process.kill()
    process.wait(60)
    until = time.monotonic() + 60
    while any(_runs(pid) for pid in children):
        assert time.monotonic() < until
        time.sleep(0.05)


def _runs(pid: str) -> bool:
    try:
        state = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
