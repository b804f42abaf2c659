"""A lying server against the owner's real code: no variant reads more than it may.

Variants that the owner's code does not yet withstand are listed with what it lacks; each is a
strict expected failure, so whoever mends one has to take it off the list.
"""

from __future__ import annotations

from functools import cache

import pytest

from simulations.adversary.cases.table import CASES, play
from simulations.adversary.reading import Row

VARIANTS: dict[str, list[str]] = {
    "honest": ["noise ratio 50", "texts refused"],
    "subtraction": ["width of the batch", "order of single texts"],
    "bounds": ["dchi", "nearest-token", "pac", "gaussian", "shaped", "wide vectors"],
    "template": ["ratio 2, nearest", "ratio 6, nearest"],
    "views": [
        "one session",
        "other special tokens",
        "other cuts",
        "held-out texts chosen",
        "mode predict",
    ],
    "labels": [
        "max-norm, zero logits",
        "marvell, noise power 1e-9",
        "drawn again, other epsilons",
        "drawn again, other tokenizers",
        "digits of an average loss",
        "differences of accuracies",
        "client head, its weights known",
        "next tokens, client head",
    ],
    "errors": ["count of words, not finite", "largest label of a batch", "presence of a word"],
    "strategies": [
        "serving allowed, train asked",
        "serving allowed, evaluate asked",
        "offsite allowed, split over messages",
    ],
    "offsite": ["one block, one step", "rounds beyond every limit"],
    "accounting": ["own head, six runs", "adapters, six runs"],
    "resources": [
        "bottoms kept",
        "process ended, chain of replacements",
        "process ended, costly expression",
        "server's words in owner's log",
        "owner's words in server's log",
    ],
    "masked-sums": [
        "honest sums refused",
        "messages played again",
        "cohort of its own",
        "keys changed on their way",
        "other neighbours' keys",
        "settings changed between messages",
        "all but one dropped",
        "mask and mask key of one owner",
        "weights without masks",
    ],
}
# case -> what the owner's code lacks, and which of its variants still read too much
OPEN: dict[str, tuple[str, set[str]]] = {}


@cache
def played(case: str) -> dict[str, Row] | BaseException:
    """Return a case's rows, or why it ended: it is played once, whatever comes of it."""
    try:
        return {row.variant: row for row in play(case, quick=True)}
    except (Exception, pytest.fail.Exception) as error:
        return error


def rows(case: str) -> dict[str, Row]:
    found = played(case)
    if isinstance(found, BaseException):
        raise found
    return found


def parameters() -> list[object]:
    found = []
    for case, variants in VARIANTS.items():
        reason, still = OPEN.get(case, ("", set()))
        for variant in variants:
            marks = [pytest.mark.xfail(strict=True, reason=reason)] if variant in still else []
            found.append(pytest.param(case, variant, marks=marks, id=f"{case}: {variant}"))
    return found


@pytest.mark.parametrize(("case", "variant"), parameters())
def test_a_lying_server_reads_no_more_than_it_may(case: str, variant: str) -> None:
    # An owner that refuses everybody withstands everything, and shows nothing.
    assert rows("honest")["texts refused"].read == 0, "honest sessions do not go through"
    row = rows(case)[variant]
    assert row.read <= row.allowance, f"{row.read:.3f} of {row.targets} {row.unit}"


@pytest.mark.parametrize("case", list(VARIANTS))
def test_every_variant_is_listed(case: str) -> None:
    assert list(rows(case)) == VARIANTS[case]


def test_every_case_is_played() -> None:
    assert list(VARIANTS) == list(CASES)
