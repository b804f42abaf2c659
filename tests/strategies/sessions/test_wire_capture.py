"""Everything that owners send in a run is kept and searched for what must never leave."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsplit.config import RunConfig
from fedsplit.wire import dial
from fedsplit.wire import reconnection as reconnection
from fedsplit.wire.frames import Kind
from strategies.split_tuning.strategy import SplitTuning
from tests.strategies.local_grid import LocalGrid
from tests.strategies.run_local import LocalRun
from tests.strategies.wire_capture import Sent, clean_rows, leaks, truths


@pytest.fixture
def record(run_locally: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function: settings -> (the finished run, everything that owners sent in it)."""

    def run(config: RunConfig) -> tuple[LocalRun, Sent]:
        per_link: dict[int, list[bytes]] = {}
        outgoing = reconnection.ReplayBuffer.outgoing
        kept: list[Any] = []  # so that no two reconnection have one id

        def went_out(self: Any, stream: int) -> Iterator[bytes]:
            if not isinstance(self.link, dial._ClientLink):
                yield from outgoing(self, stream)
                return
            kept.append(self)
            for data in outgoing(self, stream):
                per_link.setdefault(id(self), []).append(data)
                yield data

        def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
            monkeypatch.setattr(reconnection.ReplayBuffer, "outgoing", went_out)

        with monkeypatch.context():
            finished = run_locally(config, prepare=prepare)
        sent = Sent()
        for frames in per_link.values():
            for data in frames:
                sent.frame(data)
        if config.session.transport == "messages":
            # By owner and session, so that each HELLO is followed by its own frames.
            finished.grid.replies.sort(key=lambda m: m.metadata.src_node_id)
        sent.replies(finished)
        captured = sorted(finished.captured())
        hellos = [d for d in sent.blobs if d[:5] == b"FSP1" + bytes([Kind.HELLO])]
        frames = sorted(d for d in sent.blobs if d[:4] == b"FSP1" and d not in hellos)
        assert captured == frames, "the server's capture should be what was sent after HELLO"
        assert len(hellos) >= 3
        return finished, sent

    return run


