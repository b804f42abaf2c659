"""Every mechanism and denoiser through a whole run: what left, and that it left once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedsplit.errors import ConfigError
from fedsplit.privacy.denoising.learned import Recipe
from strategies.split_tuning.denoising import CACHE_VARIABLE, DENOISERS, build_denoiser

NOISE: dict[str, dict[str, Any]] = {
    "dchi": {"privacy__eta": 8.0},
    "gaussian": {"privacy__epsilon": 20.0},
    "nearest-token": {"privacy__noise_ratio": 2.0},
    "pac": {"privacy__budget": 20.0},
    "pac of its own": {"privacy__budget": 20.0, "privacy__covariance": "own"},
    "shaped": {
        "privacy__epsilon": 20.0,
        "privacy__row_clip": "auto",
        "privacy__task_words": "w1 w2 w3 | w40 w41 w42",
    },
}


PLAIN: dict[str, Tensor] = {}
"""What leaves without noise; the same for every mechanism, so it is made once."""


def options(name: str) -> dict[str, Any]:
    return {"privacy__mechanism": name.split()[0], **NOISE[name]}


def transcript(run: Any) -> dict[str, Tensor]:
    held: dict[str, Tensor] = load_file(run.folder / "transcript.safetensors")
    return held


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(
        "strategies.split_tuning.denoising.Recipe", partial(Recipe, width=32, steps=12)
    )


@pytest.fixture
def few(make_config: Any, tmp_path: Path) -> Any:
    """Return the settings of a run of seconds."""
    public = tmp_path / "public.txt"
    public.write_text("".join(f"w{i} w{i + 1} w{7 * i % 90} w3\n" for i in range(60)))

    def make(**overrides: Any) -> Any:
        few = {"train__rounds": 1, "train__max_steps": 1, "data__owners": 2, "data__limit": 40}
        return make_config(**{**few, "privacy__public_text": str(public), **overrides})

    return make


@pytest.mark.parametrize("name", NOISE)
def test_what_left_is_noisy_finite_and_the_same_after_a_restart(
    few: Any, run_locally: Any, tmp_path: Path, name: str
) -> None:
    first, again = (
        transcript(run_locally(few(output__dir=str(tmp_path / part), **options(name))))
        for part in ("a", "b")
    )
    if not PLAIN:
        PLAIN.update(transcript(run_locally(few(output__dir=str(tmp_path / "plain")))))

    rows = [k for k in PLAIN if k.endswith("/rows")]
    assert rows
    for key in rows:
        assert torch.isfinite(first[key]).all()
        assert torch.equal(first[key], again[key])
        assert not torch.allclose(first[key].float(), PLAIN[key].float())


@pytest.mark.parametrize("name", ["nearest-token"])
def test_text_to_text_runs_with_blocks_in_the_bottom(few: Any, run_locally: Any, name: str) -> None:
    run = run_locally(few(split__k=2, **options(name)))

    assert run.server["rounds"][0]["train"]["steps"] == 1


@pytest.mark.parametrize("denoise", DENOISERS)
def test_denoisers_run_and_say_what_they_cost(few: Any, run_locally: Any, denoise: str) -> None:
    config = few(privacy__denoise=denoise, **options("dchi"))

    rounds = run_locally(config).server["rounds"]

    cost = [r[mode]["denoising"] for r in rounds for mode in ("train", "evaluate") if mode in r]
    assert cost[0]["denoise"] == denoise
    assert cost[0]["seconds_per_token"] * cost[0]["tokens"] == pytest.approx(cost[0]["seconds"])
    assert 0 < cost[0]["tokens"] < cost[1]["tokens"]  # what is held out comes later


@pytest.mark.parametrize("name", ["gaussian", "pac", "shaped"])
def test_posteriors_know_every_law(few: Any, run_locally: Any, name: str) -> None:
    config = few(privacy__denoise="unigram", privacy__cti="purity", **options(name))

    assert run_locally(config).server["rounds"][0]["evaluate"]["denoising"]["tokens"] > 0


def test_learned_denoiser_is_taught_once(few: Any, run_locally: Any, tmp_path: Path) -> None:
    common = {"privacy__denoise": "learned", "split__k": 1, **options("nearest-token")}

    runs = [run_locally(few(output__dir=str(tmp_path / part), **common)) for part in "ab"]

    first, again = (r.server["rounds"][0]["evaluate"]["denoising"] for r in runs)
    assert "from_cache" not in first
    assert again["from_cache"]
    assert first["unexplained"] == again["unexplained"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"privacy__denoise": "unigram", "split__k": 1}, "needs split.k = 0"),
        ({"privacy__denoise": "learned", "split__bottom": "joint"}, "needs a frozen bottom"),
    ],
)
def test_denoisers_without_their_conditions_are_refused(
    few: Any, changed: dict[str, Any], message: str
) -> None:
    config = few(**options("dchi"), **changed)

    with pytest.raises(ConfigError, match=message):
        build_denoiser(config, None, None, None)  # type: ignore[arg-type]  # refused before use


def test_text_to_text_with_a_bottom_that_learns_is_refused(few: Any, run_locally: Any) -> None:
    with pytest.raises(ConfigError, match=r"must be another where split\.bottom is 'joint'"):
        run_locally(few(split__bottom="joint", **options("nearest-token")))


@pytest.mark.parametrize("cti", ["public-idf", "frequent"])
def test_tokens_are_chosen_without_labels(few: Any, run_locally: Any, cti: str) -> None:
    config = few(
        privacy__cti=cti, privacy__cti_max_share=0.3, privacy__cti_rho=0.0, **options("dchi")
    )

    metrics = run_locally(config).server["rounds"][0]["train"]["metrics"]

    assert metrics["share-touched"] <= 0.3
