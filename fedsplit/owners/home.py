"""What an owner keeps on its own disk: noise secret, received bottoms, state of open sessions.

::

    HOME/noise.secret               32 bytes, mode 0600; one per owner, for all runs
    HOME/bottoms/<digest>/          bundle files received from a server, verified by digest
    HOME/runs/<run>-<node>/         state that must outlive a Flower message
    HOME/runs/<job>-<owner>/        optimizers, which must outlive a restart of the server
    HOME/owner.toml                 the owner's policy, where nothing else names one
    HOME/ledger.*                   what has left (see :mod:`fedsplit.owners.ledger.chain`)

Every Flower message may start a new process, so nothing that matters is only in memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from fedsplit.errors import ConfigError, PolicyError
from fedsplit.owners.naming import HOME_VARIABLE, POLICY_VARIABLE, SIMULATION_VARIABLE
from fedsplit.owners.policy.rules import POLICY_FILE, Policy
from fedsplit.privacy.secret import OwnerSecret

log = logging.getLogger(__name__)


def in_simulation() -> bool:
    """Whether this process was started by a local experiment.

    Only the machine's own environment can say so: were it the run config, a server could make an
    owner draw its noise from a seed that the server knows.
    """
    return os.environ.get(SIMULATION_VARIABLE) == "1"


class OwnerHome:
    """One owner's folder.

    Args:
        root: the folder; created with mode 0700.

    Raises:
        ConfigError: if it cannot be created or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"owner home {root}: must be a writable folder: {error}") from None

    @classmethod
    def locate(cls, node_config: dict[str, object], owner: str) -> OwnerHome:
        """Return the home: the node config's ``state-dir``, $FEDSPLIT_HOME, or ~/.fedsplit.

        Simulated owners share one machine, so each gets a folder of its own below it.
        """
        given = node_config.get("state-dir") or os.environ.get(HOME_VARIABLE)
        root = Path(str(given)) if given else Path.home() / ".fedsplit"
        return cls(root / owner if in_simulation() else root)

    def secret(self, seed: int, owner: str) -> OwnerSecret:
        """Return the noise secret: from the operating system, or from the seed in a simulation."""
        if in_simulation():
            return OwnerSecret.for_simulation(seed, owner)
        return OwnerSecret.load_or_create(self.root / "noise.secret")

    def policy(self, node_config: Mapping[str, object], *, warn: bool = True) -> Policy:
        """Return the owner's policy: the node config's ``policy``, $FEDSPLIT_POLICY, or owner.toml.

        Without any of them nothing is bounded, which is logged as a warning.

        Args:
            node_config: the owner's own, from its SuperNode.
            warn: whether to say that there is no policy.

        Raises:
            PolicyError: the file named cannot be used; the reason is in the owner's own log alone.
        """
        own = self.root / POLICY_FILE
        given = node_config.get("policy") or os.environ.get(POLICY_VARIABLE)
        if not given and not os.path.lexists(own):
            if warn:
                log.warning(
                    "no policy: nothing bounds what leaves; see fedsplit policy init (%s)", own
                )
            return Policy({})
        try:
            return Policy.load(Path(str(given)) if given else own)
        except ConfigError as error:
            log.error("%s", error)
            raise PolicyError("owner's policy: cannot be used; its own log says why") from None

    def bottom_dir(self, digest: str) -> Path:
        """Return where the bundle with that digest lives (whether or not it is there yet)."""
        if not digest.isalnum():
            raise ConfigError(f"bottom digest {digest[:80]!r}: must be hexadecimal")
        return self.root / "bottoms" / digest

    def job_dir(self, job: str, owner: str) -> Path:
        """Return the folder for what the owner trains, which outlives a restart of the server.

        Args:
            job: the run's name across its restarts, hexadecimal.
            owner: the owner's public name.

        Raises:
            ConfigError: the name could not be a folder's.
        """
        if not job.isalnum() or not job.isascii():
            raise ConfigError(f"job {job[:80]!r}: must be hexadecimal")
        path = self.root / "runs" / f"{job}-{owner}"
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        return path

    def run_dir(self, run: int, node: int) -> Path:
        """Return the folder for state of this run that outlives a message."""
        path = self.root / "runs" / f"{run}-{node}"
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        return path
