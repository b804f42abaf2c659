"""The mechanism that a run's settings ask for: the same at an owner and at the server.

Both sides build it from public knowledge alone (settings and the bottom), so the server can denoise
with the very law that the owners use, and no private text enters a privacy parameter.  The one
exception, ``privacy.covariance = "own"``, is the owner's and stays with the owner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.config import PrivacyConfig, RunConfig
from fedsplit.errors import ConfigError, PrivacyError
from fedsplit.privacy import build, eta_from_ratio
from fedsplit.privacy.contributing_tokens import (
    PUBLIC_STATISTICS,
    ContributingTokens,
    select_contributing_tokens,
)
from fedsplit.privacy.denoising.candidates import MatrixCandidates
from fedsplit.privacy.mechanisms.base import Mechanism
from fedsplit.privacy.mechanisms.calibration import (
    Norms,
    Store,
    covariance_over,
    norms_of,
    public_vectors,
    word_table,
)
from fedsplit.privacy.mechanisms.gaussian import epsilon_from_ratio
from fedsplit.privacy.mechanisms.pac import budget_from_ratio
from fedsplit.privacy.public_text import public_ids, public_texts


def representation_norm(bottom: nn.Module, vocabulary: int) -> float:
    """Return the median L2 norm of the bottom's output over public inputs.

    The inputs are 64 sequences of 16 ids spread evenly over the vocabulary: everyone who has the
    bottom gets the same number, and no private text enters a privacy parameter.
    """
    return norms_of(public_vectors(bottom, vocabulary)).median


@dataclass(frozen=True)
class Material:
    """What a mechanism may be built from.

    Attributes:
        config: the settings.
        bottom: the bottom, in evaluation mode.
        vocabulary: V.
        specials: ids of the tokenizer's special tokens.
        own: the owner's token ids, ``(T_i,)`` each; None at the server.
        store: the owner's calibrations on disk; None at the server.
    """

    config: PrivacyConfig
    bottom: nn.Module
    vocabulary: int
    specials: frozenset[int] = frozenset()
    own: Sequence[Tensor] | None = None
    store: Store | None = None
    _norms: list[Norms] = field(default_factory=list, repr=False)

    @property
    def norms(self) -> Norms:
        """Norms of the bottom's output over public inputs."""
        if not self._norms:
            self._norms.append(norms_of(public_vectors(self.bottom, self.vocabulary)))
        return self._norms[0]


def build_mechanism(
    config: PrivacyConfig,
    bottom: nn.Module,
    vocabulary: int,
    tokenizer: Any = None,
    *,
    own: Sequence[Tensor] | None = None,
    store: Store | None = None,
    frozen: bool = True,
) -> Mechanism:
    """Return the configured mechanism; a noise ratio becomes its own level through public inputs.

    Args:
        config: the settings.
        bottom: the bottom, in evaluation mode.
        vocabulary: number of its token ids.
        tokenizer: for its special tokens (``nearest-token`` keeps them where they always are).
        own: an owner's token ids, for ``covariance = "own"``; where there is no owner (a server,
            which may not denoise then), the public covariance is the best guess.
        store: where an owner keeps what must never be computed twice.
        frozen: whether the bottom stays as it is.

    Raises:
        ConfigError: unknown mechanism or a parameter out of range; text-to-text with a bottom that
            learns, which would send another representation of one text in every round.
        PrivacyError: an owner (it has a ``store``) asked for its own covariance and gave no text.
    """
    specials = frozenset(int(i) for i in tokenizer.all_special_ids) if tokenizer else frozenset()
    if config.mechanism == "nearest-token" and not frozen:
        raise ConfigError(
            "privacy.mechanism='nearest-token': must be another where split.bottom is 'joint'"
        )
    make = _MAKERS.get(config.mechanism)
    if make is None:
        return build(config.mechanism)
    return make(Material(config, bottom, vocabulary, specials, own, store))


def _dchi(of: Material) -> Mechanism:
    ratio = of.config.noise_ratio
    eta = of.config.eta or eta_from_ratio(ratio, of.norms.dim, of.norms.median)
    return build("dchi", eta=eta)


def _nearest_token(of: Material) -> Mechanism:
    table = word_table(of.bottom)
    norms = norms_of(table)
    eta = of.config.eta or eta_from_ratio(of.config.noise_ratio, norms.dim, norms.median)
    return build(
        "nearest-token",
        eta=eta,
        candidates=MatrixCandidates(table),
        bottom=of.bottom,
        specials=of.specials,
    )


def _gaussian(of: Material) -> Mechanism:
    c = of.config
    clip = c.clip or of.norms.largest
    epsilon = c.epsilon or epsilon_from_ratio(
        c.noise_ratio, of.norms.dim, of.norms.median, clip, c.delta
    )
    return build("gaussian", epsilon=epsilon, delta=c.delta, clip=clip)


def _pac(of: Material) -> Mechanism:
    c = of.config
    # A server does not know an owner's own covariance: the public one is its best guess.
    guess = of.own is None and of.store is None
    make = _public_covariance if c.covariance == "public" or guess else _own_covariance
    if of.store is None:
        matrix = make(of)
    else:
        matrix = of.store.matrix(
            ("pac", c.covariance, c.subsamples, of.vocabulary), lambda: make(of)
        )
    norm = of.norms.median
    budget = c.budget or budget_from_ratio(c.noise_ratio, norm, matrix)
    return build("pac", budget=budget, covariance=matrix)


def _public_covariance(of: Material) -> Tensor:
    vectors = public_vectors(of.bottom, of.vocabulary, sequences=512)  # (512, 16, d)
    return covariance_over(list(vectors), of.config.subsamples)


@torch.no_grad()
def _own_covariance(of: Material) -> Tensor:
    if of.own is None:
        raise PrivacyError(
            "privacy.covariance='own': must be given the owner's text, which it is estimated on"
        )
    rows = []
    for ids in of.own[:4096]:
        batch = ids.unsqueeze(0)
        rows.append(of.bottom(batch, torch.ones_like(batch))[0].float())
    return covariance_over(rows, of.config.subsamples)


_MAKERS: dict[str, Callable[[Material], Mechanism]] = {
    "dchi": _dchi,
    "gaussian": _gaussian,
    "nearest-token": _nearest_token,
    "pac": _pac,
}


def choose_tokens(
    config: RunConfig, ids: Sequence[Tensor], labels: Tensor | None, tokenizer: Any
) -> ContributingTokens | None:
    """Return an owner's contributing tokens as configured, or None where CTI is off.

    Args:
        config: the run's settings.
        ids: the owner's token ids, ``(T_i,)`` each.
        labels: their private classes, or None.
        tokenizer: for its special tokens, and for public text where the statistic needs it.

    Raises:
        ConfigError: a statistic over labels where there are none.
        DataError: no tokens.
    """
    c = config.privacy
    if c.cti == "off" or c.mechanism == "none":
        return None
    public: list[list[int]] = []
    if c.cti in PUBLIC_STATISTICS:
        # Never a file that the server names: owners read what the interpreter ships, and only the
        # help topics, since every message may start a process that would parse all modules anew.
        texts = public_texts(docstrings=False)
        public = public_ids(tokenizer, texts, config.model.max_tokens)
    return select_contributing_tokens(
        [x.tolist() for x in ids],
        None if labels is None else labels.tolist(),
        statistic=c.cti,
        m=c.cti_per_class,
        max_share=c.cti_max_share,
        special_ids={int(i) for i in tokenizer.all_special_ids},
        public=public,
    )
