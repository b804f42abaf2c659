"""The seven projections of a transformer block, in one orientation, for any family.

Which parameter is the query projection, how a fused QKV matrix interleaves its heads, which norm
feeds what and whether its weight is ``gamma`` or ``1 + gamma`` is not looked up by model name: it
is *probed*.  A one-block model is built from the configuration, every linear layer's output is
replaced by a free variable, and the block's own forward tells who depends on whom:

- the layer whose input mixes positions is the output projection (O);
- with a single token, attention passes its values through unchanged: the rows that O reads are V;
- rows of an earlier token that move O's input and are not V are K, the remaining ones Q;
- the other consumer is the FFN's down projection; the branch it is linear in is "up", the other
  "gate".

The result is a :class:`BlockLayout` of parameter names relative to the block, which then reads any
mapping of tensors: a live model, a half of one, or a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedsplit.errors import ModelError, UnsupportedModelError
from fedsplit.models.layout.low_rank import updated
from fedsplit.models.layout.probe import probe_block
from fedsplit.models.layout.probe_model import probe_model

Lookup = Callable[[str], Tensor]


@dataclass(frozen=True)
class Site:
    """Where one projection lives: a parameter relative to its block, and which rows of it.

    ``rows`` are output features of the (out, in) matrix, or None for all of them; ``transposed``
    says that the stored weight is (in, out), as GPT-2's Conv1D keeps it.  Experts are stored
    stacked, (E, out, in) or transposed (E, in, out); ``rows`` are then those of each expert.
    """

    weight: str
    bias: str | None = None
    rows: tuple[int, ...] | None = None
    transposed: bool = False


@dataclass(frozen=True)
class NormSite:
    """A norm: ``y = xhat * (offset + weight) + bias``; kind "rms" or "layer" (mean removed)."""

    kind: str
    weight: str | None = None
    bias: str | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class BlockLayout:
    """Names, rows and head geometry of one block; the same for every block of the model.

    ``attn_norm``/``ffn_norm`` are the norms that feed the projections and nothing else (pre-norm);
    None where the input is the residual stream itself (BERT, OLMo2).  ``kv_of_head[h]`` is the
    key/value head that query head h reads.
    """

    q: Site
    k: Site
    v: Site
    o: Site
    up: Site
    gate: Site | None
    down: Site
    heads: int
    kv_heads: int
    head_dim: int
    kv_of_head: tuple[int, ...]
    attn_norm: NormSite | None
    ffn_norm: NormSite | None
    q_norm: NormSite | None
    k_norm: NormSite | None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    embedding: str = ""
    optional: frozenset[str] = frozenset()

    def sites(self) -> dict[str, Site]:
        """Return the projections by role, without absent ones."""
        found = {r: getattr(self, r) for r in ("q", "k", "v", "o", "up", "gate", "down")}
        return {role: site for role, site in found.items() if site is not None}

    def needed(self) -> set[str]:
        """Return the parameter names, relative to the block, that every block must have."""
        names: set[str] = set()
        for site in self.sites().values():
            names |= {n for n in (site.weight, site.bias) if n}
        for norm in (self.attn_norm, self.ffn_norm, self.q_norm, self.k_norm):
            if norm is not None:
                names |= {n for n in (norm.weight, norm.bias) if n}
        return names - self.optional


@dataclass
class BlockProjections:
    """One block's projections, all (out, in), norms folded in unless asked otherwise.

    Shapes with d = width, H heads, G key/value heads, D head size, I hidden units:
    q (H*D, d), k (G*D, d), v (G*D, d), o (d, H*D), up (I, d), gate (I, d) or None, down (d, I);
    biases are vectors of the out size or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    up: Tensor
    gate: Tensor | None
    down: Tensor
    biases: dict[str, Tensor]
    heads: int
    kv_heads: int
    head_dim: int
    kv_of_head: tuple[int, ...]

    def expand(self, kv: Tensor) -> Tensor:
        """Return (G*D, ...) key/value rows repeated per query head -> (H*D, ...)."""
        grouped = kv.view(self.kv_heads, -1, *kv.shape[1:])  # (G, D, ...)
        return grouped[list(self.kv_of_head)].reshape(-1, *kv.shape[1:])  # (H*D, ...)


def layout_of(config: Any) -> BlockLayout:
    """Probe the block layout of a Hugging Face configuration (cached per configuration).

    Builds one random block of the full width in float32, runs it on three tokens and frees it.

    Raises:
        UnsupportedModelError: if the block is not one attention and one (gated) FFN made of linear
            layers or stacked experts, such as latent attention or state-space blocks.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return _layout(json.dumps(text.to_dict(), sort_keys=True, default=str), _Boxed(text))


def dense_layout_of(config: Any) -> BlockLayout:
    """Return the layout of a block whose projections are all plain matrices.

    Raises:
        UnsupportedModelError: as :func:`layout_of`; and for a mixture of experts, whose stacked
            matrices have no rank of their own.
    """
    layout = layout_of(config)
    stacked = [s.weight for s in layout.sites().values() if len(layout.shapes[s.weight]) != 2]
    if stacked:
        raise UnsupportedModelError(
            f"{stacked[0]} {layout.shapes[stacked[0]]}: must be a matrix; mixtures of experts are "
            "not compressed by rank"
        )
    return layout


class _Boxed:
    """Carries a config past lru_cache without taking part in its key."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Boxed)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: products of three tokens wait longer for a second than they take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=64)
