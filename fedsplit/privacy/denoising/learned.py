"""A small network that learns to undo the owners' noise, from public text and announced noise.

Where the bottom has blocks there is no finite set of candidates and no exact posterior.  But anyone
with the bottom can make pairs (noisy, clean) of public text: the mean of clean given noisy *is* the
posterior mean under that text's distribution, and least squares finds the best network's estimate
of it.
Post-processing like every denoiser: it costs the owners nothing, and an attacker may do the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fedsplit import storage
from fedsplit.errors import PrivacyError, check
from fedsplit.privacy.denoising.posterior import Touched
from fedsplit.privacy.mechanisms.base import Mechanism
from fedsplit.privacy.secret import OwnerSecret

log = logging.getLogger(__name__)

Bottom = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How the network is built and taught.

    Attributes:
        width: of the hidden states.
        blocks: transformer blocks.
        heads: attention heads.
        steps: optimizer steps.
        batch: texts per step.
        lr: largest learning rate (AdamW, linear warm-up of a tenth, then linear to 0).
        max_tokens: longer texts are cut; positions beyond are denoised in pieces of this length.
        seed: decides weights, order and the noise that is practised on.
    """

    width: int = 256
    blocks: int = 2
    heads: int = 4
    steps: int = 400
    batch: int = 24
    lr: float = 1e-3
    max_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "blocks", "heads", "steps", "batch", "max_tokens"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        check(self.width % self.heads == 0, "width", self.width, f"a multiple of {self.heads}")
        check(0 < self.lr < 1, "lr", self.lr, "in (0, 1)")


