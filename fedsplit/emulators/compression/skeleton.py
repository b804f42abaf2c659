"""The shape of an emulator as plain values, and the same emulator laid out without memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fedsplit.emulators.build import Emulator
from fedsplit.emulators.compression.linears import (
    LowRankLinear,
    QuantisedLinear,
    is_linear,
    is_transposed,
    resize,
)
from fedsplit.emulators.compression.structure import Model, with_blocks
from fedsplit.emulators.importance.harmonizer import Harmonizer
from fedsplit.emulators.planning.plan import COMPRESS, HARMONIZER, SHARE, EmulatorPlan
from fedsplit.errors import FedsplitError, ModelError
from fedsplit.models.anatomy import probe
from fedsplit.models.layout.projections import read_config
from fedsplit.models.loading import HEADS
from fedsplit.models.splitting.structure import mirror

Shape = dict[str, Any]
FILE = "emulator.json"


def describe(emulator: Emulator) -> dict[str, Shape]:
    """Return what each harmonizer and compressed block looks like, by base position."""
    out: dict[str, Shape] = {}
    plan = emulator.plan
    for block, position in zip(probe(emulator.model).blocks, plan.positions, strict=True):
        if plan.roles[position] == HARMONIZER:
            assert isinstance(block, Harmonizer)
            out[str(position)] = {"width": block.width, "tuple_length": block.tuple_length}
        elif plan.roles[position] == COMPRESS:
            shapes = {n: _shape_of(m) for n, m in block.named_modules() if n}
            out[str(position)] = {n: s for n, s in shapes.items() if s is not None}
    return out


def _shape_of(module: nn.Module) -> Shape | None:
    if isinstance(module, LowRankLinear):
        sizes, ranks = list(module.sizes), list(module.ranks)
        return {
            "kind": "low-rank",
            "sizes": sizes,
            "ranks": ranks,
            "permuted": module.order is not None,
        }
    if isinstance(module, QuantisedLinear):
        return {"kind": "quantised", "bits": module.bits}
    if is_linear(module):
        assert isinstance(module.weight, Tensor)
        return {"kind": "plain", "shape": list(module.weight.shape)}
    return None


def lay_out(
    folder: Path,
    plan: EmulatorPlan,
    shapes: Mapping[str, Any],
    attention: str | None,
    experts: str | None,
) -> Model:
    """Return the emulator's structure on the meta device, from ``folder``'s config.json.

    The values may be hostile: whatever is built is no larger than the configuration's own model,
    and takes no memory.

    Raises:
        ModelError: if they do not describe an emulator of a causal language model.
    """
    try:
        config = read_config(folder)
        layers = config.get_text_config().num_hidden_layers
        if layers != plan.num_layers:
            raise ModelError(
                f"config.json: num_hidden_layers={layers!r}: must be the plan's {plan.num_layers}"
            )
        with torch.device("meta"):
            whole = HEADS["causal-lm"].from_config(
                config,
                attn_implementation=attention,
                experts_implementation=experts,
                trust_remote_code=False,
            )
            anatomy = probe(whole)
            made: dict[int, nn.Module] = {}
            for position in plan.positions:
                block = anatomy.blocks[position]
                shape = shapes.get(str(position))
                if plan.roles[position] == HARMONIZER:
                    made[position] = _harmonizer(block, anatomy.hidden_size, shape)
                elif plan.roles[position] != SHARE:
                    made[position] = mirror(block)
                if plan.roles[position] == COMPRESS:
                    _reshape(made[position], position, shape)
            for position in plan.having(SHARE):
                made[position] = mirror(made[plan.source[position]])
            unused = shapes.keys() - {
                str(i) for i in (*plan.having(HARMONIZER), *plan.having(COMPRESS))
            }
            if unused:
                raise ModelError(f"{FILE}: shapes of {sorted(unused)[:3]}: must not be there")
            return with_blocks(whole, [made[i] for i in plan.positions], plan.positions)
    except FedsplitError as error:
        raise ModelError(f"{FILE}, config.json: {error}") from error
    except Exception as error:
        raise ModelError(f"config.json: no emulator can be laid out from it: {error}") from error


def _harmonizer(block: nn.Module, size: int, shape: Any) -> Harmonizer:
    width, length = _integers(shape, ("width", "tuple_length"))
    if not (1 <= width <= size and 0 <= length <= 8):
        raise ModelError(
            f"harmonizer width={width}, tuple_length={length}: must be in 1..{size}, 0..8"
        )
    return Harmonizer(block, length, size, width)


def _reshape(block: nn.Module, position: int, shapes: Any) -> None:
    if not isinstance(shapes, dict):
        raise ModelError(f"block {position}: must have shapes")
    known = dict(block.named_modules())
    for name, shape in shapes.items():
        module = known.get(name)
        if module is None or not is_linear(module) or not isinstance(shape, dict):
            raise ModelError(f"block {position}: {name!r}: must be one of its linear layers")
        made = _linear(f"block {position}: {name}", module, shape)
        if made is not module:
            block.set_submodule(name, made)


def _linear(where: str, module: nn.Module, shape: Shape) -> nn.Module:
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape[::-1] if is_transposed(module) else weight.shape
    bias = getattr(module, "bias", None) is not None
    kind = shape.get("kind")
    if kind == "low-rank":
        sizes, ranks = shape.get("sizes"), shape.get("ranks")
        if not (
            _small_list(sizes)
            and _small_list(ranks)
            and len(sizes) == len(ranks)
            and sum(sizes) == rows
            and all(1 <= r <= min(n, columns) for r, n in zip(ranks, sizes, strict=True))
        ):
            raise ModelError(
                f"{where}: sizes={sizes!r}, ranks={ranks!r}: must factor ({rows}, {columns})"
            )
        return LowRankLinear(
            columns,
            sizes,
            ranks,
            bias=bias,
            permuted=shape.get("permuted") is True,
            like=weight,
        )
    if kind == "quantised":
        if shape.get("bits") not in (4, 8):
            raise ModelError(f"{where}: bits={shape.get('bits')!r}: must be 4 or 8")
        return QuantisedLinear(columns, rows, shape["bits"], bias=bias, like=weight)
    if kind == "plain":
        stored = shape.get("shape")
        if not (
            _small_list(stored)
            and len(stored) == 2
            and all(n <= m for n, m in zip(stored, weight.shape, strict=True))
        ):
            raise ModelError(f"{where}: shape={stored!r}: must be within {tuple(weight.shape)}")
        if stored != list(weight.shape):
            resize(module, tuple(stored), bias, weight)
        return module
    raise ModelError(f"{where}: kind={kind!r}: must be low-rank, quantised or plain")


def _small_list(value: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and 1 <= len(value) <= 16
        and all(type(x) is int and x >= 1 for x in value)
    )


def _integers(shape: Any, names: tuple[str, ...]) -> list[int]:
    if not isinstance(shape, dict) or any(type(shape.get(n)) is not int for n in names):
        raise ModelError(f"shape={shape!r}: must have the integers {', '.join(names)}")
    return [shape[n] for n in names]
