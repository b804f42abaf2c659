"""Everything that owners send in a run is kept and searched for what must never leave.

``leaks`` is the whole check.  It knows what the owners know (texts, labels, token ids, the clean
representations, computed here with the plain Hugging Face model) and what was sent, byte by byte.
That a gradient of the logits tells labels by its signs is declared (see ``SplitOwner``) and
measured as an attack; here nothing but the gradient itself may carry them.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from fedsplit.config import RunConfig
from fedsplit.owners.plan import slot_order
from fedsplit.owners.share import simulated_shares
from fedsplit.privacy import select_contributing_tokens
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.wire import dial, lanes
from fedsplit.wire.codecs import decode_rows
from fedsplit.wire.frames import SCHEMA, Kind
from fedsplit.wire.messages import FRAMES, REPORT, WEIGHTS, WHO, unpack_frames
from strategies.split_tuning import SplitTuning
from tests.strategies.local_grid import LocalGrid
from tests.strategies.run_local import LocalRun

BYTES = 64 << 20
FROM_OWNERS = {Kind.HELLO, Kind.NEED, Kind.READY, Kind.BATCH, Kind.GRAD, Kind.DONE}
METRICS = {"num-examples", "targets", "steps", "loss", "accuracy", "share-touched"}


# ---- what the owners know -----------------------------------------------------------------------


@dataclass
class Truth:
    """One owner's split, in slot order."""

    owner: str
    split: str
    texts: list[str]
    labels: list[int]
    ids: list[list[int]]
    clean: list[Tensor]  # (T, d) each
    selected: frozenset[int]  # contributing tokens


def truths(config: RunConfig) -> dict[tuple[str, str], Truth]:
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    model = AutoModel.from_pretrained(config.model.name).eval()
    found = {}
    for index, pair in enumerate(simulated_shares(config.data, config.seed, True)):
        name, selected = f"owner-{index}", frozenset[int]()
        secret = OwnerSecret.for_simulation(config.seed, name)
        for split, rows in zip(("train", "test"), pair, strict=True):
            order = slot_order(secret, split, len(rows))
            texts = [rows.texts[i] for i in order]
            labels = [int(rows.labels[i]) for i in order]
            length = config.model.max_tokens
            ids = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
            if split == "train" and config.privacy.cti != "off":
                selected = select_contributing_tokens(
                    ids,
                    labels,
                    statistic=config.privacy.cti,
                    m=config.privacy.cti_per_class,
                    max_share=config.privacy.cti_max_share,
                    special_ids=tokenizer.all_special_ids,
                ).token_ids
            with torch.no_grad():
                clean = [
                    model(torch.tensor([x]), output_hidden_states=True).hidden_states[
                        config.split.k
                    ][0]
                    for x in ids
                ]
            found[name, split] = Truth(name, split, texts, labels, ids, clean, selected)
    return found


# ---- what was sent ------------------------------------------------------------------------------


@dataclass
class Sent:
    """Everything that left the owners, however it travelled."""

    frames: list[tuple[Kind, dict[str, Any], bytes]] = field(default_factory=list)
    blobs: list[bytes] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)

    def frame(self, data: bytes) -> None:
        """Take one frame apart, without the code under test."""
        magic, kind, _, header, body = struct.unpack_from("<4sBIIQ", data)
        size = struct.calcsize("<4sBIIQ")
        if magic != b"FSP1" or size + header + body != len(data):
            self.odd.append("bytes beside the frame")
        values = json.loads(data[size : size + header])
        self.frames.append((Kind(kind), values, data[size + header :]))
        self.blobs.append(data)

    def replies(self, run: LocalRun) -> None:
        for reply in run.grid.replies:
            if reply.has_error():
                self.blobs.append(reply.error.reason.encode())
                continue
            known = {REPORT, WHO, FRAMES, WEIGHTS}
            self.odd += [f"record {name!r}" for name in set(reply.content) - known]
            for record in reply.content.metric_records.values():
                self.odd += [f"metric {name!r}" for name in set(record) - METRICS]
                self.odd += [f"list {n!r}" for n, v in record.items() if isinstance(v, list)]
                self.blobs.append(json.dumps(dict(record)).encode())
            for config in reply.content.config_records.values():
                self.odd += [f"setting {name!r}" for name in set(config) - {"owner"}]
                self.blobs.append(json.dumps(dict(config)).encode())
            if FRAMES in reply.content.array_records:
                for data in unpack_frames(reply.content, BYTES):
                    self.frame(data)
            elif WEIGHTS in reply.content.array_records:
                self.blobs += [a.data for a in reply.content.array_records[WEIGHTS].values()]

    def batches(self) -> Iterator[tuple[str, str, int, Tensor]]:
        """Yield (owner, split, slot, rows) of every representation sent."""
        who = ("", "")
        for kind, header, body in self.frames:
            if kind is Kind.HELLO:
                who = (header["owner"], "train" if header["mode"] == "train" else "test")
            if kind is Kind.BATCH and header["fresh"]:
                shape = (sum(header["lengths"]), header["dim"])
                rows = decode_rows(body, shape, header["codec"]).split(header["lengths"])
                for slot, part in zip(header["fresh"], rows, strict=True):
                    yield *who, slot, part


