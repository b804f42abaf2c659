"""Private inference: an owner's texts, answered by the model owner's top over one stream.

What leaves is what leaves in training: representations after the owner's mechanism, with noise that
depends on the text, so that asking twice shows nothing new; under the same policy, in the same
ledger.  What comes back (logits, or hidden states for the owner's own head) is read here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedsplit.errors import ConfigError, DataError, PrivacyError, check
from fedsplit.models.bundle.head import unpack_head
from fedsplit.owners.data_source import owner_name
from fedsplit.owners.home import OwnerHome
from fedsplit.owners.ledger.chain import Ledger
from fedsplit.owners.ledger.disclosure import Outbox, Trip
from fedsplit.owners.policy.rules import Asked, refuse
from fedsplit.owners.samples import tokenise
from fedsplit.owners.serving.generation import Choose, GeneratingOwner
from fedsplit.owners.serving.offers import Leave, take_leave
from fedsplit.owners.serving.prediction import Readout
from fedsplit.owners.split.owner import SplitOwner, SplitSettings
from fedsplit.owners.split.prepare import OwnerIdentity, ground_of
from fedsplit.owners.split.schedule import evaluation_steps
from fedsplit.owners.split.session import open_stream, run_stream_session
from fedsplit.privacy.labels.table import head_at_owner

MOST_TEXTS = 1 << 20


@dataclass(frozen=True)
class Answered:
    """What a session came to.

    Attributes:
        model: name of the base model that answered.
        mechanism: what protected the representations, in words.
        bytes_up: bytes that left.
        bytes_down: bytes that came.
        tokens: tokens that crossed.
    """

    model: str
    mechanism: str
    bytes_up: int
    bytes_down: int
    tokens: int


def classify(root: Path, texts: Sequence[str]) -> tuple[Tensor, Answered]:
    """Ask which class each text is of.

    Args:
        root: the owner's home.
        texts: at least one.

    Returns:
        Probabilities (texts, classes), and what the session cost.

    Raises:
        DataError: no texts, or one without tokens.
        PolicyError: the owner's rules forbid it; nothing has left.
        SessionError: no model serves this owner, or the session failed.
    """
    if not 1 <= len(texts) <= MOST_TEXTS:
        raise DataError(f"texts={len(texts)}: must be in [1, {MOST_TEXTS}]")
    desk = _Desk(root)
    config = desk.leave.config
    if config.model.task != "sequence-classification":
        raise ConfigError(f"model.task={config.model.task!r}: must be sequence-classification")
    sides: list[Readout] = []

    def prepare(digest: str) -> SplitOwner:
        ground = ground_of(config, desk.identity, digest)
        samples = tokenise(
            ground.tokenizer,
            texts,
            [0] * len(texts),
            max_tokens=config.model.max_tokens,
            classes=config.model.labels,
        )
        head = None
        if head_at_owner(config.labels.protection):
            head = unpack_head(desk.home.bottom_dir(digest))
        side = Readout(samples, config.model.labels, head)
        sides.append(side)
        batches = evaluation_steps(len(samples), config.train.batch_size)
        views = [0] * len(batches)
        return SplitOwner(
            ground.bottom, samples, batches, views, ground.perturber, desk.settings(), side
        )

    _, answered = desk.run(prepare)
    return sides[0].probabilities(), answered


def generate(
    root: Path,
    prompt: str,
    *,
    choose: Choose,
    most: int,
    on_text: Callable[[str], None] = lambda piece: None,
) -> tuple[str, Answered]:
    """Let the model continue ``prompt``, token by token, with a cache on each side.

    Args:
        root: the owner's home.
        prompt: at least one token.
        choose: see :func:`fedsplit.owners.serving.generation.sampler`.
        most: new tokens at most.
        on_text: called with each piece of text as it is known.

    Returns:
        The continuation, and what the session cost.

    Raises:
        As :func:`classify`.
    """
    desk = _Desk(root)
    config = desk.leave.config
    if config.model.task != "causal-lm":
        raise ConfigError(f"model.task={config.model.task!r}: must be causal-lm to generate")
    bound = config.serving.new_tokens
    check(1 <= most <= bound, "new tokens", most, f"in [1, {bound}], as the server allows")
    said: list[int] = []
    shown = [""]
    decoded: list[Callable[[], str]] = []

    def prepare(digest: str) -> SplitOwner:
        ground = ground_of(config, desk.identity, digest)
        mechanism = ground.perturber.mechanism
        if not mechanism.token_by_token:
            raise PrivacyError(f"mechanism {mechanism.name}: must work token by token to generate")
        tokenizer = ground.tokenizer
        ids = tokenizer(prompt, truncation=True, max_length=config.model.max_tokens)["input_ids"]
        if not ids:
            raise DataError("prompt has 0 tokens: must be >= 1")
        stop = {tokenizer.eos_token_id} - {None}

        def text() -> str:
            return str(tokenizer.decode(said, skip_special_tokens=True))

        def on_token(token: int) -> None:
            said.append(token)
            whole = text()
            if not whole.endswith("\ufffd"):  # half a character
                on_text(whole[len(shown[0]) :])
                shown[0] = whole

        decoded.append(text)
        return GeneratingOwner(
            ground.bottom,
            torch.tensor(ids, dtype=torch.int64),
            ground.perturber,
            desk.settings(),
            choose=choose,
            stop=frozenset(stop),
            most=most,
            on_token=on_token,
        )

    _, answered = desk.run(prepare)
    return decoded[0](), answered


class _Desk:
    """One session's identity, rules, ledger and stream."""

    def __init__(self, root: Path) -> None:
        self.home = OwnerHome(root)
        self.leave: Leave = take_leave(root)
        config, node = self.leave.config, self.leave.node_config
        self.name = owner_name(node)
        self.identity = OwnerIdentity(
            self.name, self.home, self.home.secret(config.seed, self.name), node
        )
        self.policy = self.home.policy(node, warn=False)
        offer = self.leave.offer
        refuse(
            self.policy.settings_breaches(
                Asked(
                    config.to_flat(),
                    transport=offer.transport,
                    bottom=offer.bottom,
                    round=1,
                    own_ca=bool(node.get("session-ca")),
                )
            )
        )

    def settings(self) -> SplitSettings:
        """Return the session's settings; ``predict`` learns nothing."""
        session = self.leave.config.session
        return SplitSettings(
            mode="predict",
            joint=False,
            codec=session.codec,
            logits_codec=session.logits_codec,
        )

    def run(self, prepare: Callable[[str], SplitOwner]) -> tuple[SplitOwner, Answered]:
        """Open the stream, stay to the end, and return what it came to."""
        offer, config = self.leave.offer, self.leave.config
        labels = {k: v for k, v in config.to_flat().items() if k.startswith("labels.")}
        trip = Trip(offer.run, 0, "predict", self.name, offer.bottom, labels)
        ledger = Ledger(self.home.root)
        try:
            outbox = Outbox(ledger, self.policy, trip, self.identity.secret)
            link = open_stream(offer, config, self.leave.node_config)
            owner = run_stream_session(link, offer, config, outbox, self.home, prepare)
        finally:
            ledger.close()
        report = owner.perturber.report()
        return owner, Answered(
            config.model.name,
            str(report["guarantee"]),
            link.traffic.bytes_out,
            link.traffic.bytes_in,
            int(report["tokens"]),
        )
