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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy
from safetensors.torch import load_file
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.wire.messages import weights_record

from ..rounds.state_folder import State, StateFolder
from ..sessions.representation_cache import RepresentationStore
from .cohort import CohortReport, Place
from .parts import ServerParts

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
MEMORY = ("m_t", "v_t", "current_arrays")  # what Flower's adaptive strategies remember


@dataclass(frozen=True)
class Begin:
    """Where a resumed round begins.

    Attributes:
        place: of the next step.
        live: the owners that the step is taken with.
        out: owners that have finished the round, or were lost in it.
        report: what the round had come to.
        rng: state of torch's CPU generator.
    """

    place: Place
    live: tuple[str, ...]
    out: frozenset[str]
    report: CohortReport
    rng: Tensor

    def first_of(self, name: str | None) -> int:
        """Return the step of its own that an owner begins at."""
        return self.place.step if name in self.live else 0


@dataclass
class Resumed:
    """What a run starts with.

    Attributes:
        job: names the run across its restarts; owners keep what they train under it.
        first: rounds that are over.
        trained: whether round ``first + 1`` was trained, and only its evaluation is missing.
        begin: where round ``first + 1`` begins, if not at its start.
        arrays: what owners train, averaged; None = as at the start.
        cohort: names of the owners that the interrupted round had asked.
        good: the top at that round's start, where a rejected round goes back to it.
        roll: who failed and who is benched, see
        :meth:`strategies.rounds.client_manager.Roll.memory`.
    """

    job: str
    first: int = 0
    trained: bool = False
    begin: Begin | None = None
    arrays: ArrayRecord | None = None
    cohort: tuple[str, ...] = ()
    good: dict[str, Tensor] | None = None
    roll: dict[str, Any] = field(default_factory=dict)


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


class SplitState:
    """Keeps a run's states and takes a run up where the last one ended.

    Args:
        folder: the states' folder.
        parts: what is kept and restored.
        store: representations received.
        averaging: the strategy whose memory is kept.
    """

    def __init__(
        self,
        folder: StateFolder,
        parts: ServerParts,
        store: RepresentationStore,
        averaging: Strategy,
    ) -> None:
        self.folder = folder
        self._parts = parts
        self._store = store
        self._averaging = averaging
        self.job = secrets.token_hex(16)

    # ---- keeping ----------------------------------------------------------------------------

    def keep(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a state: what all kinds share, and the caller's own.

        Raises:
            RunError: it cannot be written; the state before is intact.
        """
        optimizer, numbers = self._parts.optimisation.state()
        memory = {
            f"{name}.{key}": torch.from_numpy(np.array(value))
            for name in MEMORY
            for key, value in (getattr(self._averaging, name, None) or {}).items()
        }
        everything = {
            **_under("top", self._parts.trainable.state()),
            **_under("optimizer", optimizer),
            **_under("averaging", memory),
            **tensors,
        }
        self._save({**facts, "numbers": numbers}, everything)

    def keep_same(self, facts: Mapping[str, Any]) -> None:
        """Write a state that differs from the one before in facts and in what was received."""
        numbers = self._parts.optimisation.state()[1]
        self._save({**facts, "numbers": numbers}, None)

    def _save(self, facts: dict[str, Any], tensors: Mapping[str, Tensor] | None) -> None:
        crowded = self.folder.crowded
        self.folder.save(
            {**facts, "job": self.job, "watch": self._parts.watch.memory()},
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
        parts.trainable.load(_below("top", state))
        parts.optimisation.load(_below("optimizer", state), facts["numbers"])
        for name in MEMORY:
            found = _below(f"averaging.{name}", state)
            if found:
                setattr(self._averaging, name, {k: v.numpy() for k, v in found.items()})
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
            begin=_begin(facts["begin"], state.tensors["rng"]) if stage == "step" else None,
            arrays=weights_record({n: t.numpy() for n, t in owners.items()}) if owners else None,
            cohort=tuple(facts["cohort"]),
            good=_below("good", state) or None,
            roll=dict(facts["roll"]),
        )
        self._tell(state, resumed)
        return resumed

    def _tell(self, state: State, resumed: Resumed) -> None:
        """Say where the run goes on, and keep the rows of the rounds that stand."""
        content = self._parts.recorder.content
        last = resumed.first + (1 if resumed.trained else 0)
        rows = [row for row in content["rounds"] if row["round"] <= last]
        content["rounds"] = rows
        step = resumed.begin.place.step if resumed.begin else 0
        told = {
            "state": state.number,
            "after_round": last,
            "step": step,
            "skipped": list(self.folder.skipped),
        }
        content["resumed"] = [*content.get("resumed", []), told]
        log.info("going on after round %d, step %d (state %d)", last, step, state.number)


def _begin(facts: Mapping[str, Any], rng: Tensor) -> Begin:
    return Begin(
        Place(**facts["place"]),
        tuple(facts["live"]),
        frozenset(facts["out"]),
        CohortReport(**facts["report"]),
        rng,
    )


def begin_facts(
    place: Place, live: Sequence[str], out: Sequence[str], report: CohortReport
) -> dict[str, Any]:
    """Return what :class:`Begin` is made of, JSON-able."""
    kept = replace(report, lost=dict(report.lost))
    return {"place": asdict(place), "live": list(live), "out": list(out), "report": vars(kept)}


def open_state(
    config: RunConfig, parts: ServerParts, store: RepresentationStore, averaging: Strategy
) -> SplitState | None:
    """Open the states of ``output.dir``; None where none are kept.

    Raises:
        RunError: another run works there.
    """
    if not config.output.dir or config.output.checkpoint_steps < 0:
        return None
    base = str(parts.recorder.content["base_digest"])
    belongs = belongings(config, base, parts.bundle[1])
    # At its default a setting means what versions without it did: their runs may go on.
    usual = {key: value for key, value in RunConfig().to_flat().items() if key in belongs}
    folder = StateFolder(Path(config.output.dir) / FOLDER, belongs, usual=usual)
    return SplitState(folder, parts, store, averaging)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _below(prefix: str, state: State) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {n.removeprefix(start): t for n, t in state.tensors.items() if n.startswith(start)}


def arrays_of(arrays: ArrayRecord | None) -> dict[str, Tensor]:
    """Return what owners train as tensors, under the names that a state keeps them by."""
    found = {} if arrays is None else {n: a.numpy().copy() for n, a in arrays.items()}
    return _under("owners", {n: torch.from_numpy(a) for n, a in found.items()})


def good_of(good: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the top that a rejected round goes back to, under the names a state keeps it by."""
    return _under("good", good or {})
