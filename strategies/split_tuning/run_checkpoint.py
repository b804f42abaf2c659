"""The state of a split-tuning run: what is kept after every round and every N steps, and resuming.

A state holds everything that the next step depends on: the trained part of the top, its optimizer,
the place in the schedule, the random generator, the owners' averaged weights, the memory of the
strategy that averages them, every representation received, and who is quarantined or benched.  The
run that goes on in the same ``output.dir`` therefore makes the very steps that the interrupted one
would have made.

Within a round a state can be taken only where owners train nothing: a joint bottom, or a head of
their own, has moved on the owner's machine.  Such a round is replayed from its start, which an
owner's optimizer can too: it keeps the last rounds' (:class:`fedsplit.owners.split.run_state.
RunState`).
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy
from safetensors.torch import load_file
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.wire.messages import weights_record

from ..rounds.averaging import AveragingState, restore, state_of
from ..rounds.client_manager import ClientManager
from ..rounds.report import CohortReport
from ..rounds.state_folder import State, StateFolder
from ..sessions.representation_cache import RepresentationCache
from .cohort import Cohort
from .parts import ServerParts
from .round_context import Position, ResumePoint, RoundContext

log = logging.getLogger(__name__)

FOLDER = "state"
# Settings that decide how a run is carried out, not what comes of it.
FREE = {
    *("model.name", "session.host", "session.port", "session.wave-wait-s", "session.deadline-s"),
    *("session.idle-s", "session.round-s", "session.reconnect-s", "session.max-frame-mb"),
    *("output.dir", "output.save", "output.transcript", "output.capture"),
    *("output.checkpoint-steps", "output.owner-threads", "output.log-json", "output.tensorboard"),
    *("output.metrics-port", "train.min-owners", "train.bench-after", "train.bench-rounds"),
}


@dataclass
class Resumed:
    """What a run starts with.

    Attributes:
        job: names the run across its restarts; owners keep what they train under it.
        first: rounds that are over.
        trained: whether round ``first + 1`` was trained, and only its evaluation is missing.
        resume: where round ``first + 1`` goes on, if not at its start.
        arrays: what owners train, averaged; None = as at the start.
        cohort: names of the owners that the interrupted round had asked.
        good: the top at that round's start, where a rejected round goes back to it.
        clients: who failed and who is benched, see :meth:`.ClientManager.memory`.
    """

    job: str
    first: int = 0
    trained: bool = False
    resume: ResumePoint | None = None
    arrays: ArrayRecord | None = None
    cohort: tuple[str, ...] = ()
    good: dict[str, Tensor] | None = None
    clients: dict[str, Any] = field(default_factory=dict)


def belongings(config: RunConfig, base_digest: str, bottom_digest: str) -> dict[str, Any]:
    """Return what a state belongs to: every setting that decides the result, and the model."""
    flat = {key: value for key, value in config.to_flat().items() if key not in FREE}
    if not config.model.name.startswith("package:"):
        flat.pop("model.sha256", None)
    return {**flat, "base": base_digest, "bottom": bottom_digest}


def earlier_content(folder: Path) -> dict[str, Any]:
    """Return what stands of an interrupted run's ``server.json``; nothing if it cannot be read."""
    try:
        content = json.loads((folder / "server.json").read_bytes())
        rows = [dict(row) for row in content["rounds"]]
        return {"rounds": rows, "resumed": [dict(row) for row in content.get("resumed", [])]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


class RunCheckpoint:
    """Keeps a run's states and takes a run up where the last one ended.

    Args:
        folder: the states' folder.
        parts: what is kept and restored.
        store: representations received.
        averaging: the strategy whose memory is kept.
        clients: who takes part, and who is benched.
        every: steps between states within a round; 0 = none there.

    Attributes:
        job: names the run across its restarts, each of which has a run id of its own.
    """

    def __init__(
        self,
        folder: StateFolder,
        parts: ServerParts,
        store: RepresentationCache,
        averaging: Strategy,
        clients: ClientManager,
        every: int,
    ) -> None:
        self.folder = folder
        self.job = secrets.token_hex(16)
        self._parts = parts
        self._store = store
        self._averaging = averaging
        self._clients = clients
        self._every = every
        self._steps = 0

    # ---- keeping ----------------------------------------------------------------------------

    def keep_round(self, context: RoundContext, arrays: ArrayRecord | None) -> None:
        """Write a state after a round was trained, or evaluated.

        Raises:
            RunError: it cannot be written; the state before is intact.
        """
        if context.mode == "train":
            self.keep(self._facts(context, "trained"), _owners(arrays))
        else:
            numbers = self._parts.optimisation.state()[1]
            self._save({**self._facts(context, "evaluated"), "numbers": numbers}, None)

    def keep_step(
        self,
        context: RoundContext,
        cohort: Cohort,
        arrays: ArrayRecord | None,
        good: Mapping[str, Tensor] | None,
    ) -> None:
        """Write a state after a step, if one is due.

        A round in which owners train something cannot be kept in its middle: what they train has
        moved on their machines.

        Args:
            context: the round.
            cohort: knows who takes the next step.
            arrays: what owners train, as it was last averaged.
            good: the top that a rejected round goes back to, or None.

        Raises:
            RunError: it cannot be written; the state before is intact.
        """
        self._steps += 1
        due = self._every > 0 and self._steps % self._every == 0
        if not due or len(context.arrays) or context.mode != "train":
            return
        count = context.wave_count
        position = replace(cohort.position, wave=context.wave, waves=count)
        going_on = {*cohort.live, *cohort.waiting}
        if not going_on:  # the wave is over
            position = Position(wave=context.wave + 1, waves=count)
            if position.wave >= count:
                return  # and with it the round, whose own state comes at once
        out = set(self._names(context.asked))
        if context.resume is not None:
            out |= context.resume.out
        report = context.report.cohort
        resume = {
            "place": asdict(position),
            "live": list(cohort.live),
            "out": sorted(out - going_on),
            "report": vars(replace(report, lost=dict(report.lost))),
        }
        tensors = {
            **_owners(arrays),
            "rng": torch.get_rng_state(),
            **_under("good", good or {}),
        }
        self.keep(self._facts(context, "step") | {"begin": resume}, tensors)

    def _facts(self, context: RoundContext, stage: str) -> dict[str, Any]:
        return {
            "round": context.number,
            "stage": stage,
            "roll": self._clients.memory(),
            "cohort": self._names(context.sampled),
        }

    def _names(self, nodes: Iterable[int]) -> list[str]:
        return [name for node in nodes if (name := self._clients.names.get(node))]

    def keep(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a state: what all kinds share, and the caller's own.

        Raises:
            RunError: it cannot be written; the state before is intact.
        """
        optimizer, numbers = self._parts.optimisation.state()
        averaging = state_of(self._averaging)
        memory = {name: torch.from_numpy(array) for name, array in averaging.arrays.items()}
        everything = {
            **_under("top", self._parts.model.trainable.state()),
            **_under("optimizer", optimizer),
            **_under("averaging", memory),
            **tensors,
        }
        self._save({**facts, "numbers": numbers}, everything)

    def _save(self, facts: dict[str, Any], tensors: Mapping[str, Tensor] | None) -> None:
        crowded = self.folder.crowded
        self.folder.save(
            {
                **facts,
                "job": self.job,
                "watch": self._parts.watch.memory(),
                "averaging": state_of(self._averaging).facts,
            },
            tensors,
            self._store.tensors(unsaved=not crowded),
            whole=crowded,
        )
        self._store.mark_saved()
        self._parts.recorder.content["state"] = self.folder.report()

    # ---- resuming ---------------------------------------------------------------------------

    def resume(self) -> Resumed:
        """Restore the newest sound state, if there is one, and say where the run goes on.

        Raises:
            RunError: it is of other settings (named), or none is sound.
            ModelError: its tensors do not fit the model.
        """
        state = self.folder.load()
        if state is None:
            return Resumed(self.job)
        facts, parts = state.facts, self._parts
        parts.model.trainable.load(_below("top", state))
        parts.optimisation.load(_below("optimizer", state), facts["numbers"])
        memory = {name: t.numpy() for name, t in _below("averaging", state).items()}
        restore(self._averaging, AveragingState(memory, facts.get("averaging", {})))
        for path in state.segments:
            self._store.load(load_file(path))
        owners = _below("owners", state)
        parts.watch.recall(facts["watch"], owners)
        self.job = str(facts["job"])
        number, stage = int(facts["round"]), str(facts["stage"])
        resumed = Resumed(
            self.job,
            first=number if stage == "evaluated" else number - 1,
            trained=stage == "trained",
            resume=_resume_point(facts["begin"], state.tensors["rng"]) if stage == "step" else None,
            arrays=weights_record({n: t.numpy() for n, t in owners.items()}) if owners else None,
            cohort=tuple(facts["cohort"]),
            good=_below("good", state) or None,
            clients=dict(facts["roll"]),
        )
        self._tell(state, resumed)
        return resumed

    def _tell(self, state: State, resumed: Resumed) -> None:
        """Say where the run goes on, and keep the rows of the rounds that stand."""
        content = self._parts.recorder.content
        last = resumed.first + (1 if resumed.trained else 0)
        rows = [row for row in content["rounds"] if row["round"] <= last]
        content["rounds"] = rows
        step = resumed.resume.position.step if resumed.resume else 0
        told = {
            "state": state.number,
            "after_round": last,
            "step": step,
            "skipped": list(self.folder.skipped),
        }
        content["resumed"] = [*content.get("resumed", []), told]
        log.info("going on after round %d, step %d (state %d)", last, step, state.number)


def _resume_point(facts: Mapping[str, Any], rng: Tensor) -> ResumePoint:
    return ResumePoint(
        Position(**facts["place"]),
        tuple(facts["live"]),
        frozenset(facts["out"]),
        CohortReport(**facts["report"]),
        rng,
    )


def open_checkpoint(
    config: RunConfig,
    parts: ServerParts,
    store: RepresentationCache,
    averaging: Strategy,
    clients: ClientManager,
) -> RunCheckpoint | None:
    """Open the states of ``output.dir``; None where none are kept.

    Raises:
        RunError: another run works there.
    """
    if not config.output.dir or config.output.checkpoint_steps < 0:
        return None
    base = str(parts.recorder.content["base_digest"])
    belongs = belongings(config, base, parts.model.bundle.digest)
    # At its default a setting means what versions without it did: their runs may go on.
    usual = {key: value for key, value in RunConfig().to_flat().items() if key in belongs}
    folder = StateFolder(Path(config.output.dir) / FOLDER, belongs, usual=usual)
    every = config.output.checkpoint_steps
    return RunCheckpoint(folder, parts, store, averaging, clients, every)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _below(prefix: str, state: State) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {n.removeprefix(start): t for n, t in state.tensors.items() if n.startswith(start)}


def _owners(arrays: ArrayRecord | None) -> dict[str, Tensor]:
    """Return what owners train as tensors, under the names that a state keeps them by."""
    found = {} if arrays is None else {n: a.numpy().copy() for n, a in arrays.items()}
    return _under("owners", {n: torch.from_numpy(a) for n, a in found.items()})
