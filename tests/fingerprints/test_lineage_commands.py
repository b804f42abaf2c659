"""The lineage commands from a user's side: what they print, write and exit with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fedsplit.cli import app_cli
from fedsplit.errors import FedsplitError
from fedsplit.fingerprints.evidence import chain as evidence
from fedsplit.fingerprints.gate.lineage_gate import LineageGate
from fedsplit.fingerprints.portraits import encoder

Tiny = Callable[..., Any]
IN, NOT_SHOWN, INDEPENDENT, FAILED, USAGE = 0, 1, 2, 3, 4


def call(*arguments: object) -> tuple[int, str]:
    """Run the command; return its exit code and what it printed."""
    result = CliRunner().invoke(
        app_cli, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"}
    )
    if isinstance(result.exception, FedsplitError):
        return 1, f"{type(result.exception).__name__}: {result.exception}"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture
def saved(tiny: Tiny, tmp_path: Path) -> Callable[..., Path]:
    """Write a tiny model; nudged by ``near``, with ``change(state)`` applied to its file."""

    def save(name: str, seed: int = 0, near: float = 0.0, change: Any = None, **shape: Any) -> Path:
        folder = tmp_path / name
        model = tiny("llama", seed=seed, **shape)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(near * p.std() * torch.randn(p.shape, generator=generator))
        model.save_pretrained(folder)
        if change is not None:
            path = folder / "model.safetensors"
            state = load_file(path)
            change(state)
            save_file(state, path, {"format": "pt"})
        return folder

    return save


def test_three_verdicts_and_their_exit_codes(saved: Any, tmp_path: Path) -> None:
    base, child, stranger = saved("base"), saved("child", near=0.02), saved("other", seed=5)
    figures = tmp_path / "figures.json"
    code, said = call("compare", base, child, "--no-run", "--json", figures)
    assert code == IN
    assert "in lineage" in said
    assert "false-positive rate of 1e-06" in said
    found = json.loads(figures.read_text())
    assert found["verdict"] == "in_lineage"
    assert {"score", "pcs", "ics", "ics_published", "ics_whitened", "awm"} == set(found["values"])
    code, said = call("compare", base, stranger, "--no-run")
    assert code == INDEPENDENT
    assert "independent" in said


def test_a_spliced_block_is_named_in_the_bars(saved: Any) -> None:
    donor = load_file(saved("donor", seed=5) / "model.safetensors")

    def splice(state: dict[str, Any]) -> None:
        state.update({n: t for n, t in donor.items() if "layers.1." in n})

    code, said = call("compare", saved("base"), saved("spliced", change=splice), "--no-run")
    assert code == IN
    assert "replaced or spliced): 1" in said
    line = next(line for line in said.splitlines() if "a stranger's" in line)
    assert "····" in line


def test_a_published_fingerprint_stands_for_its_weights(saved: Any, tmp_path: Path) -> None:
    base, child, stranger = saved("base"), saved("child", near=0.02), saved("other", seed=5)
    key, out = tmp_path / "owner.pem", tmp_path / "base.json"
    code, said = call("lineage", "key", key)
    assert code == 0
    assert key.stat().st_mode & 0o077 == 0
    code, said = call(
        "fingerprint", base, "--out", out, "--key", key, "--picture", tmp_path / "base.svg"
    )
    assert code == 0
    assert "reveals" in said
    assert "the public draw" in said
    assert (tmp_path / "base.svg").read_text().startswith("<svg")
    public = f"{key}.pub"
    assert call("compare", out, child, "--signer", public)[0] == IN
    assert call("compare", out, stranger, "--pictures", tmp_path / "pictures")[0] == INDEPENDENT
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {"A.png", "B.png"}
    other = tmp_path / "child.json"
    assert call("fingerprint", child, "--out", other)[0] == 0
    code, said = call("compare", out, other)
    assert code == IN
    assert "unsigned fingerprint" in said
    code, said = call("compare", other, base, "--signer", public)
    assert code == FAILED
    assert "signed by nobody" in said


def test_a_sketch_reveals_a_quarter(saved: Any, tmp_path: Path) -> None:
    base = saved("base")
    whole, small = tmp_path / "whole.json", tmp_path / "small.json"
    assert call("fingerprint", base, "--out", whole)[0] == 0
    code, said = call("fingerprint", base, "--out", small, "--sketch")
    assert code == 0
    assert "within 0.013" in said
    assert small.stat().st_size < 0.45 * whole.stat().st_size
    assert call("compare", small, saved("child", near=0.02))[0] == IN
    code, said = call("compare", small, whole)
    assert code == FAILED
    assert "size: the base's file has 16, the suspect's 32" in said


def test_a_descendant_with_more_tokens_uses_the_bases_list(
    tiny: Tiny, saved: Any, tmp_path: Path
) -> None:
    base, longer = saved("base"), tiny("llama")
    longer.resize_token_embeddings(200)
    longer.save_pretrained(tmp_path / "longer")
    ours, theirs, mine = (tmp_path / f"{n}.json" for n in ("base", "longer", "mine"))
    call("fingerprint", base, "--out", ours)
    call("fingerprint", tmp_path / "longer", "--out", theirs)
    code, said = call("compare", ours, theirs)
    assert code == FAILED
    assert "tokens: the base's file has 160, the suspect's 200" in said
    call("fingerprint", tmp_path / "longer", "--out", mine, "--tokens-of", ours)
    assert call("compare", ours, mine)[0] == IN


def _set(name: str, value: float) -> Any:
    def change(state: dict[str, Any]) -> None:
        state[name][0, 0] = value

    return change


def _rename(state: dict[str, Any]) -> None:
    state["model.layers.1.mlp.top_proj.weight"] = state.pop("model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_rename, "missing parameters"),
        (
            lambda state: state.pop("model.layers.2.self_attn.v_proj.weight"),
            "v_proj",
        ),
        (_set("model.layers.1.mlp.up_proj.weight", float("nan")), "NaN"),
        (_set("model.embed_tokens.weight", float("inf")), "NaN or infinite"),
    ],
)
def test_damaged_weights_are_named(saved: Any, change: Any, complaint: str) -> None:
    base, bad = saved("base"), saved("bad", change=change)
    for pair in ((base, bad), (bad, base)):
        code, said = call("compare", *pair, "--no-run")
        assert code == FAILED
        assert complaint in said
    code, said = call("fingerprint", bad)
    assert code == 1
    assert complaint in said


def test_files_that_are_none(saved: Any, tmp_path: Path) -> None:
    base, wide = saved("base"), saved("wide", hidden_size=64)
    published = tmp_path / "base.json"
    call("fingerprint", base, "--out", published)
    code, said = call("compare", published, wide)
    assert code == FAILED
    assert "width=64: the base's is 48" in said
    whole = (base / "model.safetensors").read_bytes()
    single = tmp_path / "base" / "model.safetensors"
    assert call("compare", single, base, "--no-run")[0] == IN
    single.write_bytes(whole[: len(whole) // 2])
    code, said = call("compare", single, wide)
    assert code == FAILED
    assert "not a readable safetensors file" in said
    for nothing in (tmp_path / "nowhere", "package:no_such_package_at_all", "nothing here"):
        code, said = call("compare", nothing, wide)
        assert code == FAILED
        assert "ModelError" in said
    assert call("compare", base)[0] == USAGE
    assert call("compare", base, wide, "--nonsense")[0] == USAGE


def test_a_tampered_or_other_fingerprint_file(saved: Any, tmp_path: Path) -> None:
    base, out = saved("base"), tmp_path / "base.json"
    call("fingerprint", base, "--out", out)
    document = json.loads(out.read_text())
    for change, complaint in (
        ({"model": "mine"}, "checksum does not fit"),
        ({"version": 2}, "version=2"),
        ({"signature": "zz"}, "damaged fingerprint file"),
        ({"kind": "something"}, "kind='something'"),
    ):
        out.write_text(json.dumps(document | change))
        code, said = call("compare", out, base)
        assert code == FAILED
        assert complaint in said
    code, said = call("fingerprint", base, "--key", tmp_path / "no.pem")
    assert code == 1
    assert "no readable key" in said
    code, said = call("fingerprint", base, "--picture", tmp_path / "dog.gif")
    assert code == 1
    assert "must end in .png or .svg" in said


@pytest.fixture
def chain(tiny: Tiny, tmp_path: Path) -> Path:
    """A run's folder with evidence of three rounds."""
    from strategies.rounds.lineage_setup import build_watch

    model, folder = tiny("llama"), tmp_path / "run"
    from fedsplit.config import LineageConfig

    watch = build_watch(LineageConfig(), folder, model=model)
    for number in (1, 2, 3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * p.std() * torch.randn_like(p))
        row = watch.open_round(number)
        watch.check_model(row, model, [n for n, _ in model.named_parameters()])
        watch.close_round(row)
    return folder


