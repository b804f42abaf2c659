"""A lying server, and bottoms that it ships."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedsplit.models import load, split
from fedsplit.models.bundle.bottom import Bundle, pack_bottom
from fedsplit.models.bundle.head import with_head
from fedsplit.models.splitting.heads import detach_head
from tests.adversary.lying import LyingServer, Owner
from tests.tiny_models import WORDS, save_tiny_bert


@pytest.fixture
def server() -> Iterator[LyingServer]:
    with LyingServer() as lying:
        yield lying


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """An embeddings-only bottom, alone and with the head of its model."""
    folder = save_tiny_bert(tmp_path_factory.mktemp("lying"), classes=2)
    loaded = load(folder, "sequence-classification", num_labels=2)
    bottom, top = split(loaded.model, 0)
    alone = pack_bottom(bottom, loaded.tokenizer)
    return {"bottom": alone, "head": with_head(alone, detach_head(top))}


@pytest.fixture
def owner(tmp_path: Path) -> Callable[..., Owner]:
    """Return a function: policy -> an owner of 40 different texts with random labels."""

    def make(policy: str = "", count: int = 40, name: str = "owner") -> Owner:
        chance = random.Random(0)
        texts = [" ".join(chance.choices(WORDS, k=6)) + f" {i}" for i in range(count)]
        return Owner(tmp_path / name, texts, [chance.randrange(2) for _ in texts], policy)

    return make
