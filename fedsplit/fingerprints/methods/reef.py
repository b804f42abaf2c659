"""REEF-style comparison of representations: linear CKA of hidden states on the same inputs.

REEF (arXiv 2410.14273, ICLR 2025): both models read the same samples, the representations of one
middle layer (18 of 32 in the paper) are compared by linear CKA.  It needs models that run, not only
weights, and works across widths.

Invariant under everything that keeps the function (permutations, rotations and scalings act on
representations as such).  What breaks it: it sees function, so independent models of the same data
score high (the paper's related models start at 0.8 against 0.3 for strangers at 7 B scale); it is
shown in tables and never decides.  The paper reads benchmark prompts; here uniformly drawn token
sequences from a public seed stand in unless ``inputs`` are given (the default is ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fedsplit.errors import LineageError
from fedsplit.fingerprints.methods.base import Fingerprint
from fedsplit.fingerprints.methods.cka import linear_cka
from fedsplit.fingerprints.view import Similarity, WeightView, shared_rows
from fedsplit.seeding import torch_generator

DEPTH = 18 / 32


def public_inputs(vocabulary: int, samples: int, length: int, seed: int = 2312) -> Tensor:
    """Return token ids (samples, length), uniform over the shared vocabulary, the same for all."""
    generator = torch_generator(seed, "reef-inputs", vocabulary, samples, length)
    return torch.randint(0, vocabulary, (samples, length), generator=generator)


def representations(model: nn.Module, inputs: Tensor, depth: float = DEPTH) -> Tensor:
    """Return the last-token hidden states (samples, d) after the block at relative ``depth``."""
    with torch.no_grad():
        call = cast(Any, model)
        states = [
            call(
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                output_hidden_states=True,
            ).hidden_states
            for batch in torch.split(inputs, 32)
        ]
    index = max(1, round(depth * (len(states[0]) - 1)))
    return torch.cat([s[index][:, -1].float() for s in states])


class REEF(Fingerprint):
    """Linear CKA of middle-layer representations.

    Args:
        samples: number of sequences; length: tokens in each.
        inputs: token ids to use instead, (n, T).
    """

    name: ClassVar[str] = "reef"
    label: ClassVar[str] = "REEF-style CKA"
    colour: ClassVar[str] = "#8c8c8c"
    strangers: ClassVar[str] = "0.71"
    descendants: ClassVar[str] = "0.932"
    needs_running: ClassVar[bool] = True

    def __init__(
        self, *, samples: int = 200, length: int = 16, inputs: Tensor | None = None
    ) -> None:
        self.samples, self.length, self.inputs = samples, length, inputs

    def compare(
        self, base: WeightView, suspect: WeightView, tokens: Sequence[int] | None = None
    ) -> Similarity:
        """Run both models on the same inputs.

        Raises:
            LineageError: if a view is not of a live module.
        """
        del tokens
        if base.module is None or suspect.module is None:
            raise LineageError("reef: needs two models that can run, not only their weights")
        inputs = self.inputs
        if inputs is None:
            inputs = public_inputs(shared_rows(base, suspect), self.samples, self.length)
        found = [representations(v.module, inputs) for v in (base, suspect) if v.module is not None]
        return Similarity(linear_cka(*found), {})
