"""GradOT: training-free, gradient-preserving compression (after arXiv 2507.04455, ACL 2025).

From the paper we have the idea, not the formulas: per-layer dynamic ranks for attention and channel
pruning for the FFN, chosen so that the adapters' gradient changes little, without training.  **What
follows is our derivation.**

Replace one frozen projection W by W + D.  With x its input and g the gradient of the loss at its
output, three things change to first order: the signal that later adapters see, by D x; the gradient
that earlier adapters receive, by D^T g; the loss, by g^T D x.  The last weighs D x by the
directions in which gradients flow, and D^T g by those in which signals do; we minimise its second
moment

    E (g^T D x)^2  =  ||S^(1/2) D C^(1/2)||_F^2,    C = E x x^T,  S = E g g^T

(x and g taken as independent, as in K-FAC).  Its best rank-r solution is the truncated SVD of
S^(1/2) W C^(1/2), and the squared singular values of all projections of all frozen blocks are in
one unit, so ranks need no per-layer setting: components are bought in order of gain per parameter
until the budget is spent.  An FFN channel k contributes h_k W_down[:, k]; removing it changes the
loss by h_k dloss/dh_k, so the channels with the smallest E (h_k dloss/dh_k)^2 go, over all frozen
blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedsplit.config import OffsiteConfig
from fedsplit.emulators.build import Emulator
from fedsplit.emulators.compression.linears import bias_of, matrix_of, set_matrix
from fedsplit.emulators.compression.moments import Moments, collect
from fedsplit.emulators.compression.src import ATTENTION, apply_factors, module_of, read_site
from fedsplit.emulators.compression.structure import Model
from fedsplit.emulators.compression.svd import Factors
from fedsplit.emulators.compressors.base import (
    Compressor,
    Forecast,
    Material,
    Sizes,
    adapters_in,
    whole_forecast,
)
from fedsplit.emulators.planning.plan import COMPRESS, KEEP, EmulatorPlan, check_fraction
from fedsplit.errors import check
from fedsplit.models.anatomy import probe
from fedsplit.models.layout.projections import BlockLayout, Site, dense_layout_of

Key = tuple[int, str]  # (block, role)


@dataclass(frozen=True)
class GradOT(Compressor):
    """Settings of GradOT.

    Attributes:
        adapters: A's positions.
        attention: share of the attention projections' parameters to remove, in [0, 1].
        ffn: share of the FFN channels to remove, in [0, 1].
        damping: added to the eigenvalues of C and S, relative to their mean.
        calibration: token blocks used at most, the first ones.
    """

    name: ClassVar[str] = "gradot"
    adapters: tuple[int, ...]
    attention: float = 0.0
    ffn: float = 0.0
    damping: float = 1e-2
    calibration: int = 256

    def __post_init__(self) -> None:
        check_fraction("attention", self.attention)
        check_fraction("ffn", self.ffn)
        check(self.damping > 0, "damping", self.damping, "> 0")
        check(self.calibration >= 1, "calibration", self.calibration, ">= 1 (blocks)")

    @classmethod
    def run_settings(cls, offsite: OffsiteConfig) -> dict[str, Any]:
        return {"attention": offsite.beta, "ffn": offsite.beta}

    def forecast(self, sizes: Sizes) -> Forecast:
        """Return the emulator's size, to some per cent, without building it."""
        whole, rest = whole_forecast(sizes, self.adapters)
        if self.attention == 0 and self.ffn == 0:
            return whole
        sizes.known_layout(self.name)
        gone = int(self.attention * sizes.attention + self.ffn * sizes.ffn) * rest
        lossy = (sizes.attention if self.attention > 0 else 0) + self.ffn * sizes.ffn
        return replace(
            whole,
            frozen=whole.frozen - gone,
            frozen_bytes=whole.frozen_bytes - gone * sizes.width,
            run=whole.run - gone,
            verbatim=whole.verbatim - int(lossy) * rest,
        )

    def build(self, model: Model, material: Material) -> Emulator:
        """Return the emulator; needs calibration tokens, one forward and backward pass over them.

        Memory: C and S of every attention projection, about 8 d^2 float64 for each frozen block.

        Raises:
            ConfigError: if it has to compress and there are no tokens.
            UnsupportedModelError: if the block's projections cannot be told.
        """
        layers = probe(model).num_layers
        chosen = adapters_in(layers, self.adapters)
        idle = self.attention == 0 and self.ffn == 0
        plan = EmulatorPlan.with_adapters(layers, chosen, KEEP if idle else COMPRESS)
        factors: dict[Key, Factors] = {}
        channels: dict[int, Tensor] = {}
        details: dict[str, Any] = {}
        if not idle:
            layout = dense_layout_of(model.config)
            factors, channels = self._decide(model, layout, plan.having(COMPRESS), material)
            details["ranks"] = {f"{i}.{role}": f.rank for (i, role), f in factors.items()}
            details["channels"] = {str(i): len(kept) for i, kept in channels.items()}

        def edit(position: int, block: nn.Module) -> None:
            mine = {role: f for (i, role), f in factors.items() if i == position}
            apply_factors(block, layout, mine)
            if position in channels:
                keep_channels(block, layout, channels[position])

        return self.made(model, plan, material, edit=edit, details=details)

    def _decide(
        self, model: Model, layout: BlockLayout, blocks: Sequence[int], material: Material
    ) -> tuple[dict[Key, Factors], dict[int, Tensor]]:
        sites = layout.sites()
        names = sorted({module_of(sites[role]) for role in ATTENTION}) if self.attention else []
        down = module_of(sites["down"])
        moments = collect(
            model,
            material.needed_tokens(self.name)[: self.calibration],
            [(i, n) for i in blocks for n in names],
            [(i, down) for i in blocks] if self.ffn else [],
            material.batch_size,
        )
        factors: dict[Key, Factors] = {}
        if self.attention:
            spectra = {
                (i, role): _spectrum(
                    probe(model).blocks[i],
                    sites[role],
                    moments[i, module_of(sites[role])],
                    self.damping,
                )
                for i in blocks
                for role in ATTENTION
            }
            fused = {(i, r): (i, module_of(sites[r])) for i, r in spectra}
            ranks = allocate(
                {k: (s.shape, s.gains) for k, s in spectra.items()}, 1 - self.attention, fused
            )
            for key, rank in ranks.items():
                factors[key] = spectra[key].factors(rank)
        channels: dict[int, Tensor] = {}
        if self.ffn:
            scores = {i: moments[i, down].taylor for i in blocks}
            channels = best_channels({i: s for i, s in scores.items() if s is not None}, self.ffn)
        return factors, channels


