"""From a similarity to a verdict with error rates.

The question is a test: H0 "the suspect is independent of the base".  Its null distribution is

- analytic where directions are random: the cosine of two (d x d) products in independently rotated
  bases has mean 0 and standard deviation 1/d exactly, a mean over m such terms 1/(d sqrt(m));
- empirical beside it: scores of pairs known to be independent, hard negatives (same data and
  tokenizer, another seed) included, since what two models learned from the same text makes them a
  little alike.  The p-value is the predictive Student t tail of those scores, which pays for how
  few they are, and never less than the analytic one.

Outcomes: "in_lineage" if p <= alpha (the false-positive rate) and the score is at least ``least``;
"independent" if the score lies inside the null's central range and every block does; "not_shown"
otherwise.  "Independent" says: as far apart as strangers under every map considered.  A thief who
also replaced the token embeddings cannot be told from a stranger by weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.special import ndtr, stdtr, stdtrit

from fedsplit.errors import LineageError, check
from fedsplit.fingerprints.view import Similarity

Outcome = Literal["in_lineage", "not_shown", "independent"]

EXIT_CODES: dict[Outcome, int] = {"in_lineage": 0, "not_shown": 1, "independent": 2}

MEASURED: dict[str, float] = {
    "gutenberg_llama_seed0 - seed1 (d = 256, same data, hard)": 0.0159,
    "babyllama_tok105 - tok361 (d = 128)": 0.0236,
    "darwin twins 0 - 1 (d = 64, same data, hard)": 0.0009,
    "darwin twins 0 - 2": 0.0091,
    "darwin twins 0 - 3": 0.0165,
    "darwin twins 0 - 4": 0.0188,
    "darwin twins 1 - 2": 0.0156,
    "darwin twins 1 - 3": 0.0142,
    "darwin twins 1 - 4": 0.0121,
    "darwin twins 2 - 3": 0.0214,
    "darwin twins 2 - 4": 0.0155,
    "darwin twins 3 - 4": 0.0212,
    "darwin twin 0 - stories260K (same tokenizer)": -0.0070,
    "darwin twin 1 - stories260K": -0.0098,
    "darwin twin 2 - stories260K": -0.0012,
    "darwin twin 3 - stories260K": 0.0059,
    "darwin twin 4 - stories260K": -0.0077,
}
"""The score of independent pairs of really trained checkpoints, hard negatives included.

The darwin twins are five models of stories260K's shape trained from scratch on one Gutenberg author
with its tokenizer (300 steps, seeds 100-104); single blocks of these pairs reached 0.07.
"""

PUBLIC_MEASURED: dict[str, float] = {
    "gutenberg_llama_seed0 - seed1 (d = 256, same data, hard)": 0.0522,
    "babyllama_tok105 - tok361 (d = 128)": 0.0314,
    "darwin twins 0 - 1 (d = 64, same data, hard)": 0.0350,
    "darwin twins 0 - 2": 0.0722,
    "darwin twins 0 - 3": 0.0657,
    "darwin twins 0 - 4": 0.0432,
    "darwin twins 1 - 2": 0.0523,
    "darwin twins 1 - 3": 0.0667,
    "darwin twins 1 - 4": 0.0505,
    "darwin twins 2 - 3": 0.0822,
    "darwin twins 2 - 4": 0.0781,
    "darwin twins 3 - 4": 0.0659,
    "darwin twin 0 - stories260K (same tokenizer)": -0.0008,
    "darwin twin 1 - stories260K": 0.0011,
    "darwin twin 2 - stories260K": -0.0001,
    "darwin twin 3 - stories260K": 0.0045,
    "darwin twin 4 - stories260K": 0.0041,
}
"""The same for the whitened invariants that a public file sketches, exact (darwin twins anew)."""


WIDTHS_MEASURED: dict[str, float] = {
    "gutenberg_llama_seed0 - seed1 cut to 192 (same data, hard)": 0.1137,
    "gutenberg_llama_seed1 - seed0 cut to 192, FFN 70 %": 0.1092,
    "gutenberg_llama_seed1 cut to 192 - seed0": 0.1161,
    "gutenberg_llama_seed0 - seed1 cut to 128": 0.1147,
    "gutenberg_llama_seed1 - seed0 cut to 128, FFN 70 %": 0.1080,
    "gutenberg_llama_seed1 cut to 128 - seed0": 0.1171,
    "gutenberg_llama_seed0 - seed1 cut to 64": 0.1124,
    "gutenberg_llama_seed1 - seed0 cut to 64, FFN 70 %": 0.1152,
    "gutenberg_llama_seed1 cut to 64 - seed0": 0.1017,
    "babyllama_tok361 - stories260K (d = 128, 64)": 0.0214,
    "gutenberg_llama_seed0 - stories260K (d = 256, 64)": 0.0190,
}
"""The same for pairs of different width; cuts of one pair depend on each other, so that these are
fewer than they look, and the spread that they give is a floor."""


@dataclass(frozen=True)
class SketchError:
    """Root mean square error of a sketched score: for relatives, for strangers, over how many."""

    relatives: float
    strangers: float
    pairs: int


SKETCH_ERROR: dict[int, SketchError] = {
    32: SketchError(0.0084, 0.0150, 29),
    16: SketchError(0.0131, 0.0264, 29),
}
"""By the sketch's size: 12 noisy copies of four checkpoints, and the strangers above."""


