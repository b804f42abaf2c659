"""Fixtures for runs within one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsplit.config import RunConfig
from fedsplit.settings import read_settings
from tests.strategies.local_grid import LocalGrid
from tests.tiny_models import save_texts, save_tiny_bert, save_tiny_llama


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl", 120)


@pytest.fixture
def make_config(
    tiny_bert: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Return a function from overrides to the settings of a small classification run."""
    monkeypatch.setenv("FEDSPLIT_SIMULATION", "1")
    monkeypatch.setenv("FEDSPLIT_HOME", str(tmp_path / "homes"))

    def make(**overrides: Any) -> RunConfig:
        flat: dict[str, Any] = {
            "model.name": str(tiny_bert),
            "model.labels": 3,
            "model.max-tokens": 16,
            "train.rounds": 2,
            "train.batch-size": 4,
            "train.max-steps": 3,
            "train.lr": 1e-2,
            "data.kind": "file",
            "data.path": str(texts),
            "data.owners": 3,
            "data.partition": "iid",
            "session.codec": "fp32",
            "session.wave-wait-s": 120.0,
            "session.deadline-s": 120.0,
            "output.dir": str(tmp_path / "server"),
            "output.transcript": True,
            # Sums differ in the last bit with the number of threads, which each thread has its own.
            "output.threads": 1,
        }
        flat.update({k.replace("__", ".").replace("_", "-"): v for k, v in overrides.items()})
        return read_settings(flat)

    return make


@pytest.fixture(scope="session")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A public text that is read in no time, unlike the interpreter's docstrings."""
    path = tmp_path_factory.mktemp("public") / "public.txt"
    path.write_text("\n".join(f"the {i} th public line of words" for i in range(200)))
    return path


@pytest.fixture
def offsite(make_config: Any, tiny_llama: Path, public: Path) -> Any:
    """Return a function from overrides to the settings of a small offsite-tuning run."""

    def make(**overrides: Any) -> RunConfig:
        return make_config(
            **{
                "strategy": "offsite-tuning",
                "model__name": str(tiny_llama),
                "model__task": "causal-lm",
                "data__owners": 2,
                "offsite__compressor": "layerdrop",
                "offsite__positions": "0,2",
                "offsite__keep": 1,
                "offsite__settle_steps": 0,
                "offsite__block": 8,
                "offsite__public": str(public),
                "train__optimizer": "sgd",
                "train__lr": 0.1,
                "train__clip": 0.0,
                "train__warmup": 0.0,
                "train__schedule": "constant",
                "train__weight_decay": 0.0,
                "train__batch_size": 2,
                "train__max_steps": 1,
                "train__rounds": 3,
                "output__transcript": False,
                **overrides,
            }
        )

    return make


@pytest.fixture
def quick(offsite: Any) -> Any:
    """Return a function as ``offsite``, of runs that evaluate nothing."""
    return lambda **changes: offsite(**{"output__evaluate_every": 0, **changes})


@pytest.fixture
def run_locally() -> Any:
    """Return a function that carries out a run within this process: config -> (grid, server)."""
    from tests.strategies.run_local import run_local

    return run_local


__all__ = ["LocalGrid"]
