"""The server's own use of what it received: estimates of clean vectors in place of noisy ones.

Free under post-processing: the owners' guarantee and what an attacker may do are unchanged, since
the server could always compute this.  ``uniform``, ``unigram`` and ``contextual`` are posterior
means over the finite set of noiseless vectors of an embeddings-only bottom (k = 0), ``ends`` puts
right only the special tokens that every text has, as these three do too; ``linear`` is the best
affine map and ``learned`` a small network, both taught on public text, for any frozen bottom.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.data import docstrings_are_public
from fedsplit.errors import ConfigError
from fedsplit.models.splitting.halves import Bottom
from fedsplit.privacy import Mechanism, mechanism_type
from fedsplit.privacy.denoising.candidates import Candidates
from fedsplit.privacy.denoising.contextual import ContextualDenoiser
from fedsplit.privacy.denoising.learned import LearnedDenoiser, Recipe, TrainingPairs, cached
from fedsplit.privacy.denoising.linear import fit_linear
from fedsplit.privacy.denoising.ngram import BigramChain
from fedsplit.privacy.denoising.position_candidates import candidates_of
from fedsplit.privacy.denoising.posterior import Denoiser, Touched, unigram_log_prior
from fedsplit.privacy.denoising.special_tokens import KnownSpecialTokens, special_ends
from fedsplit.privacy.public_text import public_ids, public_texts
from fedsplit.registry import pick

log = logging.getLogger(__name__)

CACHE_VARIABLE = "FEDSPLIT_CACHE"
Key = tuple[str, str, int]  # owner, split, slot
Rows = Callable[[Sequence[Tensor]], list[Tensor]]


class CohortDenoiser:
    """Denoises each sample once, a whole cohort step together, and remembers the result.

    Args:
        denoiser: representations in, estimates out.
        name: row of :data:`DENOISERS`.
        setup_s: seconds that building it took.
        facts: what building it measured.
    """

    def __init__(
        self,
        denoiser: Rows,
        name: str = "",
        setup_s: float = 0.0,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self._denoiser = denoiser
        self._ready: dict[Key, Tensor] = {}
        self.name = name
        self.facts = facts or {}
        self.tokens = 0
        self.setup_s = setup_s
        self.seconds = 0.0

    def __call__(self, keys: Sequence[Key], rows: Sequence[Tensor]) -> list[Tensor]:
        """Return the estimates of ``rows``, one (T_i, d) per key."""
        fresh = [i for i, key in enumerate(keys) if key not in self._ready]
        if fresh:
            began = time.perf_counter()
            cleaned = self._denoiser([rows[i] for i in fresh])
            for i, clean in zip(fresh, cleaned, strict=True):
                self._ready[keys[i]] = clean
                self.tokens += int(clean.shape[0])
            self.seconds += time.perf_counter() - began
        return [self._ready[key] for key in keys]

    def once(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Return the estimates of ``rows``, of which nothing is remembered (serving)."""
        return self._denoiser(rows)

    def report(self) -> dict[str, Any]:
        """Return what denoising cost so far, JSON-able."""
        return {
            "denoise": self.name,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "seconds_per_token": self.seconds / self.tokens if self.tokens else 0.0,
            "setup_s": self.setup_s,
            **self.facts,
        }


