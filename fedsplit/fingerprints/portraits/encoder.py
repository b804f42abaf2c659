"""Encoder from invariants to the vector that draws the picture.

HuRef (arXiv 2312.04828), section 5: a CNN maps the (6, K, K) invariants of the last two blocks to a
512-vector that looks Gaussian to a discriminator and keeps locality: near invariants, near vectors.
It is trained on synthetic matrices only, ``x q k x^T`` with normal x, q, k; a positive is the same
with noise on x, q and k (derived from its anchor, which the public code's are not), a negative is
fresh::

    L = 1.3 (1 - cos+) + 0.7 |cos-| + 0.5 BCE(D(z), real),   D: 512-256-128-1 against N(0, I)

Scaled to K: here the input is the public fingerprint's 32 x 32 sketches, so a picture can be drawn
from a published file alone, and kernels of 5 and 3 with stride 2 take the place of 48 with stride 4
(0.7 M parameters instead of 341 M).  Reading the whitened invariants, twins get different dogs.

The learning rate, steps and noise range are ours; HuRef fixes noise at 0.4 on x and 0.1 on q, k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from fedsplit.errors import LineageError, ModelError, check
from fedsplit.fingerprints.evidence.public_file import PublicFingerprint
from fedsplit.seeding import torch_generator

CHANNELS = 6
SIDE = 32
OUT = 512
VERSION = 1
SHIPPED = Path(__file__).with_name("encoder.safetensors")


@dataclass(frozen=True)
class EncoderConfig:
    """Recipe of a training: steps of Adam on batches of synthetic anchors, from a seed."""

    steps: int = 400
    batch: int = 32
    lr: float = 5e-4
    rank: int = 64
    seed: int = 2312

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "rank"):
            check(getattr(self, name) >= 2, name, getattr(self, name), ">= 2")
        check(0 < self.lr < 1, "lr", self.lr, "in (0, 1)")


def zscore(x: Tensor) -> Tensor:
    """Return ``x`` with zero mean and unit deviation over its last two axes, the pixels."""
    mean = x.mean((-2, -1), keepdim=True)
    return (x - mean) / x.std((-2, -1), keepdim=True).clamp_min(1e-9)


class Encoder(nn.Module):
    """Map (B, 6, 32, 32) to (B, 512), each vector z-scored."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(CHANNELS, 16, 5), (16, 64, 5), (64, 128, 3), (128, OUT, 3)]
        layers: list[nn.Module] = []
        for index, (inputs, outputs, kernel) in enumerate(sizes):
            layers.append(nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2))
            layers.append(nn.BatchNorm2d(outputs))
            if index < len(sizes) - 1:
                layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Encode z-scored channels."""
        z: Tensor = self.layers(x).mean((2, 3))  # (B, 512)
        return (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True).clamp_min(1e-9)


def synthetic(batch: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return anchors and their positives, (B, 6, 32, 32) each, z-scored per channel.

    Noise is drawn per sample up to HuRef's 0.4 on x and 0.1 on q and k, so that every distance
    between identical and barely related occurs.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, y = normal(batch, CHANNELS, SIDE, rank), normal(batch, CHANNELS, SIDE, rank)
    q, k = normal(batch, CHANNELS, rank, rank), normal(batch, CHANNELS, rank, rank)
    level = torch.rand(batch, 1, 1, 1, generator=generator)
    near = [
        t + level * size * normal(*t.shape) for t, size in ((x, 0.4), (y, 0.4), (q, 0.1), (k, 0.1))
    ]
    anchor = x @ q @ k @ y.transpose(2, 3)
    positive = near[0] @ near[2] @ near[3] @ near[1].transpose(2, 3)
    return zscore(anchor), zscore(positive)


def train_encoder(
    config: EncoderConfig | None = None,
    report: Callable[[int, float, float, float], None] | None = None,
) -> Encoder:
    """Train on synthetic matrices; the same seed gives the same weights on one thread.

    Args:
        report: called every 50 steps with (step, loss, mean cos+, mean |cos-|).
    """
    config = config or EncoderConfig()
    generator = torch_generator(config.seed, "encoder-data")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = Encoder()
        judge = nn.Sequential(
            nn.Linear(OUT, 256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, 128),
            nn.LeakyReLU(0.2),
            nn.Linear(128, 1),
        )
    steps = torch.optim.Adam(encoder.parameters(), lr=config.lr)
    against = torch.optim.Adam(judge.parameters(), lr=1e-4)
    ones, zeros = torch.ones(config.batch, 1), torch.zeros(config.batch, 1)
    for step in range(config.steps):
        anchor, positive = synthetic(config.batch, config.rank, generator)
        both = encoder(torch.cat([anchor, positive]))
        z, near = both.chunk(2)
        cos_near = functional.cosine_similarity(z, near)
        # every other sample of the batch is a fresh negative
        unit = functional.normalize(z)
        cos_far = (unit @ unit.T)[~torch.eye(config.batch, dtype=torch.bool)].abs()
        fooled = functional.binary_cross_entropy_with_logits(judge(z), ones)
        loss = 1.3 * (1 - cos_near).mean() + 0.7 * cos_far.mean() + 0.5 * fooled
        steps.zero_grad()
        cast(Any, loss).backward()
        steps.step()
        real = torch.randn(config.batch, OUT, generator=generator)
        told = functional.binary_cross_entropy_with_logits(
            judge(real), ones
        ) + functional.binary_cross_entropy_with_logits(judge(z.detach()), zeros)
        against.zero_grad()
        cast(Any, told).backward()
        against.step()
        if report is not None and (step % 50 == 0 or step == config.steps - 1):
            values = (loss, cos_near.mean(), cos_far.mean())
            report(step, *(float(v.detach()) for v in values))
    _settle(encoder, config, generator)
    return encoder.eval()


def _settle(encoder: Encoder, config: EncoderConfig, generator: torch.Generator) -> None:
    """Replace the norms' running averages, which lag behind the weights, by fresh ones."""
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches that follow
    with torch.no_grad():
        for _ in range(20):
            encoder(synthetic(config.batch, config.rank, generator)[0])


