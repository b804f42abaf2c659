"""An owner's part in masked sums, over the processes that answer its messages.

State is on the owner's disk before an answer leaves, so that nothing is answered twice: the same
masks on two vectors, or both kinds of one owner's shares, would undo the sum.  Everything that
leaves passes the disclosure check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedsplit import storage
from fedsplit.errors import ConfigError, PrivacyError, SessionError
from fedsplit.owners.ledger.disclosure import MaskedWeights, SumMessage
from fedsplit.owners.secure_aggregation.peers import Peers, identity_key
from fedsplit.owners.task import OwnerTask
from fedsplit.privacy.secure_aggregation.numbers import Numbers, occasion_of, quantiser_of
from fedsplit.privacy.secure_aggregation.owner import KEY, OWN, OwnerSide
from fedsplit.privacy.secure_aggregation.roster import Advert, Roster
from fedsplit.wire import secure_sum as wire

FILE = "masked-sum.json"
RULE = "offsite.require_secure_aggregation"
_MOST_BYTES = 1 << 28
Values = wire.Values


class SumPart:
    """One owner's part in the masked sum of an accepted offer's round.

    Args:
        task: the accepted offer.

    Raises:
        ConfigError: the run's settings ask for no masked sum.
    """

    def __init__(self, task: OwnerTask) -> None:
        if not task.config.secure.aggregation:
            raise ConfigError("secure.aggregation=False: must be true for a masked sum")
        self._task = task
        self._path: Path = task.run_folder / FILE
        self._identity = identity_key(task.identity)
        self._occasion = occasion_of(task.config, task.offer.run, task.offer.round)

    def answer(self, values: Values) -> Values:
        """Return the answer to one message, once it may leave.

        Args:
            values: of the message's record, see :mod:`fedsplit.wire.secure_sum`.

        Raises:
            PrivacyError: the message would undo the sum's protection.
            PolicyError, LedgerError: the answer may not leave.
            SessionError: the message is malformed.
        """
        phases: dict[str, Callable[[Values], Values]] = {
            wire.KEYS: self._begin,
            wire.SHARES: self._share,
            wire.CONFIRM: self._confirm,
            wire.REVEAL: self._reveal,
        }
        phase = str(values["phase"])
        if phase not in phases:
            raise SessionError(f"message of a masked sum: phase {phase!r} has no answer of its own")
        found = phases[phase](values)
        content = b"".join(found[key] for key in sorted(found))
        self._task.check.release(SumMessage(phase=phase, content=content))
        return found

    def mask(
        self,
        values: Values,
        weights: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        metrics: Mapping[str, float],
    ) -> np.ndarray[Any, Any]:
        """Return this owner's numbers under masks, once they may leave.

        Args:
            values: of the message's record: the neighbours' sealed shares.
            weights: that were trained.
            start: what the round began with, of the same names.
            metrics: the owner's, as they may leave.

        Raises:
            PrivacyError, PolicyError, LedgerError, SessionError: as :meth:`answer`.
        """
        config = self._task.config
        if weights.keys() != start.keys():
            raise SessionError("a masked sum needs the weights that the round begins with")
        changes = {n: w.float().numpy() - start[n].float().numpy() for n, w in weights.items()}
        side = self._load()
        try:
            side.accept(wire.table_of(values, wire.SEALED_BYTES))
            owners = side.owners
            numbers = Numbers({name: tuple(c.shape) for name, c in changes.items()})
            quantiser = quantiser_of(config, owners)
            masked = side.mask(numbers.encode(quantiser, changes, metrics, config.secure.norm))
        finally:
            self._save(side)
        self._task.check.release(
            MaskedWeights(numbers=masked.tobytes(), owners=owners, fewest=side.fewest)
        )
        return masked

    # ---- phases -----------------------------------------------------------------------------

    def _begin(self, values: Values) -> Values:
        if self._path.exists():
            last = self._read().occasion
            if last.run == self._occasion.run and last.round >= self._occasion.round:
                raise PrivacyError(
                    f"masked sum of round {self._occasion.round}: this owner is at round "
                    f"{last.round} already; each message is answered once"
                )
        fewest = int(self._task.check.policy.rules.get(RULE, self._task.config.secure.min_owners))
        side = OwnerSide(self._occasion, self._task.identity.name, self._identity, fewest)
        advert = side.begin()
        self._save(side)
        return {"advert": advert.to_bytes()}

    def _share(self, values: Values) -> Values:
        secure = self._task.config.secure
        side = self._load()
        digests = tuple(wire.rows_of(values, "roster", wire.DIGEST_BYTES))
        roster = Roster(self._occasion, digests, secure.neighbours, secure.threshold)
        quantiser_of(self._task.config, len(digests))
        told = values.get("adverts")
        if not isinstance(told, list) or not all(isinstance(x, bytes) for x in told):
            raise SessionError("message of a masked sum: adverts must be a list of bytes")
        peers = Peers(self._task.identity.home.root, self._task.check.policy)
        shared = side.share(roster, [Advert.from_bytes(x) for x in told], peers.counts)
        peers.keep()
        self._save(side)
        return {**wire.pack_table(shared.sealed), "commitment": shared.commitment}

    def _confirm(self, values: Values) -> Values:
        side = self._load()
        signature = side.confirm(wire.places_of(values, "survivors"))
        self._save(side)
        return {"signature": signature}

    def _reveal(self, values: Values) -> Values:
        side = self._load()
        try:
            reveals = side.reveal(wire.table_of(values, wire.SIGNATURE_BYTES))
        finally:
            self._save(side)
        tables = {
            kind: {at: share for at, (found, share) in reveals.items() if found == kind}
            for kind in (OWN, KEY)
        }
        return {**wire.pack_table(tables[OWN], OWN), **wire.pack_table(tables[KEY], KEY)}

    # ---- over processes ---------------------------------------------------------------------

    def _read(self) -> OwnerSide:
        try:
            text = storage.read_bounded(self._path, _MOST_BYTES)
        except OSError as error:
            raise PrivacyError(f"masked sum: no state of it is kept here: {error}") from None
        return OwnerSide.from_json(text, self._identity)

    def _load(self) -> OwnerSide:
        """Return the state kept of this very round."""
        side = self._read()
        if side.occasion != self._occasion:
            raise PrivacyError(
                f"masked sum of round {self._occasion.round}: this owner began that of round "
                f"{side.occasion.round}, or one of other settings"
            )
        return side

    def _save(self, side: OwnerSide) -> None:
        storage.write(self._path, side.to_json(), mode=storage.PRIVATE)
