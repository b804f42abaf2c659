"""The lineage gate inside a strategy: owners' updates, averages, quarantine, evidence."""

from __future__ import annotations

import copy
import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedsplit.config import LineageConfig, RobustConfig
from fedsplit.errors import LineageError, RunError
from fedsplit.fingerprints.evasion.transforms import transform
from fedsplit.fingerprints.evidence import chain as evidence
from fedsplit.fingerprints.evidence.keys import create_key, public_hex
from fedsplit.fingerprints.gate.lineage_gate import LineageGate
from fedsplit.fingerprints.gate.owner_updates import MatrixGate, average, leave_one_out
from strategies.rounds.aggregate import average_owners
from strategies.rounds.lineage_setup import KEY_VARIABLE, build_watch, open_chain
from strategies.rounds.lineage_watch import LineageWatch, stop_reason
from tests.strategies.local_grid import LocalGrid

OWNERS = ("a", "b", "c", "d")
SWAPS = 4  # a seed whose head permutation is not the identity


def llama(seed: int = 0) -> nn.Module:
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """What an owner returns: the last two blocks."""
    return {
        n: p.detach().clone()
        for n, p in model.named_parameters()
        if "layers.1." in n or "layers.2." in n
    }


def honest(base: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: t + 0.02 * t.std() * torch.randn(t.shape, generator=generator) if t.dim() > 1 else t
        for n, t in tensors(base).items()
    }


def noise(base: nn.Module, seed: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: t.std() * torch.randn(t.shape, generator=generator) if t.dim() > 1 else t
        for n, t in tensors(base).items()
    }


def make_watch(base: nn.Module, gate: str = "reject", **options: Any) -> LineageWatch:
    config = LineageConfig(gate=gate)
    return LineageWatch(config, None, owners=LineageGate(base), **options)


def one_round(
    watch: LineageWatch, number: int, updates: dict[str, dict[str, Tensor]]
) -> dict[str, Any]:
    row = watch.open_round(number)
    kept = watch.screen(row, updates, {name: i for i, name in enumerate(OWNERS)})
    mine = {name: updates[name] for name in kept}
    if mine:
        weights = dict.fromkeys(mine, 1.0)
        watch.check_average(row, average(mine, weights), mine, weights)
    return watch.close_round(row)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return llama()


def updates_of(base: nn.Module) -> dict[str, dict[str, Tensor]]:
    return {name: honest(base, i) for i, name in enumerate(OWNERS)}


def test_honest_owners_are_all_accepted(base: nn.Module) -> None:
    watch = make_watch(base)
    for number in (1, 2, 3):
        row = one_round(watch, number, updates_of(base))
        assert (row["verdict"], row["action"]) == ("in_lineage", "accept")
        assert {r["action"] for r in row["owners"].values()} == {"accept"}
        assert row["score"] > 0.95
    assert not watch.quarantined


