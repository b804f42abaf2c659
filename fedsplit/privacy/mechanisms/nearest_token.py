"""d_chi noise on a token's vector, then the nearest vocabulary token: the text-to-text mechanism.

Feyisetan et al., WSDM 2020, arXiv 1910.08902, algorithm 1; Qu et al., CIKM 2021, arXiv 2108.01624.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedsplit.config import PrivacyConfig
from fedsplit.errors import ConfigError, PrivacyError, check
from fedsplit.privacy.denoising.candidate_search import search
from fedsplit.privacy.denoising.candidates import Candidates, MatrixCandidates
from fedsplit.privacy.levels import Level
from fedsplit.privacy.mechanisms.base import Mechanism, check_hidden, clip_rows
from fedsplit.privacy.mechanisms.calibration import CalibrationInputs, Norms, norms_of, word_table
from fedsplit.privacy.mechanisms.dchi import MAX_ETA, DChi, eta_from_ratio
from fedsplit.privacy.secret import SecretStream


@dataclass(frozen=True)
class NearestToken(Mechanism):
    """Mechanism that adds d_chi noise and sends what belongs to the nearest token instead.

    With a ``bottom`` this works on text, at any split point: the noise is put on the word
    embeddings (``candidates``), the nearest tokens make a new text, and what leaves is that text's
    clean representation.  Without one, the candidates are the representations themselves (k = 0).

    Guarantee:
        That of :class:`fedsplit.privacy.mechanisms.dchi.DChi` at the same eta, in distances
        between the
        vectors that the noise is put on: rounding, and all that is computed from the new text, is
        post-processing.  The server learns nothing more than that text.
    What breaks it:
        What breaks ``dchi``.  Tokens that stay themselves look like any other token, but at a large
        eta most do stay: count them.  A token far from all others keeps itself at noise that moves
        every other one (Xu et al., 2020, arXiv 2010.11947).  The length of the text and special
        tokens at its ends are sent as they are: they are the same for every text of that length.
        A bottom that learns would send another representation of the same text in every round, and
        is refused.
    Source:
        arXiv 1910.08902 algorithm 1, with L2.

    Args:
        eta: as in ``dchi`` (1/length units of ``candidates``).
        candidates: public vectors of every token, ``(V, d)``; they belong to the representation's
            identity and are not described again.
        bottom: ``(input_ids (1, T), mask (1, T)) -> (1, T, d')``, frozen, in evaluation mode; None
            where the candidates are the representations.
        specials: ids that stay themselves as the first or last token, and replace nothing.
    """

    name: ClassVar[str] = "nearest-token"
    level: ClassVar[Level | None] = Level(
        "eta", "1/length units of the word embeddings", total="eta", bound=MAX_ETA
    )
    adds_noise: ClassVar[bool] = False
    replaces_tokens: ClassVar[bool] = True
    token_by_token: ClassVar[bool] = False
    needs_frozen_bottom: ClassVar[bool] = True
    eta: float
    candidates: Candidates = field(repr=False, compare=False)
    bottom: Callable[[Tensor, Tensor], Tensor] | None = field(
        default=None, repr=False, compare=False
    )
    specials: frozenset[int] = field(default=frozenset(), repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = isinstance(self.eta, int | float) and self.eta > 0 and math.isfinite(self.eta)
        check(ok, "eta", self.eta, "> 0 (1/length units of the representation)")
        check(
            isinstance(self.candidates, Candidates),
            "candidates",
            type(self.candidates).__name__,
            "Candidates (see candidates_through)",
        )
        object.__setattr__(self, "eta", float(self.eta))

    @classmethod
    def check_settings(cls, config: PrivacyConfig) -> None:
        """See :meth:`Mechanism.check_settings`; no denoiser that weighs noisy vectors fits."""
        super().check_settings(config)
        if config.denoise not in ("off", "learned"):
            raise ConfigError(
                f"privacy.denoise={config.denoise!r}: must be 'off' or 'learned' for {cls.name} "
                "(what is received are clean vectors of other tokens)"
            )

    @classmethod
    def level_at(cls, ratio: float, inputs: CalibrationInputs) -> float:
        """See :meth:`Mechanism.level_at`; beside the word embeddings."""
        norms = cls.public_norms(inputs)
        return eta_from_ratio(ratio, norms.dim, norms.length)

    @classmethod
    def public_norms(cls, inputs: CalibrationInputs) -> Norms:
        """See :meth:`Mechanism.public_norms`; of all words."""
        return norms_of(inputs.words, inputs.config.row_clip)

    @classmethod
    def from_settings(cls, inputs: CalibrationInputs) -> NearestToken:
        return cls(
            eta=cls.level_from(inputs),
            candidates=MatrixCandidates(inputs.words),
            bottom=inputs.bottom,
            specials=inputs.specials,
        )

    def describe(self) -> dict[str, Any]:
        return {
            "mechanism": self.name,
            "eta": self.eta,
            "vocab_size": self.candidates.vocab_size,
            "noise_on": "representation" if self.bottom is None else "word embedding",
            "specials": sorted(self.specials),
            **self._clipped(),
        }

    def tokens(self, hidden: Tensor, stream: SecretStream, scale: Tensor | None = None) -> Tensor:
        """Return the token ids that stand for the vectors ``hidden``, ``(T, d) -> (T,)``."""
        noisy = DChi(self.eta).privatise(hidden.detach(), stream, scale)
        if hidden.shape[1] != self.candidates.dim:
            raise PrivacyError(
                f"hidden.shape={tuple(hidden.shape)}: must be (T, {self.candidates.dim})"
            )
        if not len(noisy):
            return torch.zeros(0, dtype=torch.int64)
        if not self.specials:
            return search([noisy], self.candidates)[0][0][:, 0]
        allowed = torch.zeros(self.candidates.vocab_size)
        allowed[sorted(self.specials)] = -torch.inf
        ids, _ = search(
            [noisy], self.candidates, log_likelihood=torch.Tensor.neg_, log_prior=allowed
        )
        return ids[0][:, 0]

    @property
    def sent_norm(self) -> float:
        """See :meth:`Mechanism.sent_norm`; words are clipped, what leaves is a text's own rows."""
        return 0.0

    def covered(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """See :meth:`Mechanism.covered`: word embeddings, where there is a bottom.

        Whatever bottom made ``hidden``, the noise on the words stays the same: all that leaves is
        computed from one noisy vector per word.
        """
        rows = hidden if self.bottom is None else self._words(token_ids.cpu())
        return clip_rows(rows, self.row_clip)

    def _words(self, token_ids: Tensor) -> Tensor:
        """Return the vectors (T, d) of the words that the noise is put on.

        Raises:
            PrivacyError: if the candidates depend on the position, or an id is not among them.
        """
        if not isinstance(self.candidates, MatrixCandidates) or self.candidates.positions != 1:
            raise PrivacyError("candidates: must be one (V, d) matrix to replace text")
        table = self.candidates.matrix[0]  # (V, d)
        if len(token_ids) and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < len(table):
            raise PrivacyError(f"token id={int(token_ids.max())}: must be in 0..{len(table) - 1}")
        return table[token_ids]

    def replaced(self, token_ids: Tensor, stream: SecretStream) -> Tensor:
        """See :meth:`Mechanism.replaced`; and :meth:`replace`."""
        return self.replace(token_ids, stream, None)

    def replacing_vectors(self) -> tuple[Tensor, Tensor]:
        """See :meth:`Mechanism.replacing_vectors`."""
        table = self._words(torch.arange(self.candidates.vocab_size))
        return clip_rows(table, self.row_clip), table

    def replace(self, token_ids: Tensor, stream: SecretStream, scale: Tensor | None) -> Tensor:
        """Return the text that stands for ``token_ids``, ``(T,) -> (T,)``.

        Raises:
            PrivacyError: if the candidates depend on the position, or an id is not among them.
        """
        out = self.tokens(clip_rows(self._words(token_ids), self.row_clip), stream, scale)
        for end in (0, -1) if len(token_ids) else ():
            if int(token_ids[end]) in self.specials:
                out[end] = token_ids[end]
        return out

    def privatise_sample(
        self, hidden: Tensor, token_ids: Tensor, stream: SecretStream, scale: Tensor | None = None
    ) -> Tensor:
        """See :meth:`Mechanism.privatise_sample`.

        Raises:
            PrivacyError: for a bottom that learns; see also :meth:`replace`.
        """
        if self.bottom is None:
            return super().privatise_sample(hidden, token_ids, stream, scale)
        check_hidden(hidden, scale)
        if hidden.requires_grad:
            raise PrivacyError("nearest-token: the bottom learns: must be frozen")
        ids = self.replace(token_ids.cpu(), stream, scale).unsqueeze(0).to(token_ids.device)
        if not ids.shape[1]:
            return hidden
        with torch.no_grad():
            return self.bottom(ids, torch.ones_like(ids))[0].to(hidden)

    def privatise(
        self, hidden: Tensor, stream: SecretStream, scale: Tensor | None = None
    ) -> Tensor:
        """See :meth:`Mechanism.privatise`; the backward pass treats the replacement as identity."""
        ids = self.tokens(hidden, stream, scale)
        clean = torch.empty(hidden.shape, dtype=torch.float32, device=self.candidates.device)
        for first, block in self.candidates.blocks():  # (P, v, d)
            here = ((ids >= first) & (ids < first + block.shape[1])).nonzero().squeeze(1)
            position = here if self.candidates.positions > 1 else torch.zeros_like(here)
            clean[here] = block[position, ids[here] - first]
        out: Tensor = _Replace.apply(hidden, clean.to(hidden))  # type: ignore[no-untyped-call]
        return out

    def guarantee(self, views: int = 1) -> str:
        on = "representations" if self.bottom is None else "word embeddings"
        noise = DChi(self.eta, row_clip=self.row_clip)
        return (
            f"{noise.guarantee(views)}; distances are those of {on}; "
            "what is sent are other tokens' clean vectors"
        )

    def mean_noise_norm(self, width: int) -> float:
        """See :meth:`Mechanism.mean_noise_norm`; of the noise before the nearest token is taken."""
        return width / self.eta

    def covered_norms(self, bottom: nn.Module, vocabulary: int) -> Norms:
        """See :meth:`Mechanism.covered_norms`; of words, where the noise is put on words."""
        if self.bottom is None:
            return super().covered_norms(bottom, vocabulary)
        return norms_of(word_table(bottom))

    def per_token_epsilon(self, distance: float, views: int = 1) -> float:
        """See :meth:`Mechanism.per_token_epsilon`; eta * distance * views."""
        return DChi(self.eta, row_clip=self.row_clip).per_token_epsilon(distance, views)


class _Replace(torch.autograd.Function):
    """``clean`` forward, exactly; the gradient to ``hidden`` backward.

    ``hidden + (clean - hidden).detach()`` would do the same with rounding errors that depend on the
    private ``hidden``, and would send them.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, clean: Tensor) -> Tensor:
        return clean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
