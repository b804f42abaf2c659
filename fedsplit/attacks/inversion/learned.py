"""Inversion by a small model trained on public text: any k, any announced noise.

After the learned decoders of BiSR (Chen et al., arXiv 2409.00960) and of inversion attacks on text
embeddings (Song & Raghunathan, CCS 2020, arXiv 2004.00053).  The attacker runs public text through
the public bottom, adds noise of the announced law drawn afresh, and learns the way back:

- a ridge regression from a received vector (and its position) to its token's embedding, in closed
  form, because the residual stream carries the embedding through the blocks;
- a small bidirectional encoder added to it, which reads the neighbours, trained by sampled softmax.

Tokens are scored by -||y - e_v||^2 / 2 times a learned scale plus a weight times public frequency,
so a token that the public text never had can be read as well.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsplit.attacks.base import Public, TokenAttack, View
from fedsplit.attacks.inversion.embeddings import embedding_table
from fedsplit.attacks.inversion.nearest import has_candidates
from fedsplit.attacks.scoring import Inversion
from fedsplit.errors import AttackError, check
from fedsplit.privacy.mechanisms.base import Mechanism, clip_rows
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.seeding import derive_seed, numpy_generator

POSITIONS = 64
"""Positions with a ridge offset of their own; later ones share the last."""


class Inverter(nn.Module):
    """Received vectors ``(B, T, d)`` to guessed token embeddings ``(B, T, d_e)``.

    Args:
        weight: of the ridge regression, ``(d + POSITIONS, d_e)``.
        width: of the encoder.
        layers: of the encoder; 0 for the regression alone.
        scale: standard deviation of the received vectors' coordinates.
    """

    def __init__(self, weight: Tensor, width: int, layers: int, scale: float) -> None:
        super().__init__()
        d, d_e = weight.shape[0] - POSITIONS, weight.shape[1]
        self.register_buffer("weight", weight)
        self.scale = scale
        self.inner = nn.Linear(d, width)
        self.position = nn.Embedding(POSITIONS, width)
        self.encoder: nn.Module | None = None
        if layers:
            block = nn.TransformerEncoderLayer(
                width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            self.encoder = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.outer = nn.Linear(width, d_e)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)
        self.sharpness = nn.Parameter(torch.zeros(()))
        self.frequency = nn.Parameter(torch.ones(()))

    def forward(self, received: Tensor, mask: Tensor) -> Tensor:
        """Return the guessed embeddings; ``mask`` is ``(B, T)``, 1 for tokens."""
        position = torch.arange(received.shape[1], device=received.device).clamp(max=POSITIONS - 1)
        weight = self.weight
        assert isinstance(weight, Tensor), "a buffer"
        d = received.shape[2]
        linear = received @ weight[:d] + weight[d + position]  # (B, T, d_e)
        if self.encoder is None:
            return linear
        x = self.inner(received / self.scale) + self.position(position)
        x = self.encoder(x, src_key_padding_mask=mask == 0)
        correction: Tensor = self.outer(x)
        return linear + correction

    def scores(self, guess: Tensor, table: Tensor, log_prior: Tensor) -> Tensor:
        """Return each token's score, ``(..., d_e), (V, d_e), (V,) -> (..., V)``."""
        near = guess @ table.T - table.square().sum(1) / 2
        return near * self.sharpness.exp() + self.frequency * log_prior


