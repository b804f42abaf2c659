"""What an owner's labels are drawn with: fixed by the first run, or by the policy, for ever.

A second draw at another epsilon, or for another number of classes, would be an independent look at
the same label: ninety of them read it.  So what was first used is kept in the owner's home.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsplit import storage
from fedsplit.errors import LedgerError
from fedsplit.owners.policy.rules import Breach, refuse
from fedsplit.privacy.labels.base import LabelProtection

FILE = "labels.drawn.json"


def data_key(node_config: Mapping[str, object]) -> str:
    """Return what names an owner's data and its labels' column in files of the owner's home."""
    source = "\0".join(str(node_config.get(k, "")) for k in ("data-path", "label-column"))
    return hashlib.sha256(source.encode("utf-8", "replace")).hexdigest()[:16]


def fix_draw(
    home: Path, node_config: Mapping[str, object], protection: LabelProtection, classes: int
) -> None:
    """Keep what labels are drawn with, or refuse to draw them with anything else.

    Whoever wants to pay for a second draw removes the file by hand.

    Args:
        home: the owner's folder.
        node_config: names the data and the labels' column, each of which has its own draw.
        protection: draws labels.
        classes: C that the run names.

    Raises:
        PolicyError: labels were drawn before with another epsilon or number of classes.
        LedgerError: the file cannot be read or written; nothing may leave.
    """
    key = data_key(node_config)
    asked: dict[str, Any] = {**protection.describe(), "classes": classes}
    path = home / FILE
    try:
        with storage.FileLock(home / f".{FILE}.lock"):
            known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if key not in known:
                text = json.dumps({**known, key: asked}, indent=1, sort_keys=True)
                storage.write(path, text + "\n", mode=storage.PRIVATE)
                return
            drawn = dict(known[key])
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise LedgerError(f"{path}: must be readable and writable: {error}") from None
    found = []
    for name in sorted(asked.keys() | drawn.keys()):
        if asked.get(name) != drawn.get(name):
            rule = "labels.classes" if name == "classes" else "labels.epsilon"
            bound = f"{drawn.get(name)}, as {FILE} says: labels are drawn once for ever"
            found.append(Breach(rule, asked.get(name), bound))
    refuse(found)
