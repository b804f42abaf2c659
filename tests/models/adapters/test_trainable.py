"""Every way to train a top changes what it says it changes, and nothing else."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fedsplit.errors import ConfigError, ModelError
from fedsplit.models.adapters.trainable import TRAINABLE, Trainable, make_trainable
from fedsplit.models.splitting.halves import Top, split
from fedsplit.models.splitting.heads import head_parameters
from tests.models.split_families import batch, tiny

MODELS = [
    ("bert", "sequence-classification"),
    ("gpt2", "causal-lm"),
    ("llama", "causal-lm"),
    ("llama-tied", "causal-lm"),
    ("mixtral", "causal-lm"),
    ("falcon-rotary", "causal-lm"),
]
BIASLESS = {"llama", "llama-tied", "mixtral"}
CASES = [
    (name, task, method)
    for name, task in MODELS
    for method in TRAINABLE
    if not (method == "bitfit" and name in BIASLESS)
]


def _top(name: str = "bert", task: str = "sequence-classification") -> Top:
    return split(tiny(name, task), 1, verify=False)[1]


def _input(top: Top) -> tuple[torch.Tensor, torch.Tensor]:
    mask = batch()[1]
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 6, 16, generator=generator, dtype=torch.float64), mask


def _step(trainable: Trainable) -> None:
    optimizer = torch.optim.SGD(trainable.parameters(), lr=0.1)
    for _ in range(2):  # behind LoRA's zero B, A moves from the second step on
        optimizer.zero_grad()
        trainable.top(*_input(trainable.top)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(("name", "task", "method"), CASES)
def test_starts_as_the_identity_and_trains_only_its_own(name: str, task: str, method: str) -> None:
    top = _top(name, task)
    start = top(*_input(top))

    trainable = make_trainable(top, method)
    named = dict(trainable.named_parameters())
    torch.testing.assert_close(top(*_input(top)), start)
    before = {n: t.clone() for n, t in top.named_parameters()}
    _step(trainable)

    changed = {n for n, t in top.named_parameters() if not torch.equal(t, before[n])}
    assert changed <= named.keys()
    # Keys have biases without effect on the softmax: their gradient is rounding, or nothing.
    still = {n for n in named.keys() - changed if not re.search(r"k_proj|key|attn\.k\.", n)}
    assert not still
    assert all(p.grad is not None for p in named.values())
    head = {n for n, p in top.named_parameters() if id(p) in head_parameters(top)}
    assert head
    if task == "sequence-classification" or method in ("all", "head"):
        assert head <= named.keys()
    elif method in ("lora", "ia3", "adapter"):
        assert not head & named.keys()
    total = sum(p.numel() for p in top.parameters())
    assert trainable.share == pytest.approx(sum(p.numel() for p in named.values()) / total)
    expected = {
        "all": lambda n: True,
        "head": lambda n: n in head,
        "bitfit": lambda n: n.endswith("bias") or n in head,
        "lora": lambda n: "lora_" in n or n in head,
        "ia3": lambda n: "ia3_" in n or n in head,
        "adapter": lambda n: "fedsplit_adapter" in n or n in head,
    }[method]
    assert all(expected(n) for n in named)


@pytest.mark.parametrize("method", TRAINABLE)
def test_state_travels_to_an_equal_top(method: str) -> None:
    first, second = (make_trainable(_top(), method) for _ in range(2))
    assert first.state().keys() == second.state().keys()
    assert all(torch.equal(t, second.state()[n]) for n, t in first.state().items())
    _step(first)
    state = first.state()

    second.load(state)

    torch.testing.assert_close(second.top(*_input(second.top)), first.top(*_input(first.top)))
    _step(first)  # the state is a copy: it does not follow
    assert not all(torch.equal(t, state[n]) for n, t in first.state().items())


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_initialisation_depends_on_the_seed_alone(method: str) -> None:
    def start(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed + 99)
        return make_trainable(_top("llama", "causal-lm"), method, seed=seed % 2).state()

    one, same, other = start(1), start(3), start(0)
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not all(torch.equal(one[n], other[n]) for n in one)


def _without(state: dict[str, Any]) -> None:
    state.pop(next(iter(state)))


def _first(change: Any) -> Any:
    def apply(state: dict[str, Any]) -> None:
        name = next(iter(state))
        state[name] = change(state[name])

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without, r"missing \['model"),
        (lambda s: s.update(extra=torch.zeros(1)), r"unknown \['extra'\]"),
        (_first(lambda t: t[..., :-1]), "shape .*: must be"),
        (_first(lambda t: t.long()), "must be floating point"),
        (_first(lambda t: t * float("nan")), "must be finite"),
    ],
)
def test_a_foreign_state_changes_nothing(damage: Any, message: str) -> None:
    trainable = make_trainable(_top(), "lora")
    state = {n: t + 1 for n, t in trainable.state().items()}
    damage(state)
    before = trainable.state()
    with pytest.raises(ModelError, match=message):
        trainable.load(state)
    assert all(torch.equal(t, before[n]) for n, t in trainable.state().items())


def test_too_large_for_half_precision_is_not_finite() -> None:
    trainable = make_trainable(_top().half(), "head")
    state = {n: torch.full_like(t, 1e6, dtype=torch.float32) for n, t in trainable.state().items()}
    with pytest.raises(ModelError, match=r"must be finite in torch\.float16"):
        trainable.load(state)


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="trainable='dora': must be one of adapter, all"):
        make_trainable(_top(), "dora")
    with pytest.raises(ConfigError, match="lora option='r': must be one of alpha, dropout"):
        make_trainable(_top(), "lora", r=4)
    with pytest.raises(ConfigError, match="rank=0: must be an integer >= 1"):
        make_trainable(_top(), "lora", rank=0)
    with pytest.raises(ConfigError, match="width=-1: must be an integer >= 1"):
        make_trainable(_top(), "adapter", width=-1)


def test_no_biases_no_bitfit() -> None:
    with pytest.raises(ConfigError, match="have no biases; use lora"):
        make_trainable(_top("llama", "causal-lm"), "bitfit")


def test_adapters_are_not_stacked() -> None:
    top = _top()
    make_trainable(top, "lora")
    with pytest.raises(ConfigError, match="already carries 'lora'"):
        make_trainable(top, "adapter")


def test_lora_rank_sets_the_share() -> None:
    small, large = (make_trainable(_top(), "lora", rank=r).share for r in (1, 8))
    assert 0 < small < large < 1


def test_gradients_still_reach_the_owner() -> None:
    for method in TRAINABLE:
        top = _top()
        make_trainable(top, method)
        hidden, mask = _input(top)
        hidden.requires_grad_()
        top(hidden, mask).sum().backward()
        assert hidden.grad is not None
        assert bool(hidden.grad.any())
