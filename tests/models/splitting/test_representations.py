"""A text's representation depends on that text alone, in every family, to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedsplit.errors import UnsupportedModelError
from fedsplit.models.splitting.halves import split
from fedsplit.models.splitting.representations import check_alone, represent
from tests.models.split_families import CASES, VOCAB, tiny

LENGTHS = (1, 9, 4, 9, 2, 7, 4, 20)


def texts(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(1, VOCAB, (n,), generator=generator) for n in lengths]


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize(("family", "task"), CASES)
def test_a_text_gives_the_same_bits_in_any_company_and_order(
    family: str, task: str, k: int
) -> None:
    bottom, _ = split(tiny(family, task).float(), k, verify=False)
    bottom.eval()
    check_alone(bottom)
    own = texts()
    with torch.no_grad():
        alone = [bottom(ids[None])[0] for ids in own]
        for order in (range(8), [7, 0, 3], [5, 4, 3, 2, 1, 0], [2], [6, 7]):
            for index, rows in zip(order, represent(bottom, [own[i] for i in order]), strict=True):
                assert torch.equal(rows, alone[index])


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_frequencies_that_change_with_the_length_are_refused(rope: str) -> None:
    parameters = {"rope_type": rope, "factor": 4.0, "rope_theta": 100.0}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0]}
    model = tiny("llama", "causal-lm", rope_parameters=parameters, max_position_embeddings=8)
    bottom, _ = split(model, 1, verify=False)
    with pytest.raises(UnsupportedModelError, match=f"rope_type='{rope}'"):
        check_alone(bottom.eval())
    check_alone(split(model, 0, verify=False)[0].eval())  # embeddings alone know no places


def test_experts_with_a_capacity_are_refused() -> None:
    bottom, _ = split(tiny("mixtral", "causal-lm", expert_capacity=2), 1, verify=False)
    with pytest.raises(UnsupportedModelError, match="expert_capacity=2"):
        check_alone(bottom)


def test_a_bottom_that_remembers_is_refused_whatever_its_settings_say() -> None:
    bottom, _ = split(tiny("llama", "causal-lm"), 1, verify=False)
    seen = torch.zeros(())
    bottom.register_buffer("seen", seen)
    bottom.register_forward_pre_hook(lambda module, args: [seen.add_(1), None][1])
    with pytest.raises(UnsupportedModelError, match="changes with earlier texts"):
        check_alone(bottom)
