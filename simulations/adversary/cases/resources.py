"""Case 10: the owner's disk, its process, and what others' words do to a log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict

from fedsplit.config import RunConfig
from fedsplit.errors import FedsplitError
from fedsplit.registry import pick
from simulations.adversary.child import HOSTILE, survives
from simulations.adversary.context import Field, settings, share_row, split_script, zeros
from simulations.adversary.material import Corpus, pack, tiny, with_file, word_tokenizer, write_tiny
from simulations.adversary.reading import Row
from simulations.adversary.victim import strict_policy
from simulations.runtime.local_grid import LocalGrid
from strategies import STRATEGIES

ESCAPES = "\n2030-01-01 00:00:00 INFO forged line \x1b[2J\x1b]0;forged title\x07"
MOST_BOTTOMS = 8  # that an owner may keep at once


def play(field: Field) -> list[Row]:
    """Return what is left on the owner's disk, who dies, and whose log is written by another."""
    with ThreadPoolExecutor(len(HOSTILE)) as pool:
        crashes = list(pool.map(partial(_crash, field), HOSTILE))
    return [_kept(field), *crashes, _owners_log(field), _servers_log(field)]


def _kept(field: Field) -> Row:
    """Forty runs with a bottom each: how many stay on the owner's disk."""
    many = 20 if field.quick else 40
    texts = field.corpus(12)
    tokenizer = word_tokenizer(texts.words)
    bundle, _, _ = pack(tiny(tokenizer), 0, tokenizer)
    # What comes is kept whether or not it is measured; forty measurements would show no more.
    unmeasured = {"measure__min_empirical_privacy": None, "measure__max_label_recovery": None}
    victim = field.victim(texts, strict_policy(**unmeasured))
    flat = _noise()
    text = bundle.files["tokenizer.json"]
    sessions = []
    for number in range(many):
        changed = with_file(bundle, "tokenizer.json", text + b"\n" * number)
        sessions.append(
            field.server.session(
                victim, flat, split_script(changed, zeros(2)), digest=changed.digest
            )
        )
    kept = len({path.parent for path in victim.home.rglob("bottom.safetensors")})
    return share_row(
        10, "bottoms kept", kept / many, MOST_BOTTOMS / many, many, "bottoms", sessions
    )


def _crash(field: Field, name: str) -> Row:
    lives = survives(name, field.new_folder("child"))
    return share_row(10, f"process ended, {name}", float(not lives), 0.0, 1, "process")


def _owners_log(field: Field) -> Row:
    """The reason of the server's last frame, in the owner's log."""
    texts = field.corpus(12)
    tokenizer = word_tokenizer(texts.words)
    bundle, _, _ = pack(tiny(tokenizer), 0, tokenizer)
    victim = field.victim(texts, strict_policy())
    script = split_script(bundle, zeros(2), steps=0, reason=f"bye{ESCAPES}")
    with listening() as lines:
        taken = field.server.session(victim, _noise(), script, digest=bundle.digest)
    return share_row(10, "server's words in owner's log", _raw(lines), 0.0, 1, "log", [taken])


class LyingOwners(LocalGrid):
    """Owners that answer every message with an error whose text is meant for a terminal."""

    def _work(self, message: Message, replies: list[Message]) -> None:
        reply = Message(Error(code=100, reason=f"sorry{ESCAPES}"), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
        replies.append(reply)


def _servers_log(field: Field) -> Row:
    """The text of an owner's refusal, in the server's log: a lying owner against the server."""
    texts = field.corpus(12)
    folder = field.new_folder("server")
    config = _server_config(folder, texts)
    grid = LyingOwners(config, 2)
    context = Context(grid.run_id, 0, {}, RecordDict(), dict(config.to_flat()))
    with listening() as lines, suppress(FedsplitError):
        pick(STRATEGIES, config.strategy, "strategy")(grid, context, config)
    return share_row(10, "owner's words in server's log", _raw(lines), 0.0, 1, "log")


def _server_config(folder: Path, texts: Corpus) -> RunConfig:
    model = folder / "model"
    model.mkdir()
    write_tiny(model, word_tokenizer(texts.words))
    flat: dict[str, Any] = {
        "model.name": str(model),
        "model.labels": 2,
        "data.owners": 2,
        "data.kind": "file",
        "data.path": str(folder / "none.jsonl"),
        "train.rounds": 1,
        "train.min-owners": 1,
        "lineage.gate": "off",
        "output.dir": str(folder / "out"),
        "output.threads": 1,
        "session.wave-wait-s": 2.0,
        "session.deadline-s": 2.0,
        "session.idle-s": 2.0,
    }
    return RunConfig.from_flat(flat)


def _noise() -> dict[str, Any]:
    return settings(
        privacy__mechanism="dchi",
        privacy__noise_ratio=50.0,
        labels__protection="randomised-response",
    )


def _raw(lines: list[str]) -> float:
    """Return 1 where a line carries an escape, or a line break of the other party's."""
    return float(any("\x1b" in line or "\nforged" in line or "\n2030-" in line for line in lines))


@contextmanager
def listening() -> Iterator[list[str]]:
    """Collect what the project's loggers say, as a terminal or a plain file would show it."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Lines()
    named = [logging.getLogger(name) for name in ("fedsplit", "strategies", "flwr")]
    disabled, logging.root.manager.disable = logging.root.manager.disable, logging.NOTSET
    others = [(logger, list(logger.handlers), logger.propagate) for logger in named]
    for logger in named:
        logger.handlers, logger.propagate = [handler], False
    try:
        yield lines
    finally:
        for logger, handlers, propagate in others:
            logger.handlers, logger.propagate = handlers, propagate
        logging.root.manager.disable = disabled
