"""A head in a bundle: rebuilt for every family, refused when it is not what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch

from fedsplit.errors import ModelError
from fedsplit.models.bundle.bottom import Bundle, pack_bottom
from fedsplit.models.bundle.head import unpack_head, with_head, without_head
from fedsplit.models.splitting.halves import split
from fedsplit.models.splitting.heads import detach_head, positions_read, select_positions
from tests.models.split_families import CASES, batch, tiny

# Each kind of head and of block once: poolers, dense heads, score layers, projections, tuples.
KINDS = {
    *("bert", "roberta", "distilbert", "electra", "deberta-v2", "modernbert", "llama", "gpt2"),
    *("opt", "bloom", "mpt", "gptj", "gpt_neox", "gemma2", "gemma3_text", "phi", "cohere"),
}


# Their blocks depend on their place: ModernBERT's first lacks a norm, and the tiny GPT-2 scales
# attention by the block's number.
PLACED = {"modernbert", "gpt2"}


@pytest.mark.parametrize(("name", "task"), [case for case in CASES if case[0] in KINDS])
def test_the_rebuilt_head_answers_on_the_positions_it_reads(name: str, task: str) -> None:
    bottom, top = split(tiny(name, task).float(), 1, verify=False)
    bare = pack_bottom(bottom, None)
    bundle = with_head(bare, detach_head(top))
    assert bundle.digest != bare.digest == without_head(bundle).digest
    head = unpack_head(bundle)
    assert head is not None
    positions = positions_read(head)
    assert positions == ("all" if task != "sequence-classification" else positions)

    ids, mask = (x[:2] for x in batch())  # right-padded, as a cohort is
    with torch.no_grad():
        hidden = bottom(ids, mask)
        rows = select_positions(top.hidden_states(hidden, mask), mask, positions)
        expected = top(hidden, mask)
        if task != "sequence-classification":
            assert rows.shape[0] == int(mask.sum())
            got, expected = head(rows[None], torch.ones(1, len(rows)))[0], expected[mask.bool()]
        else:
            assert positions in ("first", "last"), "every family here pools one token"
            got = head(rows[:, None], torch.ones(2, 1))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "task"), [case for case in CASES if case[0] in KINDS])
def test_the_rebuilt_tail_answers_on_the_states_that_enter_it(name: str, task: str) -> None:
    bottom, top = split(tiny(name, task).float(), 1, verify=False)
    bare, cut_off = pack_bottom(bottom, None), detach_head(top, blocks=1)
    if name in PLACED:
        with pytest.raises(ModelError, match="cannot be rebuilt"):
            with_head(bare, cut_off)
        return
    tail = unpack_head(with_head(bare, cut_off))
    assert tail is not None
    assert tail.blocks == 1
    assert positions_read(tail) == "all"
    ids, mask = batch()
    with torch.no_grad():
        hidden = bottom(ids, mask)
        expected = top(hidden, mask)
        got = tail(top.hidden_states(hidden, mask, tail=1), mask)
    compare = mask.bool() if got.ndim == 3 else slice(None)
    torch.testing.assert_close(got[compare], expected[compare], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "about",
    [{"blocks": 0}, {"blocks": 2}, {"blocks": 10**9}, {"config": None}, {"config": {}}],
)
def test_a_tail_that_is_not_what_it_says_is_refused(about: dict[str, Any]) -> None:
    bottom, top = split(tiny("llama", "causal-lm").float(), 1, verify=False)
    whole = with_head(pack_bottom(bottom, None), detach_head(top, blocks=1))
    with pytest.raises(ModelError):
        unpack_head(changed(whole, **about))


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    bottom, top = split(tiny("bert", "sequence-classification").float(), 1, verify=False)
    return with_head(pack_bottom(bottom, None), detach_head(top))


def changed(bundle: Bundle, **about: Any) -> Bundle:
    whole = json.loads(bundle.files["head.json"]) | about
    return replace(bundle, files={**bundle.files, "head.json": json.dumps(whole).encode()})


@pytest.mark.parametrize(
    "about",
    [
        {"format": 2},
        {"task": "os.system"},
        {"task": "causal-lm"},
        {"labels": 1},
        {"labels": 4},
        {"labels": True},
        {"width": 0},
        {"width": 15},
        {"tuple_length": -1},
        {"tuple_length": 100},
        {"source": "no.such.module"},
        {"source": 3},
    ],
)
def test_a_false_description_is_refused(bundle: Bundle, about: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="head"):
        unpack_head(changed(bundle, **about))


def test_weights_that_do_not_fit_are_refused(bundle: Bundle) -> None:
    good = safetensors.torch.load(bundle.files["head.safetensors"])
    name = next(n for n, t in good.items() if t.ndim == 2 and t.is_floating_point())
    for tensors in (
        {},
        good | {"more": torch.zeros(2)},
        good | {name: torch.zeros(2, 2)},
        good | {name: torch.full_like(good[name], float("inf"))},
    ):
        files = {**bundle.files, "head.safetensors": safetensors.torch.save(tensors)}
        with pytest.raises(ModelError, match=r"head\.safetensors"):
            unpack_head(Bundle(files))
    for missing in ("head.json", "head.safetensors"):
        with pytest.raises(ModelError, match="both"):
            unpack_head(Bundle({n: b for n, b in bundle.files.items() if n != missing}))
    with pytest.raises(ModelError, match="not a safetensors file"):
        unpack_head(Bundle({**bundle.files, "head.safetensors": b"\x80\x04."}))
    assert unpack_head(without_head(bundle)) is None
