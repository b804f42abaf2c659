"""The public fingerprint file and the chain of evidence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsplit.errors import LineageError
from fedsplit.fingerprints import WeightView
from fedsplit.fingerprints.evasion.transforms import transform
from fedsplit.fingerprints.evidence import chain as evidence
from fedsplit.fingerprints.evidence import keys, public_file
from fedsplit.fingerprints.gate.lineage_gate import LineageGate
from fedsplit.fingerprints.methods.whitened import WhitenedICS

Tiny = Callable[..., Any]


def _hex(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


@pytest.fixture
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def test_a_file_is_enough_to_verify_a_suspect(
    tiny: Tiny, tmp_path: Path, key: Ed25519PrivateKey
) -> None:
    model = tiny("llama")
    view = WeightView.of_module(model)
    path = tmp_path / "base.json"
    public_file.write(public_file.make(view, "base"), path, key)

    base = public_file.read(path, signer=_hex(key))

    assert public_file.compare_public(base, view).value == pytest.approx(1.0)
    rotated = WeightView.of_module(transform(model, "rotation").model)
    assert public_file.compare_public(base, rotated).value > 0.999
    stranger = WeightView.of_module(tiny("llama", seed=4))
    assert abs(public_file.compare_public(base, stranger).value) < 0.1


def test_the_sketch_is_close_to_the_exact_cosine(tiny: Tiny) -> None:
    import torch

    model, other = tiny("llama", hidden_size=96), tiny("llama", seed=3, hidden_size=96)
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.lerp_(p, 0.6)
    one, two = WeightView.of_module(model), WeightView.of_module(other)
    exact = WhitenedICS().compare(one, two).value
    errors = []
    for seed in range(6):
        base = public_file.make(one, "base", seed=seed)
        errors.append(public_file.compare_public(base, two).value - exact)
    assert max(abs(e) for e in errors) < 0.1
    assert abs(sum(errors) / len(errors)) < 0.05


def test_tampering_versions_and_signers(tiny: Tiny, tmp_path: Path, key: Ed25519PrivateKey) -> None:
    view = WeightView.of_module(tiny("llama"))
    path = tmp_path / "base.json"
    made = public_file.make(view, "base", size=8)
    public_file.write(made, path, key)
    whole = json.loads(path.read_text())

    def tampered(**changes: Any) -> Path:
        other = tmp_path / "other.json"
        other.write_text(json.dumps(whole | changes))
        return other

    with pytest.raises(LineageError, match="signature does not fit"):
        public_file.read(tampered(model="mine"))
    with pytest.raises(LineageError, match="version=2"):
        public_file.read(tampered(version=2))
    with pytest.raises(LineageError, match="signed by"):
        public_file.read(path, signer=_hex(Ed25519PrivateKey.generate()))
    (tmp_path / "junk.json").write_text("[1, 2")
    with pytest.raises(LineageError, match="not a fingerprint file"):
        public_file.read(tmp_path / "junk.json")
    with pytest.raises(LineageError, match="tokens: the base's file has 160"):
        public_file.compare_files(made, replace(made, tokens=made.tokens[:-1]))
    with pytest.raises(LineageError, match=r"size=48: must be in \[4, width=48\)"):
        public_file.make(view, "base", size=48)


def test_an_unsigned_file_shows_damage_but_no_signer(
    tiny: Tiny, tmp_path: Path, key: Ed25519PrivateKey
) -> None:
    view, path = WeightView.of_module(tiny("llama")), tmp_path / "base.json"
    made = public_file.make(view, "base", size=8)
    public_file.write(made, path, None)
    kept = public_file.read(path)
    assert (kept.signer, kept.tokens, kept.weights) == ("", made.tokens, made.weights)
    with pytest.raises(LineageError, match=f"signed by nobody, must be {_hex(key)}"):
        public_file.read(path, signer=_hex(key))
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"depth": 2}))
    with pytest.raises(LineageError, match="checksum"):
        public_file.read(path)
    path.write_text(json.dumps(document | {"signer": _hex(key)}))
    with pytest.raises(LineageError, match="signature does not fit"):
        public_file.read(path)


def test_a_chosen_token_list_shows(tiny: Tiny) -> None:
    view = WeightView.of_module(tiny("llama"))
    assert public_file.make(view, "base", size=8).standard_tokens
    assert not public_file.make(view, "base", size=8, tokens=range(60)).standard_tokens
    chosen = public_file.make(view, "base", size=8, tokens=range(60), vocabulary=160)
    assert not chosen.standard_tokens


def test_keys_of_every_wrong_kind(tmp_path: Path, key: Ed25519PrivateKey) -> None:
    made = keys.create_key(tmp_path / "k.pem")
    assert keys.public_hex(keys.load_key(tmp_path / "k.pem")) == keys.public_hex(made)
    assert keys.read_public(str(tmp_path / "k.pem.pub")) == keys.public_hex(made)
    assert keys.read_public(_hex(key).upper()) == _hex(key)
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    other = ec.generate_private_key(ec.SECP256R1())
    pem = other.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (tmp_path / "ec.pem").write_bytes(pem)
    with pytest.raises(LineageError, match="must be an Ed25519 key"):
        keys.load_key(tmp_path / "ec.pem")
    (tmp_path / "junk.pem").write_text("junk")
    with pytest.raises(LineageError, match="in PEM"):
        keys.load_key(tmp_path / "junk.pem")
    with pytest.raises(LineageError, match="must hold an Ed25519 public key"):
        keys.read_public(str(tmp_path / "junk.pem"))
    public = other.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (tmp_path / "ec.pub").write_bytes(public)
    with pytest.raises(LineageError, match="must hold an Ed25519 public key"):
        keys.read_public(str(tmp_path / "ec.pub"))
    with pytest.raises(LineageError, match="no readable key"):
        keys.read_public(str(tmp_path / "none"))


def test_a_state_digest_reads_again_only_what_changed() -> None:
    import torch

    state = {"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}
    digest = evidence.StateDigest()
    first = digest.update(state.items(), state)
    state["a"] = torch.full((3,), 2.0)
    assert digest.update(state.items(), []) == first
    second = digest.update(state.items(), ["a"])
    assert second != first
    assert evidence.StateDigest().update(state.items(), []) == second


def _chain(tiny: Tiny, path: Path, key: Ed25519PrivateKey, rounds: int = 4) -> str:
    model = tiny("llama")
    report = LineageGate(model).check(model)
    chain = evidence.Chain(path, key)
    for number in range(rounds):
        chain.append(number, report, weights="ab" * 32, action="accept")
    return chain.head


def test_a_whole_chain_verifies(tiny: Tiny, tmp_path: Path, key: Ed25519PrivateKey) -> None:
    path = tmp_path / "rounds.jsonl"
    head = _chain(tiny, path, key)
    assert evidence.verify(path, signer=_hex(key), head=head) == 4
    records = list(evidence.read(path))
    assert [r.round for r in records] == [0, 1, 2, 3]
    assert records[0].verdict == "in_lineage"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda x: [*x[:1], x[1].replace('"accept"', '"reject"'), *x[2:]], ":2: contents were"),
        (lambda x: [x[0], *x[2:]], ":2: does not follow"),
        (lambda x: [x[0], x[2], x[1], x[3]], ":2: does not follow"),
        (lambda x: [*x[:2], "{broken", x[3]], ":3: damaged"),
        (lambda x: [x[0], "[]", *x[2:]], ":2: damaged"),
        (lambda x: [x[0], x[1] + " " * (1 << 20), *x[2:]], ":2: longer than"),
    ],
)
def test_a_broken_line_is_named(
    tiny: Tiny, tmp_path: Path, key: Ed25519PrivateKey, change: Any, complaint: str
) -> None:
    path = tmp_path / "rounds.jsonl"
    _chain(tiny, path, key)
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    with pytest.raises(LineageError, match=complaint):
        evidence.verify(path)


def test_foreign_signers_and_a_cut_end(tiny: Tiny, tmp_path: Path, key: Ed25519PrivateKey) -> None:
    path = tmp_path / "rounds.jsonl"
    head = _chain(tiny, path, key)
    with pytest.raises(LineageError, match=":1: signed by"):
        evidence.verify(path, signer=_hex(Ed25519PrivateKey.generate()))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(LineageError, match="later records are missing"):
        evidence.verify(path, head=head)
    body = json.loads(lines[0])
    body["signature"] = "00" * 64
    path.write_text(json.dumps(body) + "\n")
    with pytest.raises(LineageError, match=":1: the signature"):
        evidence.verify(path)