class Network(nn.Module):
    """Noisy vectors of a text in, estimates of the clean ones out.

    The input is scaled as the best linear estimator would scale it, the output starts as the mean
    clean vector, and both scales are fixed buffers measured on public text.

    Args:
        dim: d.
        recipe: sizes.
    """

    centre: Tensor
    spread: Tensor
    gain: Tensor

    def __init__(self, dim: int, recipe: Recipe) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(dim))  # mean clean vector
        self.register_buffer("spread", torch.ones(()))  # root mean square of clean - centre
        self.register_buffer("gain", torch.ones(()))  # 1 / root mean square of noisy - centre
        w = recipe.width
        self.into = nn.Linear(dim, w)
        self.level = nn.Linear(1, w)
        self.place = nn.Parameter(torch.randn(recipe.max_tokens, w) * 0.02)
        layer = nn.TransformerEncoderLayer(
            w, recipe.heads, 4 * w, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.blocks = nn.TransformerEncoder(layer, recipe.blocks, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(w)
        self.out = nn.Linear(w, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, noisy: Tensor, mask: Tensor) -> Tensor:
        """Return estimates ``(B, T, d)`` of ``noisy`` ``(B, T, d)``; mask ``(B, T)``, 1 = token."""
        x = (noisy - self.centre) * self.gain
        # How long a vector is tells how much noise it has (contributing tokens have less).
        length = x.square().mean(-1, keepdim=True).add(1e-6).log()
        state = self.into(x) + self.level(length) + self.place[: x.shape[1]]
        state = self.blocks(state, src_key_padding_mask=mask == 0)
        found: Tensor = self.out(self.norm(state)) * self.spread + self.centre
        return found


class LearnedDenoiser:
    """A trained :class:`Network` for received samples.

    Args:
        network: in evaluation mode.
        recipe: its sizes.
        facts: what teaching it measured, JSON-able.
    """

    def __init__(self, network: Network, recipe: Recipe, facts: dict[str, Any]) -> None:
        self.network, self.recipe, self.facts = network.eval(), recipe, facts

    @torch.no_grad()
    def __call__(self, representations: Sequence[Tensor]) -> list[Tensor]:
        """Return the estimate of each token's clean vector, per sample ``(T_i, d)``."""
        longest = self.recipe.max_tokens
        pieces = [p for x in representations for p in torch.split(x.detach().float(), longest)]
        found: list[Tensor] = []
        for at in range(0, len(pieces), 64):
            part = pieces[at : at + 64]
            hidden, mask = padded(part)
            means = self.network(hidden, mask)
            found += [m[: p.shape[0]] for m, p in zip(means, part, strict=True)]
        whole = torch.split(torch.cat(found), [x.shape[0] for x in representations])
        return [m.to(x.device, x.dtype) for m, x in zip(whole, representations, strict=True)]


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return (hidden (B, T, d), mask (B, T)) of samples ``(T_i, d)``, right-padded with zeros."""
    hidden = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([row.shape[0] for row in rows])
    return hidden, (torch.arange(hidden.shape[1])[None] < lengths[:, None]).long()


class TrainingPairs:
    """Pairs of noisy and clean vectors, made from public text.

    Args:
        bottom: the owners' bottom, frozen, in evaluation mode.
        mechanism: what the owners use.
        token_lists: public text, rows of ids.
        touched: reduced noise on some tokens, as announced; drawn at random here.
        recipe: lengths, batches, seed.

    Raises:
        PrivacyError: no public text.
    """

    def __init__(
        self,
        bottom: Bottom,
        mechanism: Mechanism,
        token_lists: Sequence[Sequence[int]],
        touched: Touched | None,
        recipe: Recipe,
    ) -> None:
        self.ids = [torch.tensor(x[: recipe.max_tokens]) for x in token_lists if len(x)]
        if not self.ids:
            raise PrivacyError("public texts=0: must be >= 1 to train_denoiser a denoiser")
        self.bottom, self.mechanism, self.touched, self.recipe = bottom, mechanism, touched, recipe
        self._secret = OwnerSecret.for_simulation(recipe.seed, "denoiser practice")
        self._random = torch.Generator().manual_seed(recipe.seed)

    @torch.no_grad()
    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (noisy (B, T, d), clean (B, T, d), mask (B, T)) of freshly drawn texts."""
        picked = torch.randint(len(self.ids), (4 * self.recipe.batch,), generator=self._random)
        # Texts of like length together: padding is work for nothing.
        picked = picked[torch.argsort(torch.tensor([len(self.ids[i]) for i in picked.tolist()]))]
        first = int(torch.randint(3 * self.recipe.batch + 1, (1,), generator=self._random))
        ids = [self.ids[i] for i in picked[first : first + self.recipe.batch].tolist()]
        whole = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        lengths = torch.tensor([len(x) for x in ids])
        mask = (torch.arange(whole.shape[1])[None] < lengths[:, None]).long()
        clean = self.bottom(whole, mask).float()
        noisy = []
        for row, (x, n) in enumerate(zip(ids, lengths.tolist(), strict=True)):
            stream = self._secret.stream(step, row)
            scale = None
            if self.touched is not None and self.touched.share > 0:
                hit = torch.rand(n, generator=self._random) < self.touched.share
                scale = torch.where(hit, self.touched.rho, 1.0).double()
            noisy.append(self.mechanism.privatise_sample(clean[row, :n], x, stream, scale))
        return nn.utils.rnn.pad_sequence(noisy, batch_first=True), clean, mask


def train_denoiser(practice: TrainingPairs, recipe: Recipe) -> LearnedDenoiser:
    """Train a network by least squares on public text.

    Returns:
        The denoiser; ``facts`` has the held-out share of the clean vectors' variance that is left
        unexplained (1 for the mean vector, 0 for a perfect denoiser), steps and parameters.
    """
    noisy, clean, mask = practice.batch(-1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = Network(clean.shape[2], recipe)
    keep = mask.bool()
    network.centre.copy_(clean[keep].mean(0))
    network.spread.copy_((clean[keep] - network.centre).square().mean().sqrt())
    network.gain.copy_((noisy[keep] - network.centre).square().mean().rsqrt())
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.lr, weight_decay=0.01)
    warm = max(1, recipe.steps // 10)
    network.train()
    for step in range(recipe.steps):
        share = (step + 1) / warm if step < warm else (recipe.steps - step) / (recipe.steps - warm)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, share)
        noisy, clean, mask = practice.batch(step)
        keep = mask.bool()
        loss = (network(noisy, mask)[keep] - clean[keep]).square().mean() / network.spread**2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    network.eval()
    facts = {
        "unexplained": _unexplained(network, practice, recipe),
        "parameters": sum(p.numel() for p in network.parameters()),
        "steps": recipe.steps,
    }
    return LearnedDenoiser(network, recipe, facts)


@torch.no_grad()
def _unexplained(network: Network, practice: TrainingPairs, recipe: Recipe) -> float:
    """Return E||estimate - clean||^2 / E||clean - mean||^2 under fresh noise."""
    wrong = size = 0.0
    for extra in range(4):
        noisy, clean, mask = practice.batch(recipe.steps + extra)
        keep = mask.bool()
        wrong += float((network(noisy, mask)[keep] - clean[keep]).square().sum())
        size += float((clean[keep] - network.centre).square().sum())
    return wrong / size if size else math.nan


def cached(
    folder: Path | None,
    identity: dict[str, Any],
    recipe: Recipe,
    practice: Callable[[], TrainingPairs],
) -> LearnedDenoiser:
    """Return the denoiser of that identity, taught now or read from ``folder``.

    Args:
        folder: where taught networks are kept (safetensors); None keeps none.
        identity: everything that decides the result: bottom, mechanism, text; JSON-able.
        recipe: sizes and steps.
        practice: makes the practice material, if it is needed.
    """
    key = json.dumps([identity, asdict(recipe)], sort_keys=True, allow_nan=False)
    digest = hashlib.sha256(key.encode()).hexdigest()
    path = None if folder is None else folder / f"{digest[:40]}.safetensors"
    if path is not None and path.exists():
        return _read(path, recipe)
    denoiser = train_denoiser(practice(), recipe)
    if path is not None:
        try:
            _keep(path, denoiser)
        except OSError as error:  # the run needs the network, not the cache
            log.warning("taught denoiser not kept in %s: %s", path.parent, error)
    return denoiser


def _keep(path: Path, denoiser: LearnedDenoiser) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.contiguous() for k, v in denoiser.network.state_dict().items()}
    content = save(tensors, metadata={"facts": json.dumps(denoiser.facts)})
    storage.write(path, content, durable=False, concurrent=True)


def _read(path: Path, recipe: Recipe) -> LearnedDenoiser:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {}).get("facts", "{}"))
    tensors = load_file(path)
    network = Network(tensors["centre"].shape[0], recipe)
    network.load_state_dict(tensors)
    return LearnedDenoiser(network, recipe, {**facts, "from_cache": True})
