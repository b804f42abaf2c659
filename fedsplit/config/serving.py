"""The group ``serving``: a tuned top that answers its owners (``strategy = "serving"``)."""

from __future__ import annotations

from dataclasses import dataclass

from fedsplit.errors import check


@dataclass(frozen=True)
class ServingConfig:
    """How a tuned model answers.

    Attributes:
        weights: the server's file that training left (``top.safetensors`` in its ``output.dir``);
            empty = the base model as it is.
        minutes: how long to serve; 0 = until stopped.
        tokens: sessions an owner may open before it is sent new tokens.
        renew_s: seconds between messages with new tokens.
        sessions: sessions one owner may have open at once.
        max_batch: texts, over all owners, that share a forward.
        max_wait_ms: how long a text waits for others to share a forward with.
        new_tokens: longest answer of a generating model, in tokens.
    """

    weights: str = ""
    minutes: float = 0.0
    tokens: int = 32
    renew_s: float = 900.0
    sessions: int = 4
    max_batch: int = 64
    max_wait_ms: float = 5.0
    new_tokens: int = 256

    def __post_init__(self) -> None:
        check(0 <= self.minutes < 1e6, "serving.minutes", self.minutes, "in [0, 1e6); 0 = no end")
        check(1 <= self.tokens <= 1024, "serving.tokens", self.tokens, "in [1, 1024]")
        # Tokens live an hour: an owner must never hold only expired ones.
        check(1 <= self.renew_s <= 1800, "serving.renew-s", self.renew_s, "in [1, 1800] s")
        check(1 <= self.sessions <= 1024, "serving.sessions", self.sessions, "in [1, 1024]")
        check(1 <= self.max_batch <= 65_536, "serving.max-batch", self.max_batch, "in [1, 65536]")
        check(
            0 <= self.max_wait_ms <= 10_000,
            "serving.max-wait-ms",
            self.max_wait_ms,
            "in [0, 10000] ms",
        )
        check(
            1 <= self.new_tokens <= 65_536, "serving.new-tokens", self.new_tokens, "in [1, 65536]"
        )
