"""A joint bottom never meets the same noise twice, however a server numbers its rounds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fedsplit.client import task as client_work
from fedsplit.client.task import _Work


def work(folder: Any, exchange: int, transport: str = "messages") -> _Work:
    made = _Work.__new__(_Work)
    made.offer = SimpleNamespace(  # type: ignore[assignment]
        run=1, node=2, round=1, mode="train", transport=transport, exchange=exchange
    )
    made.identity = SimpleNamespace(  # type: ignore[assignment]
        home=SimpleNamespace(run_dir=lambda run, node: folder)
    )
    made._name_session()
    return made


@pytest.mark.parametrize("transport", ["stream", "messages"])
def test_every_session_has_a_name_of_its_own(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    monkeypatch.setattr(client_work, "in_simulation", lambda: False)
    names = {work(tmp_path, 0, transport)._session_name() for _ in range(4)}
    assert len(names) == 4  # the same run, round and mode each time


def test_a_session_over_messages_keeps_its_name(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_work, "in_simulation", lambda: False)
    first = work(tmp_path, 0)._session_name()
    assert work(tmp_path, 1)._session_name() == first
    assert work(tmp_path, 2)._session_name() == first


def test_simulations_repeat_themselves(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_work, "in_simulation", lambda: True)
    assert work(tmp_path, 0)._session_name() == work(tmp_path, 0)._session_name()
