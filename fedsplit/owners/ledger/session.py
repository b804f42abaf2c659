"""What every line of one session's part of the ledger says."""

from __future__ import annotations

from dataclasses import dataclass

from fedsplit.owners.ledger.chain import Entry


@dataclass(frozen=True)
class SessionFacts:
    """What a ledger line says of the session it belongs to.

    Attributes:
        run: Flower's run id.
        owner: public name.
        round: server round.
        mode: ``train``, ``evaluate`` or ``predict``; empty: no session was accepted.
        digest: of the files that the server handed out.
        files: what they are, ``bottom`` or ``emulator``.
        strategy: of the run; empty: no session was accepted.
        classes: digest of the agreed classes, for HELLO; empty without labels.
    """

    run: int
    owner: str
    round: int = 0
    mode: str = ""
    digest: str = ""
    files: str = "bottom"
    strategy: str = ""
    classes: str = ""

    def line(self) -> Entry:
        """Return the facts as a ledger line carries them."""
        found: Entry = {"run": str(self.run), "owner": self.owner}
        if self.mode:
            found |= {"round": self.round, "mode": self.mode, self.files: self.digest}
        return found