def _layout(_key: str, boxed: _Boxed) -> BlockLayout:
    with _one_thread():
        return _probed(boxed)


def _probed(boxed: _Boxed) -> BlockLayout:
    model, block = probe_model(boxed.config)
    optional: set[str] = set()
    if any(isinstance(m, nn.Identity) and n.count(".") == 0 for n, m in block.named_modules()):
        # ModernBERT's first block has no norm where the others have one: look at the second
        first = {n for n, _ in block.named_parameters()}
        model, block = probe_model(boxed.config, blocks=2)
        optional = {n for n, _ in block.named_parameters()} - first
    found = probe_block(model, block, boxed.config)

    def site(raw: dict[str, Any] | None) -> Site | None:
        return None if raw is None else Site(**raw)

    def norm(raw: dict[str, Any] | None) -> NormSite | None:
        return None if raw is None else NormSite(**raw)

    sites: dict[str, Any] = {r: site(found[r]) for r in ("q", "k", "v", "o", "up", "gate", "down")}
    norms: dict[str, Any] = {
        r: norm(found[r]) for r in ("attn_norm", "ffn_norm", "q_norm", "k_norm")
    }
    weight = cast(Any, model).get_input_embeddings().weight
    embedding = next(n for n, p in model.named_parameters() if p is weight)
    return BlockLayout(
        **sites,
        **norms,
        heads=found["heads"],
        kv_heads=found["kv_heads"],
        head_dim=found["head_dim"],
        kv_of_head=found["kv_of_head"],
        shapes={n: tuple(p.shape) for n, p in block.named_parameters()},
        embedding=embedding,
        optional=frozenset(optional),
    )


def block_prefixes(layout: BlockLayout, names: Mapping[str, Any] | set[str]) -> list[str]:
    """Return the prefixes ("model.layers.7.") of blocks with parameters among ``names``.

    Works on halves too, whatever number their first block carries.

    Raises:
        ModelError: if there is none, or a block lacks parameters the layout needs.
    """
    tail = layout.q.weight
    pattern = re.compile(r"^(?:.*\.)?(\d+)\.$")
    found: list[tuple[int, str]] = []
    for name in names:
        if name.endswith("." + tail):
            prefix = name[: -len(tail)]
            match = pattern.match(prefix)
            if match:
                found.append((int(match.group(1)), prefix))
    found.sort()
    if not found:
        raise ModelError(
            f"parameters={len(names)}: none is '<block>.{tail}'; first names {sorted(names)[:3]}"
        )
    for _, prefix in found:
        missing = sorted(n for n in layout.needed() if prefix + n not in names)
        if missing:
            raise ModelError(f"block={prefix!r}: missing parameters {missing}")
    return [prefix for _, prefix in found]


def embedding_name(layout: BlockLayout, names: Mapping[str, Any] | set[str]) -> str | None:
    """Return the input embedding's parameter among ``names``, or None (a top has none)."""
    tail = layout.embedding
    hits = [n for n in names if n == tail or n.endswith("." + tail) or tail.endswith("." + n)]
    return min(hits, key=len) if hits else None


def read_block(
    layout: BlockLayout,
    get: Lookup | Mapping[str, Tensor],
    prefix: str,
    *,
    fold: bool = True,
    dtype: torch.dtype = torch.float32,
    detach: bool = True,
) -> BlockProjections:
    """Read one block's projections.

    Args:
        layout: from :func:`layout_of`.
        get: parameter by full name, a mapping or a function (a file reads only what is asked).
        prefix: the block's prefix, from :func:`block_prefixes`.
        fold: fold the norms that feed the projections into them, so that moving scale between a
            norm and its projection changes nothing.  For a mean-removing norm the input mean is
            removed from the weights as well (those components never act); with q/k norms each
            head's free scale is fixed to unit Frobenius norm.
        dtype: of the result; computed from any stored float type.
        detach: from the graph; False: gradients reach the parameters.

    Raises:
        ModelError: for missing names, wrong shapes, NaN or infinite values.
    """
    lookup = get if callable(get) else get.__getitem__

    def present(norm: NormSite | None) -> NormSite | None:
        if norm is None or norm.weight not in layout.optional:
            return norm
        try:
            lookup(prefix + norm.weight)
        except KeyError:
            return None
        return norm

    def tensor(name: str) -> Tensor:
        try:
            value = lookup(prefix + name)
        except KeyError:
            raise ModelError(f"parameter={prefix + name!r}: missing") from None
        want = layout.shapes.get(name)
        if want is not None and tuple(value.shape) != tuple(want):
            raise ModelError(
                f"parameter={prefix + name!r}: shape {tuple(value.shape)}, must be {tuple(want)}"
            )
        value = (value.detach() if detach else value).to("cpu", dtype)
        if not bool(torch.isfinite(value).all()):
            raise ModelError(f"parameter={prefix + name!r}: contains NaN or infinite values")
        return value

    out: dict[str, Tensor | None] = {"gate": None}
    biases: dict[str, Tensor] = {}
    for role, site in layout.sites().items():
        weight, bias = tensor(site.weight), tensor(site.bias) if site.bias else None
        if weight.dim() == 3:
            weight = _joined_experts(site, weight, down=role == "down")
        else:
            weight = weight.T if site.transposed else weight
            if site.rows is not None:
                index = torch.tensor(site.rows)
                weight, bias = weight[index], bias[index] if bias is not None else None
        norm = present(layout.ffn_norm if role in ("up", "gate") else layout.attn_norm)
        if fold and norm is not None and role in ("q", "k", "v", "up", "gate"):
            weight, bias = _fold_input(norm, tensor, weight, bias)
        inner = {"q": layout.q_norm, "k": layout.k_norm}.get(role)
        if fold and inner is not None:
            weight = _fold_inner(inner, tensor, weight, layout.head_dim)
        out[role] = weight.contiguous()
        if bias is not None:
            biases[role] = bias
    return BlockProjections(
        **out,  # type: ignore[arg-type]
        biases=biases,
        heads=layout.heads,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        kv_of_head=layout.kv_of_head,
    )


