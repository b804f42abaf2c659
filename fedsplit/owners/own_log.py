"""An owner's own log as JSON lines, in its own home; off unless the owner asks for it.

What an owner's process says can tell of its data (how many samples, which word types carry a
label), so nothing of it is written unless the owner's own node config has ``log-json=true``; the
run's settings, which the other party writes, cannot turn it on.  Nothing reads the file but its
owner, and no metrics are offered on the owner's side at all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedsplit.errors import ConfigError
from fedsplit.observe import JsonLines, bound, context, writing

FILE = "log.jsonl"
SETTING = "log-json"


@contextmanager
def own_log(
    home: Path, node_config: Mapping[str, object], *, owner: str, **place: str | int
) -> Iterator[None]:
    """Bind who this is for the block's log lines, and write them to the home if so asked.

    Args:
        home: the owner's folder.
        node_config: the owner's own, from its SuperNode.
        owner: its public name.
        place: run, node, round and mode, as far as they are known.

    Raises:
        ConfigError: ``log-json`` is neither true nor false.
    """
    asked = node_config.get(SETTING, False)
    if not isinstance(asked, bool):
        raise ConfigError(f"{SETTING}={asked!r}: must be true or false")
    with bound(side="owner", owner=owner, **place):
        if not asked:
            yield
            return

        def mine(record: logging.LogRecord) -> bool:
            # Simulated owners may share a process, and so the loggers.
            return context().get("owner") == owner

        handler = JsonLines(home / FILE, keep=mine, mode=0o600)
        with writing(handler, ("fedsplit",)):
            yield
