"""Rows behind blocks read by the states that tokens have: exact laws, noise, and bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedsplit.attacks import Public, Truth, View, make_attack
from fedsplit.attacks.inversion.averaging import MeanOfViews
from fedsplit.attacks.inversion.carried_states import Whitened, noise_covariance
from fedsplit.attacks.inversion.learned import DrawnNoise, represent
from fedsplit.attacks.inversion.proposals import proposals
from fedsplit.attacks.inversion.row_evidence import RowEvidence
from fedsplit.attacks.inversion.token_states import TokenStates
from fedsplit.errors import AttackError, ConfigError
from fedsplit.privacy import DChi
from fedsplit.privacy.mechanisms.base import clip_rows
from fedsplit.privacy.mechanisms.shaped import Shaped
from tests.attacks.inversion import behind_blocks
from tests.attacks.inversion.behind_blocks import SAVE, tiny_bottom


@pytest.fixture(scope="module", params=sorted(SAVE))
def world(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bottom of two blocks, public and private texts; half of the vocabulary is never public."""
    bottom = tiny_bottom(request.param, tmp_path_factory.mktemp(request.param))
    draw = torch.Generator().manual_seed(5)

    def texts(count: int, among: int) -> list[Tensor]:
        sizes = torch.randint(4, 10, (count,), generator=draw).tolist()
        return [torch.randint(among, (n,), generator=draw) for n in sizes]

    return bottom, texts(300, bottom.vocab // 2), texts(20, bottom.vocab)


def seen(world: Any, ratio: float, clip: float = 0.0) -> View:
    return behind_blocks.seen(*world, ratio, clip)


def read(world: Any, attack: str, ratio: float, clip: float = 0.0, **own: Any) -> Any:
    return make_attack(attack, **own).run(seen(world, ratio, clip), Truth(ids=world[2]))


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.5])
def test_more_is_read_than_by_a_taught_model(world: Any, ratio: float) -> None:
    found = read(world, "token_states", ratio)
    assert found.success > read(world, "learned", ratio, steps=40).success
    assert found.top10 >= found.success > found.baseline


def test_tokens_that_public_text_lacks_are_read_where_blocks_leave_them(world: Any) -> None:
    view = seen(world, 0.0)
    if view.public.bottom.model.config.model_type != "bert":
        pytest.skip("two random blocks of this family leave little of any token")
    found = TokenStates().read(view).top
    half = world[0].vocab // 2
    pairs = [
        (g, y)
        for x, ids in zip(found, world[2], strict=True)
        for g, y in zip(x[:, 0], ids, strict=True)
    ]
    rare = [bool(g == y) for g, y in pairs if y >= half]
    assert sum(rare) > 0.8 * len(rare) > 20


