"""What owners know, what they sent, and whether the one is in the other: the capture check.

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
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from fedsplit.config import RunConfig
from fedsplit.confusion import is_count
from fedsplit.owners.data_source import simulated_shares
from fedsplit.owners.split.schedule import slot_order
from fedsplit.privacy import select_contributing_tokens
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.wire.codecs import decode_rows
from fedsplit.wire.frames import SCHEMA, Kind
from fedsplit.wire.messages import FRAMES, REPORT, WEIGHTS, WHO, unpack_frames
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
                others = {name for name in record if not is_count(name)}  # sums over all texts
                self.odd += [f"metric {name!r}" for name in others - METRICS]
                self.odd += [f"list {n!r}" for n, v in record.items() if isinstance(v, list)]
                self.blobs.append(json.dumps(dict(record)).encode())
            for config in reply.content.config_records.values():
                self.odd += [f"setting {name!r}" for name in set(config) - {"owner", "schema"}]
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
