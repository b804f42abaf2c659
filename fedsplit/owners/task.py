"""What an owner has agreed to do: a server's offer that the owner's own rules allow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedsplit.config import RunConfig
from fedsplit.data import names_digest
from fedsplit.owners.app_digest import digest_of_app, running_app
from fedsplit.owners.class_names import agreed_classes
from fedsplit.owners.handshake import open_stream
from fedsplit.owners.identity import OwnerIdentity
from fedsplit.owners.ledger.chain import Ledger
from fedsplit.owners.ledger.check import DisclosureCheck
from fedsplit.owners.ledger.session import SessionFacts
from fedsplit.owners.policy.rules import Asked, Policy, refuse
from fedsplit.privacy.empirical import Measure
from fedsplit.wire.link import Link
from fedsplit.wire.messages import SessionOffer


@dataclass(frozen=True)
class OwnerTask:
    """One accepted offer.

    Attributes:
        config: the run's settings.
        offer: what the server asked for.
        identity: the owner.
        check: the one way out.
    """

    config: RunConfig
    offer: SessionOffer
    identity: OwnerIdentity
    check: DisclosureCheck

    @classmethod
    def accept(
        cls,
        config: RunConfig,
        offer: SessionOffer,
        identity: OwnerIdentity,
        ledger: Ledger,
        *,
        files: str = "bottom",
        in_app: bool = False,
        warn: bool = False,
        measure: Measure | None = None,
    ) -> OwnerTask:
        """Return the task, once the owner's policy allows its settings and its offer.

        Args:
            config: the run's settings.
            offer: the server's.
            identity: the owner.
            ledger: the owner's.
            files: what the server hands out, ``bottom`` or ``emulator``.
            in_app: whether the code of a server's app runs in this process.
            warn: whether to log that there is no policy.
            measure: the owner's attackers on itself, see :mod:`fedsplit.owners.measuring`.

        Raises:
            PolicyError: names every broken rule; nothing has left.
            ConfigError: the run's classes are not those of the owner's node config.
        """
        node_config = identity.node_config
        policy = identity.home.policy(node_config, warn=warn)
        asked = Asked(
            config.to_flat(),
            transport=offer.transport,
            bottom=offer.digest,
            round=max(1, offer.round),
            own_ca=bool(node_config.get("session-ca")),
            app_digest=_app_digest(policy) if in_app else None,
        )
        refuse(policy.settings_breaches(asked))
        facts = SessionFacts(
            offer.run,
            identity.name,
            offer.round,
            offer.mode,
            offer.digest,
            files,
            config.strategy,
            names_digest(names) if (names := agreed_classes(config, node_config)) else "",
        )
        check = DisclosureCheck(ledger, facts, policy, identity.secret, measure)
        return cls(config, offer, identity, check)

    def connect(self) -> Link:
        """Connect to the announced session server.

        Raises:
            ConfigError, SessionError: see :func:`~fedsplit.owners.handshake.open_stream`.
        """
        return open_stream(self.offer, self.config, self.identity.node_config)

    @property
    def run_folder(self) -> Path:
        """The run's folder on the owner's disk."""
        return self.identity.home.run_dir(self.offer.run, self.offer.node)

    @property
    def job_folder(self) -> Path:
        """The folder of what outlives a restart of the server, which comes with a new run id."""
        if not self.offer.job:
            return self.run_folder
        return self.identity.home.job_dir(self.offer.job, self.identity.name)

    @property
    def bottom_folder(self) -> Path:
        """Where the offered bottom's bundle lives, whether or not it is there yet."""
        return self.identity.home.bottom_dir(self.offer.digest)


def _app_digest(policy: Policy) -> str:
    """Return the digest of the app that runs here, if a rule asks for it; empty: none is seen."""
    app = running_app() if "app.digest" in policy else None
    return "" if app is None else digest_of_app(app)
