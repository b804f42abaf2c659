"""What leaves an owner, described by the step that makes it.

Every act that tells the server something is one :class:`Disclosure`: representations, gradients,
averages, weights, words, or a bare frame of the protocol.  It states what it shows and of which
texts; the check (:mod:`fedsplit.owners.ledger.check`) judges and records it by its type alone,
whatever strategy or message it belongs to.
"""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.owners.measuring import Figures, OwnTexts
from fedsplit.privacy.dp.accounting import NoisySteps
from fedsplit.privacy.perturb import SamplePerturber
from fedsplit.wire.codecs import encode_rows
from fedsplit.wire.frames import Kind


@dataclass(frozen=True, eq=False)
class Source:
    """How an owner's texts become representations: bottom, mechanism, contributing tokens.

    Attributes:
        bottom: (input_ids (B, T), attention_mask (B, T)) -> (B, T, d).
        perturber: the privacy mechanism with the owner's secret.
        longest: tokens of the longest text.
        tokens: tokens of all texts of the split.
        moves: whether the bottom learns.
        own: what the owner measures its own protection on; None: it cannot.
    """

    bottom: nn.Module
    perturber: SamplePerturber
    longest: int
    tokens: int
    moves: bool = False
    own: OwnTexts | None = None


@dataclass(frozen=True, kw_only=True)
class Disclosure:
    """One act that tells the server something.

    Attributes:
        kind: the ledger's name of it.
    """

    kind: str

    @property
    def tensor(self) -> Tensor | None:
        """The tensor that leaves in a frame's body, if there is one."""
        return None

    def line(self) -> dict[str, Any]:
        """Return what the ledger says of it beside kind, size and digest."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Notice(Disclosure):
    """A frame of the protocol that tells nothing of texts: ``hello``, ``need``, ``done``."""


@dataclass(frozen=True, kw_only=True)
class Measured(Disclosure):
    """Figures of the owner's measurement of itself; nothing leaves.

    Attributes:
        key: names what they are of.
        figures: what the attackers read.
    """

    kind: str = "measured"
    key: str
    figures: Figures

    def line(self) -> dict[str, Any]:
        """Return the figures, under their key."""
        return {"key": self.key, "measured": self.figures.to_json()}


@dataclass(frozen=True, kw_only=True)
class Announcement(Disclosure):
    """How much will leave, and of which source.

    Attributes:
        batches: number of batches at most.
        source: of the representations that will follow.
        training: of the owner's own weights in this session; None: it trains nothing.
    """

    kind: str = "ready"
    batches: int
    source: Source
    training: Training | None = None

    def line(self) -> dict[str, Any]:
        """Return the number of batches, and what is trained."""
        found: dict[str, Any] = {"batches": self.batches}
        return found if self.training is None else found | self.training.line()


@dataclass(frozen=True, kw_only=True)
class Representations(Disclosure):
    """The samples of one step, and the representations of those that the server does not hold.

    Attributes:
        used: number of samples in the step.
        epochs: part of a pass over the session's split that the step is; None where the owner
            itself brought the texts.
        texts: identities of the texts that ``rows`` show (see ``Samples.texts``).
        noises: name of the noise on each of them (see :class:`fedsplit.privacy.perturb.View`).
        rows: (N, d) after the mechanism, the tokens of all ``texts`` stacked; None: no text.
        touched: tokens with reduced noise.
        source: what made ``rows``.
    """

    kind: str = "representations"
    used: int
    epochs: float | None
    texts: tuple[bytes, ...]
    noises: tuple[bytes, ...]
    rows: Tensor | None
    touched: int
    source: Source

    @property
    def tensor(self) -> Tensor | None:
        """The privatised representations."""
        return self.rows

    @property
    def tokens(self) -> int:
        """Tokens whose representations leave."""
        return 0 if self.rows is None else int(self.rows.shape[0])

    def line(self) -> dict[str, Any]:
        """Return shape, mechanism and source, or the number of samples used."""
        found: dict[str, Any] = {} if self.epochs is None else {"epochs": self.epochs}
        if self.rows is None:
            return found | {"kind": "slots", "shape": [self.used]}
        perturber = self.source.perturber
        return found | {
            "shape": list(self.rows.shape),
            "mechanism": perturber.mechanism.describe(),
            "rho": perturber.rho,
            "representation": perturber.representation_id,
            "tokens": self.tokens,
            "touched": self.touched,
        }


@dataclass(frozen=True, kw_only=True)
class Gradients(Disclosure):
    """Gradients of a step's mean loss by what the server sent.

    Attributes:
        kind: ``logit-gradients``, or ``hidden-gradients`` with the head at the owner.
        values: (rows, C) or (rows, d), after the gradient protection.
        texts: identities of the step's texts.
        protection: the label protection in force, by its settings.
    """

    values: Tensor
    texts: tuple[bytes, ...]
    protection: Mapping[str, Any]

    @property
    def tensor(self) -> Tensor | None:
        """The gradients."""
        return self.values

    def line(self) -> dict[str, Any]:
        """Return shape and protection."""
        return {"shape": list(self.values.shape), "protection": dict(self.protection)}


@dataclass(frozen=True, kw_only=True)
class Reply(Disclosure, abc.ABC):
    """What leaves outside a session, in the reply to a Flower message."""

    @abc.abstractmethod
    def measure(self) -> tuple[int, str]:
        """Return (bytes, SHA-256) of what leaves."""


@dataclass(frozen=True, kw_only=True)
class Averages(Reply):
    """Averages and counts of a session.

    Attributes:
        metrics: by name.
        texts: number of texts (or blocks) that they are over.
        epsilon: of their noise, nats per text; None: they are exact.
    """

    kind: str = "metrics"
    metrics: Mapping[str, float | int]
    texts: int
    epsilon: float | None = None

    def measure(self) -> tuple[int, str]:
        """Return size and digest of the numbers as JSON."""
        text = json_bytes(self.metrics)
        return len(text), hashlib.sha256(text).hexdigest()

    def line(self) -> dict[str, Any]:
        """Return how many numbers there are, over how many texts and with what noise."""
        found: dict[str, Any] = {"shape": [len(self.metrics)], "texts": self.texts}
        return found if self.epsilon is None else found | {"epsilon": self.epsilon}


@dataclass(frozen=True, kw_only=True)
class Training(Reply):
    """A session's steps on the owner's own adapters, head or joint bottom.

    Attributes:
        steps: number of them.
        batch: fewest samples (texts, or blocks of text) of a step.
        samples: number of the owner's.
        epochs: passes over the samples; None where the steps' representations count them.
        noise: of DP-SGD; None: updates are exact.
    """

    kind: str = "training"
    steps: int
    batch: int
    samples: int
    epochs: float | None = None
    noise: NoisySteps | None = None

    def measure(self) -> tuple[int, str]:
        """Return that nothing leaves yet."""
        return 0, hashlib.sha256(b"").hexdigest()

    def line(self) -> dict[str, Any]:
        """Return the steps and their noise."""
        told: dict[str, Any] = {"steps": self.steps, "batch": self.batch, "samples": self.samples}
        if self.noise is not None:
            told["noise"] = self.noise.to_json()
        found: dict[str, Any] = {"training": told}
        return found if self.epochs is None else found | {"epochs": self.epochs}


@dataclass(frozen=True, kw_only=True)
class Weights(Reply):
    """Weights that the owner trained: of its bottom, head or adapters.

    Attributes:
        tensors: by name; they leave as float32.
    """

    kind: str = "weights"
    tensors: Mapping[str, Tensor]

    def measure(self) -> tuple[int, str]:
        """Return size and digest over names and values, in the order of the names."""
        whole = hashlib.sha256()
        for name in sorted(self.tensors):
            whole.update(name.encode())
            values = self.tensors[name].detach().cpu().float().reshape(-1)
            whole.update(values.view(torch.uint8).numpy().data)
        return 4 * self._count(), whole.hexdigest()

    def line(self) -> dict[str, Any]:
        """Return how many numbers there are."""
        return {"shape": [self._count()]}

    def _count(self) -> int:
        return sum(values.numel() for values in self.tensors.values())


@dataclass(frozen=True, kw_only=True)
class MaskedWeights(Reply):
    """Weights that the owner trained, as numbers under masks of a sum.

    Attributes:
        numbers: bytes of the masked numbers as they leave.
        owners: that the sum may be of.
        fewest: owners that it is of at least.
    """

    kind: str = "masked-weights"
    numbers: bytes
    owners: int
    fewest: int

    def measure(self) -> tuple[int, str]:
        """Return size and digest of the numbers."""
        return len(self.numbers), hashlib.sha256(self.numbers).hexdigest()

    def line(self) -> dict[str, Any]:
        """Return how many owners the sum is of."""
        return {"owners": self.owners, "fewest": self.fewest}


@dataclass(frozen=True, kw_only=True)
class SumMessage(Reply):
    """Keys, sealed shares, a signature or shares in the clear of a masked sum: no data of texts.

    Attributes:
        phase: of the sum.
        content: as it leaves.
    """

    kind: str = "secure-sum"
    phase: str
    content: bytes

    def measure(self) -> tuple[int, str]:
        """Return size and digest of the content."""
        return len(self.content), hashlib.sha256(self.content).hexdigest()

    def line(self) -> dict[str, Any]:
        """Return the phase."""
        return {"phase": self.phase}


@dataclass(frozen=True, kw_only=True)
class Words(Reply):
    """The owner's ``name``, or the ``error`` for which it gives up; no budget keeps them back.

    Attributes:
        text: as it is told.
    """

    text: str

    def measure(self) -> tuple[int, str]:
        """Return size and digest of the text as UTF-8."""
        data = self.text.encode("utf-8", "replace")
        return len(data), hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Outgoing:
    """One frame that is about to leave, with the description of what it shows.

    Attributes:
        kind: of the frame.
        header: as ``fedsplit.wire.frames.SCHEMA`` lists it; its ``codec`` is the body's.
        disclosure: what it shows; its tensor becomes the body.
    """

    kind: Kind
    header: Mapping[str, Any]
    disclosure: Disclosure

    def encode(self) -> bytes:
        """Return the frame's body.

        Raises:
            FrameError: a value is NaN or infinite: it must not leave.
        """
        tensor = self.disclosure.tensor
        return b"" if tensor is None else encode_rows(tensor, str(self.header["codec"]))


def notice(kind: Kind, header: Mapping[str, Any]) -> Outgoing:
    """Return a frame of the protocol that tells nothing of the owner's data."""
    return Outgoing(kind, header, Notice(kind=kind.name.lower()))


def json_bytes(value: Any) -> bytes:
    """Return JSON as frames carry it."""
    return json.dumps(value, separators=(",", ":"), default=str).encode()
