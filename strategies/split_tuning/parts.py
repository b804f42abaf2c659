"""What a run's strategy works with."""

from __future__ import annotations

from dataclasses import dataclass

from fedsplit.models.adapters.trainable import Trainable
from fedsplit.models.splitting.halves import Top
from fedsplit.models.splitting.heads import Head
from fedsplit.wire.authentication import Door

from ..rounds.lineage_watch import LineageWatch
from ..rounds.recorder import Recorder
from ..sessions.transports import StreamHub
from .denoising import CohortDenoiser
from .optimisation import Optimisation


@dataclass
class ServerParts:
    """What a run's strategy works with; built by :mod:`strategies.split_tuning.run`.

    Attributes:
        top: the top model, placed and with its trainable part chosen.
        trainable: that part.
        optimisation: its optimizer.
        bundle: the bottom's files and digest.
        door: admits sessions of this run.
        watch: checks the lineage of what owners return and of each aggregate.
        recorder: writes what happened.
        hub: the stream server, or None for ``transport = "messages"``.
        ca: PEM that owners should trust for the stream; empty without TLS.
        max_tokens: longest sample that an owner may send.
        denoise: the server's estimate of what the noise hides, or None.
        positions: which final hidden states the owners' head reads; empty: the head is the top's.
        head: the owners' head as it starts, or None.
    """

    top: Top
    trainable: Trainable
    optimisation: Optimisation
    bundle: tuple[dict[str, bytes], str]
    door: Door
    watch: LineageWatch
    recorder: Recorder
    hub: StreamHub | None
    ca: bytes = b""
    max_tokens: int = 1 << 17
    denoise: CohortDenoiser | None = None
    positions: str = ""
    head: Head | None = None
