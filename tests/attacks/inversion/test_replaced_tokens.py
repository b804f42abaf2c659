"""Reading the text behind another: the channel is a distribution, and language sharpens it."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsplit.attacks import Public, Truth, View, make_attack, suited
from fedsplit.attacks.inversion.replaced_tokens import ReplacedTokens
from fedsplit.privacy.denoising.candidates import MatrixCandidates
from fedsplit.privacy.mechanisms.nearest_token import NearestToken
from fedsplit.privacy.secret import OwnerSecret

V, D = 120, 12
TABLE = torch.randn(V, D, generator=torch.Generator().manual_seed(0))


def texts(count: int, seed: int) -> list[Tensor]:
    """Return walks of a sparse chain: each word has three followers, the first the likeliest."""
    chance = torch.Generator().manual_seed(seed)
    followers = torch.randint(4, V, (V, 3), generator=torch.Generator().manual_seed(9))
    found = []
    for _ in range(count):
        word, row = int(torch.randint(4, V, (), generator=chance)), []
        for _ in range(14):
            row.append(word)
            at = int(torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), 1, generator=chance))
            word = int(followers[word, at])
        found.append(torch.tensor([2, *row, 3]))
    return found


def sent(mechanism: NearestToken, ids: list[Tensor]) -> list[Tensor]:
    secret = OwnerSecret.for_simulation(0, "o")
    return [TABLE[mechanism.replaced(x, secret.stream(i))] for i, x in enumerate(ids)]


def mechanism(eta: float) -> NearestToken:
    return NearestToken(
        eta, MatrixCandidates(TABLE), lambda ids, mask: TABLE[ids], frozenset({2, 3})
    )


def view(eta: float, ids: list[Tensor]) -> View:
    public = [x.tolist() for x in texts(400, 1)]
    of = Public(
        mechanism=mechanism(eta),
        public_ids=public,
        special_ids=frozenset({2, 3}),
        candidate_set=MatrixCandidates(TABLE),
        bottom=type("Bottom", (), {"vocab": V, "k": 0, "task": "sequence-classification"}),
    )
    return View(of, sent(mechanism(eta), ids))


def test_the_channel_is_that_of_the_mechanism():
    law = mechanism(3.0)
    attack = ReplacedTokens(played=3000, alternatives=V)

    channel = attack.fit(law, [x.tolist() for x in texts(300, 2)])
    matrix = channel.log_likelihood(torch.arange(V)).T.exp()  # (true, sent)

    # Alternatives are all tokens, and the token itself is counted twice among them at most.
    assert float((matrix.sum(1) - 1).abs().max()) < 0.2
    fresh = OwnerSecret.for_simulation(5, "other")
    ids = torch.randint(4, V, (4000,), generator=torch.Generator().manual_seed(3))
    stays = float((law.replaced(ids, fresh.stream(0)) == ids).double().mean())
    assert abs(float(matrix.diagonal()[4:].mean()) - stays) < 0.1
    uniform = torch.full_like(matrix, 1 / V)
    drawn = law.replaced(ids, fresh.stream(1))
    gain = matrix[ids, drawn].clamp_min(1e-12).log() - uniform[ids, drawn].log()
    assert float(gain.mean()) > 0.5  # nats by which it foretells what is sent


def test_language_reads_what_the_nearest_token_does_not():
    ids = texts(40, 3)
    seen = view(3.0, ids)
    read = {name: make_attack(name).run(seen, Truth(ids=ids)).success for name in NAMES}
    assert read["replaced_tokens"] > read["nearest"] + 0.1, read


NAMES = ("nearest", "replaced_tokens")


def test_a_text_that_keeps_itself_is_read_as_it_is():
    ids = texts(10, 4)
    seen = view(1e4, ids)
    assert make_attack("replaced_tokens").run(seen, Truth(ids=ids)).success > 0.99


def test_it_fits_only_where_tokens_are_replaced():
    seen = view(3.0, texts(3, 5))
    assert [a.name for a in suited(seen)] == list(NAMES)
    seen.public.mechanism = None
    assert "replaced_tokens" not in [a.name for a in suited(seen)]
