"""Tokens and the authenticator: once, in time, for exactly one session."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedsplit
from fedsplit.errors import SessionError, TokenError
from fedsplit.wire.authentication import SessionAuthenticator
from fedsplit.wire.frames import PROTOCOL, Frame, Kind
from fedsplit.wire.tokens import MODES, TokenBook

WHO = (7, 2**64 - 1, 3, "train")


def hello(token: str, **changes: object) -> Frame:
    header = {
        "protocol": PROTOCOL,
        "classes": "",
        "version": fedsplit.__version__,
        "token": token,
        "run": WHO[0],
        "node": WHO[1],
        "round": WHO[2],
        "mode": WHO[3],
        "owner": "owner-1",
        "digest": "ab",
    }
    return Frame(Kind.HELLO, {**header, **changes})


def test_a_token_is_accepted_once():
    book = TokenBook()
    token = book.issue(*WHO)

    book.redeem(token, *WHO)

    with pytest.raises(TokenError, match="already used"):
        book.redeem(token, *WHO)


def test_a_token_is_accepted_once_among_threads():
    book = TokenBook()
    tokens = [book.issue(*WHO) for _ in range(50)]
    gate = threading.Barrier(8)

    def redeem_all(_: int) -> int:
        gate.wait()
        accepted = 0
        for token in tokens:
            try:
                book.redeem(token, *WHO)
                accepted += 1
            except TokenError:
                pass
        return accepted

    with ThreadPoolExecutor(8) as pool:
        accepted = sum(pool.map(redeem_all, range(8)))

    assert accepted == len(tokens)


def test_expiry():
    now = [1000.0]
    book = TokenBook(lifetime_s=60, clock=lambda: now[0])
    first, second = book.issue(*WHO), book.issue(*WHO)

    now[0] = 1060.0
    book.redeem(first, *WHO)
    now[0] = 1061.0

    with pytest.raises(TokenError, match="expired 1 s ago"):
        book.redeem(second, *WHO)


def test_used_tokens_stay_used_while_old_ones_are_forgotten(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    book = TokenBook(lifetime_s=60, clock=lambda: now[0])
    book._used = {str(i): -1 for i in range(100_000)}
    token = book.issue(*WHO)

    book.redeem(token, *WHO)

    assert len(book._used) == 1
    with pytest.raises(TokenError, match="already used"):
        book.redeem(token, *WHO)


@pytest.mark.parametrize(
    "other",
    [(8, *WHO[1:]), (7, 1, 3, "train"), (*WHO[:2], 4, "train"), (*WHO[:3], "evaluate")],
    ids=["run", "node", "round", "mode"],
)
def test_foreign_tokens_are_refused_and_not_used_up(other: tuple[int, int, int, str]):
    book = TokenBook()
    token = book.issue(*WHO)

    with pytest.raises(TokenError, match="one issued for this"):
        book.redeem(token, *other)

    book.redeem(token, *WHO)


def test_another_books_tokens_are_refused():
    with pytest.raises(TokenError, match="one issued for this"):
        TokenBook().redeem(TokenBook().issue(*WHO), *WHO)


@given(st.text(max_size=80) | st.from_regex(r"[0-9a-f]{0,8}\.\d{0,20}\.[0-9a-f]{0,8}"))
def test_malformed_tokens_are_token_errors(token: str):
    with pytest.raises(TokenError, match="one issued for this"):
        TokenBook().redeem(token, *WHO)


@pytest.mark.parametrize(
    "change",
    [
        lambda n, e, m: f"{n}.{int(e) + 1}.{m}",
        lambda n, e, m: f"{n}0.{e}.{m}",
        lambda n, e, m: f"{n}.{e}.{m[:-1]}",
        lambda n, e, m: f"{n}.{e}.{m.upper()}",
        lambda n, e, m: f"{n}.{e}.{m}.",
        lambda n, e, m: f"{n}.+{e}.{m}",
        lambda n, e, m: f"{n}. {e}.{m}",
        lambda n, e, m: f"{n}.{e[0]}_{e[1:]}.{m}",
        lambda n, e, m: f"{n}.{e.translate({48 + i: 0x660 + i for i in range(10)})}.{m}",
        lambda n, e, m: f"\ud800{n}.{e}.{m}",
        lambda n, e, m: f"{n}.{e}.\ud800{m}",
    ],
)
def test_changed_tokens_are_refused(change):
    book = TokenBook()
    token = book.issue(*WHO)

    with pytest.raises(TokenError, match="one issued for this"):
        book.redeem(change(*token.split(".")), *WHO)

    book.redeem(token, *WHO)


@pytest.mark.parametrize("mode", MODES)
def test_door_admits_what_was_announced(mode: str):
    book = TokenBook()
    authenticator = SessionAuthenticator(WHO[0], book)

    who = authenticator.admit(hello(book.issue(*WHO[:3], mode), mode=mode))

    assert (who.run, who.node, who.round, who.mode) == (*WHO[:3], mode)
    assert (who.owner, who.digest) == ("owner-1", "ab")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"protocol": PROTOCOL + 1}, SessionError, f"must be {PROTOCOL}"),
        ({"version": "9.9.0"}, SessionError, "must match"),
        ({"version": ""}, SessionError, "must match"),
        ({"mode": "other"}, SessionError, "must be one of"),
        ({"mode": "train\x1f"}, SessionError, "must be one of"),
        ({"owner": ""}, SessionError, "printable"),
        ({"owner": "a\nINFO: all is well"}, SessionError, "printable"),
        ({"owner": "a\x1b[2J"}, SessionError, "printable"),
        ({"run": 8}, TokenError, "issued for this"),
        ({"node": 1}, TokenError, "issued for this"),
        ({"round": 4}, TokenError, "issued for this"),
        ({"mode": "evaluate"}, TokenError, "issued for this"),
    ],
)
def test_door_refuses(changes: dict[str, object], error: type[Exception], message: str):
    book = TokenBook()
    authenticator = SessionAuthenticator(WHO[0], book)
    token = book.issue(*WHO)

    with pytest.raises(error, match=message):
        authenticator.admit(hello(token, **changes))

    assert authenticator.admit(hello(token)).node == WHO[1]  # a refusal does not use the token up


def test_door_is_for_one_run_even_with_a_good_token():
    book = TokenBook()

    with pytest.raises(TokenError):
        SessionAuthenticator(8, book).admit(hello(book.issue(*WHO)))


@pytest.mark.parametrize("jump", [86_400.0, -86_400.0])
def test_a_jump_of_the_wall_clock_neither_kills_nor_revives_a_token(
    monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    book = TokenBook()
    live, dead = book.issue(*WHO), book.issue(*WHO, -5.0)
    wall = time.time
    monkeypatch.setattr("time.time", lambda: wall() + jump)
    book.redeem(live, *WHO)
    with pytest.raises(TokenError, match="expired"):
        book.redeem(dead, *WHO)