def _joined_experts(site: Site, stacked: Tensor, *, down: bool) -> Tensor:
    """Return (E, out, in) as one matrix over experts: (E*I, d), or (d, E*I) for down."""
    out = stacked.transpose(1, 2) if site.transposed else stacked
    if site.rows is not None:
        out = out[:, list(site.rows)]
    return out.transpose(0, 1).flatten(1) if down else out.flatten(0, 1)


def _fold_input(
    norm: NormSite, tensor: Lookup, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return W (xhat * g + b) + c = (W diag g) xhat + (W b + c)."""
    if norm.bias is not None:
        shift = weight @ tensor(norm.bias)  # (out,)
        bias = shift if bias is None else bias + shift
    if norm.weight is not None:
        weight = weight * (norm.offset + tensor(norm.weight))  # (out, d) * (d,)
    if norm.kind == "layer":
        weight = weight - weight.mean(dim=1, keepdim=True)
    return weight, bias


def _fold_inner(norm: NormSite, tensor: Lookup, weight: Tensor, head_dim: int) -> Tensor:
    """Fix the scale that a norm on queries or keys makes free, then fold its weight in."""
    if norm.weight is None:
        return weight
    gain = norm.offset + tensor(norm.weight)
    size = gain.shape[0]  # D for a norm per head, H*D for one over all heads
    grouped = weight.view(-1, size, weight.shape[1])
    grouped = grouped / grouped.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None]
    folded: Tensor = (grouped * gain[:, None]).view_as(weight)
    return folded


def read_config(directory: str | Path) -> Any:
    """Read a model directory's configuration; never runs code that came with it.

    Raises:
        ModelError: if there is no readable config.json of a known architecture.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # whatever each family's own checks raise on hostile values
        raise ModelError(f"{directory}: no usable config.json: {error}") from error


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters by name, adapters merged, sharing memory where unchanged.

    LoRA and IA3 layers (recognised by what they offer, not by class) are reported under the names
    that their base layer would have alone, with what the active adapters make of its tensors.
    Modules that adapters *add* keep their own names.  Matrices that a linear layer stores in fewer
    bits are made for this, in full.
    """
    out: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if ".lora_" not in name and ".ia3_" not in name:
            out[name.replace(".base_layer.", ".")] = parameter.detach()
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and "weight" not in layer._parameters:  # made on access
            out[f"{name}.weight".replace(".base_layer.", ".")] = layer.weight.detach()
    for name, layer in module.named_modules():
        base: Any = getattr(layer, "base_layer", None)
        if isinstance(base, nn.Module) and not getattr(layer, "merged", False):
            for adapter in getattr(layer, "active_adapters", []):
                _merge(out, name, layer, adapter)
    return out


def _merge(out: dict[str, Tensor], name: str, layer: Any, adapter: str) -> None:
    weight = out[f"{name}.weight"]
    if adapter in getattr(layer, "lora_A", {}):
        change, magnitudes = layer.get_delta_weight(adapter).detach(), layer.lora_magnitude_vector
        magnitude = magnitudes[adapter].weight.detach() if adapter in magnitudes else None
        turned = bool(layer.fan_in_fan_out)
        out[f"{name}.weight"] = updated(weight, change, magnitude, turned=turned)
    if adapter in getattr(layer, "ia3_l", {}):
        scale = layer.ia3_l[adapter].detach().to(weight.dtype)  # (out, 1), or (1, in) in an FFN
        turned = getattr(layer, "fan_in_fan_out", False)
        out[f"{name}.weight"] = weight * (scale.T if turned else scale)
        bias = out.get(f"{name}.bias")
        if bias is not None and not layer.is_feedforward:
            out[f"{name}.bias"] = bias * scale.flatten()