def analytic_sd(width: int, terms: int = 1) -> float:
    """Return the sd of a mean of ``terms`` product cosines in random d-dimensional bases.

    E<P, U Q V>^2 = |P|^2 |Q|^2 / d^2 for independent Haar rotations U, V.

    Raises:
        ConfigError: for a width or a number of terms below 1.
    """
    check(width >= 1, "width", width, ">= 1 (dimensions)")
    check(terms >= 1, "terms", terms, ">= 1 (products)")
    return 1.0 / (width * math.sqrt(terms))


@dataclass(frozen=True)
class NullDistribution:
    """Scores of independent pairs.

    Args:
        scores: at least two measured scores.
        sd_floor: least standard deviation, such as :func:`analytic_sd`.
    """

    scores: tuple[float, ...]
    sd_floor: float = 0.0

    def __post_init__(self) -> None:
        if len(self.scores) < 2 or not all(math.isfinite(s) for s in self.scores):
            raise LineageError(f"null scores={self.scores}: must be two or more finite numbers")

    @property
    def mean(self) -> float:
        """Mean score."""
        return sum(self.scores) / len(self.scores)

    @property
    def sd(self) -> float:
        """Unbiased standard deviation, at least ``sd_floor``."""
        mean, n = self.mean, len(self.scores)
        found = math.sqrt(sum((s - mean) ** 2 for s in self.scores) / (n - 1))
        return max(found, self.sd_floor, 1e-12)

    def _scale(self) -> float:
        return self.sd * math.sqrt(1.0 + 1.0 / len(self.scores))

    def p_value(self, score: float) -> float:
        """Return P(an independent pair scores at least this), predictive."""
        spread = (score - self.mean) / self._scale()
        empirical = float(stdtr(len(self.scores) - 1, -spread))
        analytic = float(ndtr(-score / self.sd_floor)) if self.sd_floor > 0 else 0.0
        return max(empirical, analytic)

    def lower_p(self, score: float) -> float:
        """Return P(an independent pair scores at most this), predictive."""
        return float(stdtr(len(self.scores) - 1, (score - self.mean) / self._scale()))

    def threshold(self, alpha: float) -> float:
        """Return the score that an independent pair exceeds with probability ``alpha``."""
        check(0 < alpha < 1, "alpha", alpha, "in (0, 1)")
        return self.mean + self._scale() * float(-stdtrit(len(self.scores) - 1, alpha))

    def z(self, score: float) -> float:
        """Return the distance from the null in standard deviations, as AWM's tables report it."""
        return (score - self.mean) / self.sd


@dataclass(frozen=True)
class VerdictConfig:
    """How sure a verdict must be.

    Attributes:
        alpha: false-positive rate of "in_lineage".
        least: least score of "in_lineage", however unlikely a smaller one is under the null.
        block_alpha: family-wise rate (Bonferroni over blocks) at which a block counts as related.
        central: a score with more than this in both tails lies inside the null.
        fit: embedding rows that fit this well after alignment are no stranger's (measured: at most
            0.64 between strangers, 0.99 after training against the score): then a low score is not
            shown to be independent, it may have been driven down.
    """

    alpha: float = 1e-6
    least: float = 0.1
    block_alpha: float = 0.05
    central: float = 0.01
    fit: float = 0.85

    def __post_init__(self) -> None:
        for name in ("alpha", "block_alpha", "central"):
            value = getattr(self, name)
            check(0 < value < 1, name, value, "in (0, 1) (probability)")
        check(0 <= self.least <= 1, "least", self.least, "in [0, 1] (cosine)")


@dataclass(frozen=True)
class Judgement:
    """A verdict and what it rests on.

    Attributes:
        verdict: one of three outcomes; ``exit_code`` is 0, 1 or 2.
        score: the similarity judged.
        p_value: probability of such a score between independent models.
        false_positive_rate: alpha of the test.
        threshold: the score needed.
        z: distance from the null in its standard deviations.
        block_p: p-value of each block.
        diverged: blocks that look like a stranger's, in a model that is otherwise in lineage:
            replaced or spliced.
    """

    verdict: Outcome
    score: float
    p_value: float
    false_positive_rate: float
    threshold: float
    z: float
    block_p: tuple[float, ...]
    diverged: tuple[int, ...]

    @property
    def exit_code(self) -> int:
        """0 in lineage, 1 not shown, 2 independent."""
        return EXIT_CODES[self.verdict]


