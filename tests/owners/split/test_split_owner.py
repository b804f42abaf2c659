"""The owner's half alone: what it answers, and that a restart changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsplit.errors import FrameError, ModelError, SessionError
from fedsplit.owners.samples import Samples, text_identity
from fedsplit.owners.split import message_session, prepare
from fedsplit.owners.split.owner import SplitOwner
from fedsplit.owners.split.settings import SplitSettings
from fedsplit.privacy import SamplePerturber, build
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.wire.codecs import encode_rows
from fedsplit.wire.frames import Frame, Kind
from tests.strategies.run_local import LocalRun

D, CLASSES = 6, 3
Sent = tuple[Kind, dict[str, Any], bytes]


class Table(nn.Module):
    """A bottom of embeddings only."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, D)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            self.table.weight.copy_(torch.randn(20, D, generator=generator))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden: Tensor = self.table(ids)
        return hidden


def make(
    *,
    joint: bool = False,
    mode: str = "train",
    seed: int = 0,
    mechanism: str = "dchi",
    lr: float = 0.1,
) -> SplitOwner:
    ids = tuple(torch.tensor([2, i, i + 1, i + 2][: 2 + i % 3]) for i in range(4, 12))
    texts = tuple(text_identity(f"text {i}") for i in range(8))
    samples = Samples(ids, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), texts)
    chosen = build("dchi", eta=5.0) if mechanism == "dchi" else build("none")
    perturber = SamplePerturber(chosen, OwnerSecret.for_simulation(seed, "x"), "bottom")
    batches = [np.array([0, 1, 2]), np.array([3, 4]), np.array([5, 6, 7])]
    settings = SplitSettings(mode, joint, "fp32", "fp32", bottom_lr=lr, optimizer="sgd")
    return SplitOwner(Table(), samples, batches, perturber, settings)


def logits(step: int, rows: int, *, shape: tuple[int, ...] | None = None) -> Frame:
    shape = shape or (rows, CLASSES)
    values = torch.linspace(-1, 1, int(np.prod(shape))).view(shape) * (step + 1)
    header = {"step": step, "codec": "fp32", "shape": list(shape)}
    return Frame(Kind.LOGITS, header, encode_rows(values, "fp32"))


def hidden_gradient(step: int, rows: int) -> Frame:
    header = {"step": step, "codec": "fp32", "shape": [rows, D]}
    return Frame(Kind.HIDDEN_GRAD, header, encode_rows(torch.full((rows, D), 0.5), "fp32"))


def start(window: int = 1, held: bytes = b"") -> Frame:
    return Frame(Kind.START, {"window": window}, held)


def answers(owner: SplitOwner, frame: Frame) -> list[Sent]:
    """Return what ``owner`` sends for ``frame``, encoded."""
    return [(out.kind, dict(out.header), out.encode()) for out in owner.handle(frame)]


def play(owner: SplitOwner, restart: Callable[[SplitOwner], SplitOwner] | None = None) -> Any:
    """Take a whole session; returns everything it sent and the owner at its end."""
    sent: list[Sent] = []

    def take(frame: Frame) -> None:
        nonlocal owner
        sent.extend(answers(owner, frame))
        if restart is not None:
            owner = restart(owner)

    take(start())
    for step, slots in enumerate(owner.batches):
        take(logits(step, len(slots)))
        if owner.settings.joint and owner.settings.mode == "train":
            take(hidden_gradient(step, sum(int(owner.samples.ids[s].shape[0]) for s in slots)))
    return sent, owner


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_the_same_frames_get_the_same_answers(joint: bool, mode: str) -> None:
    first, owner = play(make(joint=joint, mode=mode))
    again, _ = play(make(joint=joint, mode=mode))
    assert first == again
    assert owner.done
    assert first[-1][0] is Kind.DONE
    kinds = [kind for kind, _, _ in first]
    assert kinds.count(Kind.GRAD) == (3 if mode == "train" else 0)
    assert kinds.count(Kind.BATCH) == 3


@pytest.mark.parametrize("joint", [False, True])
def test_a_new_process_for_every_frame_gives_the_same_answers(joint: bool) -> None:
    def restart(old: SplitOwner) -> SplitOwner:
        new = make(joint=joint)
        new.load_state(json.loads(json.dumps(old.state())))
        if joint:
            new.load_weights(old.weights())
        return new

    straight, one = play(make(joint=joint))
    restarted, other = play(make(joint=joint), restart)
    assert straight == restarted
    assert one.metrics() == other.metrics()
    if joint:
        for name, value in one.weights().items():
            assert torch.equal(value, other.weights()[name])
            assert not torch.equal(value, dict(make().bottom.named_parameters())[name])


