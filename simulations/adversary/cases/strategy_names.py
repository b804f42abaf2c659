"""Case 7: rules tied to the name of the strategy instead of to the act."""

from __future__ import annotations

from typing import Any

import torch

import fedsplit
from fedsplit.models.bundle.bottom import Bundle
from fedsplit.wire.codecs import encode_rows
from fedsplit.wire.frames import Frame, Kind, decode, encode
from fedsplit.wire.messages import FRAMES, pack_frames, unpack_frames
from simulations.adversary.context import Field, settings, share_row, split_script, zeros
from simulations.adversary.material import pack, tiny, word_tokenizer
from simulations.adversary.reading import Row
from simulations.adversary.server import DIGEST, MAX_FRAME, RUNS, Taken
from simulations.adversary.victim import Victim, strict_policy

STEP = "query.fedsplit_step"


def play(field: Field) -> list[Row]:
    """Return what leaves in messages that the owner's allowed strategies have no use for."""
    return [_serving(field, "train"), _serving(field, "evaluate"), _steps(field)]


def _serving(field: Field, kind: str) -> Row:
    """An owner that allows serving alone is asked to train."""
    texts = field.corpus(48)
    tokenizer = word_tokenizer(texts.words)
    bundle, _, _ = pack(tiny(tokenizer), 0, tokenizer)
    victim = field.victim(texts, strict_policy(app__strategies=["serving"]))
    flat = settings(
        strategy="serving",
        privacy__mechanism="dchi",
        privacy__noise_ratio=50.0,
        labels__protection="randomised-response",
    )
    taken = field.server.session(
        victim, flat, split_script(bundle, zeros(2)), digest=bundle.digest, kind=kind
    )
    read = len(taken.rows) / len(texts.texts)
    return share_row(
        7, f"serving allowed, {kind} asked", read, 0.0, len(texts.texts), "texts", [taken]
    )


def _steps(field: Field) -> Row:
    """An owner that allows offsite tuning alone is asked for a split session over messages."""
    texts = field.corpus(40)
    tokenizer = word_tokenizer(texts.words)
    bundle, _, _ = pack(tiny(tokenizer), 0, tokenizer)
    policy = strict_policy(app__strategies=["offsite-tuning"])
    victim = field.victim(texts, policy)
    flat = settings(strategy="offsite-tuning")
    taken = session_over_messages(field, victim, flat, bundle)
    count = len(texts.texts)
    read = len(taken.rows) / count
    return share_row(7, "offsite allowed, split over messages", read, 0.0, count, "texts", [taken])


def session_over_messages(
    field: Field, victim: Victim, flat: dict[str, Any], bundle: Bundle, transport: str = "stream"
) -> Taken:
    """Return a whole split session in STEP messages, answered with zero logits.

    Args:
        field: where.
        victim: the owner.
        flat: the run config.
        bundle: sent when it is asked for.
        transport: that the offer claims to use.
    """
    whole = Taken()
    run, sequence = next(RUNS), 0

    def say(kind: Kind, header: dict[str, Any], body: bytes = b"") -> bytes:
        nonlocal sequence
        whole.down.append(Frame(kind, header, body))
        data = encode(Frame(kind, header, body), sequence, MAX_FRAME)
        sequence += 1
        return data

    hello = {
        "version": fedsplit.__version__,
        DIGEST: bundle.digest,
        "codec": "fp32",
        "logits_codec": "fp32",
    }
    waiting = [say(Kind.WELCOME, hello)]
    for exchange in range(200):
        content = field.server.offer(
            run, "train", digest=bundle.digest, transport=transport, exchange=exchange
        )
        content[FRAMES] = pack_frames(waiting)
        reply = victim.ask(STEP, content, run, flat)
        if reply.has_error():
            whole.refusal = str(reply.error.reason)
            return whole
        waiting = []
        for data in unpack_frames(reply.content, MAX_FRAME):
            frame = decode(data, MAX_FRAME)
            kept = Frame(frame.kind, frame.header, bytes(frame.body), frame.sequence)
            whole.up.append(kept)
            whole.size += len(kept.body)
            if frame.kind is Kind.NEED:
                for name in sorted(bundle.files):
                    last = name == max(bundle.files)
                    file = bundle.files[name]
                    about = {"name": name, "offset": 0, "size": len(file), "last": last}
                    waiting.append(say(Kind.FILE, about, file))
            elif frame.kind is Kind.READY:
                waiting.append(say(Kind.START, {"window": 1}))
            elif frame.kind is Kind.BATCH:
                shape = [len(kept["slots"]), int(flat["model.labels"])]
                answer = encode_rows(torch.zeros(shape), "fp32")
                about = {"step": kept["step"], "codec": "fp32", "shape": shape}
                waiting.append(say(Kind.LOGITS, about, answer))
            elif frame.kind is Kind.DONE:
                return whole
    return whole
