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

import contextlib
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from fedsplit.errors import ConfigError, PolicyError, check
from fedsplit.owners.naming import (
    HOME_VARIABLE,
    POLICY_VARIABLE,
    SHARED_VARIABLE,
    SIMULATION_VARIABLE,
)
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
        return self.received("bottoms") / digest

    def received(self, kind: str) -> Path:
        """Return the folder of what a server handed out, ``bottoms`` or ``emulators``, by digest.

        Simulated owners of one machine may share it (``$FEDSPLIT_SIMULATION_SHARED``): what is in
        it is named by its content, the same for all of them, and has been public from the start.
        """
        shared = os.environ.get(SHARED_VARIABLE) if in_simulation() else None
        return Path(shared) / kind if shared else self.root / kind

    def evict(self, kind: str, keep: str, node_config: Mapping[str, object]) -> None:
        """Remove the received folders that were used longest ago, beyond the node config's bounds.

        Args:
            kind: ``bottoms`` or ``emulators``.
            keep: digest of the one in use, which is never removed; it counts as used now.
            node_config: ``cache-count`` (8 folders of a kind) and ``cache-mib`` (4096).

        Raises:
            ConfigError: a bound out of range.
        """
        bounds = []
        for key, default in (("cache-count", 8), ("cache-mib", 4096)):
            value = node_config.get(key, default)
            whole = isinstance(value, int) and not isinstance(value, bool)
            check(whole and value >= 1, f"node config {key}", value, "an integer >= 1")  # type: ignore[operator]
            bounds.append(int(value))  # type: ignore[call-overload]
        folder = self.received(kind)
        if folder != self.root / kind:  # the others' too
            return
        with contextlib.suppress(OSError):
            os.utime(folder / keep)
        used: list[tuple[float, Path]] = []
        for path in folder.glob("*"):
            with contextlib.suppress(OSError):  # another process was faster
                if path.is_dir() and path.name.isalnum():
                    used.append((float("inf") if path.name == keep else path.stat().st_mtime, path))
        size = 0
        for count, (_, path) in enumerate(sorted(used, reverse=True), 1):
            size += _size(path)
            if path.name != keep and (count > bounds[0] or size > bounds[1] << 20):
                log.info("removed %s, used longest ago (cache-count, cache-mib)", path)
                shutil.rmtree(path, ignore_errors=True)

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


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total
