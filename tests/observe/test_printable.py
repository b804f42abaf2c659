"""No text of another party moves a cursor, ends a line or poses as a log line."""

from __future__ import annotations

import io
import logging

import pytest

from fedsplit.observe import PrintableHandler, printable

HOSTILE = "\x1b[2J\x1b]0;owned\x07 a\r\nERROR: forged\u202e\u2028\x9b\ud800"


def test_what_is_shown_is_printable_and_bounded() -> None:
    shown = printable(HOSTILE)
    assert shown.isprintable()
    assert "forged" in shown
    assert printable("plain text, ünïcode 你好") == "plain text, ünïcode 你好"
    assert printable("a\nb\tc\x1b", keep="\n\t") == "a\nb\tc\\x1b"
    assert len(printable("x" * 10_000)) < 2100


@pytest.mark.parametrize("raised", [False, True])
def test_a_log_line_cannot_be_forged(raised: bool) -> None:
    out = io.StringIO()
    logger = logging.Logger("fedsplit.test")
    logger.addHandler(PrintableHandler(logging.StreamHandler(out)))
    if raised:
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            logger.exception("refused")
    else:
        logger.warning("owner says: %s", HOSTILE)
    first, *rest = out.getvalue().splitlines()
    assert first.startswith(("refused", "owner says"))
    assert rest
    assert all(line.startswith("    ") for line in rest)
    assert "\x1b" not in out.getvalue()
