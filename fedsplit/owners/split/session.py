"""Driving a :class:`SplitOwner` through one session, on a stream or from message to message."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import fedsplit
from fedsplit import storage
from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, ModelError, SessionError
from fedsplit.models.bundle.bottom import Bundle
from fedsplit.owners.home import OwnerHome
from fedsplit.owners.ledger.disclosure import Outbox
from fedsplit.owners.split.owner import SplitOwner
from fedsplit.wire.frames import PROTOCOL, Kind
from fedsplit.wire.link import Link
from fedsplit.wire.messages import SessionOffer
from fedsplit.wire.stream import connect
from fedsplit.wire.transfer import receive_files

log = logging.getLogger(__name__)


def hello(offer: SessionOffer, owner: str) -> dict[str, object]:
    """Return the header of the first frame."""
    return {
        "protocol": PROTOCOL,
        "version": fedsplit.__version__,
        "token": offer.token,
        "run": offer.run,
        "node": offer.node,
        "round": offer.round,
        "mode": offer.mode,
        "owner": owner,
        "bottom": offer.bottom,
    }


def open_stream(offer: SessionOffer, config: RunConfig, node_config: dict[str, object]) -> Link:
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


def _client_certificate(node_config: dict[str, object]) -> tuple[bytes | None, bytes | None]:
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


def run_stream_session(
    link: Link,
    offer: SessionOffer,
    config: RunConfig,
    outbox: Outbox,
    home: OwnerHome,
    prepare: Callable[[str], SplitOwner],
) -> SplitOwner:
    """Run one session from HELLO to BYE and return the owner, for its metrics.

    Args:
        link: a fresh link to the server.
        offer: the message's offer.
        config: the run's settings.
        outbox: checks and records every frame before it is sent.
        home: where received bottoms are kept.
        prepare: digest -> ready owner; called once the bottom is on disk.

    Raises:
        FedsplitError: whatever went wrong; the server is told what
            :func:`~fedsplit.owners.policy.refusals.tellable` lets out.
    """
    try:
        outbox.send(link, Kind.HELLO, hello(offer, outbox.trip.owner))
        welcome = link.expect(Kind.WELCOME, config.session.deadline_s)
        digest = str(welcome["bottom"])
        if digest != offer.bottom:
            raise SessionError(f"server's bottom {digest}: must be the announced {offer.bottom}")
        fetch_bottom(link, digest, home, config.session.deadline_s, outbox)
        split_owner = prepare(digest)
        outbox.attach(split_owner)
        outbox.send(link, *split_owner.ready())
        # A wave may have to wait for the ones before it, hence the longer patience.
        patience = config.session.idle_s
        while True:
            frame = link.recv(patience)
            if frame.kind is Kind.BYE:
                break
            for outgoing in split_owner.handle(frame):
                outbox.send(link, *outgoing)
        if not split_owner.done:
            raise SessionError(f"server ended the session early: {frame['reason']}")
        link.close()
    except Exception as error:
        outbox.fail(link, error)
        raise
    return split_owner


def fetch_bottom(
    link: Link, digest: str, home: OwnerHome, deadline_s: float, outbox: Outbox
) -> None:
    """Receive the bottom unless the owner has it; nothing unverified is ever kept.

    Raises:
        ModelError: the files received do not have the announced digest, or are not acceptable.
        FrameError: slices out of order or over their bounds.
    """
    if not home.bottom_dir(digest).exists():
        outbox.send(link, Kind.NEED, {"bottom": digest})
        keep_bundle(receive_files(link, deadline_s), digest, home)


def keep_bundle(files: dict[str, bytes], digest: str, home: OwnerHome) -> None:
    """Verify a received bundle and keep it under its digest.

    Raises:
        ModelError: wrong digest or unacceptable files.
    """
    bundle = Bundle(files)
    if bundle.digest != digest:
        raise ModelError(f"bottom received has digest {bundle.digest}: must be {digest}")
    folder = home.bottom_dir(digest)
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with storage.new_folder(folder, concurrent=True) as draft:
            bundle.save(draft)
    except OSError:
        if not folder.exists():  # else another process of this owner made it, of the same digest
            raise
