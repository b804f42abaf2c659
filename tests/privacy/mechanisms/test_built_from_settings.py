"""From settings to a mechanism: alike at both sides, for ever the same, at the level asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsplit.config import PrivacyConfig, RunConfig
from fedsplit.errors import ConfigError, PrivacyError
from fedsplit.models.loading import load
from fedsplit.models.splitting.halves import split
from fedsplit.privacy import (
    OwnerSecret,
    SamplePerturber,
    build_mechanism,
    choose_tokens,
    mechanism_type,
    representation_norm,
)
from fedsplit.privacy.mechanisms.calibration import Store, covariance_over, public_vectors
from fedsplit.privacy.mechanisms.pac import Pac
from tests.tiny_models import WORDS, save_tiny_bert

G = torch.Generator().manual_seed(0)
IDS = [torch.tensor([2, *torch.randint(4, 94, (n,), generator=G).tolist(), 3]) for n in (9, 5, 12)]
NOISY = ("dchi", "gaussian", "nearest-token", "pac", "shaped")
TASK = f"{WORDS[0]} {WORDS[1]} | {WORDS[2]} {WORDS[3]}"


class Shipped:
    def __init__(self, folder: Path, k: int) -> None:
        loaded = load(str(folder), "sequence-classification", num_labels=3)
        self.tokenizer: Any = loaded.tokenizer
        self.bottom, _ = split(loaded.model, k, verify=False)
        self.bottom.eval()

    def hidden(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.bottom(ids[None], torch.ones(1, len(ids), dtype=torch.int64))[0]


@pytest.fixture(scope="module", params=[0, 2])
def shipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    return Shipped(save_tiny_bert(tmp_path_factory.mktemp("bert")), request.param)


def made(shipped: Shipped, **options: Any) -> Any:
    bottom = shipped.bottom
    return build_mechanism(PrivacyConfig(**options), bottom, bottom.vocab, shipped.tokenizer)


@pytest.mark.parametrize("name", [name for name in NOISY if name != "shaped"])
def test_the_noise_ratio_means_the_same_for_every_mechanism(shipped: Shipped, name: str):
    mechanism = made(shipped, mechanism=name, noise_ratio=1.5)
    secret = OwnerSecret.for_simulation(0, "ratio")

    if name == "nearest-token":
        table = mechanism.candidates.matrix[0]
        median, d = float(table.norm(dim=1).median()), table.shape[1]
        assert d / mechanism.eta == pytest.approx(1.5 * median, rel=1e-3)
        return
    zeros = torch.zeros(3000, shipped.bottom.hidden_size)
    noise = mechanism.privatise(zeros, secret.stream("x"))
    norm = representation_norm(shipped.bottom, shipped.bottom.vocab)
    length = float(noise.square().sum(1).mean().sqrt())
    assert length == pytest.approx(1.5 * norm, rel=0.03)


@pytest.mark.parametrize("name", NOISY)
def test_both_sides_and_every_process_build_the_same(shipped: Shipped, name: str, tmp_path: Path):
    clip = "auto" if name == "shaped" else "off"
    config = PrivacyConfig(mechanism=name, noise_ratio=3.0, row_clip=clip, task_words=TASK)
    bottom = shipped.bottom

    owner = [
        build_mechanism(
            config,
            bottom,
            bottom.vocab,
            shipped.tokenizer,
            own=IDS,
            store=Store(tmp_path, "bottom:0"),
        )
        for _ in range(2)
    ]
    server = build_mechanism(config, bottom, bottom.vocab, shipped.tokenizer)

    assert owner[0].describe() == owner[1].describe() == server.describe()
    sent = [
        SamplePerturber(m, OwnerSecret.for_simulation(0, "o"), "b:0").perturb(
            shipped.hidden(IDS[0]), IDS[0]
        )
        for m in owner
    ]
    assert torch.equal(*sent)
    assert not torch.equal(sent[0], shipped.hidden(IDS[0]))


def test_nearest_token_sends_a_text_of_the_bottom_at_any_split_point(shipped: Shipped):
    mechanism = made(shipped, mechanism="nearest-token", noise_ratio=3.0)
    stream = OwnerSecret.for_simulation(0, "t").stream("a")
    same = OwnerSecret.for_simulation(0, "t").stream("a")

    sent = mechanism.privatise_sample(shipped.hidden(IDS[0]), IDS[0], stream)
    ids = mechanism.replace(IDS[0], same, None)

    assert torch.allclose(sent, shipped.hidden(ids), atol=1e-6)
    assert (ids[0], ids[-1]) == (2, 3)
    assert not torch.equal(ids, IDS[0])


def test_own_covariance_is_the_owners_and_stays_what_it_was(shipped: Shipped, tmp_path: Path):
    config = PrivacyConfig(mechanism="pac", budget=4.0, covariance="own", subsamples=1)
    bottom = shipped.bottom
    store = Store(tmp_path, "bottom:0")

    first = build_mechanism(config, bottom, bottom.vocab, own=IDS, store=store)
    # More text later must not reshape the noise of samples that were sent already.
    later = build_mechanism(config, bottom, bottom.vocab, own=[*IDS, *IDS[:2]], store=store)
    elsewhere = build_mechanism(
        config, bottom, bottom.vocab, own=IDS[:2], store=Store(tmp_path / "b", "bottom:0")
    )
    server = build_mechanism(config, bottom, bottom.vocab)

    assert isinstance(first, Pac)
    expected = torch.cov(torch.cat([shipped.hidden(x) for x in IDS]).double().T)
    assert torch.allclose(first.covariance, expected, atol=1e-5)
    assert first.describe() == later.describe()
    assert len({m.describe()["covariance_sha256"] for m in (first, elsewhere, server)}) == 3
    with pytest.raises(PrivacyError, match="must be given the owner's text"):
        build_mechanism(config, bottom, bottom.vocab, store=Store(tmp_path / "c", "bottom:0"))


def test_covariance_over_subsamples_covers_each_of_them():
    rows = [(1 + i % 3) * torch.randn(40, 5, generator=G, dtype=torch.float64) for i in range(6)]

    whole = covariance_over(rows, 3)

    _, vectors = torch.linalg.eigh(torch.cov(torch.cat(rows).T))
    for part in range(3):
        along = (torch.cat(rows[part::3]) @ vectors).var(dim=0)
        assert bool((along <= (vectors.T @ whole @ vectors).diagonal() * (1 + 1e-9)).all())
    assert torch.allclose(covariance_over(rows, 1), torch.cov(torch.cat(rows).T))
    with pytest.raises(ConfigError, match="samples=1"):
        covariance_over(rows[:1], 1)


def test_public_inputs_need_no_text_and_no_threads():
    class Words(nn.Module):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return ids.unsqueeze(2).float()

    seen = public_vectors(Words(), 5000, sequences=64)

    assert seen.shape == (64, 16, 1)
    assert seen.min() == 0
    assert seen.max() == 4999
    assert len(seen.unique()) == 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mechanism": "laplace"}, r"privacy\.mechanism='laplace': must be one of none, dchi"),
        ({"mechanism": "gaussian"}, r"privacy\.epsilon=0\.0: must be > 0 when"),
        (
            {"mechanism": "gaussian", "epsilon": 1.0, "noise_ratio": 1.0},
            r"privacy\.epsilon=1\.0: must be .*and 0 otherwise",
        ),
        ({"mechanism": "pac"}, r"privacy\.budget=0\.0: must be > 0 when"),
        ({"mechanism": "nearest-token"}, r"privacy\.eta=0\.0: must be > 0 when"),
        (
            {"mechanism": "pac", "budget": 1.0, "covariance": "own", "denoise": "learned"},
            r"privacy\.denoise='learned': must be 'off' where",
        ),
        (
            {"mechanism": "nearest-token", "eta": 1.0, "denoise": "unigram"},
            r"privacy\.denoise='unigram': must be 'off' or 'learned' for nearest-token",
        ),
    ],
)
def test_settings_that_make_no_mechanism_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        mechanism_type(PrivacyConfig(**options))


def run_config(**privacy: Any) -> RunConfig:
    return RunConfig.from_flat(
        {
            "privacy.mechanism": "dchi",
            "privacy.eta": 5.0,
            "model.max-tokens": 16,
            **{f"privacy.{k.replace('_', '-')}": v for k, v in privacy.items()},
        }
    )


def test_tokens_are_chosen_as_configured(shipped: Shipped):
    texts = [torch.tensor([2, 10, 11, 12, 3])] * 30 + [torch.tensor([2, 20, 11, 12, 3])] * 30
    labels = torch.tensor([0] * 30 + [1] * 30)

    def chosen(labels: Tensor | None = labels, **privacy: Any) -> Any:
        return choose_tokens(run_config(**privacy), texts, labels, shipped.tokenizer)

    assert chosen() is None
    assert chosen(cti="purity", cti_max_share=0.5).token_ids == {10, 20}
    assert not chosen(cti="frequent", cti_max_share=0.5).token_ids & {2, 3}
    assert chosen(None, cti="public-idf", cti_max_share=0.5).running_share <= 0.5
    with pytest.raises(ConfigError, match="statistic='purity': must be one of frequent"):
        chosen(None, cti="purity")
