"""The evasion suite: maps that change every weight and keep the function.

A thief who knows the fingerprint applies these.  Each first proves itself: :func:`transform` runs
the model before and after on public inputs and reports the difference of the outputs; one that
claims to keep the function and does not is an error, and one that a family cannot have (a sign flip
under a mean-removing norm) raises :class:`UnsupportedModelError`.

HuRef (arXiv 2312.04828), section 4.1, names the permutation, linear-map and embedding attacks; norm
rescaling, rotations, key biases and mean injection are beyond it.  Pruning and splicing do change
the function and are reported as such.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedsplit.errors import LineageError, UnsupportedModelError
from fedsplit.fingerprints.evasion import transforms_residual as residual
from fedsplit.fingerprints.evasion.editor import Editor
from fedsplit.fingerprints.methods.reef import public_inputs
from fedsplit.registry import pick
from fedsplit.seeding import torch_generator

Change = Callable[[Editor, torch.Generator], None]


def _rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def _mixing(size: int, generator: torch.Generator) -> Tensor:
    """Return a random invertible matrix, condition number about 5."""
    u, v = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    mixed: Tensor = u * (0.5 + 2.0 * _rand(generator, size)) @ v
    return mixed


def _blockwise(blocks: list[Tensor]) -> Tensor:
    joined: Tensor = cast(Any, torch.block_diag)(*blocks)
    return joined


def ffn_permutation(editor: Editor, generator: torch.Generator) -> None:
    """Shuffle the hidden units."""
    for prefix in editor.prefixes:
        units = editor.weight(prefix, "up").shape[0]
        order = torch.eye(units, dtype=torch.float64)[torch.randperm(units, generator=generator)]
        for role in ("up", "gate") if editor.layout.gate is not None else ("up",):
            editor.apply_rows(prefix, role, order)
        editor.apply_columns(prefix, "down", order.T)


def head_permutation(editor: Editor, generator: torch.Generator) -> None:
    """Shuffle the key/value groups, each with its query heads."""
    layout = editor.layout
    share, dim = layout.heads // layout.kv_heads, layout.head_dim
    if list(layout.kv_of_head) != [h // share for h in range(layout.heads)]:
        raise UnsupportedModelError("head permutation: query heads are not grouped in order")
    if any(n is not None and n.weight is not None for n in (layout.q_norm, layout.k_norm)):
        raise UnsupportedModelError("head permutation: queries or keys are normalised")
    for prefix in editor.prefixes:
        groups = torch.randperm(layout.kv_heads, generator=generator)
        keys = (groups[:, None] * dim + torch.arange(dim)).flatten()
        heads = (groups[:, None] * share * dim + torch.arange(share * dim)).flatten()
        for role in ("k", "v"):
            editor.apply_rows(prefix, role, torch.eye(len(keys), dtype=torch.float64)[keys])
        turn = torch.eye(len(heads), dtype=torch.float64)[heads]
        editor.apply_rows(prefix, "q", turn)
        editor.apply_columns(prefix, "o", turn.T)


def vo_maps(editor: Editor, generator: torch.Generator) -> None:
    """Apply v -> A v and o -> o A^-1 for an invertible A per key/value head."""
    layout = editor.layout
    for prefix in editor.prefixes:
        maps = [_mixing(layout.head_dim, generator) for _ in range(layout.kv_heads)]
        editor.apply_rows(prefix, "v", _blockwise(maps))
        inverse = [torch.linalg.inv(maps[g]) for g in layout.kv_of_head]
        editor.apply_columns(prefix, "o", _blockwise(inverse))


def _qk_apply(editor: Editor, make: Callable[[], Tensor]) -> None:
    """Apply q -> A q and k -> A^-T k, one A per key head."""
    layout = editor.layout
    if any(n is not None for n in (layout.q_norm, layout.k_norm)):
        raise UnsupportedModelError("Q/K maps: queries or keys are normalised")
    for prefix in editor.prefixes:
        maps = [make() for _ in range(layout.kv_heads)]
        editor.apply_rows(prefix, "q", _blockwise([maps[g] for g in layout.kv_of_head]))
        editor.apply_rows(prefix, "k", _blockwise([torch.linalg.inv(m).T for m in maps]))


def _rotary_map(dim: int, rotary: int, interleaved: bool, generator: torch.Generator) -> Tensor:
    """Return 2 x 2 blocks a I + b J on the rotary pairs, anything invertible on the rest."""
    out = torch.eye(dim, dtype=torch.float64)
    for pair in range(rotary // 2):
        i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + rotary // 2)
        radius, angle = 0.5 + _rand(generator, 1), 6.28 * _rand(generator, 1)
        out[i, i] = out[j, j] = (radius * angle.cos()).item()
        out[j, i] = (radius * angle.sin()).item()
        out[i, j] = -out[j, i]
    if dim > rotary:
        out[rotary:, rotary:] = _mixing(dim - rotary, generator)
    return out


def qk_maps(editor: Editor, generator: torch.Generator) -> None:
    """Apply the largest group of Q/K maps that the position encoding leaves free, by trying.

    Any invertible map where positions do not enter through Q and K; otherwise maps that commute
    with the rotation, for half-split or interleaved pairs and a full or partial rotary width.
    """
    dim = editor.layout.head_dim
    text = editor.config.get_text_config()
    widths = {dim}
    rope = getattr(text, "rope_parameters", None) or {}
    factor = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
    for share in (factor, getattr(text, "rotary_pct", None)):
        if isinstance(share, float):
            widths.add(int(dim * share))
    if isinstance(getattr(text, "rotary_dim", None), int):
        widths.add(text.rotary_dim)
    saved = {n: p.detach().clone() for n, p in editor.parameters.items()}
    before = outputs(editor.model)
    tries: list[Callable[[], Tensor]] = [lambda: _mixing(dim, generator)]
    for rotary in sorted(widths):
        for pairs in (False, True):
            tries.append(
                lambda rotary=rotary, pairs=pairs: _rotary_map(  # type: ignore[misc]
                    dim, rotary, pairs, generator
                )
            )
    for make in tries:
        _qk_apply(editor, make)
        if difference(before, outputs(editor.model)) < TOLERANCE:
            return
        with torch.no_grad():
            for name, parameter in editor.parameters.items():
                parameter.copy_(saved[name])
    raise UnsupportedModelError("Q/K maps: no map tried commutes with the position encoding")


def key_bias(editor: Editor, generator: torch.Generator) -> None:
    """Add any vector to the key bias: without rotary positions it shifts all logits of a row."""
    for prefix in editor.prefixes:
        bias = editor.bias(prefix, "k")
        if bias is None or editor.layout.k_norm is not None:
            raise UnsupportedModelError("key bias: the keys have none, or are normalised")
        shift = torch.randn(bias.shape, generator=generator, dtype=torch.float64)
        editor.write(prefix, "k", editor.weight(prefix, "k"), bias + shift)


def norm_rescaling(editor: Editor, generator: torch.Generator) -> None:
    """Move a random positive scale from each norm into the projections that it feeds."""
    norms = [(n, roles) for n, roles in editor.norms() if n.weight is not None]
    if not norms:
        raise UnsupportedModelError("norm rescaling: no norm feeds projections only")
    for prefix in editor.prefixes:
        for norm, roles in norms:
            gain, bias = editor.norm(prefix, norm)
            scale = 0.3 + 2.7 * _rand(generator, gain.shape[0])
            editor.write_norm(prefix, norm, gain * scale, None if bias is None else bias * scale)
            for role in roles:
                editor.write(prefix, role, editor.weight(prefix, role) / scale)


def weight_scaling(editor: Editor, generator: torch.Generator) -> None:
    """Scale values up and outputs down per head, and linear FFN units likewise."""
    layout = editor.layout
    for prefix in editor.prefixes:
        scale = 0.3 + 2.7 * _rand(generator, layout.kv_heads)
        rows = scale.repeat_interleave(layout.head_dim)
        columns = scale[list(layout.kv_of_head)].repeat_interleave(layout.head_dim)
        editor.apply_rows(prefix, "v", torch.diag(rows))
        editor.apply_columns(prefix, "o", torch.diag(1 / columns))
        if layout.gate is not None:
            units = 0.3 + 2.7 * _rand(generator, editor.weight(prefix, "up").shape[0])
            editor.apply_rows(prefix, "up", torch.diag(units))
            editor.apply_columns(prefix, "down", torch.diag(1 / units))


def pruning(editor: Editor, generator: torch.Generator, share: float = 0.3) -> None:
    """Zero the smallest ``share`` of each projection's weights (changes the function)."""
    del generator
    for prefix in editor.prefixes:
        for role in editor.layout.sites():
            weight = editor.weight(prefix, role)
            bound = weight.abs().flatten().kthvalue(max(1, int(share * weight.numel()))).values
            editor.write(prefix, role, weight * (weight.abs() > bound))


