"""Gaussian noise that spares the directions a task needs, found from words that everyone knows.

The server has use for little of a token's vector: for sentiment, one direction of MiniLM's 384
tells most.  All others only help to read the token.  So the noise is strong everywhere but along
a few directions, where its standard deviation is ``spare`` times as large.  The directions come
from groups of words in the settings and from the bottom alone: Fisher's linear discriminant (1936)
of the groups' rows, with the covariance of rows over public inputs.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsplit.config import PrivacyConfig
from fedsplit.errors import ConfigError, PrivacyError, check
from fedsplit.privacy.levels import Level
from fedsplit.privacy.mechanisms.base import add_noise, check_hidden, check_views, clip_rows
from fedsplit.privacy.mechanisms.calibration import CalibrationInputs, public_vectors
from fedsplit.privacy.mechanisms.gaussian import Gaussian, gaussian_clip
from fedsplit.privacy.secret import SecretStream

SHRINKAGE = 0.3
"""What is added to the covariance's diagonal, relative to its mean: groups have few words."""


@dataclass(frozen=True)
class Shaped(Gaussian):
    """Mechanism that clips rows and adds Gaussian noise, less of it along given directions.

    Guarantee:
        (epsilon, delta)-differential privacy, locally and per token, as :class:`.gaussian.Gaussian`
        has it: epsilon is that of two vectors ``2 clip`` apart along a spared direction, the worst
        case.  Along all others the noise is 1 / ``spare`` times as strong.
    What breaks it:
        What breaks the Gaussian mechanism.  What the spared directions tell of a word is what the
        recipient learns best, and whoever makes the bottom or names the words chooses those
        directions.  So a noise ratio here is that of isotropic noise as strong as this one is along
        them; what the rest hides is for the owner to measure.
    Source:
        arXiv 1805.06530 theorem 8, in coordinates in which the noise is isotropic; Fisher, Annals
        of Eugenics 7 (1936), for the directions.

    Args:
        spare: standard deviation along the spared directions over that along all others, (0, 1].
        directions: ``(d, r)``, orthonormal columns; their bytes are part of the noise's identity.

    Raises:
        ConfigError: a parameter is out of range, or the columns are not orthonormal.
    """

    name: ClassVar[str] = "shaped"
    title: ClassVar[str] = "Gaussian noise that spares task directions"
    level: ClassVar[Level | None] = Gaussian.level
    spare: float
    directions: Tensor = field(repr=False, compare=False)
    _digest: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = isinstance(self.spare, int | float) and 0 < self.spare <= 1
        check(ok, "spare", self.spare, "in (0, 1] (noise along the spared directions)")
        u = self.directions.detach().cpu().double()
        check(u.dim() == 2 and 0 not in u.shape, "directions.shape", tuple(u.shape), "(d, r)")
        off = float((u.T @ u - torch.eye(u.shape[1], dtype=u.dtype)).abs().max())
        check(off < 1e-6, "directions", off, "orthonormal columns (off by < 1e-6)")
        object.__setattr__(self, "spare", float(self.spare))
        object.__setattr__(self, "directions", u)
        digest = hashlib.sha256(u.contiguous().numpy().astype("<f8").tobytes()).hexdigest()
        object.__setattr__(self, "_digest", digest)

    @classmethod
    def check_settings(cls, config: PrivacyConfig) -> None:
        """See :meth:`Mechanism.check_settings`; rows are clipped, and groups of words are named."""
        super().check_settings(config)
        if config.row_clip == "off":
            raise ConfigError(
                "privacy.row-clip='off': must be auto or a number with privacy.mechanism='shaped'"
            )
        word_groups(config.task_words)

    @classmethod
    def from_settings(cls, inputs: CalibrationInputs) -> Shaped:
        """See :meth:`Mechanism.from_settings`.

        Raises:
            PrivacyError: the groups' words have no rows that differ.
        """
        c = inputs.config
        words = hashlib.sha256(c.task_words.encode()).hexdigest()
        directions = (
            _directions(inputs)
            if inputs.store is None
            else inputs.store.matrix(("shaped", words), lambda: _directions(inputs))
        )
        return cls(
            epsilon=cls.level_from(inputs), delta=c.delta, clip=gaussian_clip(inputs),
            spare=c.spare, directions=directions,
        )  # fmt: skip

    @classmethod
    def public_settings(cls, config: PrivacyConfig) -> dict[str, float]:
        return super().public_settings(config) | {"spare": config.spare}

    def _parameters(self) -> dict[str, Any]:
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "clip": self.clip,
            "spare": self.spare,
            "directions_sha256": self._digest,
        }

    def privatise(
        self, hidden: Tensor, stream: SecretStream, scale: Tensor | None = None
    ) -> Tensor:
        check_hidden(hidden, scale)
        u = self.directions
        if hidden.shape[1] != len(u):
            raise PrivacyError(f"hidden.shape={tuple(hidden.shape)}: must be (T, {len(u)})")
        noise = torch.from_numpy(stream.normal(tuple(hidden.shape)))  # (T, d)
        noise = (noise - (1 - self.spare) * (noise @ u) @ u.T) * (self.sigma / self.spare)
        return add_noise(clip_rows(hidden, self.clip), noise, scale)

    def whitener(self) -> Tensor | None:
        u = self.directions
        return torch.eye(len(u), dtype=u.dtype) * self.spare + (1 - self.spare) * u @ u.T

    def guarantee(self, views: int = 1) -> str:
        check_views(views)
        return (
            super().guarantee(views)
            + f" along {self.directions.shape[1]} spared direction(s), 1 / {self.spare:g} times "
            "that along all others"
        )


