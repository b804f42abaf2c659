"""What tests of the stream share."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.wire.stream_peers import eventually
from tests.wire.wire_certificates import Authority


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("right authority")


@pytest.fixture
def no_thread_leak() -> Iterator[None]:
    """Every test closes what it opens; then none of the sessions' threads may be left."""
    before = set(threading.enumerate())
    yield
    left: list[threading.Thread] = []

    def none_left() -> bool:
        left[:] = [t for t in threading.enumerate() if t not in before]
        return not left

    assert eventually(none_left), left
