"""What an emulator will cost, for a grid of settings, before anything is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedsplit.emulators.compression.linears import is_linear, matrix_of
from fedsplit.emulators.compression.src import ATTENTION, FFN
from fedsplit.emulators.compressors.base import Compressor, Sizes
from fedsplit.errors import ConfigError, FedsplitError, UnsupportedModelError, check
from fedsplit.models.adapters.methods import METHODS, BlockTuning, MethodSettings
from fedsplit.models.anatomy import probe
from fedsplit.models.layout.projections import BlockLayout, Site, dense_layout_of, read_config
from fedsplit.models.loading import HEADS, check_causal
from fedsplit.registry import pick


@dataclass(frozen=True)
class Base:
    """A base model as the planner sees it; nothing of it is in memory.

    Attributes:
        sizes: of its blocks.
        total: parameters, tied ones once.
        outside: parameters outside the blocks: embeddings, head, final norm.
        head: parameters applied to each token after the blocks (a tied head's too).
        vocab: V.
        heads: attention heads.
        trained: parameters that the planned method trains in one block of A.
        added: those of them that are no weights of the base.
    """

    sizes: Sizes
    total: int
    outside: int
    head: int
    vocab: int
    heads: int
    trained: int
    added: int


@dataclass(frozen=True)
class PlanRow:
    """The cost of one setting.

    Attributes:
        name: as given.
        emulator_params: stored in the emulator.
        emulator_bytes: sent once.
        trained_params: in A, by the planned method.
        round_bytes: what is trained, each way, each round and owner, uncompressed.
        owner_bytes: memory of a step with Adam, an estimate: weights, gradients and two float32
            moments of what is trained, activations, logits.
        step_flops: of one step, forward and back.
        step_share: of what full fine-tuning of the base would take.
        revealed: share of the base's weights that the owner gets bit for bit: embeddings, head, A
            and whatever the compressor leaves as it is.  Weights in rounded or truncated form are
            not counted, though they tell much about the original.
    """

    name: str
    emulator_params: int
    emulator_bytes: int
    trained_params: int
    round_bytes: int
    owner_bytes: int
    step_flops: int
    step_share: float
    revealed: float


def describe_base(source: Any, width: int = 4, method: MethodSettings | None = None) -> Base:
    """Measure a causal language model from its configuration alone.

    Laid out without memory, but for one block of full width in float32, which the layout probe
    runs and frees.

    Args:
        source: a model folder, a configuration, or a model.
        width: bytes of a parameter (4: float32, 2: bfloat16).
        method: what is trained in A's blocks; None = the whole blocks.

    Raises:
        ConfigError: if width is not 1, 2, 4 or 8, or the method finds nothing to train.
        ModelError: if the folder has no usable config.json.
        UnsupportedModelError: if the anatomy does not know the family, or it is no decoder.
    """
    check(width in (1, 2, 4, 8), "width", width, "1, 2, 4 or 8 (bytes)")
    config = read_config(source) if isinstance(source, str | Path) else source
    config = getattr(config, "config", config)
    check_causal(config, str(source) if isinstance(source, str | Path) else "model")
    try:
        with torch.device("meta"):
            model = HEADS["causal-lm"].from_config(config, trust_remote_code=False)
    except Exception as error:
        raise UnsupportedModelError(f"{source}: no causal language model: {error}") from error
    anatomy = probe(model)
    total = sum(p.numel() for p in model.parameters())
    inside = sum(p.numel() for p in anatomy.blocks.parameters())
    layers = anatomy.num_layers
    linears = [matrix_of(m) for m in anatomy.blocks.modules() if is_linear(m)]
    layout: BlockLayout | None
    try:
        layout = dense_layout_of(config)
    except FedsplitError:
        layout = None
    sizes = Sizes(
        layers=layers,
        hidden=anatomy.hidden_size,
        block=inside // layers,
        matrices=sum(m.numel() for m in linears) // layers,
        rows=sum(len(m) for m in linears) // layers,
        attention=_numel(layout, ATTENTION),
        ffn=_numel(layout, FFN),
        layout=layout,
        width=width,
    )
    method = method or MethodSettings()
    head = anatomy.output_embeddings
    text = config.get_text_config()
    outside_blocks = 0 if head is None else sum(p.numel() for p in head.parameters())
    trained = _trained(model, anatomy.blocks[0], layout, method)  # changes the block: comes last
    return Base(
        sizes=sizes,
        total=total,
        outside=total - inside,
        head=outside_blocks,
        vocab=int(text.vocab_size),
        heads=int(getattr(text, "num_attention_heads", 1)),
        trained=trained,
        added=0 if METHODS[method.method].own else trained,
    )


def _trained(model: Any, block: nn.Module, layout: BlockLayout | None, m: MethodSettings) -> int:
    row = pick(METHODS, m.method, "method")
    if row.count is not None:  # attached by running the block, which has no memory here
        if layout is None:
            raise UnsupportedModelError(
                f"method={m.method!r}: this family's projections cannot be told"
            )
        return row.count(layout, m)
    with torch.device("meta"):
        return BlockTuning(model, {"block.": block}, m).count()


def _numel(layout: BlockLayout | None, roles: Sequence[str]) -> int:
    if layout is None:
        return 0
    return sum(_site_numel(layout, s) for r, s in layout.sites().items() if r in roles)


def _site_numel(layout: BlockLayout, site: Site) -> int:
    rows, columns = layout.shapes[site.weight][:: -1 if site.transposed else 1]
    return (rows if site.rows is None else len(site.rows)) * columns


def plan_grid(
    base: Base,
    grid: Mapping[str, Compressor],
    *,
    batch_size: int = 8,
    length: int = 128,
) -> list[PlanRow]:
    """Return one row for each setting.

    FLOPs: 2 per parameter and token forward, 2 more for gradients of activations, 2 more for those
    of A's weights, and 4 T^2 d a block forward (8 back) for attention.  Activations: T B d (34 + 5
    heads T / d) bytes a block at 2 bytes a number (Korthikanti et al. 2022, eq. 2), and three
    copies of the logits in float32.

    Args:
        base: from :func:`describe_base`.
        grid: compressors by the names their rows shall have.
        batch_size: B of an owner's step.
        length: T, tokens.

    Raises:
        ConfigError: if a setting does not fit the base; names the row.
        UnsupportedModelError: if a setting needs projections that cannot be told.
    """
    check(batch_size >= 1, "batch_size", batch_size, ">= 1")
    check(length >= 1, "length", length, ">= 1 (tokens)")
    return [_row(base, name, compressor, batch_size, length) for name, compressor in grid.items()]


def _row(base: Base, name: str, compressor: Compressor, batch: int, length: int) -> PlanRow:
    sizes = base.sizes
    try:
        seen = compressor.forecast(sizes)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    inside_a = seen.adapters * sizes.block
    outside = base.outside - (0 if seen.head_verbatim else base.head)
    trained, added = seen.adapters * base.trained, seen.adapters * base.added
    stored = base.outside * sizes.width + inside_a * sizes.width + seen.frozen_bytes
    tokens = batch * length
    activations = tokens * sizes.hidden * (34 + 5 * base.heads * length / sizes.hidden)
    owner = (
        stored
        + added * sizes.width
        + trained * (sizes.width + 8)
        + int(activations * seen.depth * sizes.width / 2)
        + 3 * tokens * base.vocab * 4
    )
    step = _flops(base, inside_a + added + seen.run, trained, seen.depth, batch, length)
    inside = sizes.block * sizes.layers
    full = _flops(base, inside, inside + base.outside, sizes.layers, batch, length)
    return PlanRow(
        name=name,
        emulator_params=base.outside + inside_a + seen.frozen,
        emulator_bytes=stored,
        trained_params=trained,
        round_bytes=trained * sizes.width,
        owner_bytes=owner,
        step_flops=step,
        step_share=step / full,
        revealed=(outside + seen.verbatim) / base.total,
    )


def _flops(base: Base, run: int, trained: int, depth: int, batch: int, length: int) -> int:
    tokens = batch * length
    mixing = 12 * batch * length**2 * base.sizes.hidden * depth
    return tokens * (4 * (run + base.head) + 2 * trained) + mixing
