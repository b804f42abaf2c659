"""Who an owner is: its public name, its home and its noise secret."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedsplit.config import RunConfig
from fedsplit.owners.home import OwnerHome
from fedsplit.owners.naming import owner_name
from fedsplit.privacy.secret import OwnerSecret


@dataclass(frozen=True)
class OwnerIdentity:
    """Who this owner is, and where its state lives.

    Attributes:
        name: public name.
        home: the owner's folder.
        secret: of its noise.
        node_config: the owner's own settings, from its SuperNode.
    """

    name: str
    home: OwnerHome
    secret: OwnerSecret
    node_config: Mapping[str, object]

    @classmethod
    def from_node(
        cls, config: RunConfig, node_config: Mapping[str, object], home: OwnerHome | None = None
    ) -> OwnerIdentity:
        """Return the identity given by the node config and the machine.

        Args:
            config: the run's settings; their seed gives a simulated owner's secret.
            node_config: the owner's own.
            home: the owner's folder; None: where the node config says.

        Raises:
            ConfigError: no usable name, or a home that cannot be written.
            PrivacyError: a noise secret that others can read, or a damaged one.
        """
        name = owner_name(node_config)
        home = home or OwnerHome.locate(dict(node_config), name)
        return cls(name, home, home.secret(config.seed, name), dict(node_config))