def test_show_and_verify(chain: Path, tmp_path: Path) -> None:
    code, said = call("lineage", "show", chain)
    assert code == 0
    assert said.count("in lineage") == 3
    assert (chain / "lineage.png").read_bytes().startswith(b"\x89PNG")
    code, said = call("lineage", "verify", chain / "lineage.jsonl")
    assert code == 0
    assert "3 records" in said
    assert "give --key" in said
    public = chain / "lineage-key.pem.pub"
    head = list(evidence.read(chain / "lineage.jsonl"))[-1].hash
    assert call("lineage", "verify", chain, "--key", public, "--head", head)[0] == 0
    code, said = call("lineage", "verify", chain, "--head", "0" * 64)
    assert code == 1
    assert "later records are missing" in said
    call("lineage", "key", tmp_path / "other.pem")
    code, said = call("lineage", "verify", chain, "--key", tmp_path / "other.pem.pub")
    assert code == 1
    assert ":1: signed by" in said
    assert call("lineage", "verify", tmp_path)[0] == 0  # the one just below
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "lineage.jsonl").touch()
    code, said = call("lineage", "verify", tmp_path)
    assert code == 1
    assert "holds 2 chains" in said
    assert "no records" in call("lineage", "verify", tmp_path / "again")[1]
    (tmp_path / "empty").mkdir()
    code, said = call("lineage", "show", tmp_path / "empty")
    assert code == 1
    assert "holds no lineage.jsonl" in said