def save(encoder: Encoder, path: str | Path, config: EncoderConfig) -> None:
    """Write the weights as float16 with the recipe beside them."""
    state = {
        n: t.half().contiguous() if t.is_floating_point() else t.contiguous()
        for n, t in encoder.state_dict().items()
    }
    notes = {name: str(value) for name, value in asdict(config).items()}
    save_file(state, str(path), notes | {"encoder_version": str(VERSION)})


def load(path: str | Path = SHIPPED) -> Encoder:
    """Read encoder weights (the shipped ones by default).

    Raises:
        ModelError: for a missing, damaged or foreign file.
    """
    encoder = Encoder()
    wanted = encoder.state_dict()
    try:
        with safe_open(str(path), framework="pt") as handle:
            version = (handle.metadata() or {}).get("encoder_version")
            if version != str(VERSION):
                raise ModelError(f"{path}: encoder_version={version!r}: must be {VERSION}")
            state = {n: handle.get_tensor(n).to(wanted[n].dtype) for n in handle.keys()}  # noqa: SIM118
        encoder.load_state_dict(state)
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise ModelError(f"{path}: not this encoder's weights: {error}") from error
    return encoder.eval()


def channels(fingerprint: PublicFingerprint) -> Tensor:
    """Return the three products of the last two blocks, (6, 32, 32), z-scored per channel.

    Raises:
        LineageError: if the fingerprint's sketches have another size.
    """
    if fingerprint.size != SIDE:
        raise LineageError(f"size={fingerprint.size}: the encoder reads sketches of {SIDE}")
    last = fingerprint.sketches[-2:]
    if last.shape[0] == 1:
        last = torch.cat([last, last])
    return zscore(last.flatten(0, 1))


def vector(fingerprint: PublicFingerprint, encoder: Encoder | None = None) -> NDArray[np.float64]:
    """Return the 512-vector of a fingerprint, ready for :func:`.portrait.draw`."""
    encoder = encoder or load()
    with torch.no_grad():
        z = cast(Tensor, encoder(channels(fingerprint)[None]))[0]
    found: NDArray[np.float64] = z.double().numpy()
    return found
