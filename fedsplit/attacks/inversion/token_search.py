"""Exact inversion of causal models, token by token: the worst case for a split without noise.

After SipIt (Nikolaou et al., arXiv 2510.15511, algorithm 1 and theorem 3.1): the map from a prefix
and the next token to the hidden state at any depth is injective for almost all weights, and in a
causal model state t depends on tokens 1..t alone.  So the text is read left to right: at position t
some vocabulary token reproduces the received state, and with the prefix already known each trial
costs one token's forward pass.  Trials are batched over the vocabulary; the prefix's keys and
values are computed once where the model has a cache.  Candidates are tried in the order of their
distance to an embedding found by gradient descent (the paper's guided policy), so few are.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedsplit.attacks.base import TokenAttack, View
from fedsplit.attacks.inversion.embeddings import embedding_table, soft_embeddings
from fedsplit.attacks.inversion.nearest import has_candidates
from fedsplit.attacks.inversion.row_evidence import EXACT
from fedsplit.attacks.scoring import Inversion
from fedsplit.errors import AttackError, check
from fedsplit.models.modes import evaluating, frozen
from fedsplit.models.splitting.structure import Exit, Reached

FIRST_AT_ONCE = 1024


@dataclass
class SearchEffort:
    """What an exact search did.

    Attributes:
        trials: candidate tokens run through the bottom.
        tokens: positions searched.
        exact: positions whose received state was reproduced within the tolerance.
        cached: whether the prefix's keys and values were reused.
    """

    trials: int = 0
    tokens: int = 0
    exact: int = 0
    cached: bool = False


@dataclass(frozen=True)
class ExactSearch(TokenAttack):
    """The attack: the first token that reproduces the received state, for causal bottoms.

    Noise ends exactness: then the best token within the budget is kept, errors included, and later
    positions are searched behind a wrong prefix.

    Args:
        tolerance: relative squared error under which a state counts as reproduced (codec and
            rounding: 1e-6 suits float32, 1e-5 what was sent as bf16).
        max_trials: candidate tokens tried per position at most; 0 for the whole vocabulary.
        chunk: candidates run together.
        guide_steps: gradient steps for the order of the candidates; 0: by distance to the received
            state alone.
        guide_lr: of Adam, relative to the embeddings' root mean square.
        top_k: guesses ranked per token.
        samples: read at most (it is slow); 0 for all.
    """

    name: ClassVar[str] = "exact_search"
    knows: ClassVar[str] = "white box: the initial causal bottom (any k), no noise"
    budget: ClassVar[tuple[str, ...]] = ("max_trials", "guide_steps", "samples")
    keys: ClassVar[Mapping[str, tuple[str, int]]] = {"search-samples": ("samples", 1)}
    result_key: ClassVar[str] = "exact_inversion"
    words: ClassVar[str] = "every next token tried"
    tolerance: float = 1e-5
    max_trials: int = 0
    chunk: int = 256
    guide_steps: int = 10
    guide_lr: float = 0.3
    top_k: int = 10
    samples: int = 8
    effort: SearchEffort = field(default_factory=SearchEffort, compare=False, repr=False)

    def __post_init__(self) -> None:
        check(self.tolerance > 0, "tolerance", self.tolerance, "> 0 (relative squared error)")
        check(self.guide_lr > 0, "guide_lr", self.guide_lr, "> 0")
        for name in ("chunk", "top_k"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("max_trials", "guide_steps", "samples"):
            check(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")

    def applies(self, view: View) -> bool:
        """Return whether a language model's clean states were received, behind blocks.

        Other tasks on causal models are read by ``text_search``, which tries fewer tokens.
        """
        causal = super().applies(view) and view.public.bottom.task == "causal-lm"
        return causal and not has_candidates(view) and not view.public.noisy

    def read(self, view: View) -> Inversion:
        of = view.public
        return self.invert(view.rows[: self.samples or None], of.bottom, of.embedding, of.vocab)

    def invert(
        self,
        representations: Sequence[Tensor],
        bottom: nn.Module,
        embedding: nn.Module,
        vocab_size: int,
    ) -> Inversion:
        """Guess the tokens behind ``representations``; ``effort`` counts the trials.

        Args:
            representations: what was received, per sample ``(T_i, d)``, unpadded.
            bottom: a :class:`fedsplit.models.splitting.halves.Bottom` of a causal model.
            embedding: the module inside ``bottom`` that looks up token embeddings.
            vocab_size: V.

        Raises:
            AttackError: if a state depends on later tokens, or a shape does not fit.
        """
        start = time.perf_counter()
        top: list[Tensor] = []
        with frozen(bottom):
            device = next(bottom.parameters()).device
            check_causal(bottom, vocab_size, device)
            table = embedding_table(embedding, vocab_size, device)  # (V, d_e)
            runner = PrefixRunner(bottom, embedding)
            self.effort.cached = runner.cached
            for received in representations:
                top.append(self._sample(received.to(device).float(), runner, table))
        return Inversion(top, time.perf_counter() - start)

    def _sample(self, received: Tensor, runner: PrefixRunner, table: Tensor) -> Tensor:
        """Return the ranked guesses of one sample, ``(T, k)``."""
        known: list[int] = []
        out = []
        for state in received:  # (d,)
            runner.advance(known)
            ranked = self.position(state, runner, table)
            known.append(int(ranked[0]))
            out.append(ranked.cpu())
        return torch.stack(out)

    def position(self, state: Tensor, runner: PrefixRunner, table: Tensor) -> Tensor:
        """Return the best tokens behind the runner's prefix, best first, ``(k,)``.

        Args:
            state: as received, ``(d,)``.
            runner: advanced to the prefix.
            table: of token embeddings, ``(V, d_e)``.

        Raises:
            AttackError: the state's width is not the bottom's.
        """
        order = self._order(state, runner, table)
        limit = min(self.max_trials or len(order), len(order))
        power = float(state.square().sum()) + 1e-12
        tried, errors = [], []
        for part in torch.split(order[:limit], self.chunk):
            with torch.no_grad():
                hidden = runner.tokens(part)  # (n, d)
            if hidden.shape[1] != len(state):
                raise AttackError(f"received d={len(state)}: must be {hidden.shape[1]}")
            gap = (hidden - state).square().sum(1) / power
            tried.append(part)
            errors.append(gap)
            self.effort.trials += len(part)
            if float(gap.min()) <= self.tolerance:
                self.effort.exact += 1
                break
        self.effort.tokens += 1
        all_tried = torch.cat(tried)
        best = torch.cat(errors).argsort()[: self.top_k]
        ranked = all_tried[best]
        if len(ranked) < self.top_k:  # a budget below top_k leaves ranks that were never tried
            rest = order[~torch.isin(order, ranked)][: self.top_k - len(ranked)]
            ranked = torch.cat([ranked, rest])
        return ranked

    def _order(self, state: Tensor, runner: PrefixRunner, table: Tensor) -> Tensor:
        """Return all ids, the most promising first, ``(V,)``."""
        near = state if table.shape[1] == len(state) else table.mean(0)
        guess = table[(table - near).square().sum(1).argmin()].clone()
        if not self.guide_steps:
            return (table - near).square().sum(1).argsort()
        guess.requires_grad_()
        size = float(table.square().mean().sqrt())
        optimiser = torch.optim.Adam([guess], lr=self.guide_lr * size)
        for _ in range(self.guide_steps):
            loss = (runner.soft(guess) - state).square().sum()
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
        return (table - guess.detach()).square().sum(1).argsort()


UNEXPLAINED = -ExactSearch.tolerance / EXACT**2
"""Nats below which a row without noise speaks against a token, as exact search has it."""


class PrefixRunner:
    """Runs a causal bottom one token past a known prefix.

    Args:
        bottom: the attacker's copy.
        embedding: its token embedding.
    """

    def __init__(self, bottom: nn.Module, embedding: nn.Module) -> None:
        self._bottom, self._embedding = bottom, embedding
        self._device = next(bottom.parameters()).device
        self._prefix: list[int] = []
        self._cache: Any = None
        self.cached = self._cache_works()

    def advance(self, prefix: Sequence[int]) -> None:
        """Make ``prefix`` what the next token stands behind."""
        self._prefix = list(prefix)
        self._cache = None
        if self.cached and self._prefix:
            with torch.no_grad():
                self._cache = prefix_cache(self._bottom, self._row(self._prefix))

    def tokens(self, ids: Tensor) -> Tensor:
        """Return the state at the next position for each of ``ids``, ``(n,) -> (n, d)``."""
        ids = ids.to(self._device)
        if self._cache is not None:
            return self._behind_cache(ids)
        prefix = self._row(self._prefix).expand(len(ids), -1)
        whole = torch.cat([prefix, ids.unsqueeze(1)], dim=1)  # (n, t + 1)
        hidden: Tensor = self._bottom(whole, torch.ones_like(whole))
        return hidden[:, -1].float()

    def soft(self, vector: Tensor) -> Tensor:
        """Return the state at the next position for an embedding, ``(d_e,) -> (d,)``."""
        table = self._embedding(self._row([*self._prefix, 0]))[0].detach()  # (t + 1, d_e)
        rows = torch.cat([table[:-1], vector.to(table.dtype).unsqueeze(0)])
        ids = self._row([*self._prefix, 0])
        with soft_embeddings(self._embedding) as slot:
            slot.append(rows.unsqueeze(0))
            hidden: Tensor = self._bottom(ids, torch.ones_like(ids))
        return hidden[0, -1].float()

    def _behind_cache(self, ids: Tensor) -> Tensor:
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(len(ids))
        mask = torch.ones(len(ids), len(self._prefix) + 1, dtype=torch.int64, device=self._device)
        hidden = state_before_cut(
            self._bottom,
            input_ids=ids.unsqueeze(1),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        return hidden[:, -1].float()

    def _cache_works(self) -> bool:
        """Say whether cached and whole forward passes agree, tried on a short prefix."""
        ids = torch.tensor([1, 0, 1], device=self._device)
        self._prefix = [0, 1]
        try:
            with torch.no_grad():
                whole = self.tokens(ids)
                self._cache = prefix_cache(self._bottom, self._row(self._prefix))
                cached = self._behind_cache(ids)
        except Exception:  # a family without this kind of cache: recompute the prefix instead
            return False
        finally:
            self._cache = None
        return bool(torch.allclose(whole, cached, rtol=1e-3, atol=1e-4 * float(whole.abs().max())))

    def _row(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], dtype=torch.int64, device=self._device)


@torch.no_grad()
def first_states(runner: PrefixRunner, vocab: int) -> Tensor:
    """Return the clean state of every token that begins a text, ``(V, d)``."""
    runner.advance([])
    parts = torch.split(torch.arange(vocab), FIRST_AT_ONCE)
    return torch.cat([runner.tokens(part) for part in parts])


def prefix_cache(bottom: nn.Module, ids: Tensor) -> Any:
    """Return the keys and values of ``ids`` (1, t) in the bottom's blocks.

    The cache is the family's own, made by its forward and caught on its way to the cut.

    Raises:
        AttackError: if the bottom's forward passes no cache on (k = 0 needs none).
    """
    caught: list[Any] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [*args, *kwargs.values()]
        caught.extend(v for v in values if hasattr(v, "batch_repeat_interleave"))

    with _last_block(bottom).register_forward_pre_hook(keep, with_kwargs=True):
        state_before_cut(bottom, input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    if not caught:
        raise AttackError("bottom: its blocks receive no cache: must for a cached search")
    return caught[0]


def state_before_cut(bottom: nn.Module, **inputs: Any) -> Tensor:
    """Return what the stand-in for block k is given, ``(B, t, d)``; the forward ends there."""
    try:
        bottom.model(**inputs)  # type: ignore[operator]
    except Reached as reached:
        return reached.hidden
    raise AttackError("bottom: its forward never reached the cut")


def _last_block(bottom: nn.Module) -> nn.Module:
    """Return the stand-in behind the bottom's blocks (see ``Exit`` of the splitting package)."""
    return next(m for m in bottom.modules() if isinstance(m, Exit))


def reads_left_to_right(bottom: Any) -> bool:
    """Return whether a bottom's states depend on what stands before them alone, whatever its task.

    A classifier on a causal model is as causal as a language model.
    """
    try:
        with evaluating(bottom):
            check_causal(bottom, int(bottom.vocab), next(bottom.parameters()).device)
    except AttackError:
        return False
    return True


@torch.no_grad()
def check_causal(bottom: nn.Module, vocab_size: int, device: torch.device) -> None:
    """Raise unless a position's state is the same whatever follows it.

    Raises:
        AttackError: says by how much it moves.
    """
    first = torch.tensor([[0, 1, 0]], device=device) % vocab_size
    other = torch.tensor([[0, 1, min(2, vocab_size - 1)]], device=device)
    a, b = (bottom(x, torch.ones_like(x)).float()[0, :2] for x in (first, other))
    moved = float((a - b).abs().max())
    bound = 1e-4 * float(a.abs().max())
    if moved > bound:
        raise AttackError(
            f"bottom: a state moves by {moved:.3g} with what follows it: must be <= {bound:.3g} "
            "(causal models only; use the optimisation or learned attack)"
        )
