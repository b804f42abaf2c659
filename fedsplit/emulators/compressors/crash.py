"""CRaSh: clustering, removing and sharing of layers (arXiv 2310.15477)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedsplit.config import OffsiteConfig
from fedsplit.emulators.build import Emulator
from fedsplit.emulators.compression.structure import Model, first
from fedsplit.emulators.compressors.base import (
    Compressor,
    Forecast,
    Material,
    Sizes,
    adapters_in,
    plain_forecast,
)
from fedsplit.emulators.lm import check_tokens, logits_of
from fedsplit.emulators.planning.plan import ADAPTER, DROP, KEEP, SHARE, EmulatorPlan
from fedsplit.errors import check
from fedsplit.models.anatomy import probe
from fedsplit.models.modes import frozen

MAX_ROWS = 1024


@dataclass(frozen=True)
class Crash(Compressor):
    """Adjacent blocks whose outputs look alike form a cluster; its centre runs for all of them.

    Attributes:
        adapters: A's positions.
        clusters: number of clusters of the blocks outside A; None: one for each (no compression).
        share: run the centre at every place of its cluster (the depth stays); False: remove the
            others ("clustering and removing" alone).
    """

    name: ClassVar[str] = "crash"
    adapters: tuple[int, ...]
    clusters: int | None = None
    share: bool = True

    def __post_init__(self) -> None:
        good = self.clusters is None or self.clusters >= 1
        check(good, "clusters", self.clusters, "None or >= 1")

    @classmethod
    def run_settings(cls, offsite: OffsiteConfig) -> dict[str, Any]:
        return {"clusters": offsite.keep}

    def forecast(self, sizes: Sizes) -> Forecast:
        chosen = adapters_in(sizes.layers, self.adapters)
        count = self._count(runs_between(sizes.layers, chosen))
        rest = sizes.layers - len(chosen)
        return plain_forecast(sizes, len(chosen), count, runs=rest if self.share else count)

    def _count(self, runs: Sequence[Sequence[int]]) -> int:
        total = sum(len(r) for r in runs)
        count = total if self.clusters is None else self.clusters
        check(len(runs) <= count <= total, "clusters", count, f"in {len(runs)}..{total}")
        return count

    def build(self, model: Model, material: Material) -> Emulator:
        """Return the emulator; calibration tokens are needed unless ``clusters`` is None.

        Raises:
            ConfigError: if there are more clusters than blocks outside A, or fewer than runs of
                adjacent blocks between adapters, or tokens are missing.
        """
        layers = probe(model).num_layers
        chosen = adapters_in(layers, self.adapters)
        runs = runs_between(layers, chosen)
        total, count = sum(len(r) for r in runs), self._count(runs)
        similar, clusters = torch.eye(layers), [[i] for run in runs for i in run]
        if count < total:
            tokens = material.needed_tokens(self.name)
            similar = cka_matrix(block_features(model, tokens[: material.batch_size]))
            clusters = cluster(similar, runs, count)
        centres = {i: centre_of(similar, c) for c in clusters for i in c}
        other = SHARE if self.share else DROP
        roles = tuple(
            ADAPTER if i in chosen else KEEP if centres[i] == i else other for i in range(layers)
        )
        source = tuple(centres[i] if roles[i] == SHARE else i for i in range(layers))
        plan = EmulatorPlan(roles, source)
        return self.made(model, plan, material, details={"clusters": clusters})


def runs_between(layers: int, adapters: Sequence[int]) -> list[list[int]]:
    """Return the runs of adjacent positions outside A."""
    runs: list[list[int]] = []
    for i in range(layers):
        if i in adapters:
            continue
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


@torch.no_grad()
def block_features(model: Model, tokens: Tensor) -> list[Tensor]:
    """Return each block's output on ``tokens``, flattened to (rows, d), at most 1024 rows."""
    check_tokens("tokens", tokens)
    found: list[Tensor] = []

    def keep(block: nn.Module, args: Any, output: Any) -> None:
        found.append(first(output).flatten(0, -2)[:MAX_ROWS].double().cpu())

    with ExitStack() as hooks:
        for block in probe(model).blocks:
            hooks.enter_context(block.register_forward_hook(keep))
        hooks.enter_context(frozen(model))
        logits_of(model, tokens.to(next(model.parameters()).device))
    return found


def cka_matrix(features: Sequence[Tensor]) -> Tensor:
    """Return linear CKA (Kornblith et al. 2019, eq. 4) between all pairs of features, (L, L).

    1 for features equal up to rotation, shift and scale; 0 where either is constant.

    Args:
        features: L tensors (n, d_i) over the same n rows.
    """
    grams = []
    for x in features:
        x = x - x.mean(0)
        gram = (x @ x.T).flatten()  # <K_x, K_y> = ||X^T Y||_F^2
        grams.append(gram / gram.norm().clamp_min(1e-300))
    stacked = torch.stack(grams)  # (L, n * n)
    return stacked @ stacked.T


def cluster(similar: Tensor, runs: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Merge neighbours, most similar on average first, until ``count`` clusters are left.

    Args:
        similar: (L, L).
        runs: adjacent positions; clusters never reach across runs.
        count: number of clusters, >= len(runs).
    """
    clusters = [[[i] for i in run] for run in runs]
    while sum(len(c) for c in clusters) > count:
        best = max(
            ((r, k) for r, run in enumerate(clusters) for k in range(len(run) - 1)),
            key=lambda rk: float(
                similar[clusters[rk[0]][rk[1]]][:, clusters[rk[0]][rk[1] + 1]].mean()
            ),
        )
        run = clusters[best[0]]
        run[best[1] : best[1] + 2] = [run[best[1]] + run[best[1] + 1]]
    return [c for run in clusters for c in run]


def centre_of(similar: Tensor, members: Sequence[int]) -> int:
    """Return the member most similar to the others; of equals the one nearest the middle."""
    middle = (members[0] + members[-1]) / 2
    return max(
        members, key=lambda i: (round(float(similar[i, list(members)].sum()), 9), -abs(i - middle))
    )