@pytest.fixture(scope="session")
def wordy(
    tiny_bert: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The tiny model and its texts with words long enough to be looked for among random bytes."""
    folder = tmp_path_factory.mktemp("wordy")
    for path in tiny_bert.iterdir():
        data = path.read_bytes()
        if path.name == "tokenizer.json":
            data = re.sub(rb'"w(\d+)"', rb'"whisper\1"', data)
        (folder / path.name).write_bytes(data)
    said = folder.parent / "wordy.jsonl"
    said.write_text(re.sub(r"\bw(\d+)\b", r"whisper\1", texts.read_text()))
    return folder, said


@pytest.fixture
def settings(make_config: Any, wordy: tuple[Path, Path]) -> Any:
    def build(**overrides: Any) -> RunConfig:
        options: dict[str, Any] = {
            "model__name": str(wordy[0]),
            "data__path": str(wordy[1]),
            "privacy__mechanism": "dchi",
            "privacy__eta": 8.0,
            "train__max_steps": 0,
            "train__batch_size": 8,
            "output__capture": True,
            "lineage__gate": "off",
        }
        return make_config(**options | overrides)

    return build


@pytest.mark.parametrize(
    ("transport", "k", "codec"),
    [
        ("stream", 0, "fp32"),
        ("messages", 0, "fp32"),
        ("messages", 1, "bf16"),
        ("stream", 2, "int8"),
    ],
)
def test_nothing_leaves_in_the_clear(
    settings: Any, record: Any, transport: str, k: int, codec: str
) -> None:
    config = settings(split__k=k, session__codec=codec, session__transport=transport)
    run, sent = record(config)
    known = truths(config)
    assert leaks(sent, known) == []
    # It looked at everything: each sample of each owner crossed, and crossed once.
    crossed = [(owner, split, slot) for owner, split, slot, _ in sent.batches()]
    assert len(crossed) == len(set(crossed)) == sum(len(t.ids) for t in known.values())
    for owner, split, slot, rows in sent.batches():
        assert rows.shape == known[owner, split].clean[slot].shape
    assert run.server["rounds"][-1]["train"]["finished"] == ["owner-0", "owner-1", "owner-2"]


@pytest.mark.parametrize("transport", ["stream", "messages"])
def test_a_joint_bottom_keeps_the_same_silence(settings: Any, record: Any, transport: str) -> None:
    config = settings(
        split__bottom="joint", split__k=1, session__transport=transport, train__max_steps=3
    )
    _, sent = record(config)
    assert leaks(sent, truths(config)) == []


@pytest.mark.parametrize("transport", ["stream", "messages"])
def test_contributing_tokens_and_no_others_lose_their_noise(
    settings: Any, record: Any, transport: str
) -> None:
    config = settings(
        privacy__cti="purity",
        privacy__cti_rho=0.0,
        privacy__cti_max_share=0.1,
        session__transport=transport,
    )
    run, sent = record(config)
    known = truths(config)
    assert leaks(sent, known) == []
    first = run.server["rounds"][0]
    clear = 0
    for (owner, split), rows in clean_rows(sent, known).items():
        selected = known[owner, "train"].selected
        if split == "test":
            continue
        assert selected
        assert [clean for _, clean in rows] == [token in selected for token, _ in rows]
        share = sum(clean for _, clean in rows) / len(rows)
        declared = first["train"]["metrics"]["owners"][owner]["share-touched"]
        assert share == pytest.approx(declared)
        assert 0 < share <= config.privacy.cti_max_share
        clear += sum(clean for _, clean in rows)
    assert clear > 0


def test_a_share_of_the_noise_is_no_clear_text(settings: Any, record: Any) -> None:
    config = settings(privacy__cti="purity", privacy__cti_rho=0.3, privacy__cti_max_share=0.1)
    _, sent = record(config)
    rows = [clean for rows in clean_rows(sent, truths(config)).values() for _, clean in rows]
    assert not any(rows)


# ---- the check can fail -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transport", "codec"), [("stream", "fp32"), ("messages", "bf16"), ("stream", "int8")]
)
def test_a_run_without_noise_is_caught(
    settings: Any, record: Any, transport: str, codec: str
) -> None:
    config = settings(
        privacy__mechanism="none",
        privacy__eta=0.0,
        session__transport=transport,
        session__codec=codec,
        train__rounds=1,
        output__evaluate_every=0,
    )
    _, sent = record(config)
    found = leaks(sent, truths(config))
    assert sum("clean representations" in leak for leak in found) == 3
    rows = [clean for rows in clean_rows(sent, truths(config)).values() for _, clean in rows]
    assert all(rows)


def test_what_is_planted_is_found(settings: Any, record: Any) -> None:
    config = settings(train__max_steps=1, train__rounds=1, output__evaluate_every=0)
    _, sent = record(config)
    known = truths(config)
    assert leaks(sent, known) == []
    truth = known["owner-1", "train"]
    ids, labels = truth.ids[5], truth.labels
    plants = {
        "words of owner-1/train": [truth.texts[3].split()[0].encode(), truth.texts[3].encode()],
        "labels of owner-1/train": [
            json.dumps(labels).encode(),
            json.dumps(labels[4:12], separators=(",", ":")).encode(),
            *(np.asarray(labels).astype(t).tobytes() for t in ("i1", "<i2", "<i4", "<i8", "<f4")),
        ],
        "token ids of owner-1/train": [
            json.dumps(ids).encode(),
            *(np.asarray(ids[1:5]).astype(t).tobytes() for t in ("<i2", "<i4", "<i8", "<f4")),
        ],
        "numbers of a clean representation of owner-1/train": [truth.clean[5][2].numpy().tobytes()],
    }
    for leak, blobs in plants.items():
        for blob in blobs:
            sent.blobs.append(b"\x01" + blob)
            assert leak in leaks(sent, known)
            sent.blobs.pop()
    sent.frames.append((Kind.DONE, {"samples": 1, "steps": 1, "labels": 3}, b""))
    assert leaks(sent, known) == ["DONE frame with ['labels', 'samples', 'steps']"]


# ---- refusals -----------------------------------------------------------------------------------


BAD_FILES = dict(
    zip(
        ["broken", "no object", "label no scalar", "text no text", "column", "null", "labels"],
        [
            '{"text": "the patient has gout", "label": 0}\n{"text": "the patient has gout" "label"',
            '{"text": "the patient has gout", "label": 0}\n["the patient has gout"]\n',
            '{"text": "the patient has gout", "label": {"gout": 1}}\n' * 3,
            '{"text": ["the patient has gout"], "label": 0}\n' * 3,
            '{"gout": "the patient has gout", "label": 0}\n' * 3,
            '{"text": "the patient has gout", "label": 0}\n{"text": "gout", "label": null}\n',
            "".join(f'{{"text": "gout", "label": "gout{i}"}}\n' for i in range(5)),
        ],
        strict=True,
    )
)


@pytest.mark.parametrize(("case", "transport"), zip(BAD_FILES, cycle(["stream", "messages"])))
def test_a_refusal_says_nothing_of_the_data(
    make_config: Any,
    run_locally: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    texts: Path,
    case: str,
    transport: str,
) -> None:
    """What is wrong with a file is said; what is in it is not."""
    config = make_config(
        data__owners=2,
        train__rounds=1,
        train__max_steps=1,
        output__evaluate_every=0,
        lineage__gate="off",
        session__transport=transport,
    )
    monkeypatch.delenv("FEDSPLIT_SIMULATION")
    (tmp_path / "bad.jsonl").write_text(BAD_FILES[case])

    def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
        for owner, path in enumerate((texts, tmp_path / "bad.jsonl")):
            home = str(tmp_path / f"home-{owner}")
            grid.node_configs[owner] = {"data-path": str(path), "state-dir": home}

    run = run_locally(config, prepare=prepare)
    lost = run.server["rounds"][0]["train"]["lost"]
    assert list(lost) == ["owner-1"]
    said = json.dumps(lost) + "".join(r.error.reason for r in run.grid.replies if r.has_error())
    assert "Error: " in said
    assert "gout" not in said
    assert "patient" not in said