def default_null(width: int, terms: int) -> NullDistribution:
    """Return the null of the measured pairs, with this width's analytic spread as a floor.

    The null is centred on the measured scores (0.01), not on 0: hard negatives are in it.
    """
    return NullDistribution(tuple(MEASURED.values()), analytic_sd(width, terms))


def block_null(null: NullDistribution, width: int, terms: int = 2) -> NullDistribution:
    """Return the null of one block: the same centre, the spread of a mean of ``terms`` products."""
    return NullDistribution(null.scores, max(null.sd_floor, analytic_sd(width, terms), 0.025))


def judge(
    similarity: Similarity,
    width: int,
    *,
    null: NullDistribution | None = None,
    per_block: NullDistribution | None = None,
    config: VerdictConfig | None = None,
) -> Judgement:
    """Judge a score (of ``AlignedProducts`` unless other nulls are given).

    Args:
        similarity: value and per-block values.
        width: residual width d, for the analytic part.
        null: scores of independent pairs; None for the measured ones.
        per_block: scores of single blocks of independent pairs.
    """
    config = config or VerdictConfig()
    blocks = similarity.per_block
    null = null or default_null(width, max(1, 2 * len(blocks)))
    single = per_block or block_null(null, width)
    p = null.p_value(similarity.value)
    threshold = max(config.least, null.threshold(config.alpha))
    block_p = tuple(single.p_value(s) for s in blocks)
    bound = config.block_alpha / max(1, len(blocks))
    strangers = tuple(i for i, value in enumerate(block_p) if value > bound)
    outcome: Outcome = "not_shown"
    if similarity.value >= threshold:
        outcome = "in_lineage"
    elif _like_a_stranger(similarity, null, config) and len(strangers) == len(blocks):
        outcome = "independent"
    return Judgement(
        verdict=outcome,
        score=similarity.value,
        p_value=p,
        false_positive_rate=config.alpha,
        threshold=threshold,
        z=null.z(similarity.value),
        block_p=block_p,
        diverged=strangers if outcome != "independent" else (),
    )


def _like_a_stranger(similarity: Similarity, null: NullDistribution, config: VerdictConfig) -> bool:
    score = similarity.value
    inside = min(null.p_value(score), null.lower_p(score)) > config.central
    return inside and not (similarity.fit is not None and similarity.fit >= config.fit)


def public_null(size: int, depth: int, *, block: bool = False) -> NullDistribution:
    """Return the null of a sketched score: measured pairs, and the sketch's own spread.

    A product's sketched cosine spreads by 1/size around the exact one for strangers; a score
    averages 2 products of each of ``depth`` blocks, a block's only 2.
    """
    check(size >= 1, "size", size, ">= 1 (side of the sketch)")
    check(depth >= 1, "depth", depth, ">= 1 (blocks)")
    exact = NullDistribution(tuple(PUBLIC_MEASURED.values()))
    own = max(exact.sd, 0.07) if block else exact.sd  # twins' single blocks: up to 0.07
    terms = 2 if block else 2 * depth
    return NullDistribution(exact.scores, math.hypot(own, 1.0 / (size * math.sqrt(terms))))


def judge_public(
    similarity: Similarity, width: int, size: int, *, config: VerdictConfig | None = None
) -> Judgement:
    """Judge the whitened invariants' sketched score, what public fingerprint files give."""
    depth = max(1, len(similarity.per_block))
    return judge(
        similarity,
        width,
        null=public_null(size, depth),
        per_block=public_null(size, depth, block=True),
        config=config,
    )


def judge_widths(
    similarity: Similarity, width: int, *, config: VerdictConfig | None = None
) -> Judgement:
    """Judge the score of models of different width.

    Args:
        similarity: of :func:`fedsplit.fingerprints.methods.widths.compare_widths`.
        width: the narrower model's.
        config: how sure a verdict must be.
    """
    scores = tuple(WIDTHS_MEASURED.values())
    null = NullDistribution(scores, analytic_sd(width, max(1, 2 * len(similarity.per_block))))
    single = NullDistribution(scores, max(analytic_sd(width, 2), 0.1))  # twins' blocks: to 0.25
    return judge(similarity, width, null=null, per_block=single, config=config)


def not_comparable(why: str) -> tuple[Similarity, Judgement]:
    """Return what is said of two models that nothing here can lay over each other: not shown."""
    config = VerdictConfig()
    judgement = Judgement("not_shown", 0.0, 1.0, config.alpha, config.least, 0.0, (), ())
    return Similarity(0.0, {}, (), (f"not comparable by this fingerprint: {why}",)), judgement


def separation(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Return AWM's |Z|: the positives' mean distance from the negatives in the negatives' sd."""
    null = NullDistribution(tuple(negatives))
    return sum(abs(null.z(p)) for p in positives) / max(1, len(positives))