def test_what_the_server_holds_is_not_sent_again() -> None:
    held = np.packbits([1, 0, 1, 1, 1, 0, 0, 0]).tobytes()
    sent = answers(make(), start(3, held))
    fresh = [header["fresh"] for _, header, _ in sent]
    assert fresh == [[1], [], [5, 6, 7]]
    assert sent[1][2] == b""
    everything = answers(make(), start(3))
    assert sent[2][2] == everything[2][2]
    for bad in (b"\x00\x00", b"\x00" * 3):
        with pytest.raises(FrameError, match="must be 1"):
            list(make().handle(start(3, bad)))


def test_the_gradient_is_that_of_the_private_labels_loss() -> None:
    owner = make()
    list(owner.handle(start()))
    frame = logits(0, 3)
    (kind, header, body), *_ = answers(owner, frame)
    values = torch.frombuffer(bytearray(frame.body), dtype=torch.float32).view(3, CLASSES)
    expected = (values.softmax(1) - nn.functional.one_hot(torch.tensor([0, 1, 2]), 3)) / 3
    assert kind is Kind.GRAD
    assert header["weight"] == 3.0
    found = torch.frombuffer(bytearray(body), dtype=torch.float32).view(3, CLASSES)
    assert torch.allclose(found, expected, atol=1e-7)


@pytest.mark.parametrize(
    ("frame", "error", "match"),
    [
        (logits(1, 2), FrameError, "LOGITS step 1: must be 0"),
        (logits(0, 2), FrameError, r"LOGITS shape \(2, 3\): must be \(3, classes\)"),
        (logits(0, 3, shape=(3, 1)), FrameError, "LOGITS shape"),
        (logits(0, 3, shape=(3, 2)), FrameError, "LOGITS with 2 classes: fewer than labels"),
        (logits(0, 3, shape=(3,)), FrameError, "LOGITS shape"),
        (hidden_gradient(0, 3), SessionError, "HIDDEN_GRAD frame: not expected"),
        (start(), SessionError, "START frame: must come once"),
        (Frame(Kind.DONE, {"samples": 1, "steps": 1}), SessionError, "DONE frame: not expected"),
    ],
)
def test_frames_that_do_not_belong_here(frame: Frame, error: type[Exception], match: str) -> None:
    owner = make()
    list(owner.handle(start()))
    with pytest.raises(error, match=match):
        list(owner.handle(frame))


def test_a_server_cannot_ask_for_the_same_answer_twice() -> None:
    owner = make()
    list(owner.handle(start(2)))
    list(owner.handle(logits(0, 3)))
    with pytest.raises(FrameError, match="LOGITS step 0: must be 1"):
        list(owner.handle(logits(0, 3)))


def test_weights_that_do_not_fit_change_nothing() -> None:
    owner = make(joint=True)
    before = owner.weights()
    name = "table.weight"
    for bad in (
        {},
        {name: torch.zeros(2, 2)},
        {name: torch.full((20, D), float("nan"))},
        {name: before[name], "more": torch.zeros(1)},
    ):
        with pytest.raises(ModelError, match="bottom weight"):
            owner.load_weights(bad)
        assert torch.equal(owner.weights()[name], before[name])


# ---- noise --------------------------------------------------------------------------------------


def bodies(owner: SplitOwner) -> list[bytes]:
    return [body for kind, _, body in answers(owner, start(3)) if kind is Kind.BATCH]


def test_the_noise_is_the_same_after_a_restart_and_another_for_another_secret() -> None:
    assert bodies(make()) == bodies(make())
    assert bodies(make()) != bodies(make(seed=1))
    assert bodies(make()) != bodies(make(mechanism="none"))


def joint_views(run: LocalRun) -> dict[tuple[str, str, int], list[bytes]]:
    """Representations by (node, mode, slot), in the order in which they were sent."""
    from fedsplit.wire.frames import decode

    found: dict[tuple[str, str, int], list[bytes]] = {}
    for path in sorted((run.folder / "capture").glob("*.bin")):
        node, _, mode = path.stem.partition("-")
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            frame = decode(data[at + 8 : at + 8 + length], 1 << 26)
            at += 8 + length
            if frame.kind is not Kind.BATCH:
                continue
            place = 0
            for slot, size in zip(frame["fresh"], frame["lengths"], strict=True):
                end = place + 4 * frame["dim"] * size
                found.setdefault((node, mode, slot), []).append(bytes(frame.body[place:end]))
                place = end
    return found


