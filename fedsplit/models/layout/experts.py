"""Discovery of a mixture of experts kept as stacked matrices; see :mod:`.projections`.

A mixture is one FFN whose hidden units come in groups: up and gate of all experts stacked, down
side by side.  Which of them a token meets is the router's business; products over all hidden units
do not depend on the experts' order.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.errors import UnsupportedModelError


def find_experts(block: nn.Module) -> str | None:
    """Return the name of a block's module with two stacked matrices (E, ., .), or None."""
    found = [
        name
        for name, module in block.named_modules()
        if sum(p.dim() == 3 for p in module.parameters(recurse=False)) == 2
    ]
    return found[0] if len(found) == 1 else None


def expert_ffn(module: nn.Module, name: str, width: int, kind: str) -> dict[str, Any]:
    """Return the sites of up, gate and down inside a module of stacked experts.

    The input half that the output is linear in is "up", as for a dense gated FFN.

    Args:
        module: takes (hidden (T, d), expert index (T, k), weights (T, k)).
        name: of the module within its block.
        width: d.
        kind: model type, for messages.

    Raises:
        UnsupportedModelError: if the shapes are not (E, 2I, d) and (E, d, I), either way round, or
            no half of the first behaves like "up".
    """
    stacked = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() == 3}
    shapes = {n: tuple(p.shape) for n, p in stacked.items()}
    joined, down, units = _told_apart(shapes, width, kind)
    turned = shapes[joined][1] == width
    halves = [list(range(units)), list(range(units, 2 * units))]
    strides = [list(range(0, 2 * units, 2)), list(range(1, 2 * units, 2))]
    for first, second in (halves, strides):
        for up, gate in ((first, second), (second, first)):
            if _doubles(module, joined, up, turned, width, kind):
                site = {"weight": f"{name}.{joined}", "bias": None, "transposed": turned}
                last = {"weight": f"{name}.{down}", "bias": None, "rows": None}
                return {
                    "up": site | {"rows": tuple(up)},
                    "gate": site | {"rows": tuple(gate)},
                    "down": last | {"transposed": shapes[down][2] == width},
                    "ffn_name": name,
                }
    raise UnsupportedModelError(
        f"model_type={kind!r}: experts {shapes}: their output is linear in no half of {joined!r}"
    )


def _told_apart(shapes: dict[str, tuple[int, ...]], width: int, kind: str) -> tuple[str, str, int]:
    names = list(shapes)
    for joined, down in (names, names[::-1]):
        rest = [sorted(set(shapes[n][1:]) - {width}) for n in (joined, down)]
        if all(len(r) == 1 for r in rest) and rest[0][0] == 2 * rest[1][0]:
            return joined, down, rest[1][0]
    raise UnsupportedModelError(
        f"model_type={kind!r}: experts {shapes}: expected (E, 2I, {width}) and (E, {width}, I)"
    )


def _doubles(
    module: nn.Module, joined: str, rows: list[int], turned: bool, width: int, kind: str
) -> bool:
    """Return whether the first expert's output doubles with these rows of its input matrix."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(3, width, generator=generator)
    changed = copy.deepcopy(module)
    with torch.no_grad():
        for one in (module, changed):
            for parameter in one.parameters():  # the same values in both, whatever the init left
                own = torch.Generator().manual_seed(parameter.numel())
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=own))
        matrix = dict(changed.named_parameters())[joined]
        view = matrix.transpose(1, 2) if turned else matrix
        view[:, rows] *= 2.0
        before, after = _run(module, hidden, kind), _run(changed, hidden, kind)
    return torch.allclose(after, 2 * before, rtol=1e-3, atol=1e-5)


def _run(module: Any, hidden: Tensor, kind: str) -> Tensor:
    try:
        out = module(hidden, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise UnsupportedModelError(
            f"model_type={kind!r}: its experts cannot be probed: {error}"
        ) from error
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found
