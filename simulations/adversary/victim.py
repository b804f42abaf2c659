"""One owner as a lying server meets it: its real ClientApp, home, policy and data.

Nothing of the owner's code is replaced.  A message goes through Flower's own dispatch, so whatever
the app registers is reached, under whatever name its modules have.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedsplit.owners.naming import HOME_VARIABLE, SIMULATION_VARIABLE

NODE = 17
Policy = dict[str, dict[str, Any]]
"""Tables of an owner.toml."""


def strict_policy(**changes: Any) -> Policy:
    """Return what ``fedsplit policy init`` writes, with rules changed.

    Args:
        **changes: ``table__rule=value``; None removes the rule.
    """
    from fedsplit.owners.policy.description import TEMPLATE

    return changed(tomllib.loads(TEMPLATE.read_text()), changes)


def changed(policy: Policy, changes: Mapping[str, Any]) -> Policy:
    """Return ``policy`` with rules ``table__rule`` changed; None removes one."""
    made = {table: dict(rules) for table, rules in policy.items()}
    for name, value in changes.items():
        table, _, rule = name.partition("__")
        if value is None:
            made.get(table, {}).pop(rule, None)
        else:
            made.setdefault(table, {})[rule] = value
    return {table: rules for table, rules in made.items() if rules}


def permissive_policy() -> Policy:
    """Return a policy that lets everything out as it is; used to learn the truth for scoring."""
    return {
        "noise": {"mechanisms": ["none"]},
        "labels": {"protection": ["none", "client-head", "randomised-response", "max-norm"]},
    }


def rule(policy: Policy, name: str) -> Any:
    """Return a rule's value, whatever table it stands in; None where there is no such rule."""
    return next((rules[name] for rules in policy.values() if name in rules), None)


@dataclass
class Victim:
    """An owner with texts, labels, a policy and a noise secret.

    Attributes:
        folder: holds its home and its data.
        texts: its own.
        labels: one per text; None where it has none.
        policy: its owner.toml; None: it has none.
        secret: 32 bytes; fixed, so that a run can be repeated.
    """

    folder: Path
    texts: Sequence[str]
    labels: Sequence[int] | None
    policy: Policy | None
    secret: bytes = bytes(range(32))

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._write("noise.secret", self.secret)
        if self.policy is not None:
            self._write("owner.toml", _toml(self.policy).encode())
        labels = self.labels if self.labels is not None else [0] * len(self.texts)
        rows = [
            json.dumps({"text": t, "label": int(y)})
            for t, y in zip(self.texts, labels, strict=True)
        ]
        (self.folder / "data.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")

    @property
    def home(self) -> Path:
        """The owner's home."""
        return self.folder / "home"

    @property
    def node_config(self) -> dict[str, Any]:
        """The owner's own settings of its node."""
        return {
            "owner": "victim",
            "state-dir": str(self.home),
            "data-path": str(self.folder / "data.jsonl"),
            "ledger-sync": 64,
        }

    def without_protection(self, folder: Path) -> Victim:
        """Return the same owner with a policy that lets everything out: the truth to score by."""
        return Victim(folder, self.texts, self.labels, permissive_policy(), self.secret)

    def ask(self, kind: str, content: RecordDict, run: int, flat: Mapping[str, Any]) -> Message:
        """Hand the owner's ClientApp one message and return its reply."""
        from fedsplit.client_app import app

        TaskIdentity.run_id = run  # Flower sets them where it starts an app's process
        TaskIdentity.node_id = TaskIdentity.task_id = 1
        message = Message(content, dst_node_id=NODE, message_type=kind)
        context = Context(run, NODE, self.node_config, RecordDict(), dict(flat))
        with own_environment():
            return app(message, context)

    def ledger_text(self) -> str:
        """Return everything that the owner's home says of what left."""
        return "\n".join(
            path.read_text(encoding="utf-8", errors="replace")
            for path in sorted(self.home.glob("ledger*"))
            if path.is_file()
        )

    def _write(self, name: str, content: bytes) -> None:
        path = self.home / name
        path.write_bytes(content)
        path.chmod(0o600)


@contextmanager
def own_environment() -> Iterator[None]:
    """Let the owner's process be no simulation while the context lasts: its secret is its own."""
    names = (SIMULATION_VARIABLE, HOME_VARIABLE, "FEDSPLIT_POLICY")
    before = {name: os.environ.pop(name, None) for name in names}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _toml(policy: Policy) -> str:
    lines: list[str] = []
    for table, rules in policy.items():
        lines.append(f"[{table}]")
        lines += [f"{name} = {json.dumps(value, default=str)}" for name, value in rules.items()]
    return "\n".join(lines) + "\n"
