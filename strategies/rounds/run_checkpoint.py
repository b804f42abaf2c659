"""The state of a run: kept after every round and every N steps, and taken up again.

A state holds everything that the next step depends on: what the server trains and its optimizer,
how far the round is, the random generator, the owners' averaged weights, the moments of the
strategy that averages them, every representation received, and who is quarantined or benched.  The
run that goes on in the same ``output.dir`` therefore makes the very steps that the interrupted one
would have made.  All strategies share this code and the format of :mod:`.state_folder`.

Within a round a state can be taken only where owners train nothing: a joint bottom, or a head of
their own, has moved on the owner's machine.  Such a round is replayed from its start, which an
owner's optimizer can too: it keeps the last rounds' (:class:`fedsplit.owners.split.run_state.
RunState`).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy
from safetensors.torch import load_file
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.tasks import task_of, task_type
from fedsplit.wire.messages import weights_record

from ..early_stopping import EarlyStopping
from ..sessions.representation_cache import RepresentationCache
from .averaging import AveragingState, restore, state_of
from .client_manager import ClientManager
from .contributions import capped
from .lineage_watch import LineageWatch
from .recorder import Recorder
from .round_context import ResumePoint, RoundContext
from .state_folder import FOLDER, State, StateFolder

log = logging.getLogger(__name__)

# Settings that decide how a run is carried out, not what comes of it.
FREE = {
    *("model.name", "session.host", "session.port", "session.wave-wait-s", "session.deadline-s"),
    *("session.idle-s", "session.round-s", "session.reconnect-s", "session.max-frame-mb"),
    *("output.dir", "output.save", "output.transcript", "output.capture"),
    "output.record-mb",
    *("output.checkpoint-steps", "output.owner-threads", "output.log-json", "output.tensorboard"),
    *("output.metrics-port", "train.min-owners", "train.bench-after", "train.bench-rounds"),
}
# Settings that are gone, and the one value that they could have: runs that had them may go on.
FORMER = {"offsite.secure-aggregation": False}


class SavedParts(Protocol):
    """What a strategy works with, as far as a state has to know of it."""

    @property
    def watch(self) -> LineageWatch:
        """The lineage gate."""

    @property
    def recorder(self) -> Recorder:
        """What writes down what happened."""

    def digests(self) -> dict[str, str]:
        """Return digests of the files that a state belongs to, by name."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (tensors, JSON values) that the server's own training has changed."""

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`; also given what owners train, under ``owners.*``."""

    def as_base(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the owners' weights make of the base's own tensors."""


class RunCheckpoint:
    """What a run goes on from, and the states that it leaves for a later start.

    Args:
        config: the run's settings.
        parts: what is kept and restored.
        clients: the owners' names, and who is benched.
        averaging: the strategy whose moments are kept.
        cache: representations received, or None.

    Attributes:
        job: names the run across its restarts, each of which has a run id of its own.
        first: rounds that an interrupted run has finished: Flower counts those that are left.
        trained: whether only the evaluation of round ``first + 1`` is missing.
        resume_point: where the next round is taken up, if not at its start.
        good: the top that a rejected round goes back to, or None.
        arrays: what owners train, as it was last averaged; None: as at the start.
        stopping: watches held-out losses or scores and keeps the best state (``train.patience``).
    """

    def __init__(
        self,
        config: RunConfig,
        parts: SavedParts,
        clients: ClientManager,
        averaging: Strategy,
        cache: RepresentationCache | None = None,
    ) -> None:
        self._config = config
        self._parts = parts
        self._clients = clients
        self._averaging = averaging
        self._cache = cache
        self._folder: StateFolder | None = None
        self._steps = 0
        self.job = secrets.token_hex(16)
        self.first = 0
        self.trained = False
        self.resume_point: ResumePoint | None = None
        self.good: dict[str, Tensor] | None = None
        self.arrays: ArrayRecord | None = None
        watch = config.train.watch
        higher = watch == "metric" and not task_type(config.model.task).lower_is_better
        self.stopping = EarlyStopping(config.train.patience, watch, higher=higher)

    # ---- resuming ---------------------------------------------------------------------------

    def open(self, folder: StateFolder | None) -> None:
        """Go on from the newest state, if there is one, and keep states there from now on.

        Args:
            folder: from :func:`open_states`.

        Raises:
            RunError: the state is of another model, or none of the states is sound.
            ModelError: the state's tensors do not fit the model.
        """
        if folder is None:
            return
        self._folder = folder
        folder.belongs |= self._parts.digests()
        state = folder.load()
        if state is not None:
            self._restore(state, folder)

    def _restore(self, state: State, folder: StateFolder) -> None:
        facts, parts = state.facts, self._parts
        parts.restore(state.tensors, facts)
        moments = {name: t.numpy() for name, t in below("averaging", state.tensors).items()}
        restore(self._averaging, AveragingState(moments, facts.get("averaging", {})))
        if self._cache is not None:
            for path in state.segments:
                self._cache.load(load_file(path))
        owners = below("owners", state.tensors)
        parts.watch.restore(facts["watch"], parts.as_base(owners) if owners else {})
        number, stage = int(facts["round"]), str(facts["stage"])
        self.job = str(facts["job"])
        self.first = number if stage == "evaluated" else number - 1
        self.trained = stage == "trained"
        if stage == "step":
            self.resume_point = ResumePoint.from_facts(facts["begin"], state.tensors["rng"])
        if owners:
            self.arrays = weights_record({n: t.numpy() for n, t in owners.items()})
        self.good = below("good", state.tensors) or None
        if self.stopping.active and "stopping" in facts:
            self.stopping.restore(facts["stopping"], below("best", state.tensors))
        self._clients.restore(facts["roll"], facts["cohort"])
        self._record(state, folder)

    def _record(self, state: State, folder: StateFolder) -> None:
        """Write down where the run goes on, and keep the rows of the rounds that stand."""
        content = self._parts.recorder.content
        last = self.first + (1 if self.trained else 0)
        content["rounds"] = [row for row in content["rounds"] if row["round"] <= last]
        step = self.resume_point.position.step if self.resume_point else 0
        told = {
            "state": state.number,
            "after_round": last,
            "step": step,
            "skipped": list(folder.skipped),
        }
        content["resumed"] = [*content.get("resumed", []), told]
        log.info("going on after round %d, step %d (state %d)", last, step, state.number)

    def take_resume_point(self) -> ResumePoint | None:
        """Return where the next round is taken up, once."""
        point, self.resume_point = self.resume_point, None
        return point

    # ---- keeping ----------------------------------------------------------------------------

    def judge(
        self,
        number: int,
        metrics: Mapping[str, Any],
        owners: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
    ) -> bool:
        """Keep the present state as the best one if the held-out loss or score is the best yet.

        Args:
            number: the round after which it was measured.
            metrics: of the evaluation.
            owners: each one's own.

        Returns:
            Whether it is.
        """
        if not self.stopping.active:
            return False
        watch = self._config.train.watch
        key, value = "loss", metrics.get("loss")
        if watch == "metric":
            key, value = "headline", task_of(self._config).headline(metrics)
        if not isinstance(value, int | float):
            log.warning("round %d: no owner tells train.watch=%r: nothing is judged", number, watch)
            return False
        told = {name: row for name, row in owners.items() if key in row}
        cap = self._config.robust.weight_cap
        weights = capped({name: row["targets"] for name, row in told.items()}, cap)
        values = {name: (row[key], weights[name]) for name, row in told.items()}
        best = self.stopping.improves(number, float(value), values)
        if best:
            own, facts = self._parts.state()
            self.stopping.keep({**own, **under("owners", tensors_of(self.arrays))}, facts)
        report = self.stopping.report()
        self._parts.recorder.content["early_stopping"] = report
        if report["stopped"]:
            log.info(
                "no better held-out %s since round %d: the run ends", watch, report["best_round"]
            )
        return best

    def take_best(self) -> None:
        """Put the best state in the place of the last one, where losses were watched."""
        best = self.stopping
        if not best.tensors:
            return
        self._parts.restore(best.tensors, best.facts)
        if owners := below("owners", best.tensors):
            self.arrays = weights_record({n: t.numpy() for n, t in owners.items()})

    def save(self, context: RoundContext, stage: str, *, best: bool = False) -> None:
        """Keep a state after a round was ``trained``, or ``evaluated`` (and is the ``best``).

        Raises:
            RunError: it cannot be written; the state before is intact.
        """
        self._save(context, stage, None if stage == "evaluated" and not best else {})

    def save_step(self, context: RoundContext) -> None:
        """Keep a state within a round, after every ``output.checkpoint-steps`` steps."""
        every = self._config.output.checkpoint_steps
        self._steps += 1
        due = every > 0 and self._steps % every == 0
        if self._folder is None or not due or context.shapes or context.mode != "train":
            return
        point = context.resume_point(torch.get_rng_state())
        if point is not None:  # else the round is over, and its own state comes at once
            tensors = {"rng": point.rng, **under("good", self.good or {})}
            self._save(context, "step", tensors, begin=point.to_facts())

    def _save(
        self, context: RoundContext, stage: str, more: dict[str, Tensor] | None, **facts: Any
    ) -> None:
        """Write a state; without ``more`` only facts and what was received differ."""
        folder, cache = self._folder, self._cache
        if folder is None:
            return
        own, own_facts = self._parts.state()
        averaging = state_of(self._averaging)
        tensors = None
        if more is not None:
            moments = {name: torch.from_numpy(a) for name, a in averaging.arrays.items()}
            tensors = {
                **own,
                **under("averaging", moments),
                **under("owners", tensors_of(self.arrays)),
                **under("best", self.stopping.tensors),
                **more,
            }
        if self.stopping.active:
            facts["stopping"] = self.stopping.state()
        crowded = folder.crowded
        folder.save(
            {
                **own_facts,
                **facts,
                "round": context.number,
                "stage": stage,
                "roll": self._clients.state(),
                "cohort": context.owners(),
                "job": self.job,
                "watch": self._parts.watch.state(),
                "averaging": averaging.facts,
            },
            tensors,
            cache.tensors(unsaved=not crowded) if cache is not None else None,
            whole=crowded,
        )
        if cache is not None:
            cache.mark_saved()
        self._parts.recorder.content["state"] = folder.report()

    def clear(self) -> None:
        """Remove all states: there is nothing left to go on with."""
        if self._folder is not None:
            self._folder.clear()


@contextmanager
def open_states(config: RunConfig) -> Iterator[StateFolder | None]:
    """Yield the states of ``output.dir``, held against other runs; None where none are kept.

    States belong to every setting that decides the result, and to the digests that
    :meth:`RunCheckpoint.open` adds.

    Raises:
        RunError: another run works there, or the newest state is of other settings (named).
    """
    if not config.output.dir or config.output.checkpoint_steps < 0:
        yield None
        return
    settings = {key: value for key, value in config.to_flat().items() if key not in FREE} | FORMER
    if not config.model.name.startswith("package:"):
        settings.pop("model.sha256", None)
    # At its default a setting means what versions without it did: their runs may go on.
    usual = {key: value for key, value in RunConfig().to_flat().items() if key in settings} | FORMER
    with closing(StateFolder(Path(config.output.dir) / FOLDER, settings, usual=usual)) as folder:
        folder.check_settings()
        yield folder


def tensors_of(arrays: ArrayRecord | None) -> dict[str, Tensor]:
    """Return copies of what owners train as tensors, by name."""
    return {n: torch.from_numpy(a.numpy().copy()) for n, a in (arrays or {}).items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under names that begin with ``prefix.``."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of the tensors that :func:`under` named so, by their own names."""
    start = f"{prefix}."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
