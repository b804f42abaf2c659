"""Ways to read by comparing sends that the suite's cases do not play: each is bounded by views."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsplit.errors import PolicyError
from fedsplit.owners.ledger.chain import Ledger
from fedsplit.owners.ledger.check import DisclosureCheck
from fedsplit.owners.ledger.disclosure import Outgoing, Representations, Source
from fedsplit.owners.ledger.session import SessionFacts
from fedsplit.owners.policy.rules import Asked, Policy
from fedsplit.owners.samples import text_identity
from fedsplit.privacy import OwnerSecret, SamplePerturber, build
from fedsplit.wire.frames import Kind
from simulations.adversary.context import Field
from simulations.adversary.material import directions, pack, tiny, word_tokenizer
from simulations.adversary.reading import nearest
from simulations.adversary.server import LyingServer, settings, split_script, zeros
from simulations.adversary.victim import strict_policy

WIDTH = 48

SPLIT = "split-tuning"


@pytest.fixture
def field(tmp_path: Path) -> Iterator[Field]:
    with LyingServer() as server:
        yield Field(tmp_path, server, quick=True)


def two_bottoms(field: Field) -> tuple[Any, Any, list[Any], list[Tensor]]:
    """Return texts, settings, and two bottoms of other word vectors with one tokenizer."""
    texts = field.corpus(12)
    tokenizer = word_tokenizer(texts.words)
    tables = [directions(len(tokenizer), WIDTH, seed) for seed in (1, 2)]
    bundles = [pack(tiny(tokenizer, table=t, width=WIDTH), 0, tokenizer)[0] for t in tables]
    flat = settings(
        privacy__mechanism="dchi",
        privacy__noise_ratio=12.0,
        labels__protection="randomised-response",
    )
    return texts, flat, bundles, tables


def test_the_difference_of_two_bottoms_rows_cannot_be_had(field: Field) -> None:
    """With one noise on both sends, their difference would be a table that is free of noise."""
    texts, flat, bundles, tables = two_bottoms(field)
    policy = strict_policy(budget__views_per_bottom=1, budget__views_total=2)
    victim = field.victim(texts, policy)
    truth, _ = field.truth(victim, flat, bundles[0], tables[0])

    sends = [
        field.server.session(victim, flat, split_script(b, zeros(2)), digest=b.digest).rows
        for b in bundles
    ]

    difference = tables[0] - tables[1]
    read = right = bare = 0
    for slot, ids in truth.items():
        rows = [send[slot] for send in sends]
        guess = nearest(rows[0] - rows[1], difference).tolist()
        right += sum(a == b for a, b in zip(guess, ids, strict=True))
        cancelled = nearest(tables[0][ids] - tables[1][ids], difference).tolist()
        bare += sum(a == b for a, b in zip(cancelled, ids, strict=True))
        read += len(ids)
    assert bare == read  # what shared noise would have told
    assert right / read < 0.1


def test_a_third_bottom_gets_nothing_of_a_text_seen_twice(field: Field) -> None:
    texts, flat, bundles, _ = two_bottoms(field)
    victim = field.victim(texts, strict_policy(budget__views_per_bottom=1, budget__views_total=1))

    first, second, again = (
        field.server.session(victim, flat, split_script(b, zeros(2)), digest=b.digest)
        for b in (bundles[0], bundles[1], bundles[0])
    )

    assert first.rows
    assert not second.rows
    assert "budget.views_total" in second.told[0]
    assert again.rows.keys() == first.rows.keys()  # what it has already, it may have again
    assert all(torch.equal(again.rows[slot], rows) for slot, rows in first.rows.items())


def test_a_joint_bottom_that_does_not_move_shows_nothing_new(field: Field) -> None:
    """Other rounds and modes once drew other noise on the same rows."""
    texts, flat, bundles, _ = two_bottoms(field)
    policy = strict_policy(
        budget__views_per_bottom=1, budget__views_total=1, model__bottom=["joint"]
    )
    victim = field.victim(texts, policy)
    flat |= {"split.bottom": "joint"}

    sends = [
        field.server.session(
            victim,
            flat,
            split_script(bundles[0], zeros(2)),
            digest=bundles[0].digest,
            kind="evaluate",
            round=number,
        )
        for number in (1, 2, 3)
    ]

    assert sends[0].rows
    for taken in sends[1:]:
        assert taken.rows.keys() == sends[0].rows.keys()
        assert all(torch.equal(taken.rows[slot], rows) for slot, rows in sends[0].rows.items())


def test_one_size_of_batch_tells_what_any_other_does(field: Field) -> None:
    """Bits that depend on company would be a new view, or a difference."""
    texts = field.corpus(12)
    tokenizer = word_tokenizer(texts.words)
    bundle, _, _ = pack(tiny(tokenizer, width=WIDTH), 1, tokenizer)
    # What attackers that learn would read is nothing to the batches: they get two seconds.
    victim = field.victim(texts, strict_policy(budget__views_total=1, measure__seconds=2))
    flat = settings(
        split__k=1,
        privacy__mechanism="dchi",
        privacy__noise_ratio=12.0,
        labels__protection="randomised-response",
    )

    sends = [
        field.server.session(
            victim,
            flat | {"train.batch-size": size, "seed": seed},
            split_script(bundle, zeros(2)),
            digest=bundle.digest,
        ).rows
        for size, seed in ((1, 0), (3, 1), (64, 2))
    ]

    assert len(sends[0]) > 5
    for rows in sends[1:]:
        assert rows.keys() == sends[0].keys()
        assert all(torch.equal(rows[slot], sends[0][slot]) for slot in rows)


# ---- one budget for all that asks ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "mode", "bottom"), [(8, "train", "a"), (7, "evaluate", "a"), (7, "predict", "b")]
)
def test_a_text_has_one_budget_whatever_asks_for_it(
    tmp_path: Path, run: int, mode: str, bottom: str
) -> None:
    """Another run, mode or bottom buys no second noise on a text, and no tokens are a new text."""
    rules = Policy.parse(b"[budget]\nviews_total = 1")
    secret, ids = OwnerSecret(bytes(32)), torch.arange(4)
    perturber = SamplePerturber(build("dchi", eta=1.0), secret, "b:0")
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    text = text_identity("w1 w2")

    def record(ledger: Ledger, rows: Tensor, ids: Tensor, facts: SessionFacts) -> bytes:
        sent = perturber.view(rows, ids, text)
        shown = Representations(
            used=1,
            epochs=None,
            texts=(text,),
            noises=(sent.noise,),
            rows=sent.rows,
            touched=0,
            source=Source(torch.nn.Identity(), perturber, len(ids), len(ids)),
        )
        header = {"step": 0, "slots": [0], "fresh": [0], "lengths": [len(ids)]}
        frame = Outgoing(Kind.BATCH, header | {"codec": "fp32", "dim": 8, "last": True}, shown)
        return DisclosureCheck(ledger, facts, rules, secret).record(frame)

    with Ledger(tmp_path) as ledger:
        first = record(
            ledger, rows, ids, SessionFacts(7, "x", 1, "train", "a" * 64, strategy=SPLIT)
        )
        strategy = "serving" if mode == "predict" else SPLIT
        other = SessionFacts(run, "x", 1, mode, bottom * 64, strategy=strategy)
        assert record(ledger, rows, ids, other) == first  # the same rows, the same bytes
        with pytest.raises(PolicyError, match=r"budget\.views_total: asked 2"):
            record(ledger, rows[:3], ids[:3] + 5, other)
        assert [row.views for row in ledger.totals.exposure.most_exposed(5)] == [1]


@pytest.mark.parametrize(
    ("rules", "clip", "ok"),
    [
        ("require_clip = true", "off", False),
        ("require_clip = true", "auto", True),
        ("require_clip = true", "1000000.0", False),
        ("require_clip = true\nmax_clip = 5.0", "1000000.0", False),
        ("require_clip = true\nmax_clip = 5.0", "4.5", True),
        ("max_clip = 5.0", "off", True),
        ("require_clip = false", "7.0", True),
    ],
)
def test_a_norm_is_the_owners_or_within_its_bound(rules: str, clip: str, ok: bool) -> None:
    flat = settings(privacy__mechanism="dchi", privacy__eta=1.0, privacy__row_clip=clip)
    found = Policy.parse(f"[noise]\n{rules}".encode()).settings_breaches(Asked(flat))
    assert (found == []) == ok