@pytest.mark.parametrize("bottom_lr", [1e-2, 1e-9])
def test_a_joint_run_draws_fresh_noise_whenever_rows_have_moved(
    make_config: Any, run_locally: Any, bottom_lr: float
) -> None:
    """Re-used noise would tell how h moved; a bottom that hardly moves would show it."""
    config = make_config(
        split__bottom="joint",
        train__bottom_lr=bottom_lr,
        train__optimizer="sgd",
        train__max_steps=0,
        train__epochs=2,
        train__batch_size=8,
        data__owners=1,
        data__limit=30,
        session__deadline_s=120.0,
        session__wave_wait_s=120.0,
        privacy__mechanism="dchi",
        privacy__eta=10.0,
        output__capture=True,
        lineage__gate="off",
    )
    views = joint_views(run_locally(config))
    for (_, mode, _), sent in views.items():
        assert len(sent) == (4 if mode == "train" else 2)
        rows = [np.frombuffer(body, dtype="<f4") for body in sent]
        for one, two in pairwise(rows):
            if bottom_lr < 1e-6 and np.array_equal(one, two):
                continue  # nothing has moved: the same bytes again tell nothing
            # Two independent draws with E||n|| = d/eta = 3.2 per token are far apart.
            assert np.linalg.norm(one - two) / np.sqrt(len(one) / 32) > 1.0


# ---- restarts of a session over messages --------------------------------------------------------


@pytest.mark.parametrize(
    ("bottom", "optimizer"), [("frozen", "adamw"), ("joint", "sgd"), ("joint", "adamw")]
)
def test_a_process_that_starts_anew_for_each_message_gives_the_same_model(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch, bottom: str, optimizer: str
) -> None:
    options = {
        "session__transport": "messages",
        "split__bottom": bottom,
        "train__optimizer": optimizer,
        "train__bottom_lr": 1e-2,
        "train__max_steps": 2,
        "train__batch_size": 16,
        "privacy__mechanism": "dchi",
        "privacy__eta": 20.0,
        "privacy__cti": "purity",
        "privacy__cti_max_share": 0.1,
        "lineage__gate": "off",
        "data__owners": 1,
        "data__limit": 60,
    }
    kept = run_locally(make_config(**options), run_id=7)
    assert message_session._LIVE, "with one owner the session should have stayed in memory"
    answer = message_session.MessageSession.answer
    forgotten = 0

    def forget(self: Any, frames: list[bytes]) -> list[bytes]:
        nonlocal forgotten
        forgotten += len(message_session._LIVE)
        message_session._LIVE.clear()
        prepare._bottom.cache_clear()
        prepare._samples.cache_clear()
        return answer(self, frames)

    monkeypatch.setattr(message_session.MessageSession, "answer", forget)
    restarted = run_locally(make_config(**options), run_id=8)
    assert forgotten > 0
    assert kept.state.keys() == restarted.state.keys()
    for name, value in kept.state.items():
        assert torch.equal(value, restarted.state[name]), name
    if bottom == "joint":
        for name, array in kept.result.arrays.items():
            assert np.array_equal(array.numpy(), restarted.result.arrays[name].numpy()), name
    for one, two in zip(kept.server["rounds"], restarted.server["rounds"], strict=True):
        for part in ("train", "evaluate"):
            assert one[part]["metrics"] == two[part]["metrics"]
    assert kept.server["rounds"][0]["train"]["metrics"]["share-touched"] > 0


def test_a_message_of_another_moment_is_refused(make_config: Any, run_locally: Any) -> None:
    from tests.strategies.local_grid import HANDLERS

    run = run_locally(
        make_config(session__transport="messages", train__rounds=1, lineage__gate="off")
    )
    steps = [m for m in run.grid.sent if m.metadata.message_type == "query.fedsplit_step"]
    late = steps[len(steps) // 2]
    reply = HANDLERS["query.fedsplit_step"](late, run.grid.context(late.metadata.dst_node_id))
    assert reply.has_error()
    assert "this owner's session is at" in reply.error.reason


def test_an_offer_for_another_node_is_refused(make_config: Any, run_locally: Any) -> None:
    from tests.strategies.local_grid import HANDLERS

    run = run_locally(make_config(train__rounds=1, train__max_steps=1, lineage__gate="off"))
    message = run.grid.sent[0]
    other = next(n for n in run.grid.nodes if n != message.metadata.dst_node_id)
    reply = HANDLERS["train"](message, run.grid.context(other))
    assert reply.has_error()
    assert "offer is for another run or node" in reply.error.reason


def test_owners_keep_their_bottoms_verified(
    make_config: Any, run_locally: Any, tmp_path: Path
) -> None:
    config = make_config(train__rounds=1, train__max_steps=1, lineage__gate="off")
    run = run_locally(config)
    digest = run.server["bottom_digest"]
    for owner in range(3):
        assert (tmp_path / "homes" / f"owner-{owner}" / "bottoms" / digest).is_dir()
