"""Checks of a trained portrait encoder: does it keep relatives together and strangers apart?

The recipe itself is :func:`fedsplit.fingerprints.portraits.encoder.train_encoder`; the shipped
weights are
what it gives with :class:`~fedsplit.fingerprints.portraits.encoder.EncoderConfig`'s defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from fedsplit.errors import ModelError
from fedsplit.fingerprints.portraits.encoder import Encoder, EncoderConfig, synthetic
from fedsplit.seeding import torch_generator


@dataclass(frozen=True)
class HeldOut:
    """Return cosines on synthetic matrices that training never saw.

    Attributes:
        near: mean cosine of a matrix and its noisy copy.
        near_least: the least of these.
        far: mean absolute cosine of unrelated matrices.
        far_most: the largest of these.
        samples: number of matrices.
    """

    near: float
    near_least: float
    far: float
    far_most: float
    samples: int


def held_out(encoder: Encoder, config: EncoderConfig, samples: int = 64) -> HeldOut:
    """Measure an encoder on fresh synthetic matrices as its recipe draws them."""
    generator = torch_generator(config.seed, "encoder-held-out")
    anchor, positive = synthetic(samples, config.rank, generator)
    with torch.no_grad():
        z, copy = cast(Tensor, encoder(anchor)), cast(Tensor, encoder(positive))
    near = functional.cosine_similarity(z, copy)
    unit = functional.normalize(z)
    far = (unit @ unit.T)[~torch.eye(samples, dtype=torch.bool)].abs()
    return HeldOut(
        float(near.mean()), float(near.min()), float(far.mean()), float(far.max()), samples
    )


def recipe(path: str | Path) -> dict[str, str]:
    """Return the recipe that an encoder's file says it was made by.

    Raises:
        ModelError: for a file that cannot be read.
    """
    try:
        with safe_open(str(path), framework="pt") as handle:
            return dict(handle.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file: {error}") from error


def largest_difference(one: Encoder, two: Encoder) -> float:
    """Return the largest absolute difference of two encoders' weights and running averages."""
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)
