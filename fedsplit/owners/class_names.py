"""What an owner's labels mean, as the parties agreed: the list of classes, the range of numbers.

The server announces the names (``model.label-names``), or owners keep them to themselves (node
config ``label-names``); with neither, a label is an integer below ``model.labels`` and means
itself.  No list is ever derived from an owner's own file: two files would give one class two
indices.  The list's digest stands in HELLO, where the server compares it with that of the others.

A list that a lying server makes up asks a question: whether a label is outside it.  So the first
list for a data set is kept, and another is refused whatever the labels are; the owner's own list,
where there is one, decides before any label is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fedsplit import storage
from fedsplit.config import RunConfig
from fedsplit.data import names_digest, parse_class_names
from fedsplit.errors import LedgerError
from fedsplit.owners.label_draws import data_key
from fedsplit.owners.policy.rules import Breach, refuse
from fedsplit.tasks import task_of
from fedsplit.tasks.classification import OWN

FILE = "labels.names.json"


def agreed_classes(config: RunConfig, node_config: Mapping[str, object]) -> tuple[str, ...]:
    """Return the names of the run's classes, in order, or what else its labels mean.

    Empty without labels.

    Raises:
        ConfigError: the server announces another meaning than the owner's own.
    """
    task = task_of(config)
    return task.agreed(config.model, str(node_config.get(task.terms_setting, "")))


def own_classes(home: Path, node_config: Mapping[str, object]) -> tuple[str, ...]:
    """Return the classes that a run must have: the owner's, or the first announced for its data.

    Returns:
        Their names, in order; empty where neither is known.

    Raises:
        ConfigError: the owner's list is none.
        LedgerError: the kept list cannot be read.
    """
    own = parse_class_names(str(node_config.get(OWN, "")), f"node config {OWN}")
    return own or _known(home).get(data_key(node_config), ())


def keep_first(
    home: Path,
    node_config: Mapping[str, object],
    names: tuple[str, ...],
    setting: str = OWN,
) -> None:
    """Keep the first list of classes that a server announced for this data, or refuse another.

    With a list of the owner's own there is nothing to keep.

    Args:
        home: the owner's folder.
        node_config: the owner's own; names the data and the labels' column.
        names: as :func:`agreed_classes` returned them.
        setting: key of the node config with the owner's own.

    Raises:
        PolicyError: another list was announced before.
        LedgerError: the file cannot be read or written.
    """
    if not names or str(node_config.get(setting, "")).strip():
        return
    path, key = home / FILE, data_key(node_config)
    try:
        with storage.FileLock(home / f".{FILE}.lock"):
            known = _known(home)
            if key not in known:
                text = json.dumps({**known, key: names}, indent=1, sort_keys=True)
                storage.write(path, text + "\n", mode=storage.PRIVATE)
                return
    except OSError as error:
        raise LedgerError(f"{path}: must be writable: {error}") from None
    first = known[key]
    if names_digest(first) != names_digest(names):
        bound = (
            f"{', '.join(first)}, the first that were announced for this data ({FILE}); to agree "
            f"to others, set {setting} in the node config"
        )
        refuse([Breach("labels.classes", ", ".join(names), bound)])


def _known(home: Path) -> dict[str, tuple[str, ...]]:
    path = home / FILE
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
        return {str(key): tuple(map(str, names)) for key, names in content.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise LedgerError(f"{path}: must be a readable list: {error}") from None
