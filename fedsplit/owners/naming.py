"""An owner's public name and the variables of its machine; imports nothing heavy.

Apart because what supervises an owner's processes needs these, and must not hold torch in memory.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedsplit.errors import ConfigError

HOME_VARIABLE = "FEDSPLIT_HOME"
POLICY_VARIABLE = "FEDSPLIT_POLICY"
SIMULATION_VARIABLE = "FEDSPLIT_SIMULATION"
SHARED_VARIABLE = "FEDSPLIT_SIMULATION_SHARED"


def owner_name(node_config: Mapping[str, object]) -> str:
    """Return the owner's public name: ``owner`` in its node config, else its partition.

    Raises:
        ConfigError: if there is neither, or the name is not plain.
    """
    name = node_config.get("owner")
    if name is None and "partition-id" in node_config:
        name = f"owner-{node_config['partition-id']}"
    if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"node config owner={name!r}: must be letters, digits, '-' and '_'")
    if len(name) > 64:
        raise ConfigError(f"node config owner={name!r}: must be at most 64 characters")
    return name
