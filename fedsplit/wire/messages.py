"""What Flower messages carry: a session's offer, weights, and frames as a fallback.

One RecordDict per message, always new: Flower's own helper shares one among all nodes, which would
hand every node's token to every other.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedsplit.errors import FrameError, SessionError, WireError
from fedsplit.wire.message_types import STEP_TYPE as STEP_TYPE
from fedsplit.wire.message_types import WHO_TYPE as WHO_TYPE
from fedsplit.wire.tokens import MODES

OFFER = "fedsplit.offer"
REPORT = "fedsplit.report"
WHO = "fedsplit.who"
FRAMES = "fedsplit.frames"
WEIGHTS = "arrays"
TRANSPORTS = ("stream", "messages")
_LENGTH = struct.Struct("<I")
_MAX_PEM = 1 << 16


@dataclass(frozen=True)
class SessionOffer:
    """What an owner needs to open its session.

    Attributes:
        run: Flower's run id.
        node: Flower's node id of the receiver.
        round: server round, from 1.
        mode: ``train`` or ``evaluate``.
        transport: ``stream`` or ``messages``.
        token: single-use token for exactly this session.
        address: ``host:port`` of the session server (stream).
        ca: PEM of the server's authority, empty on loopback without TLS; an owner's own node config
            outranks it.
        server_name: name in the server's certificate, when it is not the address's host.
        digest: of the files that the server hands out: a bottom's bundle, or an emulator.
        exchange: counts the Flower messages of this session (messages transport), from 0.
        first: step that the session begins with; an interrupted run took those before.
        job: names the run across its restarts, each of which has a run id of its own.
    """

    run: int
    node: int
    round: int
    mode: str
    transport: str
    token: str
    address: str = ""
    ca: bytes = b""
    server_name: str = ""
    digest: str = ""
    exchange: int = 0
    first: int = 0
    job: str = ""

    def to_record(self) -> ConfigRecord:
        """Return the record for one message."""
        values = {f.name.replace("_", "-"): getattr(self, f.name) for f in fields(self)}
        # Ids use all 64 bits, records hold signed integers.
        return ConfigRecord(values | {"run": str(self.run), "node": str(self.node)})

    @classmethod
    def from_content(cls, content: RecordDict) -> SessionOffer:
        """Parse a message's content.

        Raises:
            SessionError: if the message announces no session, or a field is missing or mistyped.
        """
        record = content.config_records.get(OFFER)
        if record is None:
            raise SessionError("message announces no session: no record fedsplit.offer in it")

        def text(key: str, longest: int) -> str:
            value = record.get(key)
            if not isinstance(value, str) or len(value) > longest:
                raise SessionError(f"offer {key}: must be text of at most {longest} characters")
            return value

        def number(key: str) -> int:
            value = record.get(key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise SessionError(f"offer {key}: must be an integer >= 0")
            return value

        def identity(key: str) -> int:
            value = text(key, 20)
            if not value.isdecimal() or int(value) >= 2**64:
                raise SessionError(f"offer {key}: must be a 64-bit id")
            return int(value)

        def one_of(key: str, known: tuple[str, ...]) -> str:
            value = text(key, 16)
            if value not in known:
                raise SessionError(f"offer {key}={value!r}: must be one of {', '.join(known)}")
            return value

        ca = record.get("ca")
        if not isinstance(ca, bytes) or len(ca) > _MAX_PEM:
            raise SessionError(f"offer ca: must be PEM bytes, at most {_MAX_PEM}")
        return cls(
            run=identity("run"),
            node=identity("node"),
            round=number("round"),
            mode=one_of("mode", MODES),
            transport=one_of("transport", TRANSPORTS),
            token=text("token", 256),
            address=text("address", 300),
            ca=ca,
            server_name=text("server-name", 300),
            digest=text("digest", 100),
            exchange=number("exchange"),
            first=number("first"),
            job=text("job", 64),
        )


def pack_frames(frames: list[bytes]) -> ArrayRecord:
    """Return encoded frames as one byte array (Flower sends arrays in chunks)."""
    data = b"".join(part for frame in frames for part in (_LENGTH.pack(len(frame)), frame))
    return ArrayRecord(
        {"frames": Array(dtype="uint8", shape=(len(data),), stype=FRAMES, data=data)}
    )


def unpack_frames(content: RecordDict, max_frame_bytes: int, max_frames: int = 4096) -> list[bytes]:
    """Return the encoded frames in a message; frames themselves are parsed by the link.

    Raises:
        FrameError: truncated, too many, or one over its bound.
    """
    record = content.array_records.get(FRAMES)
    if record is None or "frames" not in record:
        raise FrameError("message carries no frames")
    data = memoryview(record["frames"].data)
    frames: list[bytes] = []
    at = 0
    while at < len(data):
        if len(frames) >= max_frames:
            raise FrameError(f"message with over {max_frames} frames")
        if at + _LENGTH.size > len(data):
            raise FrameError("message ends inside a frame's length")
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if length > max_frame_bytes or at + length > len(data):
            raise FrameError(f"frame of {length} bytes: must be <= {max_frame_bytes} and complete")
        frames.append(bytes(data[at : at + length]))
        at += length
    return frames


def read_array(array: Array, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the values of an array that another party sent, a copy.

    Args:
        array: as it came.
        dtype: that it must be of, by its own word and by what its bytes hold.
        shape: likewise.

    Raises:
        WireError: of another type or shape, or no array at all.
    """
    due = f"must be {dtype} {shape}"
    # The declared form first: nothing is allocated for an array of another size.
    if tuple(array.shape) != shape or array.dtype != dtype:
        raise WireError(f"{array.dtype[:60]} {tuple(array.shape)[:8]}: {due}")
    try:
        values = array.numpy()
    except Exception as error:  # whatever bytes can raise: EOFError, BadZipFile, MemoryError ...
        raise WireError(f"{due}; not an array: {type(error).__name__}") from None
    # Bytes that declare float32 may hold complex numbers, or an archive.
    if not isinstance(values, np.ndarray):
        raise WireError(f"{due}; holds no array")
    if values.shape != shape or values.dtype != np.dtype(dtype):
        raise WireError(f"{due}; holds {values.dtype} {values.shape}")
    return values.copy()


def weights_record(state: dict[str, np.ndarray]) -> ArrayRecord:
    """Return named float32 weights as Flower arrays."""
    return ArrayRecord({name: Array(value) for name, value in state.items()})
