"""Several samples in one token block, none of which attends to another.

Position ids start anew with each sample; where a model is given them without a mask, transformers
builds the block-diagonal causal mask that they mean.  A family that ignores them, or reads
positions from elsewhere, is told by :func:`check_packing` and refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.emulators.compression.structure import Model
from fedsplit.emulators.lm import IGNORED, logits_of
from fedsplit.errors import DataError, UnsupportedModelError, check
from fedsplit.models.anatomy import probe
from fedsplit.models.modes import evaluating
from fedsplit.models.splitting.equivalence import TOLERANCE, relative_difference

Sample = tuple[Tensor, Tensor]  # ids (T_i,) and labels (T_i,), IGNORED where nothing is predicted


@dataclass(frozen=True)
class Packed:
    """Samples in blocks.

    Attributes:
        ids: (N, T).
        labels: (N, T), :data:`~fedsplit.emulators.lm.IGNORED` at each sample's first token.
        positions: (N, T), place of each token within its sample; padding is a sample of its own.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor


def pieces_of(ids: Tensor, length: int) -> list[Sample]:
    """Return a text's ids (n,) as samples of at most ``length`` tokens, every next one predicted.

    A last piece of a single token, which predicts nothing, is left out.
    """
    pieces = [piece for piece in torch.split(ids, length) if len(piece) >= 2]
    return [(piece, piece) for piece in pieces]


def pack_samples(samples: Sequence[Sample], length: int, pad: int) -> Packed:
    """Put samples into as few blocks as first-fit finds, in their order.

    Args:
        samples: each of at most ``length`` tokens.
        length: T of a block.
        pad: id for what is left over.

    Raises:
        DataError: no sample, or one that is longer than a block.
    """
    check(length >= 2, "length", length, ">= 2 (tokens)")
    if not samples:
        raise DataError("0 samples to pack: must be >= 1")
    blocks: list[list[Sample]] = []
    room: list[int] = []
    for ids, labels in samples:
        if len(ids) > length:
            raise DataError(f"a sample of {len(ids)} tokens: must be <= {length}, one block")
        at = next((i for i, left in enumerate(room) if left >= len(ids)), None)
        if at is None:
            at = len(blocks)
            blocks.append([])
            room.append(length)
        blocks[at].append((ids, labels))
        room[at] -= len(ids)
    packed = Packed(
        torch.full((len(blocks), length), pad),
        torch.full((len(blocks), length), IGNORED),
        torch.zeros((len(blocks), length), dtype=torch.int64),
    )
    for row, block in enumerate(blocks):
        start = 0
        for ids, labels in block:
            end = start + len(ids)
            packed.ids[row, start:end] = ids
            packed.labels[row, start + 1 : end] = labels[1:]  # the first follows another sample
            packed.positions[row, start:end] = torch.arange(len(ids))
            start = end
        packed.positions[row, start:] = torch.arange(length - start)
    return packed


@torch.no_grad()
def check_packing(model: Model) -> None:
    """Check on a tiny batch that samples in one block give the logits that they give alone.

    Raises:
        UnsupportedModelError: they do not (says by how much), or the model takes no position ids.
    """
    embedding = probe(model).input_embeddings
    vocab = int(embedding.num_embeddings)  # type: ignore[arg-type]
    parameter = next(model.parameters())
    ids = [(torch.arange(n) * 5 + 3 + n) % vocab for n in (3, 4)]
    packed = pack_samples([(one, one) for one in ids], 8, 0)
    name = type(model).__name__
    with evaluating(model):
        try:
            device = parameter.device
            together = logits_of(model, packed.ids.to(device), packed.positions.to(device))[0]
        except Exception as error:
            raise UnsupportedModelError(
                f"{name}: its forward does not run on packed samples: {error}"
            ) from error
        alone = torch.cat([logits_of(model, one[None].to(device))[0] for one in ids])
    difference = relative_difference(alone, together[: len(alone)])
    bound = TOLERANCE.get(parameter.dtype, 3e-2)
    if not difference <= bound:
        raise UnsupportedModelError(
            f"{name}: packed samples differ from separate ones by {difference:.3g} of the largest "
            f"logit: must be <= {bound:g} for {parameter.dtype}; offsite.packing must be false"
        )
