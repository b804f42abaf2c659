"""The extraction attack: it closes a gap it can close, and says so honestly."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.attacks import Extraction, Truth, View
from fedsplit.attacks.extraction.attack import Gap, Look, Task
from fedsplit.attacks.extraction.gap import closed_share
from fedsplit.attacks.extraction.regrow import regrown
from fedsplit.emulators import Emulator, EmulatorPlan, Material, build_emulator, make_compressor
from fedsplit.emulators.build import adapter_state, load_adapters, plug_in
from fedsplit.emulators.compression.structure import tiny_logits
from fedsplit.emulators.importance.harmonizer import make_harmonizers
from fedsplit.errors import AttackError, ConfigError
from fedsplit.evaluation.perplexity import TextLoss, summed, text_loss
from tests.emulators.emulator_families import tiny, tokens

ROLES = ("adapter", "drop", "keep", "harmonizer", "drop", "adapter")


def emulator_of(
    family: str = "llama", roles: tuple[str, ...] = ROLES, base: Any = None
) -> tuple[Any, Emulator]:
    base = base or tiny(family)
    bridges = dict(enumerate(make_harmonizers(base)))
    return base, build_emulator(base, EmulatorPlan(roles), harmonizers=bridges)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loss(model: Any, ids: torch.Tensor) -> TextLoss:
    return text_loss(model, ids, window=16, stride=8)


def opinionated() -> Any:
    """A random model whose blocks matter, and whose predictions are far from uniform."""
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
        for block in model.model.layers:
            block.self_attn.o_proj.weight.mul_(3)
            block.mlp.down_proj.weight.mul_(3)
    return model


def written_by(model: Any, rows: int = 280, length: int = 16) -> torch.Tensor:
    """Text that the model itself wrote: on it, nobody predicts better."""
    generator = torch.Generator().manual_seed(0)
    ids = tokens(rows, 1)
    with torch.no_grad():
        for _ in range(length - 1):
            p = torch.softmax(model(input_ids=ids, use_cache=False).logits[:, -1], -1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], 1)
    return ids


@pytest.mark.parametrize(("queries", "regrow"), [(False, False), (True, False), (True, True)])
def test_an_owner_closes_part_of_the_gap(queries: bool, regrow: bool) -> None:
    base, emulator = emulator_of(base=opinionated())
    text = written_by(base)
    public, held_out = text[:240], text[240:].flatten()
    attack = Extraction(steps=25, batch_size=24, lr=3e-3, queries=queries, regrow=regrow)

    attacked = attack.train(emulator, public, teacher=base if queries else None)

    found = closed_share(
        loss(base, held_out), loss(emulator.model, held_out), loss(attacked, held_out)
    )
    assert found.share is not None
    assert found.interval is not None
    assert 0.2 < found.interval[0] <= found.share <= found.interval[1]
    assert found.share < 1.1  # windows begin inside a text, so the author is not quite the best


def test_the_attack_leaves_everything_given_as_it_was() -> None:
    base, emulator = emulator_of()
    before = copy.deepcopy(emulator.model.state_dict())
    own = copy.deepcopy(base.state_dict())

    attacked = Extraction(steps=3, queries=True).train(emulator, tokens(), teacher=base)

    assert all(torch.equal(v, before[k]) for k, v in emulator.model.state_dict().items())
    assert all(torch.equal(v, own[k]) for k, v in base.state_dict().items())
    assert not torch.equal(tiny_logits(attacked), tiny_logits(emulator.model))


def test_adapters_embeddings_and_head_stay_the_bases() -> None:
    _, emulator = emulator_of()
    frozen = adapter_state(emulator)
    seen: list[Any] = []

    attacked = Extraction(steps=3).train(
        emulator, tokens(), look=lambda _, __, own: seen.append(adapter_state(own)), marks=[3]
    )

    (after,) = seen
    assert all(torch.equal(after[name], frozen[name]) for name in frozen)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        before = emulator.model.get_parameter(name)
        assert torch.equal(attacked.get_parameter(name), before)


@pytest.mark.parametrize("regrow", [False, True])
def test_other_adapters_can_be_put_in_while_looking(regrow: bool) -> None:
    _, emulator = emulator_of()
    mine = adapter_state(emulator)
    tuned = {name: tensor + 0.1 for name, tensor in mine.items()}
    seen: list[torch.Tensor] = []

    def look(_: int, model: Any, own: Emulator) -> None:
        for state in (mine, tuned, mine):
            load_adapters(own, state)
            seen.append(tiny_logits(model))

    Extraction(steps=2, regrow=regrow).train(emulator, tokens(), look=look, marks=[0])

    load_adapters(emulator, tuned)
    assert torch.equal(seen[0], seen[2])
    assert torch.allclose(seen[1], tiny_logits(emulator.model), atol=1e-4)


def test_same_seed_same_attack() -> None:
    _, emulator = emulator_of()
    runs = [Extraction(steps=4, seed=s).train(emulator, tokens(40)) for s in (1, 1, 2)]

    logits = [tiny_logits(m) for m in runs]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "opt", "gemma3"])
def test_regrown_blocks_change_nothing_at_first(family: str) -> None:
    base, emulator = emulator_of(family)
    before = tiny_logits(emulator.model)

    made = regrown(copy.deepcopy(emulator))

    assert torch.allclose(tiny_logits(made), before, atol=1e-4, rtol=1e-3)
    anew = sum(p.numel() for p in made.parameters())
    assert anew >= sum(p.numel() for p in base.parameters())


@pytest.mark.parametrize("name", ["scaleot", "quantised"])
def test_matrices_of_low_rank_or_few_bits_grow_back(name: str) -> None:
    base = tiny("gpt2")
    settings = {"scaleot": {"beta": 0.6}, "quantised": {"bits": 4}}[name]
    emulator = make_compressor(name, adapters=(0, 5), **settings).build(base, Material(tokens()))
    kinds = {type(m).__name__ for m in emulator.model.modules()}
    assert kinds & {"LowRankLinear", "QuantisedLinear"}

    made = regrown(copy.deepcopy(emulator))

    assert not {type(m).__name__ for m in made.modules()} & {"LowRankLinear", "QuantisedLinear"}
    assert torch.allclose(tiny_logits(made), tiny_logits(emulator.model), atol=1e-4, rtol=1e-3)


def blocks(*nats: float) -> TextLoss:
    return summed(np.asarray(nats) * 10.0, np.full(len(nats), 10.0))


@given(
    st.lists(st.floats(1, 5), min_size=8, max_size=20),
    st.floats(0.5, 3),
    st.floats(-0.5, 1.5),
)
def test_a_known_share_is_found(full: list[float], gap: float, share: float) -> None:
    own = np.asarray(full)

    found = closed_share(blocks(*own), blocks(*(own + gap)), blocks(*(own + gap * (1 - share))))

    assert found.share == pytest.approx(share, abs=1e-9)
    assert found.interval == pytest.approx((share, share), abs=1e-9)


def test_without_a_gap_there_is_no_share() -> None:
    full = [3.0, 3.1, 2.9, 3.2]
    better = [2.9, 3.0, 2.8, 3.1]
    unclear = [3.4, 2.8, 3.1, 3.0]

    for emulator in (full, better, unclear):
        found = closed_share(blocks(*full), blocks(*emulator), blocks(*full))
        assert found.share is None
        assert found.interval is None


def test_only_the_same_blocks_compare() -> None:
    with pytest.raises(AttackError, match="same blocks"):
        closed_share(blocks(3, 3), blocks(4, 4), blocks(3, 3, 3))
    with pytest.raises(AttackError, match="blocks=1"):
        closed_share(blocks(3), blocks(4), blocks(3))


def test_what_cannot_be_run_is_named() -> None:
    base, emulator = emulator_of()
    with pytest.raises(AttackError, match="queries=True"):
        Extraction(queries=True).train(emulator, tokens())
    with pytest.raises(AttackError, match="queries=False"):
        Extraction().train(emulator, tokens(), teacher=base)
    _, all_adapters = emulator_of(roles=("adapter",) * 6)
    with pytest.raises(AttackError, match="outside A"):
        Extraction().train(all_adapters, tokens())
    with pytest.raises(AttackError, match="full size"):
        Extraction(regrow=True).train(all_adapters, tokens())
    with pytest.raises(ConfigError, match="steps=0"):
        Extraction(steps=0)


@pytest.mark.parametrize("control", [False, True])
def test_both_gaps_are_those_of_the_four_models_and_the_base_stays(control: bool) -> None:
    base, emulator = emulator_of(base=opinionated())
    own = copy.deepcopy(base.state_dict())
    tuned = {name: tensor + 0.05 for name, tensor in adapter_state(emulator).items()}
    text = written_by(base, 40).flatten()
    sent = text_loss(emulator.model, text, window=16)
    expected = {"public": (text_loss(base, text, window=16), sent)}
    plugged, mine = copy.deepcopy(base), copy.deepcopy(emulator)
    plug_in(plugged, tuned, emulator.plan)
    load_adapters(mine, tuned)
    expected["task"] = text_loss(plugged, text, window=16), text_loss(mine.model, text, window=16)
    seen: list[Look] = []

    attack = Extraction(steps=2, batch_size=4, window=16, marks=(0,), control=control)
    truth = Truth(gap=Gap(base, text, Task(tuned, text)))
    result = attack.run(View(emulator=emulator, text=tokens(8)), truth, on_look=seen.append)

    looks = result.detail
    assert tuple(seen) == looks
    assert result.success == (looks[-1].public.share or 0.0)
    assert result.extra["rows"] == [look.to_json() for look in looks]
    assert [look.steps for look in looks] == [0, 2]
    assert [look.tokens for look in looks] == [0, 80]
    for gap, (full, sent) in expected.items():
        start, end = (getattr(look, gap) for look in looks)
        assert (start.full, start.emulator) == pytest.approx((full.nats, sent.nats), abs=1e-5)
        assert (end.full, end.emulator) == (start.full, start.emulator)
        # Before its first step an attacker has what it was sent, the control the full model.
        assert start.share == pytest.approx(1.0 if control else 0.0, abs=1e-4)
        assert end.attacked != start.attacked
    assert all(torch.equal(v, own[k]) for k, v in base.state_dict().items())
    with pytest.raises(AttackError, match="mark=3"):
        Extraction(steps=2, marks=(3,))
