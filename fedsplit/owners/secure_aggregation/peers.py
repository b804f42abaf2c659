"""Whose identity keys count in a masked sum, as far as this owner can know.

With ``offsite.peers`` in its policy: those in that folder, ``NAME.pub`` each, 64 hexadecimal digits
as ``fedsplit owner identity`` prints them; whoever is not there may take part and does not count.
Without it the key under which a name is first seen is kept in ``HOME/peers.json`` and believed from
then on.  That holds against a server that changes keys later, not against one that lies from the
first round on.  In a simulation keys follow from the run's seed, and all count.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from fedsplit import storage
from fedsplit.errors import ConfigError, PrivacyError
from fedsplit.owners.home import in_simulation
from fedsplit.owners.identity import OwnerIdentity
from fedsplit.owners.policy.rules import Policy
from fedsplit.privacy.secure_aggregation.masks import identity_public
from fedsplit.privacy.secure_aggregation.roster import Advert

RULE = "offsite.peers"
FILE = "peers.json"
_KEY = re.compile(r"[0-9a-f]{64}")
_MOST_BYTES = 1 << 24


def identity_key(identity: OwnerIdentity) -> bytes:
    """Return the private half of an owner's Ed25519 identity key; it follows from its secret."""
    return identity.secret.key("fedsplit.masked-sum.identity")


def identity_of(identity: OwnerIdentity) -> str:
    """Return the public half as other owners write it down."""
    return identity_public(identity_key(identity)).hex()


class Peers:
    """The identity keys that one owner knows.

    Args:
        home: the owner's folder.
        policy: its rules.

    Raises:
        ConfigError: the policy's folder of keys cannot be read, or a file in it is no key.
    """

    def __init__(self, home: Path, policy: Policy) -> None:
        self._file = home / FILE
        folder = policy.rules.get(RULE)
        self._listed = None if folder is None else _listed(Path(str(folder)))
        self._seen: dict[str, str] = {}
        self._new = False
        if self._listed is None and not in_simulation() and self._file.exists():
            self._seen = _read(self._file)

    def counts(self, advert: Advert) -> bool:
        """Return whether an owner's key is one that counts.

        Raises:
            PrivacyError: its name is known with another key.
        """
        if self._listed is None and in_simulation():
            return True
        known = self._seen if self._listed is None else self._listed
        key = advert.identity.hex()
        if self._listed is None and advert.name not in known:
            known[advert.name] = key
            self._new = True
        if advert.name in known and known[advert.name] != key:
            raise PrivacyError(
                f"keys of {advert.name!r}: its identity key is {key[:16]}, "
                f"must be {known[advert.name][:16]}"
            )
        return advert.name in known

    def keep(self) -> None:
        """Write down the keys that were seen for the first time."""
        if self._new:
            with storage.FileLock(self._file.with_suffix(".lock")):
                seen = {**self._seen, **(_read(self._file) if self._file.exists() else {})}
                storage.write(self._file, json.dumps(seen, indent=1), mode=storage.PRIVATE)
            self._new = False


def _listed(folder: Path) -> dict[str, str]:
    try:
        found = {file.stem: file.read_text().strip() for file in sorted(folder.glob("*.pub"))}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{RULE}={folder}: must be readable: {error}") from None
    bad = [name for name, key in found.items() if not _KEY.fullmatch(key)]
    if bad or not found:
        what = f"{bad[0]}.pub is none" if bad else "there is none"
        raise ConfigError(f"{RULE}={folder}: must hold NAME.pub, 64 hexadecimal digits; {what}")
    return found


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(storage.read_bounded(path, _MOST_BYTES))
        good = isinstance(found, dict) and all(_KEY.fullmatch(str(k)) for k in found.values())
    except (OSError, ValueError):
        good = False
    if not good:
        raise ConfigError(f"{path}: must be this owner's record of other owners' keys")
    return {str(name): str(key) for name, key in found.items()}
