"""The equivalence check: bottom then top against the whole model, on a tiny padded batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedsplit.errors import UnsupportedModelError
from fedsplit.models.anatomy import probe, text_config
from fedsplit.models.modes import evaluating

# Largest difference allowed, relative to the largest logit.  The halves run the same operations
# on the same shapes, so anything above rounding is a part of the model that was cut wrongly.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.bfloat16: 3e-2,
    torch.float16: 1e-2,
}


def padded_batch(vocab: int, device: torch.device, pad: int | None = 0) -> tuple[Tensor, Tensor]:
    """Return ids and mask (3, 5): a full row, one padded on the right, one on the left."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]], device=device)
    pad = 0 if pad is None else pad
    ids = (torch.arange(15, device=device).view(3, 5) * 7 + 3) % vocab
    ids = torch.where(ids == pad, (pad + 1) % vocab, ids)
    return torch.where(mask.bool(), ids, pad), mask


def relative_difference(expected: Tensor, got: Tensor) -> float:
    """Return the largest difference relative to the largest expected value.

    Where the whole itself gives NaN, both must: transformers' eager attention does so in float64
    for rows padded on the left (it fills with the float64 minimum, then takes a float32 softmax).
    Infinite if NaNs do not coincide or nothing is finite.
    """
    expected, got = expected.double(), got.double().to(expected.device)
    finite = expected.isfinite()
    if not torch.equal(finite, got.isfinite()) or not bool(finite.any()):
        return float("inf")
    expected, got = expected[finite], got[finite]
    return float((expected - got).abs().max() / expected.abs().max().clamp_min(1e-30))


@torch.no_grad()
def check_equivalence(whole: PreTrainedModel, bottom: nn.Module, top: nn.Module) -> float:
    """Compare bottom-then-top with the whole model; return the relative difference.

    Raises:
        UnsupportedModelError: if it exceeds the dtype's tolerance, or a forward pass fails.
    """
    name = type(whole).__name__
    parameter = next(whole.parameters())
    vocab = int(probe(whole).input_embeddings.num_embeddings)  # type: ignore[arg-type]
    ids, mask = padded_batch(vocab, parameter.device, text_config(whole).pad_token_id)
    with evaluating(whole, bottom, top):
        expected = _attempt(name, lambda: whole(input_ids=ids, attention_mask=mask).logits)
        got = _attempt(name, lambda: top(bottom(ids, mask), mask))
    if got.shape != expected.shape:
        raise UnsupportedModelError(
            f"{name}: bottom then top give {tuple(got.shape)}, the whole {tuple(expected.shape)}"
        )
    if expected.ndim == 3:
        expected, got = expected[mask.bool()], got[mask.bool()]  # padding carries no meaning
    difference = relative_difference(expected, got)
    bound = TOLERANCE.get(parameter.dtype, 3e-2)
    if not difference <= bound:
        raise UnsupportedModelError(
            f"{name}: bottom then top differ from the whole by {difference:.3g} of the largest "
            f"logit: must be <= {bound:g} for {parameter.dtype}; this family passes more between "
            "its blocks than hidden states, or computes from token ids above the cut"
        )
    return difference


def _attempt(name: str, forward: Callable[[], Tensor]) -> Tensor:
    try:
        return forward()
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"{name}: its forward fails on a padded batch: {error}") from (
            error
        )
