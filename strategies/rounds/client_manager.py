"""Connected nodes, their owners' names, and the sampling of a round: one for all strategies."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedsplit.config import RunConfig
from fedsplit.errors import RunError, SessionError
from fedsplit.seeding import derive_seed
from fedsplit.wire.messages import WHO, WHO_TYPE

from ..sessions.owner_keys import OwnerNames
from .lineage_watch import LineageWatch
from .report import natural

log = logging.getLogger(__name__)

PATIENCE_S = 600.0


@dataclass(frozen=True)
class Bench:
    """An owner that is not asked for a while.

    Attributes:
        reason: what it did.
        since: the round that it failed in last.
        until: the last round that it sits out.
    """

    reason: str
    since: int
    until: int


class ClientManager:
    """The nodes of one run by their owners' names.

    Node ids are random in every run; names are not, so the same seed samples the same owners.

    Args:
        config: the run's settings.
        watch: knows who is quarantined.

    Attributes:
        owners: whose names are.
    """

    def __init__(self, config: RunConfig, watch: LineageWatch) -> None:
        self.benched: dict[str, Bench] = {}
        self.owners = OwnerNames()
        self._failures: dict[str, int] = {}  # rounds in a row
        self._charges: dict[str, tuple[int, int]] = {}  # rounds with one, rounds without since then
        self._awaited: set[str] = set()
        self._config = config
        self._watch = watch

    def sample(self, grid: Grid, number: int) -> list[int]:
        """Return the nodes of round ``number``, in the order of their owners' names if sampled.

        Raises:
            RunError: too few owners connected, or all of them quarantined.
        """
        train = self._config.train
        nodes = self._wait(grid)
        if train.fraction >= 1.0:
            return self._eligible(nodes, number)
        self.ask_names(grid, nodes)
        known = sorted((n for n in nodes if n in self.names), key=lambda n: natural(self.names[n]))
        count = max(train.min_owners, round(train.fraction * len(known)))
        generator = random.Random(derive_seed(self._config.seed, "sample", number))
        chosen = generator.sample(known, min(count, len(known)))
        return self._eligible(sorted(chosen, key=known.index), number)

    @property
    def names(self) -> dict[int, str]:
        """Node -> its owner's name, as far as it was told and claimed."""
        return self.owners.names

    @names.setter
    def names(self, names: dict[int, str]) -> None:
        self.owners.names = names

    def claim(self, node: int, name: str) -> None:
        """Give a node the name that it says its owner has, see :meth:`OwnerNames.claim`."""
        self.owners.claim(node, name)

    def record_outcomes(
        self,
        number: int,
        finished: Iterable[str],
        lost: Mapping[str, str],
        charged: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Count who failed in a round of training, and bench who keeps failing.

        What is held against an owner is remembered for ``train.bench-after`` rounds that it takes
        part in without more: who lies every second round is benched as well.

        Args:
            number: the round.
            finished: names of the owners whose work counted.
            lost: owner, or ``node N`` where it has told no name -> reason.
            charged: owner -> what is held against it; as a loss, and remembered.
        """
        after = self._config.train.bench_after
        for name in finished:
            self._failures.pop(name, None)
            times, fine = self._charges.pop(name, (0, 0))
            if times and fine + 1 < after:
                self._charges[name] = times, fine + 1
        for name, reason in {**charged, **lost}.items():
            failures = self._failures[name] = self._failures.get(name, 0) + 1
            told = f"failed in {failures} rounds in a row, last in {number}: {reason[:500]}"
            if name in charged:
                times = self._charges.get(name, (0, 0))[0] + 1
                self._charges[name] = times, 0
                if times > failures:
                    told = f"charged in {times} rounds, last in {number}: {reason[:500]}"
                failures = max(failures, times)
            if after and failures >= after:
                until = number + self._config.train.bench_rounds
                self.benched[name] = Bench(told, number, until)
                log.warning(
                    "owner %s is not asked again before round %d: %s", name, until + 1, told
                )

    def benched_in(self, number: int) -> dict[str, str]:
        """Return who is benched in a round -> why."""
        return {
            name: f"{bench.reason}; until round {bench.until}"
            for name, bench in self.benched.items()
            if bench.since < number <= bench.until
        }

    def state(self) -> dict[str, Any]:
        """Return what a restarted run must know, JSON-able."""
        benched = {name: asdict(bench) for name, bench in self.benched.items()}
        keys = dict(self.owners.keys.bound)
        charges = {name: list(row) for name, row in self._charges.items()}
        failures = dict(self._failures)
        return {"failures": failures, "charges": charges, "benched": benched, "keys": keys}

    def restore(self, state: Mapping[str, Any], awaited: Iterable[str]) -> None:
        """Go on from :meth:`state`.

        Args:
            state: as the interrupted run saved it.
            awaited: names of owners that the first round waits for, at most
                ``session.wave-wait-s``: after a restart they come back one by one.
        """
        self._failures.update(state.get("failures", {}))
        charges = state.get("charges", {})
        self._charges.update({n: (int(times), int(fine)) for n, (times, fine) in charges.items()})
        self.owners.keys.restore(state.get("keys", {}).items())
        found = state.get("benched", {})
        self.benched.update({name: Bench(**row) for name, row in found.items()})
        self._awaited = set(awaited)

    def ask_names(self, grid: Grid, nodes: list[int]) -> None:
        """Ask nodes whose names are unknown for them; a node that does not answer stays unknown."""
        self.owners.take_known(grid)
        unknown = [n for n in nodes if n not in self.names]
        if not unknown:
            return
        asked = [Message(RecordDict(), dst_node_id=n, message_type=WHO_TYPE) for n in unknown]
        for reply in grid.send_and_receive(asked, timeout=self._config.session.deadline_s):
            if reply.has_error():
                continue
            who = reply.content.config_records.get(WHO)
            name = None if who is None else who.get("owner")
            node = reply.metadata.src_node_id
            try:
                if isinstance(name, str) and len(name) <= 200 and name.isprintable():
                    self.claim(node, name)
            except SessionError as error:
                log.warning("node %d: %s", node, error)

    def _wait(self, grid: Grid) -> list[int]:
        need = self._config.train.min_owners
        waited = 0.0
        while len(nodes := self.owners.connected(grid)) < need:
            if waited >= PATIENCE_S:
                raise RunError(
                    f"connected owners={len(nodes)}: must be >= {need} (train.min-owners)"
                )
            log.info("waiting for owners: %d of %d connected", len(nodes), need)
            time.sleep(1.0)
            waited += 1.0
        return self._wait_for_returning(grid, nodes)

    def _wait_for_returning(self, grid: Grid, nodes: list[int]) -> list[int]:
        """Give the owners of an interrupted round time to come back."""
        until = time.monotonic() + self._config.session.wave_wait_s
        while self._awaited:
            self.ask_names(grid, nodes)
            missing = self._awaited - {self.names.get(n, "") for n in nodes}
            if not missing or time.monotonic() > until:
                if missing:
                    log.warning("going on without %s", ", ".join(sorted(missing)))
                self._awaited = set()
                break
            log.info("waiting for owners to come back: %s", ", ".join(sorted(missing)))
            time.sleep(1.0)
            nodes = self.owners.connected(grid)
        return nodes

    def _eligible(self, nodes: list[int], number: int) -> list[int]:
        """Leave out the nodes of quarantined owners, and of benched ones if enough remain."""
        left = [n for n in nodes if not self._watch.is_quarantined(n, self.names.get(n))]
        if not left:
            reasons = "; ".join(f"{o}: {why}" for o, why in self._watch.quarantined.items())
            raise RunError(f"owners left=0: must be >= 1; quarantined: {reasons[:2000]}")
        benched = self.benched_in(number)
        asked = [n for n in left if not {self.names.get(n, ""), f"node {n}"} & benched.keys()]
        if len(asked) < self._config.train.min_owners:
            log.warning("too few owners without the benched ones: they are asked all the same")
            return left
        return asked