@dataclass(frozen=True)
class LearnedInversion(TokenAttack):
    """The attack: a small inverter, trained before anything was received.

    Args:
        steps: of training the encoder; 0 leaves the closed-form regression alone.
        batch: public samples per step.
        width: of the encoder.
        layers: of the encoder.
        lr: of AdamW, warmed up and decayed linearly.
        negatives: tokens drawn by frequency that each batch is told apart from, beside its own.
        ridge: of the regression, relative to the received vectors' mean square.
        public_samples: public texts that it is trained on at most.
        seconds: of training the encoder at most; 0 = no bound.
        seed: of initialisation, batches and simulated noise.
        top_k: guesses ranked per token.
    """

    name: ClassVar[str] = "learned"
    knows: ClassVar[str] = "white box: the initial bottom (any k), the mechanism's law, public text"
    budget: ClassVar[tuple[str, ...]] = ("steps", "batch", "width", "layers", "public_samples")
    keys: ClassVar[Mapping[str, tuple[str, int]]] = {
        "learned-steps": ("steps", 1),
        "public-samples": ("public_samples", 1),
    }
    result_key: ClassVar[str] = "learned_inversion"
    words: ClassVar[str] = "a model taught on public text behind the same bottom"
    steps: int = 200
    batch: int = 32
    width: int = 192
    layers: int = 1
    lr: float = 1e-3
    negatives: int = 2048
    ridge: float = 1e-4
    public_samples: int = 3000
    seconds: float = 0.0
    seed: int = 0
    top_k: int = 10

    def __post_init__(self) -> None:
        for name in ("batch", "negatives", "public_samples", "top_k"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("steps", "layers", "seconds"):
            check(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        check(self.width >= 4 and self.width % 4 == 0, "width", self.width, "a multiple of 4")
        for name in ("lr", "ridge"):
            check(getattr(self, name) > 0, name, getattr(self, name), "> 0")

    def applies(self, view: View) -> bool:
        """Return whether blocks are in front of the cut."""
        return super().applies(view) and not has_candidates(view)

    def read(self, view: View) -> Inversion:
        """Return the guesses, after training on the view's public text."""
        start = time.perf_counter()
        top = self.trained(view.public).rank(view.rows, self.top_k)
        return Inversion(top, time.perf_counter() - start)

    def trained(self, of: Public) -> TrainedInverter:
        """Return the inverter taught on public text; a search after it finds it in ``of``."""
        states, ids = taught_on(of, self.public_samples, self.seed)
        table = embedding_table(of.embedding, of.vocab, torch.device("cpu"))
        found = self.train(states, ids, table, of.mechanism)
        of.inverter = found
        return found

    def invert(
        self,
        representations: Sequence[Tensor],
        public: Sequence[Tensor],
        public_ids: Sequence[Tensor],
        table: Tensor,
        mechanism: Mechanism | None = None,
    ) -> Inversion:
        """Train on public text and guess the tokens behind ``representations``.

        Args:
            representations: what was received, per sample ``(T_i, d)``.
            public: the public bottom's clean output for public text, per sample ``(T_j, d)``; see
                :func:`represent`.
            public_ids: its tokens, per sample ``(T_j,)``.
            table: token embeddings ``(V, d_e)``, any public ones in which tokens differ.
            mechanism: what the owners announced; None for no noise.

        Raises:
            AttackError: if a shape does not fit or there is no public text.
        """
        start = time.perf_counter()
        trained = self.train(public, public_ids, table, mechanism)
        top = trained.rank(representations, self.top_k)
        return Inversion(top, time.perf_counter() - start)

    def train(
        self,
        public: Sequence[Tensor],
        public_ids: Sequence[Tensor],
        table: Tensor,
        mechanism: Mechanism | None = None,
    ) -> TrainedInverter:
        """Return the trained attacker; arguments as in :meth:`invert`.

        Raises:
            AttackError: if a shape does not fit or there is no public text.
        """
        if not public or len(public) != len(public_ids):
            raise AttackError(f"public={len(public)}, ids={len(public_ids)}: must be equal, >= 1")
        for i, (x, ids) in enumerate(zip(public, public_ids, strict=True)):
            if x.dim() != 2 or len(x) != len(ids):
                raise AttackError(f"public[{i}]={tuple(x.shape)}: must be ({len(ids)}, d)")
        noise = DrawnNoise(mechanism, self.seed)
        received = [noise(x.detach().float()) for x in public]
        counts = torch.bincount(torch.cat(list(public_ids)), minlength=len(table)).float() + 0.1
        log_prior = (counts / counts.sum()).log()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "attacks", "learned"))
            weight = ridge_map(received, public_ids, table, self.ridge)
            scale = float(torch.cat(received).std())
            model = Inverter(weight, self.width, self.layers if self.steps else 0, scale)
            self._start_scale(model, received, public_ids, table)
            # Every twentieth public sample decides whether the encoder helped.
            held = [i for i in range(len(public)) if i % 20 == 19]
            kept = [i for i in range(len(public)) if i % 20 != 19]
            before = {name: value.clone() for name, value in model.state_dict().items()}
            start = self._share(model, received, public_ids, held, table, log_prior)
            self._descend(
                model,
                [public[i] for i in kept],
                [public_ids[i] for i in kept],
                table,
                log_prior,
                noise,
            )
            if self._share(model, received, public_ids, held, table, log_prior) < start:
                model.load_state_dict(before)
        return TrainedInverter(model.eval(), table, log_prior)

    def _share(
        self,
        model: Inverter,
        received: list[Tensor],
        ids: Sequence[Tensor],
        held: list[int],
        table: Tensor,
        log_prior: Tensor,
    ) -> float:
        """Return the share of the held-out public tokens that ``model`` reads."""
        if not self.steps or not held:
            return 0.0
        model.eval()
        held = held[:100]
        top = TrainedInverter(model, table, log_prior).rank([received[i] for i in held], 1)
        truth = torch.cat([ids[i] for i in held])
        return float((torch.cat(top)[:, 0] == truth).double().mean())

    def _start_scale(
        self, model: Inverter, received: list[Tensor], ids: Sequence[Tensor], table: Tensor
    ) -> None:
        """Set the scale to 1 / variance of what the regression leaves: its own likelihood."""
        some = list(range(min(64, len(ids))))
        x, mask = padded([received[i] for i in some])
        with torch.no_grad():
            left = (model(x, mask) - table[padded_ids([ids[i] for i in some])])[mask.bool()]
            variance = float(left.square().mean()) + 1e-8
            model.sharpness.copy_(torch.tensor(-np.log(variance)))

    def _descend(
        self,
        model: Inverter,
        public: Sequence[Tensor],
        ids: Sequence[Tensor],
        table: Tensor,
        log_prior: Tensor,
        noise: DrawnNoise,
    ) -> None:
        if not self.steps:
            return
        rng = numpy_generator(self.seed, "attacks", "learned", "batches")
        optimiser = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.01)
        warmup = max(1, self.steps // 20)
        draw = log_prior.double().exp().sqrt().numpy()  # flatter than the frequencies
        draw /= draw.sum()
        model.train()
        begin = time.perf_counter()
        for step in range(self.steps):
            gone = (time.perf_counter() - begin) / self.seconds if self.seconds else 0.0
            if gone >= 1:
                break
            ahead = min((self.steps - step) / max(1, self.steps - warmup), 1 - gone)
            rate = min((step + 1) / warmup, ahead)
            for group in optimiser.param_groups:
                group["lr"] = self.lr * rate
            chosen = rng.choice(len(public), size=min(self.batch, len(public)), replace=False)
            x, mask = padded([noise(public[i].float()) for i in chosen])
            truth = torch.cat([ids[i] for i in chosen])  # (N,)
            others = torch.from_numpy(rng.choice(len(table), self.negatives, p=draw))
            rivals, target = torch.unique(torch.cat([truth, others]), return_inverse=True)
            guess = model(x, mask)[mask.bool()]  # (N, d_e)
            scores = model.scores(guess, table[rivals], log_prior[rivals])
            loss = F.cross_entropy(scores, target[: len(truth)])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()


@dataclass(frozen=True)
class TrainedInverter:
    """An attacker ready to read."""

    model: Inverter
    table: Tensor
    log_prior: Tensor

    @torch.no_grad()
    def rank(self, representations: Sequence[Tensor], top_k: int, batch: int = 64) -> list[Tensor]:
        """Return each sample's guesses, best first, ``(T_i, top_k)``.

        Raises:
            AttackError: if a shape does not fit.
        """
        weight = self.model.weight
        assert isinstance(weight, Tensor), "a buffer"
        dim = weight.shape[0] - POSITIONS
        k = min(top_k, len(self.table))
        out: list[Tensor] = []
        for at in range(0, len(representations), batch):
            rows = [x.detach().cpu().float() for x in representations[at : at + batch]]
            if any(x.dim() != 2 or x.shape[1] != dim for x in rows):
                raise AttackError(f"representations: every one must be (T, {dim})")
            x, mask = padded(rows)
            guess = self.model(x, mask)[mask.bool()]
            best = [
                self.model.scores(part, self.table, self.log_prior).topk(k, dim=1).indices
                for part in torch.split(guess, 1024)
            ]
            out += torch.split(torch.cat(best), [len(r) for r in rows])
        return out


def taught_on(of: Public, samples: int, seed: int) -> tuple[Sequence[Tensor], list[Tensor]]:
    """Return clean states (T_j, d) of public texts, and their ids, as an attacker learns from them.

    Args:
        of: what is known; states that it has are all used.
        samples: texts at most otherwise.
        seed: of their choice.
    """
    if of.states is not None:
        return of.states, [torch.as_tensor(x) for x in of.public_ids]
    order = numpy_generator(seed, "attacks", "public").permutation(len(of.public_ids))[:samples]
    ids = [torch.tensor(of.public_ids[i]) for i in order if len(of.public_ids[i]) >= 2]
    return represent(of.bottom, ids), ids


class DrawnNoise:
    """The announced law, drawn afresh each time by the attacker itself."""

    def __init__(self, mechanism: Mechanism | None, seed: int) -> None:
        self.mechanism = mechanism if mechanism is not None and mechanism.protects() else None
        self._secret = OwnerSecret.for_simulation(seed, "attacker")
        self._draws = 0

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.mechanism is None:
            return hidden
        self._draws += 1
        hidden = clip_rows(hidden, self.mechanism.row_clip)
        return self.mechanism.privatise(hidden, self._secret.stream("learned", self._draws))


def ridge_map(
    received: Sequence[Tensor], ids: Sequence[Tensor], table: Tensor, ridge: float
) -> Tensor:
    """Return the regression from (vector, one-hot position) to embedding, ``(d + P, d_e)``.

    Rows of a token that is frequent count less (1 / sqrt of its count), since what matters is to
    tell all tokens apart.
    """
    d, size = received[0].shape[1], len(table)
    gram = torch.zeros(d + POSITIONS, d + POSITIONS, dtype=torch.float64)
    cross = torch.zeros(d + POSITIONS, table.shape[1], dtype=torch.float64)
    counts = torch.bincount(torch.cat(list(ids)), minlength=size).clamp(min=1).double()
    power, rows = 0.0, 0
    for at in range(0, len(received), 256):
        x = torch.cat(list(received[at : at + 256]))  # (n, d)
        y = torch.cat(list(ids[at : at + 256]))
        position = torch.cat([torch.arange(len(r)) for r in received[at : at + 256]])
        hot = F.one_hot(position.clamp(max=POSITIONS - 1), POSITIONS).float()
        weight = counts[y].rsqrt().float().unsqueeze(1)
        design = torch.cat([x, hot], dim=1)
        gram += (design.T @ (design * weight)).double()
        cross += (design.T @ (table[y] * weight)).double()
        power, rows = power + float((x.square() * weight).sum()), rows + len(x)
    gram.diagonal()[:d] += ridge * power / d + 1e-9
    gram.diagonal()[d:] += 1e-3
    solution: Tensor = torch.linalg.solve(gram, cross)
    return solution.float()


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return ``(B, T, d)`` and its mask ``(B, T)``."""
    x = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(r) for r in rows])
    return x, (torch.arange(x.shape[1]) < lengths[:, None]).long()


def padded_ids(ids: Sequence[Tensor]) -> Tensor:
    """Return ``(B, T)``, zeros behind each sample."""
    whole: Tensor = nn.utils.rnn.pad_sequence(list(ids), batch_first=True)
    return whole


@torch.no_grad()
def represent(bottom: nn.Module, ids: Sequence[Tensor], batch: int = 64) -> list[Tensor]:
    """Return the bottom's clean output for public text, per sample ``(T_i, d)``.

    Samples of like length run together; the bottom must be in evaluation mode.
    """
    out: list[Tensor] = [torch.empty(0)] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    device = next(bottom.parameters()).device
    for at in range(0, len(order), batch):
        group = order[at : at + batch]
        tokens = padded_ids([ids[i] for i in group])
        lengths = torch.tensor([len(ids[i]) for i in group])
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        hidden = bottom(tokens.to(device), mask.to(device)).float().cpu()
        for i, h in zip(group, hidden, strict=True):
            out[i] = h[: len(ids[i])].clone()
    return out
