"""The top in several processes: each computes a part of a cohort's owners, gradients are summed.

Worker 0 is the server's own process.  A step's owners are dealt in the order of the cohort, each
worker a run of them; every worker's rows and gradients are put together in that order, so that
the result is the same in every run.  It differs from one worker's by the rounding of sums: of what
is trained, each worker's gradients are complete before they are added.  Dropout draws at each
worker from a seed of the step and the worker.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from fedsplit.config import RunConfig
from fedsplit.errors import RunError
from fedsplit.seeding import derive_seed

from .replica_channel import PREFIX, Channel, named, trained
from .top_step import ForwardHere, Step, TopRows

START_S = 300.0


class Replicas:
    """Computes steps with ``server.workers`` processes; see :class:`.top_step.Forward`.

    Args:
        rows: of the top in this process.
        config: of the run.

    Raises:
        RunError: a worker does not start.
    """

    def __init__(self, rows: TopRows, config: RunConfig) -> None:
        self._here = ForwardHere(rows)
        self.per_token = rows.per_token
        self._top = rows.top
        self._seed = config.seed
        self._steps = 0
        self._training = False
        self._current: set[int] = set()  # workers that have what is trained as it is now
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        try:
            for number in range(1, config.server.workers):
                self._start(number, config)
            whole = {**dict(self._top.named_parameters()), **dict(self._top.named_buffers())}
            for channel in self._channels:
                channel.receive()
                channel.wait_for_ever()  # a step takes what it takes; an end is seen at once
                channel.send(whole, do="take")
        except RunError:
            self.close()
            raise

    def _start(self, number: int, config: RunConfig) -> None:
        mine, other = socket.socketpair()
        mine.settimeout(START_S)
        told = json.dumps({"run": config.to_flat(), "worker": number})
        command = [sys.executable, "-P", "-m", f"{__package__}.replica_worker", str(other.fileno())]
        path = os.pathsep.join(entry for entry in sys.path if entry)
        with other:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                pass_fds=[other.fileno()],
                env={**os.environ, "PYTHONPATH": path},
            )
        assert process.stdin is not None
        process.stdin.write(told.encode())
        process.stdin.close()
        self._processes.append(process)
        self._channels.append(Channel(mine, f"worker {number} of the top"))

    def train(self, mode: bool) -> None:
        """Set training or evaluation mode, everywhere."""
        self._training = mode
        self._current.clear()
        self._here.train(mode)

    def __call__(
        self, hidden: Tensor, mask: Tensor, texts: Sequence[int], *, learn: bool, joint: bool
    ) -> Step:
        """See :class:`.top_step.Forward`."""
        self._steps += 1
        counts = deal(texts, 1 + len(self._channels))
        parts = list(zip(torch.split(hidden, counts), torch.split(mask, counts), strict=True))
        busy = []
        for number, (part, of) in enumerate(parts):
            if number and len(part):
                channel = self._channels[number - 1]
                tensors = {"hidden": part, "mask": of, **self._news(number)}
                seed = derive_seed(self._seed, "worker", number, self._steps)
                modes = {"learn": learn, "joint": joint, "training": self._training}
                channel.send(tensors, do="step", seed=seed, **modes)
                busy.append(channel)
        first = self._here(parts[0][0].clone(), parts[0][1], texts, learn=learn, joint=joint)
        rows = [first.rows, *(channel.receive()[1]["rows"].to(first.rows) for channel in busy)]
        return _DealtStep(first, busy, rows, trained(self._top))

    def _news(self, number: int) -> dict[str, Tensor]:
        """Return what is trained, as it is now, for a worker that has it as it was."""
        if number in self._current:
            return {}
        if not self._training:  # in training the next step finds it changed
            self._current.add(number)
        return named(trained(self._top))

    def close(self) -> None:
        """End the workers."""
        for channel in self._channels:
            channel.close()
        for process in self._processes:
            try:
                process.wait(5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._channels, self._processes = [], []


class _DealtStep:
    """A step whose parts several workers compute."""

    def __init__(
        self,
        first: Step,
        others: Sequence[Channel],
        rows: Sequence[Tensor],
        trained: Mapping[str, nn.Parameter],
    ) -> None:
        self._first, self._others = first, others
        self._counts = [len(part) for part in rows]
        self._trained = trained
        self.rows = torch.cat(list(rows))

    def backward(self, upward: Tensor) -> Tensor | None:
        """See :class:`.top_step.Step`."""
        parts = torch.split(upward, self._counts)
        for channel, part in zip(self._others, parts[1:], strict=True):
            channel.send({"upward": part}, do="backward")
        found = [self._first.backward(parts[0])]
        for channel in self._others:
            _, tensors = channel.receive()
            if "hidden" in tensors:
                found.append(tensors["hidden"])
            for name, parameter in self._trained.items():
                if (gradient := tensors.get(PREFIX + name)) is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = gradient.to(parameter)
                else:
                    parameter.grad += gradient.to(parameter)
        hidden = [part for part in found if part is not None]
        return torch.cat(hidden) if hidden else None


def deal(texts: Sequence[int], workers: int) -> list[int]:
    """Return how many texts each worker gets: whole owners, in order, as evenly as that allows.

    Args:
        texts: of each owner.
        workers: number of them; the first gets at least one owner.
    """
    total, ends = sum(texts), [0, *accumulate(texts)]
    cuts = [0]
    for worker in range(1, workers):
        least = ends[1] if worker == 1 else cuts[-1]
        wanted = total * worker / workers
        cuts.append(max(least, min(ends, key=lambda end: (abs(end - wanted), end))))
    cuts.append(total)
    return [b - a for a, b in pairwise(cuts)]
