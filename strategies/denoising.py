"""The server's own use of what it received: posterior means in place of noisy vectors.

Free under post-processing: the owners' guarantee and what an attacker may do are unchanged, since
the server could always compute this.  Only for embeddings-only bottoms (k = 0), whose noiseless
outputs are a public finite set; see :mod:`fedsplit.privacy.posterior`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError
from fedsplit.models.halves import Bottom
from fedsplit.privacy.candidates import candidates_through
from fedsplit.privacy.mechanism import Mechanism
from fedsplit.privacy.posterior import Denoiser, unigram_log_prior

log = logging.getLogger(__name__)

MEMORY_BYTES = 8 << 30
Key = tuple[str, str, int]  # owner, split, slot


class CohortDenoiser:
    """Denoises each sample once, a whole cohort step together, and remembers the result.

    Args:
        denoiser: the posterior mean.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._ready: dict[Key, Tensor] = {}
        self.tokens = 0
        self.seconds = 0.0

    def __call__(self, keys: Sequence[Key], rows: Sequence[Tensor]) -> list[Tensor]:
        """Return the posterior means of ``rows``, one (T_i, d) per key."""
        fresh = [i for i, key in enumerate(keys) if key not in self._ready]
        if fresh:
            began = time.perf_counter()
            cleaned = self._denoiser([rows[i] for i in fresh])
            for i, clean in zip(fresh, cleaned, strict=True):
                self._ready[keys[i]] = clean
                self.tokens += int(clean.shape[0])
            self.seconds += time.perf_counter() - began
        return [self._ready[key] for key in keys]


def public_log_prior(tokenizer: Any, vocabulary: int, max_tokens: int) -> Tensor:
    """Return the unigram log prior over text that everyone has: Python's own help topics.

    The interpreter ships them (``pydoc_data.topics``, about 460 kB of English technical prose), so
    no download is needed; a server with a corpus nearer to its owners' domain should use that.
    """
    from pydoc_data import topics

    texts = [topics.topics[name] for name in sorted(topics.topics)]
    pieces = [line for text in texts for line in text.split("\n\n") if line.strip()]
    ids = tokenizer(pieces, truncation=True, max_length=max_tokens)["input_ids"]
    return unigram_log_prior(ids, vocabulary)


def build_denoiser(
    config: RunConfig, bottom: Bottom, tokenizer: Any, mechanism: Mechanism
) -> CohortDenoiser | None:
    """Return the configured denoiser, or None where it is off.

    Raises:
        ConfigError: denoising asked for with blocks in the bottom or a bottom that learns.
        PrivacyError: the mechanism's law is not known.
    """
    if config.privacy.denoise == "off" or config.privacy.mechanism == "none":
        return None
    if config.split.k != 0 or config.split.bottom != "frozen":
        raise ConfigError(
            f"privacy.denoise={config.privacy.denoise!r}: needs split.k = 0 (is {config.split.k}) "
            f"and a frozen bottom (is {config.split.bottom}): else there is no candidate set"
        )
    prior: Tensor | None = None
    if config.privacy.denoise == "unigram":
        prior = public_log_prior(tokenizer, bottom.vocab, config.model.max_tokens)
    candidates = candidates_through(bottom, bottom.vocab, config.model.max_tokens)
    size = 4 * candidates.positions * candidates.vocab_size * candidates.dim
    if size <= MEMORY_BYTES:
        candidates = candidates.materialise()
    else:
        log.warning("denoising candidates of %d bytes are recomputed at every step", size)
    log.info("denoising with %d candidates at %d positions", bottom.vocab, candidates.positions)
    return CohortDenoiser(Denoiser(candidates, mechanism, prior))
