"""What crosses between an owner and the server: frames, codecs, tokens, the stream, messages.

Strategies and owners are peers; they meet here and nowhere else.  Names are resolved on first use.

Examples:
    >>> import torch
    >>> from fedsplit.wire import Kind, decode_rows, encode_rows, loopback
    >>> owner, server = loopback(max_frame_bytes=1 << 20)
    >>> rows = torch.ones(2, 4)
    >>> body = encode_rows(rows, "bf16")
    >>> len(body)
    16
    >>> decode_rows(body, (2, 4), "bf16").equal(rows)
    True
    >>> owner.send(Kind.BYE, {"reason": "done"})
    >>> frame = server.recv(timeout_s=5.0)
    >>> frame.kind.name, frame["reason"]
    ('BYE', 'done')
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsplit.registry import lazy

if TYPE_CHECKING:
    from fedsplit.wire.codecs import CODECS, decode_rows, encode_rows
    from fedsplit.wire.dial import connect
    from fedsplit.wire.frames import Frame, Kind, decode, encode
    from fedsplit.wire.link import Link, loopback
    from fedsplit.wire.messages import SessionOffer
    from fedsplit.wire.stream import ServerTls, SessionServer
    from fedsplit.wire.tokens import TokenBook

__all__ = [
    "CODECS",
    "Frame",
    "Kind",
    "Link",
    "ServerTls",
    "SessionOffer",
    "SessionServer",
    "TokenBook",
    "connect",
    "decode",
    "decode_rows",
    "encode",
    "encode_rows",
    "loopback",
]

__getattr__ = lazy(
    __name__,
    {
        "codecs": ("CODECS", "decode_rows", "encode_rows"),
        "dial": ("connect",),
        "frames": ("Frame", "Kind", "decode", "encode"),
        "link": ("Link", "loopback"),
        "messages": ("SessionOffer",),
        "stream": ("ServerTls", "SessionServer"),
        "tokens": ("TokenBook",),
    },
)