@dataclass
class Spectrum:
    """One projection W (m, n) in the metric S^(1/2) W C^(1/2) = U diag(s) V^T.

    Attributes:
        weight: W.
        left: S^(-1/2) U, (m, k).
        right: U^T S^(1/2), (k, m).
        gains: s^2, falling, (k,).
    """

    weight: Tensor
    left: Tensor
    right: Tensor
    gains: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return int(self.weight.shape[0]), int(self.weight.shape[1])

    def factors(self, rank: int) -> Factors:
        """Return S^(-1/2) U_r U_r^T S^(1/2) W, which is best of rank r in this metric."""
        matrix = self.weight.double().cpu()
        up, down = self.left[:, :rank], self.right[:rank] @ matrix
        error = float((matrix - up @ down).norm() / matrix.norm().clamp_min(1e-300))
        return Factors(up.to(self.weight).contiguous(), down.to(self.weight).contiguous(), error)


def _spectrum(block: nn.Module, site: Site, moments: Moments, damping: float) -> Spectrum:
    weight = read_site(block, site)
    inputs, gradients = moments.inputs, moments.gradients
    assert inputs is not None
    assert gradients is not None
    if site.rows is not None:
        rows = list(site.rows)
        gradients = gradients[rows][:, rows]
    return whiten(weight, inputs, gradients, damping)