@pytest.fixture
def record(run_locally: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function: settings -> (the finished run, everything that owners sent in it)."""

    def run(config: RunConfig) -> tuple[LocalRun, Sent]:
        per_link: dict[int, list[bytes]] = {}
        outgoing = lanes.Lane.outgoing
        kept: list[Any] = []  # so that no two lanes have one id

        def went_out(self: Any, stream: int) -> Iterator[bytes]:
            if not isinstance(self.link, dial._ClientLink):
                yield from outgoing(self, stream)
                return
            kept.append(self)
            for data in outgoing(self, stream):
                per_link.setdefault(id(self), []).append(data)
                yield data

        def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
            monkeypatch.setattr(lanes.Lane, "outgoing", went_out)

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


# ---- the check ----------------------------------------------------------------------------------


Patterns = Iterator[tuple[bool, bytes]]  # whether it is text, and what is looked for


def encodings(numbers: list[int], dtypes: str) -> Patterns:
    for dtype in dtypes.split():
        yield False, np.asarray(numbers).astype(dtype).tobytes()


def windows(sequence: list[int], length: int) -> Iterator[list[int]]:
    for at in range(len(sequence) - length + 1):
        yield sequence[at : at + length]


def as_text(numbers: list[int]) -> Patterns:
    yield True, ",".join(map(str, numbers)).encode()
    yield True, ", ".join(map(str, numbers)).encode()


def label_patterns(truth: Truth, batches: list[list[int]]) -> Patterns:
    for window in windows(truth.labels, 6):
        if len(set(window)) > 1:
            yield from encodings(window, "<i2 <i4 <i8 <f4 <f8 >i4 >i8")
            yield from as_text(window)
    for window in windows(truth.labels, 14):
        if len(set(window)) > 1:
            yield from encodings(window, "i1")
    for slots in batches:
        mine = [truth.labels[s] for s in slots]
        if len(mine) >= 3 and len(set(mine)) > 1:
            yield from encodings(mine, "<i4 <i8 <f4 <f8")


def id_patterns(truth: Truth) -> Patterns:
    for ids in truth.ids:
        for window in windows(ids, 4):
            yield from encodings(window, "<i2 <i4 <i8 <f4 <f8 >i2 >i4")
            yield from as_text(window)
        for window in windows(ids, 7):
            yield from encodings(window, "u1")


def word_patterns(truth: Truth) -> Patterns:
    for word in {word for text in truth.texts for word in text.split()}:
        yield True, word.encode()
        yield True, word.encode("utf-16-le")


def clean_rows(sent: Sent, known: dict[tuple[str, str], Truth]) -> dict[tuple[str, str], list[Any]]:
    """Return, per owner and split, (token id, whether its row was sent without noise)."""
    found: dict[tuple[str, str], list[Any]] = {}
    for owner, split, slot, rows in sent.batches():
        truth = known[owner, split]
        every = torch.cat(truth.clean)
        # Against every clean row of the owner, not only the one that is due.
        near = torch.cdist(rows, every).amin(dim=1) / every.norm(dim=1).mean()
        flags = (near < 0.03).tolist()
        found.setdefault((owner, split), []).extend(zip(truth.ids[slot], flags, strict=True))
    return found


def leaks(sent: Sent, known: dict[tuple[str, str], Truth]) -> list[str]:
    """Return what was found that must not leave; empty for a run that keeps its promises."""
    found = list(sent.odd)
    everything = b"\x00".join(sent.blobs)
    # Slots and lengths are short lists of small numbers, as token ids can be: they are compared
    # with what they should be, and not looked through.
    said = re.sub(rb'"(slots|fresh|lengths)":\[[\d,]*\]', b"", everything)
    who = ("", "")
    slots: dict[tuple[str, str], list[list[int]]] = {}
    for kind, header, _ in sent.frames:
        if kind not in FROM_OWNERS or header.keys() != SCHEMA[kind].keys():
            found.append(f"{kind.name} frame with {sorted(header)}")
        if kind is Kind.HELLO:
            who = (header["owner"], "train" if header["mode"] == "train" else "test")
        if kind is Kind.BATCH:
            slots.setdefault(who, []).append(header["slots"])
            if header["lengths"] != [len(known[who].ids[s]) for s in header["fresh"]]:
                found.append(f"lengths that are no lengths of {who}")
    selected = frozenset[int]().union(*(truth.selected for truth in known.values()))
    for key, truth in known.items():
        where = "/".join(key)
        for what, patterns in (
            ("labels", label_patterns(truth, slots.get(key, []))),
            ("token ids", id_patterns(truth)),
            ("words", word_patterns(truth)),
        ):
            if any(pattern in (said if text else everything) for text, pattern in set(patterns)):
                found.append(f"{what} of {where}")
        numbers = {
            row[token, :4].numpy().tobytes()
            for ids, row in zip(truth.ids, truth.clean, strict=True)
            for token, number in enumerate(ids)
            if number not in selected  # another owner's may be the same vector
        }
        if any(pattern in everything for pattern in numbers):
            found.append(f"numbers of a clean representation of {where}")
    for (owner, split), rows in clean_rows(sent, known).items():
        own = known[owner, split].selected
        bare = [token for token, clean in rows if clean and token not in own]
        if bare:
            found.append(f"{len(bare)} of {len(rows)} clean representations of {owner}/{split}")
    return found


# ---- the tests ----------------------------------------------------------------------------------


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