TRANSFORMS: dict[str, Change] = {
    "ffn_permutation": ffn_permutation,
    "head_permutation": head_permutation,
    "vo_maps": vo_maps,
    "qk_maps": qk_maps,
    "key_bias": key_bias,
    "norm_rescaling": norm_rescaling,
    "weight_scaling": weight_scaling,
    "embedding_permutation": residual.embedding_permutation,
    "sign_flips": residual.sign_flips,
    "rotation": residual.rotation,
    "residual_scaling": residual.residual_scaling,
    "mean_injection": residual.mean_injection,
}
"""Function-preserving maps by name."""

TOLERANCE = 5e-3
"""Largest relative output difference of a map that keeps the function, in float32 arithmetic."""


@dataclass(frozen=True)
class Transformed:
    """A transformed copy and its proof: the largest output difference relative to the output."""

    model: nn.Module
    name: str
    difference: float


def outputs(model: nn.Module, samples: int = 4, length: int = 12) -> Tensor:
    """Return the model's output on random tokens: logits, or hidden states' inner products.

    A bare encoder answers in the residual basis itself, which a map may have moved; what a user of
    it can compare are inner products, (samples, T, T).
    """
    config: Any = cast(Any, model).config
    inputs = public_inputs(int(config.get_text_config().vocab_size), samples, length)
    with torch.no_grad():
        out = model(input_ids=inputs, attention_mask=torch.ones_like(inputs))
    found: Tensor = out[0].double()
    if cast(Any, model).get_output_embeddings() is None:
        found = found @ found.transpose(1, 2)
    return found


