"""What a Flower message carries when a model begins to serve: an address and single-use tokens."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import ConfigRecord, RecordDict

from fedsplit.errors import SessionError
from fedsplit.wire.messages import SessionOffer
from fedsplit.wire.tokens import MODES

SERVING = "fedsplit.serving"
MODE = "predict"
MAX_TOKENS = 1024
assert MODE in MODES


@dataclass(frozen=True)
class ServingOffer:
    """Permission to open sessions with a serving model.

    Attributes:
        session: address, authority and bottom; its ``token`` is empty.
        tokens: one per session, each good once.
    """

    session: SessionOffer
    tokens: tuple[str, ...]

    def to_content(self) -> RecordDict:
        """Return the content of one message to one node."""
        record = self.session.to_record()
        return RecordDict(
            {"fedsplit.offer": record, SERVING: ConfigRecord({"tokens": list(self.tokens)})}
        )

    @classmethod
    def from_content(cls, content: RecordDict) -> ServingOffer:
        """Parse a message's content.

        Raises:
            SessionError: no such records, or a field is missing, mistyped or too long.
        """
        session = SessionOffer.from_content(content)
        if session.mode != MODE or session.transport != "stream":
            raise SessionError(
                f"serving offer for {session.mode} over {session.transport}: must be for {MODE} "
                "over stream"
            )
        record = content.config_records.get(SERVING)
        tokens = None if record is None else record.get("tokens")
        if not isinstance(tokens, list) or not 1 <= len(tokens) <= MAX_TOKENS:
            raise SessionError(f"serving offer tokens: must be a list of 1 to {MAX_TOKENS}")
        if not all(isinstance(t, str) and 0 < len(t) <= 256 for t in tokens):
            raise SessionError("serving offer tokens: must be texts of at most 256 characters")
        return cls(session, tuple(str(t) for t in tokens))