def whiten(weight: Tensor, inputs: Tensor, gradients: Tensor, damping: float) -> Spectrum:
    """Return the spectrum of ``weight`` (m, n) under C = ``inputs`` and S = ``gradients``."""
    root_c, _ = _roots(inputs, damping)
    root_s, inverse_s = _roots(gradients, damping)
    matrix = root_s @ weight.double().cpu() @ root_c
    u, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return Spectrum(weight, inverse_s @ u, u.T @ root_s, values.square())


def _roots(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(0)
    # A layer whose output never matters has S = 0: every direction counts alike, and nothing much.
    values = values + damping * values.mean() + 1e-30
    root = values.sqrt()
    return vectors * root @ vectors.T, vectors / root @ vectors.T


def allocate(
    spectra: Mapping[Key, tuple[tuple[int, int], Tensor]],
    keep: float,
    fused: Mapping[Key, object],
) -> dict[Key, int]:
    """Spend ``keep`` of the parameters on the components with the most gain per parameter.

    Args:
        spectra: shape (m, n) and falling gains of each projection.
        keep: share of the parameters, in [0, 1]; every projection keeps rank 1 whatever it says.
        fused: the layer each projection lives in.  A layer keeps its matrix only if all of its
            projections reach the rank from which factors cost more than the matrix.

    Returns:
        Ranks; projections to be left as they are are not in it.
    """
    budget = keep * sum(m * n for (m, n), _ in spectra.values())
    limit = {k: max(1, math.ceil(m * n / (m + n)) - 1) for k, ((m, n), _) in spectra.items()}
    ranks = dict.fromkeys(spectra, 1)
    spent = float(sum(m + n for (m, n), _ in spectra.values()))
    offers = sorted(
        (-float(gain) / (m + n), key, j)
        for key, ((m, n), gains) in spectra.items()
        for j, gain in enumerate(gains.tolist())
        if j >= 1
    )
    for _, key, _ in offers:
        m, n = spectra[key][0]
        if ranks[key] > limit[key]:
            continue  # the whole matrix is bought already
        cost = m + n
        if ranks[key] == limit[key]:
            cost = m * n - ranks[key] * (m + n)  # the rest of the matrix at once
        if spent + cost > budget:
            continue
        spent += cost
        ranks[key] += 1
    whole = {key for key in ranks if ranks[key] > limit[key]}
    together = {fused[k] for k in ranks if k not in whole}
    return {
        key: min(rank, limit[key])
        for key, rank in ranks.items()
        if key not in whole or fused[key] in together
    }


def best_channels(scores: Mapping[int, Tensor], remove: float) -> dict[int, Tensor]:
    """Return for each block which channels stay, in order: the best over all blocks together.

    Args:
        scores: (I,) for each block.
        remove: share of all channels to remove; each block keeps at least one.
    """
    blocks = list(scores)
    flat = torch.cat([scores[i] for i in blocks])
    keep = flat.numel() - int(remove * flat.numel() + 1e-9)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(keep).indices] = True
    out: dict[int, Tensor] = {}
    for i, part in zip(blocks, torch.split(mask, [len(scores[i]) for i in blocks]), strict=True):
        kept = part.nonzero().flatten()
        out[i] = kept if len(kept) else scores[i].argmax().view(1)
    return out


def keep_channels(block: nn.Module, layout: BlockLayout, kept: Tensor) -> None:
    """Remove the FFN channels of ``block`` that are not in ``kept``, in place."""
    sites = layout.sites()
    rows: dict[str, list[int]] = {}
    for role in ("up", "gate"):
        if role in sites:
            site = sites[role]
            where = list(site.rows) if site.rows is not None else None
            chosen = kept.tolist() if where is None else [where[i] for i in kept.tolist()]
            rows.setdefault(module_of(site), []).extend(chosen)
    for name, chosen in rows.items():
        module = block.get_submodule(name)
        index = torch.tensor(sorted(chosen))  # fused halves stay in their order
        matrix, bias = matrix_of(module)[index], bias_of(module)
        set_matrix(module, matrix.clone(), None if bias is None else bias[index].clone())
    module = block.get_submodule(module_of(sites["down"]))
    set_matrix(module, matrix_of(module)[:, kept].clone(), bias_of(module))