def difference(before: Tensor, after: Tensor) -> float:
    """Return max |after - before| / std(before)."""
    return float((after - before).abs().max() / before.std().clamp_min(1e-12))


def transform(model: nn.Module, name: str, seed: int = 0) -> Transformed:
    """Apply one function-preserving map to a copy of ``model`` and prove that it is one.

    Raises:
        ConfigError: for an unknown name.
        UnsupportedModelError: if the family does not have this freedom.
        LineageError: if the output changed by more than :data:`TOLERANCE`.
    """
    change = pick(TRANSFORMS, name, "transform")
    before = outputs(model)
    changed = copy.deepcopy(model)
    editor = Editor(changed)
    if len(editor.layout.shapes[editor.layout.down.weight]) == 3:
        raise UnsupportedModelError(f"transform={name!r}: mixtures of experts are not rewritten")
    change(editor, torch_generator(seed, "evasion", name))
    moved = difference(before, outputs(editor.model))
    if not moved < TOLERANCE:
        if name == "key_bias":
            raise UnsupportedModelError("key bias: positions enter through the keys")
        raise LineageError(
            f"transform={name!r}: output moved by {moved:.2e} standard deviations, "
            f"must be < {TOLERANCE}"
        )
    return Transformed(editor.model, name, moved)


def splice(model: nn.Module, donor: nn.Module, blocks: list[int]) -> nn.Module:
    """Return a copy of ``model`` whose given blocks are the donor's (changes the function)."""
    changed = copy.deepcopy(model)
    ours, theirs = Editor(changed), Editor(donor)
    with torch.no_grad():
        for index in blocks:
            prefix, other = ours.prefixes[index], theirs.prefixes[index]
            for name, parameter in ours.parameters.items():
                if name.startswith(prefix):
                    parameter.copy_(theirs.parameters[other + name[len(prefix) :]])
    return changed
