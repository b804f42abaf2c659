"""A run's session server, as its settings and the server's environment say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fedsplit.config import SessionConfig
from fedsplit.errors import ConfigError
from fedsplit.wire.authentication import SessionAuthenticator
from fedsplit.wire.stream import ServerTls

from .transports import StreamTransport


def server_tls() -> tuple[ServerTls | None, bytes]:
    """Return the session server's TLS and the authority to announce, from the environment.

    ``FEDSPLIT_TLS_CERT``, ``FEDSPLIT_TLS_KEY`` and ``FEDSPLIT_TLS_CA`` name PEM files; with
    ``FEDSPLIT_TLS_CLIENT_CA`` an owner must show a certificate of that authority as well.  They
    are not run settings, because those travel to every owner.

    Raises:
        ConfigError: only some of them are set, or a file cannot be read.
    """
    names = ("FEDSPLIT_TLS_CERT", "FEDSPLIT_TLS_KEY", "FEDSPLIT_TLS_CA")
    values = [os.environ.get(name, "") for name in names]
    if not any(values):
        return None, b""
    if not all(values):
        missing = [n for n, v in zip(names, values, strict=True) if not v]
        raise ConfigError(f"{missing[0]}: must be set when another of {names} is")
    try:
        certificate, key, ca = (Path(v).read_bytes() for v in values)
        asked = os.environ.get("FEDSPLIT_TLS_CLIENT_CA", "")
        client_ca = Path(asked).read_bytes() if asked else None
    except OSError as error:
        raise ConfigError(f"session certificate: must be readable: {error}") from None
    return ServerTls(certificate, key, client_ca), ca


def open_transport(session: SessionConfig, run: int, **options: Any) -> StreamTransport:
    """Open the session server's port.

    Args:
        session: address and bounds.
        run: Flower's run id; only its sessions are admitted.
        options: further ones of :class:`~strategies.sessions.transports.StreamTransport`.

    Raises:
        ConfigError, SessionError: see :func:`server_tls`, StreamTransport.
    """
    tls, ca = server_tls()
    return StreamTransport(
        SessionAuthenticator(run),
        host=session.host,
        port=session.port,
        tls=tls,
        ca=ca,
        max_frame_bytes=session.max_frame_mb << 20,
        **options,
    )