def test_noise_takes_from_what_is_read(world: Any) -> None:
    shares = [read(world, "token_states", ratio).success for ratio in (0.0, 1.5, 20.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < shares[0] / 2


def test_rows_that_owners_clip_are_compared_with_clipped_states(world: Any) -> None:
    norms = torch.cat(represent(world[0], world[2])).norm(dim=1)
    clip = 0.5 * float(norms.min())
    assert read(world, "token_states", 1e-3, clip).success > 0.8 * (
        read(world, "token_states", 0.0).success
    )


def test_the_mean_of_views_is_clipped_as_each_view_is(world: Any) -> None:
    law = DChi(3.0, row_clip=0.25)
    mean = MeanOfViews(of=law, views=4, row_clip=law.row_clip)
    assert mean.sent_norm == law.sent_norm == 0.25
    rows = represent(world[0], world[2][:1])[0]
    evidence = RowEvidence(Public(world[0], mean), clip_rows(rows, 0.25))
    told = evidence(rows.unsqueeze(0))
    assert torch.allclose(told, evidence(clip_rows(rows, 0.25).unsqueeze(0)))


def test_a_reader_is_made_once_and_found_in_what_is_known(world: Any) -> None:
    view = seen(world, 0.0)
    attack = TokenStates()
    reader = attack.taught(view.public)
    assert attack.taught(view.public) is reader is view.public.token_reader
    with pytest.raises(AttackError, match=r"must be \(T, "):
        reader.scores(torch.zeros(3, 2))


def test_a_bound_of_seconds_leaves_the_most_frequent_tokens(world: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("fedsplit.attacks.inversion.token_states.AT_ONCE", 16)
    view = seen(world, 0.0)
    reader = TokenStates(seconds=1e-9).taught(view.public)
    order = view.public.log_prior().argsort(descending=True)
    assert torch.equal(reader.tokens, order[:16])
    (guess,) = reader.rank(view.rows[:1], 40)
    assert guess.shape == (len(world[2][0]), 16)


@pytest.mark.parametrize("name", ["contexts", "context_tokens", "public_samples", "top_k"])
def test_fields_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=0: must be >= 1"):
        make_attack("token_states", **{name: 0})
    with pytest.raises(ConfigError, match="seconds=-1"):
        make_attack("token_states", seconds=-1)


def test_whitened_scores_are_gaussian_log_densities_up_to_a_row_constant() -> None:
    draw = torch.Generator().manual_seed(1)
    root = torch.randn(6, 6, generator=draw).double()
    covariance = root @ root.T + torch.eye(6).double()
    means, rows = torch.randn(9, 6, generator=draw), torch.randn(4, 6, generator=draw)
    found = Whitened.of(means, covariance, 0.0).scores(rows)
    law = torch.distributions.MultivariateNormal(means.double(), covariance)
    wanted = law.log_prob(rows.double().unsqueeze(1))  # (4, 9)
    left = found.double() - wanted
    assert torch.allclose(left, left[:, :1].expand_as(left), atol=1e-4)


@pytest.mark.parametrize("rows", [3, 4000])
@pytest.mark.parametrize("shaped", [False, True])
def test_the_noises_covariance_is_the_laws_however_few_rows_tell_it(
    rows: int, shaped: bool
) -> None:
    draw = torch.Generator().manual_seed(2)
    clean = [torch.randn(rows, 8, generator=draw)]
    law: Any = DChi(2.0)
    wanted = torch.eye(8).double() * law.mean_noise_norm(8) ** 2 / 8
    if shaped:
        directions = torch.linalg.qr(torch.randn(8, 2, generator=draw).double()).Q
        law = Shaped(epsilon=1.0, delta=1e-5, clip=1e3, spare=0.2, directions=directions)
        whiten = law.whitener()
        wanted = law.sigma**2 * torch.linalg.inv(whiten @ whiten.T)
    found = noise_covariance(clean, DrawnNoise(law, 0))
    ratio = float(found.trace() / wanted.trace())
    assert torch.allclose(found, ratio * wanted, atol=1e-6 * float(wanted.max()))
    assert 0.4 < ratio < 2.5
    sample = torch.cat([DrawnNoise(law, n)(clean[0]) - clean[0] for n in range(20)]).double()
    if rows > 100:
        empirical = sample.T @ sample / len(sample)
        assert torch.allclose(found, empirical, atol=0.05 * float(wanted.max()))


def test_a_large_common_part_costs_no_precision() -> None:
    draw = torch.Generator().manual_seed(3)
    means = torch.randn(200, 16, generator=draw) + 1e4 * torch.randn(16, generator=draw)
    found = Whitened.of(means, torch.zeros(16, 16).double(), 1e-8)
    assert torch.equal(found.scores(means).argmax(1), torch.arange(200))


def test_few_public_rows_lose_little(world: Any) -> None:
    def read_with(texts: int) -> float:
        view = seen(world, 1.0)
        view.public.public_ids = view.public.public_ids[:texts]
        return make_attack("token_states").run(view, Truth(ids=world[2])).success

    assert read_with(8) > 0.5 * read_with(300)


def test_a_reader_of_other_settings_is_not_taken_for_this_ones(world: Any) -> None:
    view = seen(world, 0.0)
    first = TokenStates().taught(view.public)
    assert TokenStates(top_k=3).taught(view.public) is first
    other = TokenStates(contexts=1).taught(view.public)
    assert other is not first
    assert proposals(view.public, view.rows, 4) is not None
    assert view.public.token_reader is other


def test_public_text_without_two_tokens_is_refused(world: Any) -> None:
    for texts in ([], [[3], [4]], [[4, 3, 3], [3, 3]]):
        view = View(Public(world[0], None, texts, frozenset({3})), seen(world, 0.0).rows)
        assert not TokenStates().applies(view)
        assert proposals(view.public, view.rows, 4) is None
        for name in ("token_states", "text_search"):
            with pytest.raises(AttackError, match="two tokens"):
                make_attack(name).run(view, Truth(ids=world[2]))


def test_what_leaves_at_another_width_is_refused() -> None:
    class Wider:
        mechanism = DChi(1.0)

        def __call__(self, x: Tensor) -> Tensor:
            return torch.cat([x, x], 1)

    with pytest.raises(AttackError, match="must be"):
        noise_covariance([torch.zeros(2, 3)], Wider())  # type: ignore[arg-type]