def word_groups(text: str) -> list[list[str]]:
    """Return the groups of words in ``privacy.task-words``.

    Raises:
        ConfigError: fewer than two groups, or an empty one.
    """
    groups = [group.split() for group in text.split("|")]
    if len(groups) < 2 or not all(groups):
        raise ConfigError(
            f"privacy.task-words={text[:60]!r}: must be at least two groups of words, '|' between "
            "groups"
        )
    return groups


@torch.no_grad()
def _directions(inputs: CalibrationInputs) -> Tensor:
    """Return the discriminant directions of the configured groups, ``(d, groups - 1)``."""
    if inputs.tokenizer is None:
        raise PrivacyError("privacy.task-words: must have the bottom's tokenizer to be read")
    specials = torch.tensor(sorted(inputs.specials))
    means = []
    for group in word_groups(inputs.config.task_words):
        rows = []
        for word in group:
            ids = torch.tensor([inputs.tokenizer(word)["input_ids"]])
            own = ~torch.isin(ids[0], specials)
            if not bool(own.any()):
                raise PrivacyError(f"privacy.task-words: {word!r}: must be a word of the tokenizer")
            hidden = inputs.bottom(ids, torch.ones_like(ids))[0].detach().double()
            rows.append(hidden[own].mean(0))
        means.append(torch.stack(rows).mean(0))
    centres = torch.stack(means)  # (groups, d)
    apart = (centres - centres.mean(0)).T  # (d, groups)
    vectors = public_vectors(inputs.bottom, inputs.vocabulary, sequences=512)
    spread = torch.cov(vectors.flatten(0, 1).double().T)  # (d, d)
    spread += SHRINKAGE * spread.diagonal().mean() * torch.eye(len(spread), dtype=spread.dtype)
    found = torch.linalg.solve(spread, apart)
    u, values, _ = torch.linalg.svd(found, full_matrices=False)
    keep = len(means) - 1
    if not math.isfinite(float(values.sum())) or float(values[keep - 1]) <= 1e-9 * float(values[0]):
        raise PrivacyError("privacy.task-words: groups' vectors must differ in every direction")
    directions: Tensor = u[:, :keep].contiguous()
    return directions
