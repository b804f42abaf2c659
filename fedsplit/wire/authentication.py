"""Authentication of sessions: one check for every transport."""

from __future__ import annotations

from dataclasses import dataclass

import fedsplit
from fedsplit.errors import SessionError, TokenError
from fedsplit.wire.frames import PROTOCOL, Frame
from fedsplit.wire.tokens import MODES, TokenBook


@dataclass(frozen=True)
class Hello:
    """Who opened a session, after its token was accepted; ``classes``: digest of its classes."""

    run: int
    node: int
    round: int
    mode: str
    owner: str
    digest: str
    classes: str = ""


class SessionAuthenticator:
    """Issues the session tokens of one run, and admits who shows one.

    Args:
        run: Flower's run id.
        tokens: issues and redeems the run's tokens; None: a new book.
    """

    def __init__(self, run: int, tokens: TokenBook | None = None) -> None:
        self.run = run
        self.tokens = tokens or TokenBook()

    def issue(self, node: int, round_: int, mode: str, lifetime_s: float | None = None) -> str:
        """Return a new token for one session, see :meth:`TokenBook.issue`."""
        return self.tokens.issue(self.run, node, round_, mode, lifetime_s)

    def admit(self, frame: Frame) -> Hello:
        """Redeem a HELLO's token and return who it is.

        Raises:
            TokenError: the token is not acceptable.
            SessionError: another protocol, version or mode, or an owner's name that cannot be
                shown in a log or report.
        """
        if frame["protocol"] != PROTOCOL:
            raise SessionError(f"session protocol {frame['protocol']}: must be {PROTOCOL}")
        if frame["version"].split(".")[:2] != fedsplit.__version__.split(".")[:2]:
            raise SessionError(
                f"owner's fedsplit {frame['version']}: must match {fedsplit.__version__}"
            )
        if frame["mode"] not in MODES:
            raise SessionError(f"session mode {frame['mode']!r}: must be one of {MODES}")
        if not frame["owner"] or not frame["owner"].isprintable():
            raise SessionError(f"owner's name {frame['owner']!r}: must be printable characters")
        if frame["run"] != self.run:
            raise TokenError("session token: must be one issued for this run, node, round and mode")
        node, round_, mode = frame["node"], frame["round"], frame["mode"]
        self.tokens.redeem(frame["token"], self.run, node, round_, mode)
        owner, digest, classes = frame["owner"], frame["digest"], frame["classes"]
        return Hello(self.run, node, round_, mode, owner, digest, classes)
