"""Session tokens: single use, short-lived, bound to run, node, round and mode.

``token = nonce . expiry . HMAC-SHA256(run secret, run | node | round | mode | nonce | expiry)``.
The run secret is drawn by the server from the operating system and never leaves it; a token reaches
its node inside a Flower message, so no session exists that no message announced.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
import threading
import time
from collections.abc import Callable

from fedsplit.errors import TokenError

_EXPIRY = re.compile(r"[0-9]{1,15}")
MODES = ("train", "evaluate", "predict")


class TokenBook:
    """Issues tokens and accepts each once.

    Args:
        lifetime_s: seconds between issue and the latest start of the session, at most.
        clock: seconds, for tests.  The book that issues a token also redeems it, so the clock need
            not be the wall's, which may jump.

    Guarantee: a token is accepted at most once, only for the run, node, round and mode it was
    issued for, and only before its expiry.  What breaks it: a leaked run secret, or a reader of
    the Flower message (TLS is what protects that one).
    """

    def __init__(
        self, lifetime_s: float = 3600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._secret = secrets.token_bytes(32)
        self._lifetime = lifetime_s
        self._clock = clock
        self._used: dict[str, int] = {}
        self._lock = threading.Lock()

    def issue(
        self, run: int, node: int, round_: int, mode: str, lifetime_s: float | None = None
    ) -> str:
        """Return a new token for one session.

        Args:
            run: Flower's run id.
            node: Flower's node id.
            round_: server round.
            mode: one of :data:`MODES`.
            lifetime_s: shorter than the book's; None = the book's.
        """
        nonce = secrets.token_hex(16)
        seconds = self._lifetime if lifetime_s is None else min(lifetime_s, self._lifetime)
        expiry = math.ceil(self._clock() + seconds)
        return f"{nonce}.{expiry}.{self._mac(run, node, round_, mode, nonce, expiry)}"

    def redeem(self, token: str, run: int, node: int, round_: int, mode: str) -> None:
        """Accept the token, once.

        Raises:
            TokenError: malformed, foreign, expired or already used; the reason given is the same
                for malformed and foreign tokens.
        """
        parts = token.split(".")
        if len(parts) != 3 or not token.isascii() or not _EXPIRY.fullmatch(parts[1]):
            raise TokenError("session token: must be one issued for this run, node, round and mode")
        nonce, expiry = parts[0], int(parts[1])
        expected = self._mac(run, node, round_, mode, nonce, expiry)
        if not hmac.compare_digest(expected.encode(), parts[2].encode()):
            raise TokenError("session token: must be one issued for this run, node, round and mode")
        now = self._clock()
        if now > expiry:
            raise TokenError(f"session token expired {now - expiry:.0f} s ago")
        with self._lock:
            if nonce in self._used:
                raise TokenError("session token was already used: tokens are single use")
            self._used[nonce] = expiry
            if len(self._used) > 100_000:
                self._used = {n: e for n, e in self._used.items() if e >= now}

    def _mac(self, run: int, node: int, round_: int, mode: str, nonce: str, expiry: int) -> str:
        text = "\x1f".join(("fedsplit-session", str(run), str(node), str(round_), mode, nonce))
        return hmac.new(self._secret, f"{text}\x1f{expiry}".encode(), hashlib.sha256).hexdigest()
