"""How a session begins, for every strategy and transport: HELLO, WELCOME and, for files, NEED."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import fedsplit
from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, SessionError
from fedsplit.owners.ledger.check import DisclosureCheck
from fedsplit.owners.ledger.disclosure import notice
from fedsplit.wire.frames import PROTOCOL, Kind
from fedsplit.wire.link import Link
from fedsplit.wire.messages import SessionOffer
from fedsplit.wire.stream import connect


def open_stream(offer: SessionOffer, config: RunConfig, node_config: Mapping[str, object]) -> Link:
    """Connect to the announced server.

    The owner's node config outranks the offer: with ``session-ca`` (and ``session-server-name``)
    set there, no certificate that the message brought is believed.

    Raises:
        ConfigError: unreadable ``session-ca``, or plaintext to another machine.
        SessionError: no connection.
    """
    ca = offer.ca or None
    given = node_config.get("session-ca")
    if given:
        try:
            ca = Path(str(given)).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"session-ca={given!r}: must be a readable PEM file: {error}"
            ) from None
    name = str(node_config.get("session-server-name", "")) or offer.server_name
    certificate, key = _client_certificate(node_config)
    return connect(
        offer.address,
        ca=ca,
        server_name=name,
        certificate=certificate,
        key=key,
        max_frame_bytes=config.session.max_frame_mb << 20,
        reconnect_s=config.session.reconnect_s,
    )


def _client_certificate(node_config: Mapping[str, object]) -> tuple[bytes | None, bytes | None]:
    """Return (certificate, key) for mutual TLS, if the node config names them."""
    names = ("session-certificate", "session-key")
    given = [node_config.get(name) for name in names]
    if not any(given):
        return None, None
    try:
        certificate, key = (Path(str(value)).read_bytes() for value in given)
    except OSError as error:
        raise ConfigError(f"{' and '.join(names)}: must be readable PEM files: {error}") from None
    return certificate, key


def hello(offer: SessionOffer, owner: str, classes: str = "") -> dict[str, object]:
    """Return the header of a session's first frame."""
    return {
        "protocol": PROTOCOL,
        "version": fedsplit.__version__,
        "token": offer.token,
        "run": offer.run,
        "node": offer.node,
        "round": offer.round,
        "mode": offer.mode,
        "owner": owner,
        "digest": offer.digest,
        "classes": classes,
    }


def greet(link: Link, offer: SessionOffer, check: DisclosureCheck, deadline_s: float) -> None:
    """Send HELLO and check that the server's WELCOME announces the offered files.

    Raises:
        SessionError: the server hands out other files than it offered.
        PolicyError, LedgerError: HELLO may not leave.
    """
    session = check.session
    check.send(link, notice(Kind.HELLO, hello(offer, session.owner, session.classes)))
    found = link.expect(Kind.WELCOME, deadline_s)["digest"]
    if found != offer.digest:
        files = session.files
        raise SessionError(f"server's {files} {found}: must be the announced {offer.digest}")


def request_files(link: Link, offer: SessionOffer, check: DisclosureCheck) -> None:
    """Ask for the offered files with NEED."""
    check.send(link, notice(Kind.NEED, {"digest": offer.digest}))
