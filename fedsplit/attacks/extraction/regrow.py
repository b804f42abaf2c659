"""Giving an emulator its full size back, before it is trained toward the model it stands for."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fedsplit.emulators.build import Emulator
from fedsplit.emulators.compression.linears import LowRankLinear, QuantisedLinear
from fedsplit.emulators.compression.structure import Model, tiny_logits, with_blocks
from fedsplit.emulators.planning.plan import DROP, HARMONIZER
from fedsplit.errors import AttackError, UnsupportedModelError
from fedsplit.models.anatomy import probe
from fedsplit.models.layout.projections import layout_of
from fedsplit.models.splitting.structure import mirror


def regrown(emulator: Emulator) -> Model:
    """Return the emulator's model at the full model's size, computing what it did.

    Low-rank and quantised matrices become plain ones.  Wherever the plan has no block of full size
    there is a new one: a copy of the nearest whole block, with the projections onto the residual
    stream set to zero (a harmonizer stays, with the new block behind it).

    Args:
        emulator: its adapters stay the very same tensors; other parts may be changed.

    Raises:
        AttackError: if nothing is missing.
        UnsupportedModelError: if the family's blocks have no such projections, or the new model
            computes something else.
    """
    before = tiny_logits(emulator.model)
    plan, anatomy = emulator.plan, probe(emulator.model)
    widened = sum(_plain_matrices(block) for block in anatomy.blocks)
    where = {position: index for index, position in enumerate(plan.positions)}
    blocks: list[nn.Module] = []
    places: list[int] = []
    for position, role in enumerate(plan.roles):
        if role != DROP:
            blocks.append(anatomy.blocks[where[position]])
            places.append(where[position])
        if role in (DROP, HARMONIZER):
            near = min(
                (i for i in plan.positions if plan.roles[i] != HARMONIZER),
                key=lambda i: (abs(i - position), i),
            )
            blocks.append(_silent_copy(anatomy.blocks[where[near]], emulator))
            places.append(where[near])
    made = emulator.model
    if len(blocks) > len(anatomy.blocks):
        made = with_blocks(made, [mirror(block) for block in blocks], places).eval()
    elif not widened:
        raise AttackError("regrow: the emulator has its full size: must lack something")
    after = tiny_logits(made)
    if before is None or after is None or not torch.allclose(before, after, atol=1e-4, rtol=1e-3):
        kind = emulator.base_config.get("model_type")
        raise UnsupportedModelError(f"regrow: a {kind} at full size computes something else")
    return made


def _plain_matrices(block: nn.Module) -> int:
    """Replace low-rank and quantised layers by plain ones, in place; return how many."""
    found = [
        (name, module)
        for name, module in block.named_modules()
        if isinstance(module, LowRankLinear | QuantisedLinear)
    ]
    for name, module in found:
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        plain.weight = nn.Parameter(module.weight.detach().clone())
        if module.bias is not None:
            plain.bias = nn.Parameter(module.bias.detach().clone())
        parent, _, child = name.rpartition(".")
        setattr(block.get_submodule(parent), child, plain)
    return len(found)


def _silent_copy(block: nn.Module, emulator: Emulator) -> nn.Module:
    layout = layout_of(emulator.model.config)
    fresh = copy.deepcopy(block)
    for site in (layout.o, layout.down):
        module = fresh.get_submodule(site.weight.rpartition(".")[0])
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
    return fresh
