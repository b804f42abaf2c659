"""What an owner keeps, and what nobody but its own machine may decide."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest

from fedsplit.config import DataConfig, RunConfig
from fedsplit.config.groups import ModelConfig
from fedsplit.errors import (
    ConfigError,
    DataError,
    FedsplitError,
    PolicyError,
    PrivacyError,
    SessionError,
)
from fedsplit.owners.data_source import own_data, owner_name
from fedsplit.owners.home import OwnerHome
from fedsplit.owners.identity import OwnerIdentity
from fedsplit.owners.policy.refusals import TOLD, tellable
from fedsplit.privacy.secret import OwnerSecret

SECRET = OwnerSecret(bytes(range(32)))


def numbers(secret: OwnerSecret) -> list[float]:
    return [float(x) for x in secret.stream("test").uniform(4)]


def config(seed: int = 0) -> RunConfig:
    return RunConfig.from_flat({"seed": seed})


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An owner's real machine, not a simulation."""
    monkeypatch.delenv("FEDSPLIT_SIMULATION", raising=False)
    monkeypatch.delenv("FEDSPLIT_HOME", raising=False)
    return tmp_path / "home"


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FEDSPLIT_SIMULATION", "1")
    monkeypatch.setenv("FEDSPLIT_HOME", str(tmp_path / "homes"))
    return tmp_path / "homes"


@pytest.mark.parametrize("variable", [None, "", "0", "true", "yes", "01", " 1"])
def test_the_runs_seed_never_decides_the_noise_of_a_real_owner(
    real: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    if variable is not None:
        monkeypatch.setenv("FEDSPLIT_SIMULATION", variable)
    node = {"owner": "clinic", "state-dir": str(real)}
    # Whatever a server can put into the node config's neighbour, the run config.
    first = numbers(OwnerIdentity.from_node(config(0), node).secret)
    again = numbers(OwnerIdentity.from_node(config(1), node).secret)
    elsewhere = {"owner": "clinic", "state-dir": str(real / "elsewhere")}
    other = numbers(OwnerIdentity.from_node(config(0), elsewhere).secret)
    assert first == again != other
    for seed in (0, 1):
        assert first != numbers(OwnerSecret.for_simulation(seed, "clinic"))
    secret = real / "noise.secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(real.stat().st_mode) & 0o077 == 0


def test_a_simulated_owners_noise_is_that_of_seed_and_name(simulated: Path) -> None:
    first = numbers(OwnerIdentity.from_node(config(0), {"partition-id": 0}).secret)
    assert first == numbers(OwnerIdentity.from_node(config(0), {"partition-id": 0}).secret)
    assert first != numbers(OwnerIdentity.from_node(config(1), {"partition-id": 0}).secret)
    assert first != numbers(OwnerIdentity.from_node(config(0), {"partition-id": 1}).secret)
    assert not list(simulated.rglob("noise.secret"))


def test_where_the_home_is(real: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert OwnerHome.locate({}, "clinic").root == tmp_path / ".fedsplit"
    monkeypatch.setenv("FEDSPLIT_HOME", str(tmp_path / "env"))
    assert OwnerHome.locate({}, "clinic").root == tmp_path / "env"
    assert OwnerHome.locate({"state-dir": str(real)}, "clinic").root == real
    monkeypatch.setenv("FEDSPLIT_SIMULATION", "1")
    assert OwnerHome.locate({}, "clinic").root == tmp_path / "env" / "clinic"


def test_a_home_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"owner home .*must be a writable folder"):
        OwnerHome(tmp_path / "file" / "home")


@pytest.mark.parametrize("content", [b"", bytes(31), bytes(33)])
def test_a_damaged_secret_is_refused_and_not_replaced(real: Path, content: bytes) -> None:
    real.mkdir()
    secret = real / "noise.secret"
    secret.write_bytes(content)
    secret.chmod(0o600)
    with pytest.raises(PrivacyError, match="must be 32 bytes"):
        OwnerHome(real).secret(0, "clinic")
    assert secret.read_bytes() == content


@pytest.mark.parametrize("digest", ["../../etc", "a/b", "", ".", "a.b", "/abs"])
def test_a_digest_names_no_other_folder(tmp_path: Path, digest: str) -> None:
    with pytest.raises(ConfigError, match="must be hexadecimal"):
        OwnerHome(tmp_path).bottom_dir(digest)


def test_run_folders_are_apart_and_private(tmp_path: Path) -> None:
    home = OwnerHome(tmp_path / "home")
    folders = {home.run_dir(1, 23), home.run_dir(12, 3), home.run_dir(1, 23)}
    assert len(folders) == 2
    for folder in folders:
        assert stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0


# ---- data ---------------------------------------------------------------------------------------


def test_outside_a_simulation_the_run_config_names_no_data(real: Path, texts: Path) -> None:
    asked = DataConfig(kind="file", path=str(texts), owners=1, partition="iid")
    with pytest.raises(ConfigError, match="data-path: must name this owner's own data"):
        own_data(RunConfig(data=asked), {"partition-id": 0}, SECRET)
    own = texts.parent / "own.jsonl"
    own.write_text('{"words": "mine", "class": "yes"}\n{"words": "mine too", "class": "no"}\n' * 4)
    node = {"data-path": str(own), "text-column": "words", "label-column": "class"}
    model = ModelConfig(labels=2, label_names="no, yes")
    shares = []
    for path, column in ((str(texts), "text"), ("/etc/passwd", "label"), ("", "words")):
        asked = replace(asked, path=path, text_column=column, kind="docstrings", limit=1)
        shares.append(own_data(RunConfig(data=asked, model=model), node, SECRET))
    for train, test in shares:
        assert {*train.texts, *test.texts} == {"mine", "mine too"}
        assert len(train) + len(test) == 8
        assert {*zip(train.texts, train.labels, strict=True)} <= {("mine", 1), ("mine too", 0)}
        assert [*train.texts] == [*shares[0][0].texts]


def test_in_a_simulation_it_is_the_partition_that_counts(simulated: Path, texts: Path) -> None:
    asked = DataConfig(kind="file", path=str(texts), owners=3, partition="iid")
    nodes = [{"partition-id": i, "data-path": "/x"} for i in range(3)]
    run = RunConfig(data=asked, model=ModelConfig(labels=3))
    parts = [own_data(run, node, SECRET) for node in nodes]
    assert sum(len(train) + len(test) for train, test in parts) == 120
    for bad in (3, -1, None, "0", 1.0):
        with pytest.raises(ConfigError, match=r"partition-id=.*must be in"):
            own_data(run, {"partition-id": bad}, SECRET)


def test_owners_of_two_rows_have_one_on_each_side(simulated: Path, texts: Path) -> None:
    asked = DataConfig(
        kind="file", path=str(texts), owners=3, partition="iid", limit=6, test_share=0.1
    )
    run = RunConfig(data=asked, model=ModelConfig(labels=3))
    parts = [own_data(run, {"partition-id": i}, SECRET) for i in range(3)]
    assert [(len(train), len(test)) for train, test in parts] == [(1, 1)] * 3
    with pytest.raises(DataError, match=r"owners=3: must be <= 2.*every owner must have 2"):
        own_data(RunConfig(data=replace(asked, limit=5)), {"partition-id": 0}, SECRET)


@pytest.mark.parametrize(
    ("node", "name"),
    [
        ({"owner": "clinic-7_b"}, "clinic-7_b"),
        ({"owner": "clinic", "partition-id": 3}, "clinic"),
        ({"partition-id": 0}, "owner-0"),
    ],
)
def test_owner_names(node: dict[str, object], name: str) -> None:
    assert owner_name(node) == name


@pytest.mark.parametrize(
    "node",
    [
        {},
        {"owner": ""},
        {"owner": "-_"},
        {"owner": "../clinic"},
        {"owner": "a/b"},
        {"owner": "a b"},
        {"owner": "a\n"},
        {"owner": 7},
        {"owner": None},
        {"owner": "x" * 65},
        {"partition-id": "0/.."},
    ],
)
def test_names_that_are_none(node: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="node config owner="):
        owner_name(node)


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [DataError("text='gout'"), KeyError("gout"), OSError("gout")])
def test_what_leaves_of_an_error_is_not_the_data(real: Path, error: Exception) -> None:
    told = tellable(error)
    assert "gout" not in str(told)
    assert "its own log says why" in str(told)
    assert type(told) is (DataError if isinstance(error, DataError) else SessionError)


