"""A process with a replica of the server's top; :mod:`.replicas` starts it.

It loads and cuts the base model as the server does, gets what is trained with the step that needs
it, and has no session, no owner's name and no port.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.config import RunConfig
from fedsplit.errors import RunError

from .model import build_replica
from .replica_channel import PREFIX, Channel, named, trained
from .top_step import ForwardHere, Step, TopRows


def main(descriptor: int) -> None:
    """Answer steps until the server closes its end."""
    told = json.load(sys.stdin)
    config = RunConfig.from_flat(told["run"])
    channel = Channel(socket.socket(fileno=descriptor), "the server")
    if config.output.threads:
        torch.set_num_threads(config.output.threads)
    try:
        rows = build_replica(config, int(told["worker"]))
        channel.send(ready=True)
        answer(channel, rows)
    except Exception as error:  # whatever it is, the server must hear of it
        channel.send(error=f"{type(error).__name__}: {error}"[:2000])
        raise


def answer(channel: Channel, rows: TopRows) -> None:
    """Answer what the server asks for until it closes its end."""
    step: Step | None = None
    whole = {**dict(rows.top.named_parameters()), **dict(rows.top.named_buffers())}
    while True:
        try:
            facts, tensors = channel.receive()
        except RunError:  # the run is over
            return
        if facts["do"] == "take":
            take(whole, tensors)
        elif facts["do"] == "step":
            news = {n.removeprefix(PREFIX): t for n, t in tensors.items() if n.startswith(PREFIX)}
            take(whole, news)
            step = forward(rows, facts, tensors)
            channel.send({"rows": step.rows})
        elif step is not None:
            channel.send(backward(rows, step, tensors["upward"]))


def take(whole: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Make a replica's tensors those that came."""
    with torch.no_grad():
        for name, value in tensors.items():
            whole[name].copy_(value)


def forward(rows: TopRows, facts: dict[str, Any], tensors: dict[str, Tensor]) -> Step:
    """Compute one part of a step."""
    torch.manual_seed(int(facts["seed"]))
    rows.top.train(bool(facts["training"]))
    hidden, mask = tensors["hidden"], tensors["mask"]
    here = ForwardHere(rows)
    return here(hidden, mask, [len(hidden)], learn=facts["learn"], joint=facts["joint"])


def backward(rows: TopRows, step: Step, upward: Tensor) -> dict[str, Tensor]:
    """Return the gradients of this part: of what is trained, and of ``hidden`` if asked for."""
    parameters: dict[str, nn.Parameter] = trained(rows.top)
    for parameter in parameters.values():
        parameter.grad = None
    hidden = step.backward(upward)
    found = named({n: p.grad for n, p in parameters.items() if p.grad is not None})
    return found if hidden is None else {**found, "hidden": hidden}


if __name__ == "__main__":
    main(int(sys.argv[1]))
