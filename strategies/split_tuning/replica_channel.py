"""Frames between the server and a process with a replica of its top: JSON facts and tensors.

Over a pair of sockets that only these two processes hold, so that nobody else can speak on it, and
that end with either of them.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from fedsplit.errors import RunError

PREFIX = "top."
_SIZES = struct.Struct("<IQ")  # bytes of facts, of tensors


class Channel:
    """One end.

    Args:
        end: of the pair; the channel's from now on.
        peer: who is at the other, for errors.
    """

    def __init__(self, end: socket.socket, peer: str) -> None:
        self._end, self._peer = end, peer
        self._reader = end.makefile("rb")

    def send(self, tensors: Mapping[str, Tensor] | None = None, **facts: Any) -> None:
        """Send facts and tensors.

        Raises:
            RunError: the other end is gone.
        """
        own = {n: t.detach().cpu().contiguous() for n, t in (tensors or {}).items()}
        body = safetensors.torch.save(own) if own else b""
        head = json.dumps(facts).encode()
        try:
            self._end.sendall(_SIZES.pack(len(head), len(body)) + head)
            self._end.sendall(body)
        except OSError as error:
            raise RunError(f"{self._peer} is gone: {error}") from None

    def receive(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the next facts and tensors.

        Raises:
            RunError: the other end is gone, or says that it failed.
        """
        try:
            head, body = _SIZES.unpack(self._exactly(_SIZES.size))
            facts: dict[str, Any] = json.loads(self._exactly(head))
            tensors = safetensors.torch.load(self._exactly(body)) if body else {}
        except OSError as error:
            raise RunError(f"{self._peer} is gone: {error}") from None
        if "error" in facts:
            raise RunError(f"{self._peer} failed: {facts['error']}")
        return facts, tensors

    def _exactly(self, size: int) -> bytes:
        data = self._reader.read(size)
        if len(data) < size:
            raise OSError(f"{len(data)} of {size} bytes came")
        return data

    def wait_for_ever(self) -> None:
        """Lift the bound on how long the other end may take."""
        self._end.settimeout(None)

    def close(self) -> None:
        """Close this end."""
        with contextlib.suppress(OSError):  # the other end has gone already
            self._end.shutdown(socket.SHUT_RDWR)
        self._reader.close()
        self._end.close()


def trained(top: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a top, by name."""
    return {name: p for name, p in top.named_parameters() if p.requires_grad}


def named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a top's tensors as frames carry them beside others."""
    return {PREFIX + name: tensor for name, tensor in tensors.items()}