def test_every_error_is_told_as_a_sentence_of_the_table(real: Path) -> None:
    kinds, seen = [FedsplitError], set()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        seen.add(str(tellable(kind("hidden: 414 NaN values\n\x1b[2J"))))
    assert seen == set(TOLD.values())


def test_a_policys_refusal_names_its_rules_and_no_value(real: Path) -> None:
    told = tellable(PolicyError("noise.max_eta: asked 8", ("noise.max_eta", "made.up 414")))
    assert str(told).endswith("(rules: noise.max_eta)")


def test_a_simulation_is_told_everything(simulated: Path) -> None:
    assert "gout" in str(tellable(DataError("text='gout'")))
    assert "gout" in str(tellable(KeyError("gout")))


# ---- what is received ---------------------------------------------------------------------------


def test_only_simulated_owners_share_what_they_received(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    monkeypatch.setenv("FEDSPLIT_SIMULATION_SHARED", str(shared))
    home = OwnerHome(real)
    assert home.bottom_dir("ab") == real / "bottoms" / "ab"
    assert home.received("emulators") == real / "emulators"
    monkeypatch.setenv("FEDSPLIT_SIMULATION", "1")
    assert home.bottom_dir("ab") == shared / "bottoms" / "ab"
    assert home.received("emulators") == shared / "emulators"


def test_one_owners_bounds_do_not_remove_what_others_share(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSPLIT_SIMULATION_SHARED", str(tmp_path / "shared"))
    home = OwnerHome(simulated / "owner-0")
    for digest in ("aa", "bb"):
        home.bottom_dir(digest).mkdir(parents=True)
    home.evict("bottoms", "aa", {"cache-count": 1})
    assert home.bottom_dir("bb").is_dir()