@pytest.mark.parametrize("attack", ["noise", "foreign", "nan"])
def test_a_stranger_is_named_and_quarantined_and_the_others_average(
    base: nn.Module, attack: str
) -> None:
    watch = make_watch(base)
    updates = updates_of(base)
    if attack == "nan":
        updates["c"]["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    else:
        updates["c"] = noise(base) if attack == "noise" else tensors(llama(seed=7))

    row = one_round(watch, 1, updates)

    assert {o: r["action"] for o, r in row["owners"].items()} == {
        "a": "accept",
        "b": "accept",
        "c": "quarantine",
        "d": "accept",
    }
    assert (row["verdict"], row["action"]) == ("in_lineage", "accept")
    assert list(row["quarantined"]) == ["c"]
    assert watch.is_quarantined(99, "c")
    assert watch.is_quarantined(2, "another name")
    assert not watch.is_quarantined(3, "d")
    watch.lift_quarantine("c", 2)
    assert not watch.is_quarantined(2, "c")


def test_an_average_hides_one_stranger_of_four_but_not_one_of_two(base: nn.Module) -> None:
    """Why each owner's own update is judged first."""
    watch = make_watch(base, check_owners=False)
    four = updates_of(base) | {"c": noise(base)}
    assert one_round(watch, 1, four)["verdict"] == "in_lineage"

    two = {"a": honest(base, 1), "c": noise(base)}
    row = one_round(make_watch(base, check_owners=False), 1, two)
    assert row["verdict"] == "not_shown"
    assert row["rejected"] is True
    assert row["named"] == "c"
    assert row["leave_one_out"]["c"] > 0.9 > row["leave_one_out"]["a"]
    assert "only without this owner" in row["quarantined"]["c"]


def test_a_rejected_average_leaves_the_last_good_state(base: nn.Module) -> None:
    watch = make_watch(base, check_owners=False)
    one_round(watch, 1, {"a": honest(base, 1), "b": honest(base, 2)})
    kept = {n: t.clone() for n, t in watch._state.items()}
    one_round(watch, 2, {"a": honest(base, 3), "b": noise(base)})
    for name, tensor in kept.items():
        assert torch.equal(watch._state[name], tensor)
    assert one_round(watch, 3, {"a": honest(base, 4)})["verdict"] == "in_lineage"


@pytest.mark.parametrize(
    "name", ["ffn_permutation", "head_permutation", "vo_maps", "qk_maps", "weight_scaling"]
)
def test_an_equivalent_permutation_is_set_aside_without_blame(base: nn.Module, name: str) -> None:
    watch = make_watch(base)
    updates = updates_of(base) | {"b": tensors(transform(base, name, seed=SWAPS).model)}
    row = one_round(watch, 1, updates)
    assert row["owners"]["b"]["action"] == "set aside"
    assert row["owners"]["b"]["verdict"] == "in_lineage"
    assert "another basis" in row["owners"]["b"]["reason"]
    assert row["verdict"] == "in_lineage"
    assert not watch.quarantined


def test_warn_records_and_stop_stops(base: nn.Module) -> None:
    updates = updates_of(base) | {"c": noise(base)}
    warned = one_round(make_watch(base, "warn"), 1, updates)
    assert warned["owners"]["c"]["action"] == "warn"
    assert "quarantined" not in warned
    assert stop_reason(warned) is None
    stopped = one_round(make_watch(base, "stop"), 1, updates)
    assert stop_reason(stopped) is not None
    assert "update of c" in str(stop_reason(stopped))
    off = LineageWatch(LineageConfig(gate="off"), None)
    assert off.close_round(off.open_round(1)) == {"round": 1, "verdict": "off"}


def test_an_update_is_judged_by_the_blocks_it_returns_alone(base: nn.Module) -> None:
    gate = LineageGate(base)
    watch = LineageWatch(LineageConfig(gate="reject"), None, owners=gate)
    seen: list[int] = []
    plain = gate.check

    def check(*args: Any, **options: Any) -> Any:
        found = plain(*args, **options)
        seen.append(found.recomputed)
        return found

    gate.check = check  # type: ignore[method-assign]
    watch.screen(watch.open_round(1), {"a": honest(base, 1)})
    assert seen == [2]


def test_without_owners_weights_the_report_says_that_nobody_can_be_named(base: nn.Module) -> None:
    model = copy.deepcopy(base)
    watch = LineageWatch(LineageConfig(gate="reject"), LineageGate(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    row = watch.open_round(1)
    watch.check_model(row, model, [n for n, _ in model.named_parameters()])
    watch.close_round(row)
    assert row["rejected"] is True
    assert "no owner can be named" in row["note"]


def test_embeddings_alone_are_judged_by_their_matrices() -> None:
    rows = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    gate = MatrixGate({"embedding.weight": rows, "norm.bias": torch.zeros(16)})
    near = gate.check({"embedding.weight": rows + 0.01, "norm.bias": torch.ones(16)})
    far = gate.check({"embedding.weight": rows.flip(0), "norm.bias": torch.ones(16)})
    assert (near.verdict, far.verdict) == ("in_lineage", "independent")
    with pytest.raises(LineageError, match=r"embedding\.weight.*missing"):
        gate.check({"norm.bias": torch.ones(16)})


def test_leave_one_out_names_nobody_when_nobody_alone_mends_it(base: nn.Module) -> None:
    updates = {"a": honest(base, 1), "b": noise(base, 1), "c": noise(base, 2)}
    gate = LineageGate(base)
    gate.check(base)
    state = {n: p.detach() for n, p in base.named_parameters()}
    assert leave_one_out(gate, state, updates, dict.fromkeys(updates, 1.0)).named is None


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_bad_weights_of_an_average_are_named(base: nn.Module, weight: float) -> None:
    with pytest.raises(LineageError, match="weight of 'a'"):
        average({"a": honest(base, 1)}, {"a": weight})


# ---- evidence -----------------------------------------------------------------------------------


def test_evidence_is_signed_chained_and_resumed(
    base: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    config = LineageConfig(gate="reject")
    for first in (1, 3):
        watch = make_watch(base, chain=open_chain(tmp_path, config))
        one_round(watch, first, updates_of(base) | {"c": noise(base)})
        row = one_round(watch, first + 1, updates_of(base))
    key_file = tmp_path / "lineage-key.pem"
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    public = (tmp_path / "lineage-key.pem.pub").read_text().strip()
    chain = tmp_path / "lineage.jsonl"
    assert evidence.verify(chain, signer=public, head=row["record"]) == 4
    records = list(evidence.read(chain))
    assert [r.round for r in records] == [1, 2, 3, 4]
    details = records[0].body["details"]
    assert details["owners"]["c"]["action"] == "quarantine"
    assert set(details["portraits"]) == {"base", "aggregate", "owners"}
    assert len({r.body["weights"] for r in records}) >= 2


def test_a_broken_or_foreign_chain_is_not_continued(
    base: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    config = LineageConfig()
    one_round(make_watch(base, chain=open_chain(tmp_path, config)), 1, updates_of(base))
    monkeypatch.setenv(KEY_VARIABLE, str(tmp_path / "other.pem"))
    with pytest.raises(LineageError, match="no readable key"):
        open_chain(tmp_path, config)
    other = create_key(tmp_path / "other.pem")
    with pytest.raises(LineageError, match=f":1: signed by .* must be {public_hex(other)}"):
        open_chain(tmp_path, config)
    monkeypatch.delenv(KEY_VARIABLE)
    chain = tmp_path / "lineage.jsonl"
    body = json.loads(chain.read_text())
    chain.write_text(json.dumps(body | {"action": "reject"}) + "\n")
    with pytest.raises(LineageError, match=":1: contents were changed"):
        open_chain(tmp_path, config)


def test_no_evidence_where_it_is_off(tmp_path: Path) -> None:
    assert open_chain(tmp_path, LineageConfig(evidence=False)) is None
    assert open_chain(tmp_path, LineageConfig(gate="off")) is None
    assert open_chain(None, LineageConfig()) is None
    assert list(tmp_path.iterdir()) == []


def test_the_portrait_of_a_round_is_that_of_the_published_fingerprint(base: nn.Module) -> None:
    from fedsplit.fingerprints import WeightView
    from fedsplit.fingerprints.evidence import public_file
    from fedsplit.fingerprints.portraits import encoder
    from fedsplit.fingerprints.portraits.round_portrait import (
        RoundPortrait,
        pack_vector,
        unpack_vector,
    )

    view = WeightView.of_module(base)
    drawn = RoundPortrait(view).vector(view)
    published = encoder.vector(public_file.make(view, "base"))
    torch.testing.assert_close(
        torch.from_numpy(drawn), torch.from_numpy(published), atol=1e-3, rtol=1e-3
    )
    kept = torch.from_numpy(unpack_vector(pack_vector(drawn)))
    torch.testing.assert_close(kept, torch.from_numpy(drawn), atol=2e-3, rtol=2e-3)
    with pytest.raises(LineageError, match="not a vector"):
        unpack_vector("%%%")


# ---- in split tuning ----------------------------------------------------------------------------

QUICK = {"train__rounds": 2, "train__max_steps": 1, "output__evaluate_every": 0}


@pytest.mark.parametrize("k", [0, 1])
def test_an_owner_that_returns_a_foreign_bottom_is_left_out_of_later_rounds(
    make_config: Any, run_locally: Any, k: int, tmp_path: Path
) -> None:
    from strategies.split_tuning.strategy import SplitTuning

    spoilt: list[str] = []

    def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
        watch = strategy.parts.watch
        screen = watch.screen

        def replaced(row: Any, updates: Any, nodes: Any = None) -> list[str]:
            if not spoilt:
                spoilt.append(min(updates))
                generator = torch.Generator().manual_seed(0)
                for tensor in updates[spoilt[0]].values():
                    if tensor.dim() > 1:
                        tensor.copy_(tensor.std() * torch.randn(tensor.shape, generator=generator))
            return screen(row, updates, nodes)

        watch.screen = replaced  # type: ignore[method-assign]

    run = run_locally(
        make_config(**QUICK | {"split__bottom": "joint", "split__k": k, "lineage__gate": "reject"}),
        prepare=prepare,
    )
    first, second = run.server["rounds"]
    assert list(first["lineage"]["quarantined"]) == spoilt
    assert first["lineage"]["owners"][spoilt[0]]["action"] == "quarantine"
    assert first["lineage"]["verdict"] == "in_lineage"
    assert spoilt[0] not in second["train"]["metrics"]["owners"]
    assert len(second["train"]["metrics"]["owners"]) == 2
    assert evidence.verify(run.folder / "lineage.jsonl") == 2


def test_a_round_without_anybody_left_ends_the_run_with_the_reasons(
    make_config: Any, run_locally: Any
) -> None:
    def prepare(grid: LocalGrid, strategy: Any) -> None:
        for node in grid.get_node_ids():
            strategy.parts.watch.quarantine(f"owner {node}", "seen before", node)

    with pytest.raises(RunError, match=r"owners left=0.*seen before"):
        run_locally(make_config(**QUICK), prepare=prepare)


def test_a_frozen_bottoms_rounds_say_what_was_not_checked(
    make_config: Any, run_locally: Any
) -> None:
    run = run_locally(make_config(**QUICK | {"train__rounds": 1}))
    row = run.server["rounds"][0]["lineage"]
    assert "no owner can be named" in row["note"]
    assert row["verdict"] == "in_lineage"
    (record,) = evidence.read(run.folder / "lineage.jsonl")
    assert record.hash == row["record"]
    assert record.body["report"]["score"] == row["score"]


def test_nothing_is_averaged_where_every_owner_is_refused(base: nn.Module) -> None:
    watch = make_watch(base)
    row = watch.open_round(1)
    assert average_owners(watch, row, [], {}, FedAvg(), ArrayRecord(), RobustConfig()) is None
    assert build_watch(LineageConfig(gate="off"), None, model=base).gate is None
