"""Who is connected, under which names, and who is sampled: the same for every strategy."""

from __future__ import annotations

import logging
import random
import time

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedsplit.config import RunConfig
from fedsplit.errors import RunError
from fedsplit.seeding import derive_seed
from fedsplit.wire.messages import WHO, WHO_TYPE
from strategies.lineage_watch import LineageWatch
from strategies.round import natural

log = logging.getLogger(__name__)

PATIENCE_S = 600.0


class Roll:
    """The nodes of one run by their owners' names.

    Node ids are random in every run; names are not, so the same seed samples the same owners.

    Args:
        config: the run's settings.
        watch: knows who is quarantined.
    """

    def __init__(self, config: RunConfig, watch: LineageWatch) -> None:
        self.names: dict[int, str] = {}
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
            return self._left(nodes)
        self.learn(grid, nodes)
        known = sorted((n for n in nodes if n in self.names), key=lambda n: natural(self.names[n]))
        count = max(train.min_owners, round(train.fraction * len(known)))
        generator = random.Random(derive_seed(self._config.seed, "sample", number))
        chosen = generator.sample(known, min(count, len(known)))
        return self._left(sorted(chosen, key=known.index))

    def learn(self, grid: Grid, nodes: list[int]) -> None:
        """Ask those nodes for their names that have not told them; who does not answer has none."""
        unknown = [n for n in nodes if n not in self.names]
        if not unknown:
            return
        asked = [Message(RecordDict(), dst_node_id=n, message_type=WHO_TYPE) for n in unknown]
        for reply in grid.send_and_receive(asked, timeout=self._config.session.deadline_s):
            if reply.has_error():
                continue
            who = reply.content.config_records.get(WHO)
            name = None if who is None else who.get("owner")
            if isinstance(name, str) and name not in {self.names.get(n) for n in nodes}:
                self.names[reply.metadata.src_node_id] = name

    def _wait(self, grid: Grid) -> list[int]:
        need = self._config.train.min_owners
        waited = 0.0
        while len(nodes := sorted(grid.get_node_ids())) < need:
            if waited >= PATIENCE_S:
                raise RunError(
                    f"connected owners={len(nodes)}: must be >= {need} (train.min-owners)"
                )
            log.info("waiting for owners: %d of %d connected", len(nodes), need)
            time.sleep(1.0)
            waited += 1.0
        return nodes

    def _left(self, nodes: list[int]) -> list[int]:
        """Leave out the nodes of quarantined owners."""
        left = [n for n in nodes if not self._watch.barred(n, self.names.get(n))]
        if not left:
            reasons = "; ".join(f"{o}: {why}" for o, why in self._watch.quarantined.items())
            raise RunError(f"owners left=0: must be >= 1; quarantined: {reasons[:2000]}")
        return left
