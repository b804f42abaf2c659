"""The portrait's vector of every round, at next to no cost.

The picture reads U^T Y V, the public fingerprint's sketch of the last two blocks' products
(:mod:`fedsplit.fingerprints.evidence.public_file`), with Y = Xo P Xo^T and Xo the orthonormalised
rows of the base's embedding.  The rows do not change while a top is trained, so (U^T Xo) and
(Xo^T V), 32 x d each, are made once, and a round costs two thin products per block.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsplit.errors import LineageError, ModelError
from fedsplit.fingerprints.methods.aligned_products import centred_stream, product_factors
from fedsplit.fingerprints.methods.matching import KINDS
from fedsplit.fingerprints.methods.whitened import orthonormal_rows
from fedsplit.fingerprints.portraits.encoder import SIDE, Encoder, load, zscore
from fedsplit.fingerprints.view import WeightView, choose_tokens
from fedsplit.seeding import torch_generator

log = logging.getLogger(__name__)


class RoundPortrait:
    """Reader of the portrait vectors of states that share the base's embedding rows.

    Args:
        base: the base's view, with embedding rows.
        seed: of the sketch, as in a public fingerprint file.

    Raises:
        LineageError: if the base has no rows, or is no wider than the sketch.
    """

    def __init__(self, base: WeightView, seed: int = 2312) -> None:
        if base.width <= SIDE:
            raise LineageError(f"width={base.width}: must be > {SIDE} for a portrait")
        tokens = choose_tokens(base.vocabulary)
        self._centre = centred_stream(base)
        x = orthonormal_rows(base.embeddings(tokens), centre=self._centre)
        generator = torch_generator(seed, "public-fingerprint", len(tokens), SIDE)
        u, v = (torch.randn(len(tokens), SIDE, generator=generator) for _ in range(2))
        self._left, self._right = u.T @ x, x.T @ v  # (32, d), (d, 32)
        self._encoder: Encoder = load()

    def vector(self, view: WeightView) -> NDArray[np.float64]:
        """Return the 512-vector; equal to that of the published fingerprint of the same weights."""
        blocks = [self._sketch(view, index) for index in range(-min(2, view.depth), 0)]
        stacked = torch.cat(blocks if len(blocks) == 2 else blocks * 2)  # (6, 32, 32)
        with torch.no_grad():
            z = cast(Tensor, self._encoder(zscore(stacked)[None]))[0]
        found: NDArray[np.float64] = z.double().numpy()
        return found

    def _sketch(self, view: WeightView, index: int) -> Tensor:
        factors = product_factors(view.block(index))
        out = []
        for kind in KINDS:
            a, b = factors[kind]
            if self._centre and kind != "qk":
                b = b - b.mean(1, keepdim=True)
            out.append((self._left @ a.T) @ (b @ self._right))
        return torch.stack(out)


class PortraitDrawer:
    """Draws the states that a gate judges, as text for a record.

    Args:
        base: the gate's base.

    Attributes:
        base: the base's own portrait.

    Raises:
        LineageError: see :class:`RoundPortrait`.
    """

    def __init__(self, base: WeightView) -> None:
        self._layout = base.layout
        self._reader = RoundPortrait(base)
        self.base = pack_vector(self._reader.vector(base))

    @classmethod
    def of(cls, base: WeightView) -> PortraitDrawer | None:
        """Return the drawer, or None for a base that has no portrait: no picture, no harm."""
        try:
            return cls(base)
        except LineageError as error:  # too narrow, or no embedding rows
            log.info("no portraits: %s", error)
            return None

    def draw(self, state: nn.Module | Mapping[str, Tensor]) -> str | None:
        """Return the portrait of a module or of named tensors; None where there is none."""
        try:
            view = (
                WeightView.of_module(state)
                if isinstance(state, nn.Module)
                else WeightView.of_tensors(state, self._layout)
            )
            return pack_vector(self._reader.vector(view))
        except (LineageError, ModelError) as error:
            log.info("no portrait: %s", error)
            return None


def pack_vector(vector: NDArray[np.float64]) -> str:
    """Return a vector as text for a record: base64 of little-endian float16, 1.4 kB."""
    return base64.b64encode(vector.astype("<f2").tobytes()).decode()


def unpack_vector(text: str) -> NDArray[np.float64]:
    """Return the vector of a record.

    Raises:
        LineageError: if the text is not one.
    """
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), "<f2").astype(np.float64)
    except (ValueError, TypeError, binascii.Error) as error:
        raise LineageError(f"portrait: not a vector: {error}") from error
    return values