@dataclass(frozen=True)
class Material:
    """What a denoiser may be built from."""

    config: RunConfig
    bottom: Bottom
    tokenizer: Any
    mechanism: Mechanism

    @property
    def touched(self) -> Touched | None:
        """What the server knows of contributing tokens: the largest share, and rho."""
        c = self.config.privacy
        if c.cti == "off" or c.cti_rho == 1 or c.cti_max_share >= 1:
            return None
        return Touched(c.cti_max_share, c.cti_rho)

    def candidates(self) -> Candidates:
        """Return the vectors that received rows may have come from, clipped as those were."""
        longest, clip = self.config.model.max_tokens, self.mechanism.sent_norm
        return candidates_of(self.bottom, self.bottom.vocab, longest, clip=clip)

    def texts(self) -> list[str]:
        """Return public text; docstrings are none where they are the owners' data."""
        c = self.config
        return public_texts(c.privacy.public_text, docstrings=docstrings_are_public(c.data.kind))

    def ids(self, most: int = 0) -> list[list[int]]:
        """Return public text as token ids, of at most ``most`` texts spread over all; 0 = all."""
        texts = self.texts()
        step = max(1, len(texts) // most) if most else 1
        return public_ids(self.tokenizer, texts[::step], self.config.model.max_tokens)


def public_log_prior(tokenizer: Any, vocabulary: int, max_tokens: int) -> Tensor:
    """Return the unigram log prior over text that everyone has: Python's own help topics.

    The interpreter ships them (``pydoc_data.topics``, about 460 kB of English technical prose), so
    no download is needed; a server with a corpus nearer to its owners' domain should use that.
    """
    ids = public_ids(tokenizer, public_texts(docstrings=False), max_tokens)
    return unigram_log_prior(ids, vocabulary)


def _with_ends(of: Material, inner: Rows | None) -> Rows:
    """Put what stands at the ends of every text right, whatever ``inner`` makes of the rest."""
    return KnownSpecialTokens(
        inner, of.bottom, special_ends(of.tokenizer), of.config.model.max_tokens
    )


def _ends(of: Material) -> tuple[Rows, dict[str, Any]]:
    return _with_ends(of, None), {}


def _uniform(of: Material) -> tuple[Rows, dict[str, Any]]:
    candidates = of.candidates()
    return _with_ends(of, Denoiser(candidates, of.mechanism, None, of.touched)), {}


def _unigram(of: Material) -> tuple[Rows, dict[str, Any]]:
    candidates = of.candidates()
    ids = of.ids()
    prior = unigram_log_prior(ids, of.bottom.vocab)
    facts = {"public_tokens": sum(map(len, ids))}
    return _with_ends(of, Denoiser(candidates, of.mechanism, prior, of.touched)), facts


def _contextual(of: Material) -> tuple[Rows, dict[str, Any]]:
    candidates = of.candidates()
    ids = of.ids()
    chain = BigramChain(ids, of.bottom.vocab)
    facts = {"public_tokens": sum(map(len, ids)), "public_bigrams": int(chain.counts.nnz)}
    denoiser = ContextualDenoiser(candidates, of.mechanism, chain, of.touched)
    return _with_ends(of, denoiser), facts


def _linear(of: Material) -> tuple[Rows, dict[str, Any]]:
    recipe = Recipe(max_tokens=of.config.model.max_tokens, seed=of.config.seed)
    pairs = TrainingPairs(of.bottom, of.mechanism, of.ids(most=4096), of.touched, recipe)
    found = fit_linear(pairs)
    facts = {"unexplained": found.unexplained}
    return (found if of.config.split.k else _with_ends(of, found)), facts


def _learned(of: Material) -> tuple[Rows, dict[str, Any]]:
    c = of.config
    recipe = Recipe(max_tokens=min(64, c.model.max_tokens), seed=c.seed)
    identity = {
        "bottom": _digest(of.bottom),
        "k": c.split.k,
        "mechanism": of.mechanism.describe(),
        "touched": [of.touched.share, of.touched.rho] if of.touched else None,
        "text": _text_identity(c),
        "max_tokens": c.model.max_tokens,
    }
    found: LearnedDenoiser = cached(
        cache_folder(),
        identity,
        recipe,
        lambda: TrainingPairs(of.bottom, of.mechanism, of.ids(), of.touched, recipe),
    )
    return found, found.facts


DENOISERS: dict[str, Callable[[Material], tuple[Rows, dict[str, Any]]]] = {
    "contextual": _contextual,
    "ends": _ends,
    "learned": _learned,
    "linear": _linear,
    "uniform": _uniform,
    "unigram": _unigram,
}


def cache_folder() -> Path | None:
    """Return where taught denoisers are kept: $FEDSPLIT_CACHE, else the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    if given == "":
        return None
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(given) if given else Path(root) / "fedsplit" / "denoisers"


def _text_identity(config: RunConfig) -> str:
    """Return what names the public text: the file's digest, or which interpreter ships it."""
    path = config.privacy.public_text
    if path:
        return hashlib.sha256("\n".join(public_texts(path)).encode()).hexdigest()
    return (
        f"python {platform.python_version()} docstrings={docstrings_are_public(config.data.kind)}"
    )


def build_denoiser(
    config: RunConfig, bottom: Bottom, tokenizer: Any, mechanism: Mechanism
) -> CohortDenoiser | None:
    """Return the configured denoiser, or None where it is off.

    Args:
        config: the run's settings.
        bottom: the owners' bottom, frozen, in evaluation mode.
        tokenizer: for public text.
        mechanism: what the owners use.

    Raises:
        ConfigError: a bottom that learns, or a posterior asked for with blocks in the bottom.
        PrivacyError: the mechanism's law is not known.
    """
    name = config.privacy.denoise
    if name == "off" or not mechanism_type(config.privacy).protects():
        return None
    build = pick(DENOISERS, name, "privacy.denoise")
    if config.split.bottom != "frozen":
        raise ConfigError(
            f"privacy.denoise={name!r}: needs a frozen bottom (is {config.split.bottom}): what "
            "clean vectors look like would change in every round"
        )
    if config.split.k != 0 and name not in ("learned", "linear"):
        raise ConfigError(
            f"privacy.denoise={name!r}: needs split.k = 0 (is {config.split.k}), else there is no "
            "candidate set; use 'learned' or 'linear'"
        )
    began = time.perf_counter()
    rows, facts = build(Material(config, bottom, tokenizer, mechanism))
    seconds = time.perf_counter() - began
    log.info("denoising (%s) ready after %.1f s: %s", name, seconds, facts)
    return CohortDenoiser(rows, name, seconds, facts)


def _digest(bottom: Bottom) -> str:
    """Return a digest of the bottom's parameters."""
    whole = hashlib.sha256()
    for name, tensor in sorted(bottom.state_dict().items()):
        whole.update(name.encode())
        whole.update(tensor.detach().cpu().contiguous().view(-1).float().numpy().tobytes())
    return whole.hexdigest()
