"""Frames that no honest owner sends cost their sender alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsplit.wire.frames import Kind
from tests.owners.interfere import Outgoing, Tamper, tamper_with
from tests.strategies.failing import (
    QUICK,
    VICTIM,
    assert_only_the_victim_is_lost,
    floats,
    nan_gradient,
    warm,
)

__all__ = ["warm"]  # a fixture that runs by itself


def _nan_rows(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        floats(outgoing, float("nan"), at=5)


def _infinite_rows(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        floats(outgoing, float("-inf"))


def _huge_rows(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        floats(outgoing, 1e30)


def _huge_gradient(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.GRAD, 1):
        floats(outgoing, 1e9)


def _short_gradient(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.GRAD):
        outgoing.body = outgoing.body[:-4]


def _heavy_gradient(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.GRAD):
        outgoing.header["weight"] = 1e6


def _weightless_gradient(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.GRAD):
        outgoing.header["weight"] = 0.0


def _foreign_codec(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.GRAD):
        outgoing.header["codec"] = "fp8"


def _other_dtype(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        outgoing.header["codec"] = "bf16"


def _wrong_width(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        outgoing.header["dim"] *= 2


def _wrong_lengths(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        outgoing.header["lengths"][0] += 1


def _over_long_sample(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        outgoing.header["lengths"][0] = 17  # model.max-tokens is 16


def _empty_batch(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        outgoing.header |= {"slots": [], "fresh": [], "lengths": []}
        outgoing.body = b""


def _duplicate_slots(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        outgoing.header["slots"][1] = outgoing.header["slots"][0]


def _duplicate_fresh(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        outgoing.header["fresh"][1] = outgoing.header["fresh"][0]


def _foreign_slot(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        outgoing.header["slots"][0] = outgoing.header["fresh"][0] = 10_000


def _never_sent_slot(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        outgoing.header |= {"fresh": [], "lengths": [], "dim": 0}
        outgoing.body = b""


def _later_step(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.BATCH):
        outgoing.header["step"] = 1


def _gradient_of_another_step(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.GRAD):
        outgoing.header["step"] = 1


def _repeated_frame(outgoing: Outgoing) -> bool:
    outgoing.send()
    if outgoing.at(Kind.BATCH):
        outgoing.send(sequence=outgoing.sequence)
    return True


def _skipped_frame(outgoing: Outgoing) -> bool:
    outgoing.send(outgoing.sequence + (outgoing.kind is Kind.BATCH))
    return True


def _endless_batches(outgoing: Outgoing) -> None:
    if outgoing.kind is Kind.BATCH:
        outgoing.header["last"] = False


def _early_end(outgoing: Outgoing) -> None:
    if outgoing.kind is Kind.BATCH:
        outgoing.header["last"] = True


def _done_for_gradient(outgoing: Outgoing) -> bool:
    if outgoing.at(Kind.GRAD):
        outgoing.kind, outgoing.header = Kind.DONE, {"samples": 1, "steps": 1}
    outgoing.send()
    return True


def _no_batches(outgoing: Outgoing) -> None:
    if outgoing.kind is Kind.READY:
        outgoing.header["batches"] = 0


def _countless_samples(outgoing: Outgoing) -> None:
    if outgoing.kind is Kind.READY:
        outgoing.header["samples"] = 1 << 40


def _garbage(outgoing: Outgoing) -> bool | None:
    if not outgoing.at(Kind.BATCH):
        return None
    outgoing.link.put(outgoing.link.outgoing, b"\x80\x04\x95 no frame at all " * 4)
    return True


TAMPERED: dict[str, tuple[Tamper, str]] = {
    "NaN representations": (_nan_rows, "must be finite"),
    "infinite representations": (_infinite_rows, "must be finite"),
    "huge representations": (_huge_rows, "must be finite and <= 1e+06"),
    "NaN gradient": (nan_gradient, "must be finite"),
    "huge gradient": (_huge_gradient, "must be finite and <= 1000"),
    "gradient of a wrong shape": (_short_gradient, "bytes: must be"),
    "gradient of too much weight": (_heavy_gradient, "GRAD weight 1000000.0: must be in (0, 4]"),
    "gradient of no weight": (_weightless_gradient, "GRAD weight 0.0: must be in"),
    "unknown codec": (_foreign_codec, "codec='fp8': must be one of"),
    "another dtype": (_other_dtype, "bytes: must be"),
    "wrong width": (_wrong_width, "BATCH width 64: must be 32"),
    "wrong lengths": (_wrong_lengths, "bytes: must be"),
    "over-long sample": (_over_long_sample, "must be in [1, 16] tokens"),
    "empty batch": (_empty_batch, "BATCH slots: must be distinct"),
    "duplicate slots": (_duplicate_slots, "BATCH slots: must be distinct"),
    "duplicate fresh slots": (_duplicate_fresh, "BATCH fresh slots: must be distinct"),
    "slot out of range": (_foreign_slot, "below 32"),
    "slot that was never sent": (_never_sent_slot, "was never sent"),
    "batch out of order": (_later_step, "BATCH step 1: must be 0"),
    "gradient out of order": (_gradient_of_another_step, "must be GRAD of step 0"),
    "repeated frame": (_repeated_frame, "frame sequence 3: must be 4"),
    "skipped frame": (_skipped_frame, "frame sequence 4: must be 3"),
    "batches without end": (_endless_batches, "last must be true at 1"),
    "an end before the end": (_early_end, "last must be true at 1"),
    "a frame of another kind": (_done_for_gradient, "DONE frame: must be GRAD"),
    "no batches": (_no_batches, "READY with 0 batches"),
    "countless samples": (_countless_samples, "READY with 2 batches of 1099511627776 samples"),
    "bytes that are no frame": (_garbage, "frame magic"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_bad_frame_costs_its_sender_alone(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    tamper, reason = TAMPERED[case]
    if case == "slot out of range":
        reason = "must be distinct, >= 1 of them, below"
    tamper_with(monkeypatch, {VICTIM: tamper})
    run = run_locally(make_config(**QUICK))
    assert_only_the_victim_is_lost(run, reason)
    assert len(run.grid.replies) == 3
    refused = [r for r in run.grid.replies if r.has_error()]
    assert [r.metadata.src_node_id for r in refused] == [1034]


def test_what_the_others_learn_is_untouched_by_a_bad_frame(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN gradient gives the very top that the others make when the sender leaves instead."""

    def leave(outgoing: Outgoing) -> bool:
        if outgoing.at(Kind.GRAD, 1):
            outgoing.link.close("left")
            return True
        return False

    states = []
    for tamper in (nan_gradient, leave):
        with monkeypatch.context() as patched:
            tamper_with(patched, {VICTIM: tamper})
            states.append(run_locally(make_config(**QUICK)).state)
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])


def test_an_oversized_frame_costs_its_sender_alone(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def oversized(outgoing: Outgoing) -> bool:
        if outgoing.at(Kind.BATCH):
            outgoing.body = bytes(3 << 20)
        outgoing.send()
        return True

    tamper_with(monkeypatch, {VICTIM: oversized}, frame_mb=16)
    run = run_locally(make_config(session__max_frame_mb=1, **QUICK))
    assert_only_the_victim_is_lost(run, "session closed")
    (refused,) = [r for r in run.grid.replies if r.has_error()]
    assert "larger than max" in refused.error.reason