@pytest.mark.parametrize("line", [1, 2, 3])
def test_verify_names_the_tampered_line(chain: Path, line: int) -> None:
    path = chain / "lineage.jsonl"
    lines = path.read_text().splitlines()
    lines[line - 1] = lines[line - 1].replace('"in_lineage"', '"independent"')
    path.write_text("\n".join(lines) + "\n")
    for command in ("verify", "show"):
        code, said = call("lineage", command, chain)
        assert code == 1
        assert f"lineage.jsonl:{line}: contents were changed" in said.replace("\n", "")


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    key = tmp_path / "k.pem"
    call("lineage", "key", key)
    before = key.read_bytes()
    code, said = call("lineage", "key", key)
    assert code == 1
    assert "never overwritten" in said
    assert key.read_bytes() == before


def test_train_encoder_is_the_shipped_recipe_from_a_seed(tmp_path: Path) -> None:
    from fedsplit.fingerprints.portraits.encoder_checks import largest_difference, recipe

    one, two = (tmp_path / f"{n}.safetensors" for n in ("one", "two"))
    for path in (one, two):
        code, said = call("lineage", "train-encoder", "--out", path, "--seed", 7, "--steps", 2)
        assert code == 0
        assert "fresh matrices" in said
    shipped = recipe(encoder.SHIPPED)
    assert recipe(one) == shipped | {"seed": "7", "steps": "2"}
    assert largest_difference(encoder.load(one), encoder.load(two)) == 0.0
    code, said = call("lineage", "train-encoder", "--out", one, "--steps", 1)
    assert code == 1
    assert "steps" in said


def test_attack_lineage_shows_every_fingerprint_after_every_map(tiny: Tiny, tmp_path: Path) -> None:
    from tests.tiny_models import save_tiny_llama

    model, figures = save_tiny_llama(tmp_path / "model"), tmp_path / "figures.json"
    code, said = call(
        "attack", "lineage", model, "--only", "ffn_permutation", "--only", "rotation",
        "--only", "key_bias", "--json", figures,
    )  # fmt: skip
    assert code == 0
    found = json.loads(figures.read_text())
    rows = {row["map"]: row for row in found["rows"]}
    assert set(rows) == {"(before)", "ffn_permutation", "rotation"}
    for name in ("ffn_permutation", "rotation"):
        assert rows[name]["difference"] < 5e-3
        assert rows[name]["score"] > 0.999
        assert rows[name]["pcs"] < 0.8
    assert "key_bias" in found["reasons"]
    code, said = call("attack", "lineage", model, "--only", "magic")
    assert code == 1
    assert "transform='magic'" in said


def test_a_gate_and_the_commands_agree(tiny: Tiny, saved: Any, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    call("compare", saved("base"), saved("child", near=0.1), "--no-run", "--json", figures)
    child = tiny("llama")
    child.load_state_dict(load_file(tmp_path / "child" / "model.safetensors"), strict=False)
    found = LineageGate(tiny("llama")).check(child)
    assert json.loads(figures.read_text())["score"] == pytest.approx(found.score, abs=0.01)
