"""The lineage gate: after each aggregate, is this still the base model?

The gate keeps a sketch of the base's aligned products (a d x m projection per block and kind, exact
when m = d), the invariants of the last blocks, and the parameter cosine's running sums.  A check
recomputes only blocks among whose parameters something changed.

Guarantee: blocks replaced by strangers' weights or by noise score near 0 (std about 1/d), honest
fine-tuning of one round near 1; a permuted but equivalent block counts as in lineage, since
products cancel hidden-unit, head, V/O and Q/K maps.  What breaks it: a change inside the base's own
subspace is not seen (a backdoor trained in is still "in lineage"); modules that an adapter method
adds have no counterpart in the base (LoRA and IA3 are merged and judged, bottleneck adapters are
only counted in ``notes``); thresholds are not a proof of provenance, see
:mod:`fedsplit.fingerprints.gate.verdict` for calibrated error rates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fedsplit.errors import LineageError, ModelError, check
from fedsplit.fingerprints.methods.align import Alignment
from fedsplit.fingerprints.methods.aligned_products import (
    centred_stream,
    embedding_alignment,
    product_factors,
)
from fedsplit.fingerprints.methods.ics import ICS, Factors, correlation
from fedsplit.fingerprints.methods.matching import KINDS, cosine, mean_cosine
from fedsplit.fingerprints.methods.pcs import Moments, moments
from fedsplit.fingerprints.view import WeightView, choose_tokens, same_width
from fedsplit.models.layout.projections import BlockProjections
from fedsplit.seeding import torch_generator

Verdict = Literal["in_lineage", "not_shown", "independent"]

MOVED = 0.1
"""A product that agrees better than the worse of its two matrices by more than this was moved to
another basis.  Training lowers products faster than matrices, so honest updates have the opposite
sign (docs/lineage.md has the figures)."""

FACTORS = {"qk": ("q", "k"), "vo": ("v", "o"), "ffn": ("up", "down")}
State = Mapping[str, Tensor] | nn.Module | WeightView


@dataclass(frozen=True)
class GateConfig:
    """Thresholds and cost of the gate.

    Attributes:
        in_lineage: least mean score for "in_lineage".
        block: least score of every single block for "in_lineage".
        independent: at or below this mean score (and no block above ``block``) the verdict is
            "independent".
        sketch: columns m of each product's sketch; m >= d is exact.
        tokens: embedding rows used for the invariants; 0 leaves them out.
        seed: of the sketch.

    Defaults are ours, from trained checkpoints: fine-tuned and LoRA descendants scored 0.96 or more
    (worst block 0.95), 30 % pruning and 4-bit weights 0.986, further training at ten times the
    learning rate 0.75 (worst block 0.70) and 0.30, strangers 0.03 or less (best block 0.07).  In
    federations (docs/lineage.md) every block of honest updates stayed at 0.93 or more over 100
    rounds, and the worst block of an attack at 0.01 or less.

    An average in which one of n owners replaced a block keeps about 0.63 of it for n = 2 and 0.95
    for n = 4: check every owner's update, not the aggregate alone (``pcs_per_layer`` falls to 0.71
    and 0.95 there, against 0.99 for honest owners).
    """

    in_lineage: float = 0.8
    block: float = 0.7
    independent: float = 0.1
    sketch: int = 128
    tokens: int = 512
    seed: int = 2312

    def __post_init__(self) -> None:
        check(0 < self.in_lineage <= 1, "in_lineage", self.in_lineage, "in (0, 1]")
        check(0 < self.block <= 1, "block", self.block, "in (0, 1]")
        check(
            0 <= self.independent < self.in_lineage,
            "independent",
            self.independent,
            "in [0, in_lineage)",
        )
        check(self.sketch >= 1, "sketch", self.sketch, ">= 1 (columns)")
        check(self.tokens >= 0, "tokens", self.tokens, ">= 0 (rows)")


@dataclass(frozen=True)
class LineageReport:
    """Outcome of one check.

    Attributes:
        pcs: cosine of the matrices matched by name; 1 for an unchanged model.
        ics: corrected invariants' cosine of the last blocks, None without embedding rows.
        score: mean over blocks of the aligned products' cosine (V/O and FFN).
        verdict: "in_lineage", "not_shown" or "independent".
        per_layer: score of each block, in order.
        parts: mean cosine by kind of product.
        diverged: indices of blocks below the block threshold: spliced, replaced or noisy.
        recomputed: number of blocks that this check really looked at.
        notes: what had to be done, and what was not judged.
        pcs_per_layer: parameter cosine of each block, more sensitive than the score to an average
            with a stranger, but blind to equivalent permutations.
        moved: indices of blocks that keep the base's products by other matrices (permuted, mixed or
            rescaled): in lineage, but not to be averaged with blocks in the base's own basis.
    """

    pcs: float
    ics: float | None
    score: float
    verdict: Verdict
    per_layer: tuple[float, ...]
    parts: Mapping[str, float]
    diverged: tuple[int, ...]
    recomputed: int
    notes: tuple[str, ...] = ()
    pcs_per_layer: tuple[float, ...] = ()
    moved: tuple[int, ...] = ()


def decide(per_layer: Iterable[float], config: GateConfig) -> tuple[Verdict, tuple[int, ...]]:
    """Return one of three outcomes from block scores, and the indices below the threshold."""
    scores = list(per_layer)
    mean = sum(scores) / max(1, len(scores))
    diverged = tuple(i for i, s in enumerate(scores) if s < config.block)
    if mean >= config.in_lineage and not diverged:
        return "in_lineage", diverged
    if mean <= config.independent and len(diverged) == len(scores):
        return "independent", diverged
    return "not_shown", diverged


@dataclass
class _Memory:
    """What the last committed check found, by block index, canonical name and channel."""

    blocks: dict[int, dict[str, float]] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    ics: dict[str, float] = field(default_factory=dict)
    alignment: Alignment | None = None
    aligned: bool = False

    def copy(self) -> _Memory:
        return replace(
            self, blocks=dict(self.blocks), moments=dict(self.moments), ics=dict(self.ics)
        )


class LineageGate:
    """Compares every state with one base.

    Args:
        base: the base model or top, as a view, a module or named tensors with its ``config``.
        config: thresholds.
        model_config: the Hugging Face configuration (or layout) when ``base`` is a plain mapping.
        rows: token embedding rows (V, d) that the server holds, for a top without embeddings;
            used for the invariants only.
        snapshot: copy the base's matrices, because ``base`` is a live module that training will
            change.  A view on files or on tensors that nobody writes to needs no copy.

    Raises:
        LineageError: if states cannot be compared (width, depth, shapes).
        ModelError: for missing parameters, NaN or infinite values.
        UnsupportedModelError: for architectures that cannot be probed.
    """

    def __init__(
        self,
        base: State,
        config: GateConfig | None = None,
        *,
        model_config: object | None = None,
        rows: Tensor | None = None,
        snapshot: bool = True,
    ) -> None:
        self.config = config or GateConfig()
        self._rows = rows.detach().clone() if rows is not None else None
        view = self._view(base, model_config)
        self._canonical = view.canonical()
        self._matrices = [n for n, own in self._canonical.items() if len(view.names[own]) >= 2]
        self.base = _snapshot(view) if snapshot else view
        width, columns = view.width, min(self.config.sketch, view.width)
        if columns == width:
            self._probe = torch.eye(width)
        else:
            generator = torch_generator(self.config.seed, "lineage-sketch", width, columns)
            self._probe = torch.randn(width, columns, generator=generator) / columns**0.5
        self._centre = centred_stream(view)
        self._sketches = [
            _sketch(view.block(i), self._probe, None, centre=self._centre)
            for i in range(view.depth)
        ]
        self._ics = ICS()
        self._tokens: tuple[int, ...] = ()
        self._factors: dict[str, Factors] = {}
        if view.vocabulary and self.config.tokens:
            self._tokens = choose_tokens(view.vocabulary, self.config.tokens)
            self._factors = dict(self._ics.factors(view, self._tokens))
        self._memory = _Memory()

    def check(
        self, state: State, changed: Iterable[str] | None = None, *, commit: bool = True
    ) -> LineageReport:
        """Compare ``state`` with the base.

        Args:
            state: a module, a view, or named tensors (under the base's names or wrapped ones).
            changed: names of parameters that may differ from the last committed state (any
                wrapping); None means all.
            commit: remember this state as the one that later ``changed`` refers to.  An owner's
                candidate update is checked with ``commit=False``.

        Raises:
            LineageError: for another width, depth or shape than the base's.
            ModelError: for missing parameters, NaN or infinite values.
        """
        view = self._view(state, self.base.layout)
        same_width(self.base, view)
        if view.depth != self.base.depth:
            raise LineageError(f"blocks={view.depth}: the base has {self.base.depth}")
        names = view.canonical()
        touched = set(self._canonical) if changed is None else _canonical_of(names, changed)
        memory = self._memory.copy()
        if "embedding" in touched or not memory.aligned:
            memory.alignment, memory.aligned = self._alignment(view, names), True
        alignment = memory.alignment
        blocks = {int(n.split(".")[1]) for n in touched if n.startswith("blocks.")}
        blocks |= set(range(view.depth)) - set(memory.blocks)
        if alignment is not self._memory.alignment:
            blocks = set(range(view.depth))
        for index in sorted(blocks):
            memory.blocks[index] = self._compare(index, view.block(index), alignment)
        for name in self._matrices:
            if name in touched or name not in memory.moments:
                if name not in names:
                    if name.startswith("blocks."):
                        raise LineageError(f"parameter={name!r}: missing from the state")
                    continue
                memory.moments[name] = moments(
                    self.base.get(self._canonical[name]), view.get(names[name]), name
                )
        for name in touched & set(names):
            _finite(view, names[name])
        self._invariants(view, blocks, "embedding" in touched, memory)
        report = self._report(view, memory, len(blocks), alignment)
        if commit:
            self._memory = memory
        return report

    def _view(self, state: State, config: object | None) -> WeightView:
        if isinstance(state, WeightView):
            return state
        if isinstance(state, nn.Module):
            plain = WeightView.of_module(state)
            if plain.vocabulary:
                return plain
            return WeightView.of_module(state, rows=self._rows)
        if config is None:
            raise LineageError("model_config=None: a plain mapping needs its model's config")
        plain = WeightView.of_tensors(state, config)
        return plain if plain.vocabulary else WeightView.of_tensors(state, config, rows=self._rows)

    def _alignment(self, view: WeightView, names: Mapping[str, str]) -> Alignment | None:
        """Return a map of the residual basis, if the state's own embedding moved."""
        brought = "embedding" in names and "embedding" in self._canonical
        if not brought or not view.vocabulary or not self.base.vocabulary:
            return None
        found = embedding_alignment(self.base, view, rows=2048)
        return None if found.kind == "identity" else found

    def _compare(
        self, index: int, block: BlockProjections, alignment: Alignment | None
    ) -> dict[str, float]:
        matrix = None if alignment is None else alignment.matrix.to(torch.float32)
        theirs = _sketch(block, self._probe, matrix, centre=self._centre)
        return {k: cosine(self._sketches[index][k], theirs[k]) for k in KINDS}

    def _invariants(self, view: WeightView, blocks: set[int], moved: bool, memory: _Memory) -> None:
        if not self._factors or not view.vocabulary:
            return
        last = {int(key[1:]) for key in self._factors}
        stale = last if moved or not memory.ics else {i for i in last if view.depth + i in blocks}
        if not stale:
            return
        for key, theirs in self._ics.factors(view, self._tokens, stale):
            memory.ics[key] = correlation(self._factors[key], theirs)

    def _report(
        self, view: WeightView, memory: _Memory, recomputed: int, alignment: Alignment | None
    ) -> LineageReport:
        order = [memory.blocks[i] for i in range(view.depth)]
        per_layer = tuple(mean_cosine(b) for b in order)
        verdict, diverged = decide(per_layer, self.config)
        none = Moments(0.0, 0.0, 0.0)
        total = sum(memory.moments.values(), none)
        by_block = [none] * view.depth
        for name, found in memory.moments.items():
            if name.startswith("blocks."):
                index = int(name.split(".")[1])
                by_block[index] = by_block[index] + found
        notes: tuple[str, ...] = ()
        if alignment is not None:
            notes = (f"residual basis aligned by {alignment.kind}",)
        added = set(view.canonical()) - set(self._canonical)
        if added:
            notes += (f"{len(added)} parameters are not in the base and were not judged",)
        return LineageReport(
            pcs=total.cosine(),
            ics=sum(memory.ics.values()) / len(memory.ics) if memory.ics else None,
            score=sum(per_layer) / len(per_layer),
            verdict=verdict,
            per_layer=per_layer,
            parts={k: sum(b[k] for b in order) / len(order) for k in KINDS},
            diverged=diverged,
            recomputed=recomputed,
            notes=notes,
            pcs_per_layer=tuple(m.cosine() for m in by_block),
            moved=tuple(i for i in range(view.depth) if self._moved(i, memory)),
        )

    def _moved(self, index: int, memory: _Memory) -> bool:
        sites = self.base.layout.sites()
        for kind, roles in FACTORS.items():
            names = [f"blocks.{index}.{sites[role].weight}" for role in roles]
            found = [memory.moments[n].cosine() for n in names if n in memory.moments]
            if found and memory.blocks[index][kind] - min(found) > MOVED:
                return True
        return False


def _finite(view: WeightView, name: str) -> None:
    """Check that vectors outside the products (norms, biases) are finite too."""
    if len(view.names[name]) < 2 and not bool(torch.isfinite(view.get(name)).all()):
        raise ModelError(f"parameter={name!r}: contains NaN or infinite values")


def _snapshot(view: WeightView) -> WeightView:
    kept = {n: view.get(n).detach().to("cpu", copy=True) for n in view.names}
    return WeightView(view.layout, view.names, kept.__getitem__, rows=view._rows)


def _canonical_of(names: Mapping[str, str], changed: Iterable[str]) -> set[str]:
    """Return canonical names touched; an adapter's tensor touches the matrix it adapts."""
    wanted = set()
    back = {own: short for short, own in names.items()}
    for name in changed:
        plain = name.replace(".base_layer.", ".")
        for mark in (".lora_", ".ia3_"):
            if mark in plain:
                plain = plain.split(mark)[0] + ".weight"
        hit = back.get(plain)
        if hit is None:
            hit = next(
                (s for o, s in back.items() if plain.endswith("." + o) or o.endswith("." + plain)),
                None,
            )
        if hit is not None:
            wanted.add(hit)
    return wanted


def _sketch(
    block: BlockProjections, probe: Tensor, matrix: Tensor | None, *, centre: bool
) -> dict[str, Tensor]:
    """Return P G (d, m) for each product P = A^T B; with a basis map R it is R^T P R G."""
    right = probe if matrix is None else matrix @ probe
    out: dict[str, Tensor] = {}
    for kind, (a, b) in product_factors(block).items():
        if centre and kind != "qk":
            b = b - b.mean(1, keepdim=True)
        found = a.T @ (b @ right)  # (d, m)
        out[kind] = found if matrix is None else matrix.T @ found
    return out
