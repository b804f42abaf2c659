"""Frozen matrices in fewer bits, and activations that are computed again: laws of a top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from fedsplit.errors import ConfigError
from fedsplit.models.adapters.trainable import make_trainable
from fedsplit.models.anatomy import probe
from fedsplit.models.frozen_linear import FORMS, GROUP, FrozenLinear, recompute, store_frozen
from fedsplit.models.splitting.halves import Top, split
from fedsplit.settings import read_settings
from tests.tiny_models import save_tiny_bert, save_tiny_llama

BITS = {"bfloat16": 16, "int8": 8, "nf4": 4}
NEAR = {"bfloat16": 0.01, "int8": 0.02, "nf4": 0.25}  # relative error of gradients


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("models")
    return {"bert": save_tiny_bert(at / "bert"), "llama": save_tiny_llama(at / "llama")}


def make_top(folders: dict[str, Path], family: str) -> Top:
    if family == "gpt2":  # matrices stored the other way round
        torch.manual_seed(0)
        shape = GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=60, n_positions=32)
        return split(GPT2LMHeadModel(shape).eval(), 1)[1]
    if family == "bert":
        model = AutoModelForSequenceClassification.from_pretrained(folders["bert"], num_labels=3)
    else:
        model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    return split(model.eval(), 1)[1]


def batch(top: Top) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(3, 8, top.hidden_size, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:] = 0
    return hidden, mask


def loss_of(top: Top, hidden: Tensor, mask: Tensor) -> Tensor:
    logits = top(hidden, mask)
    kept = logits[mask.bool()] if logits.ndim == 3 else logits
    return kept.log_softmax(-1)[:, 0].mean().neg()


@pytest.mark.parametrize("form", FORMS)
def test_a_stored_matrix_is_near_and_small(form: str) -> None:
    matrix = torch.randn(40, 2 * GROUP + 6, generator=torch.Generator().manual_seed(0))
    layer = FrozenLinear(matrix, None, form)
    off = (layer.weight - matrix).abs()
    if form == "bfloat16":
        assert torch.equal(layer.weight, matrix.bfloat16().float())
    elif form == "int8":
        assert (off <= matrix.abs().amax(1, keepdim=True) / 254 * 1.001).all()
    else:  # half of the widest step between two levels
        assert off.max() <= 0.1523 * matrix.abs().max()
        assert off.norm() < 0.11 * matrix.norm()
    stored = layer.codes.numel() * layer.codes.element_size()
    wide = matrix.numel() if form != "nf4" else 40 * 3 * GROUP
    assert stored == wide * BITS[form] // 8
    assert not list(layer.parameters())
    again = FrozenLinear(layer.weight, None, form)
    assert torch.equal(again.codes, layer.codes)


@pytest.mark.parametrize("form", FORMS)
def test_codes_outlive_a_change_of_dtype(form: str) -> None:
    matrix = torch.randn(8, GROUP, generator=torch.Generator().manual_seed(0))
    layer = FrozenLinear(matrix, None, form)
    before = layer.weight
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert (layer.weight.float() - before).norm() < 0.01 * before.norm()


@pytest.mark.parametrize("form", FORMS)
def test_product_and_gradient_are_those_of_the_stored_matrix(form: str) -> None:
    torch.manual_seed(0)
    layer = FrozenLinear(torch.randn(5, 70), nn.Parameter(torch.randn(5)), form)
    x = torch.randn(2, 3, 70, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    upward = torch.randn(2, 3, 5)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, wanted = layer(x), functional.linear(twin, layer.weight, layer.bias)
        assert y.dtype == wanted.dtype
        mine = torch.autograd.grad(y, (x, layer.bias), upward.to(y.dtype))
        theirs = torch.autograd.grad(wanted, (twin, layer.bias), upward.to(y.dtype))
        for a, b in zip((y, *mine), (wanted, *theirs), strict=True):
            assert (a - b).float().norm() <= (0.02 if autocast else 1e-6) * b.float().norm()


@pytest.mark.parametrize(
    ("family", "form"),
    [("bert", "bfloat16"), ("llama", "int8"), ("llama", "nf4"), ("gpt2", "int8")],
)
def test_lora_on_stored_matrices_learns_what_it_would_learn(
    folders: dict[str, Path], family: str, form: str
) -> None:
    found: dict[str, Any] = {}
    for name in ("as loaded", form):
        top = make_top(folders, family)
        stored = store_frozen(top, form) if name == form else 0
        trainable = make_trainable(top, "lora", rank=2)
        hidden, mask = batch(top)
        loss = loss_of(top, hidden, mask)
        loss.backward()
        grads = {n: p.grad for n, p in trainable.named_parameters()}
        found[name] = stored, float(loss.detach()), torch.cat([g.flatten() for g in grads.values()])
        found[name, "names"] = list(grads)
        found[name, "left"] = sum(p.numel() for p in probe(top.model).blocks.parameters())
    stored, loss, gradient = found[form]
    _, exact_loss, exact = found["as loaded"]
    assert stored >= 4 * 2
    assert found[form, "names"] == found["as loaded", "names"]
    assert loss == pytest.approx(exact_loss, rel=NEAR[form])
    assert (gradient - exact).norm() < 2 * NEAR[form] * exact.norm()
    assert (
        found[form, "left"] < found["as loaded", "left"] / 2
    )  # what is left is LoRA's, norms', biases


@pytest.mark.parametrize(
    ("method", "options"), [("lora", {"form": "dora"}), ("ia3", {}), ("adapter", {}), ("head", {})]
)
def test_every_method_begins_at_the_stored_top(
    folders: dict[str, Path], method: str, options: dict[str, Any]
) -> None:
    top = make_top(folders, "llama")
    store_frozen(top, "int8")
    hidden, mask = batch(top)
    with torch.no_grad():
        before = top(hidden, mask)
        trainable = make_trainable(top, method, **options)
        assert torch.allclose(top(hidden, mask)[mask.bool()], before[mask.bool()], atol=1e-5)
    loss_of(top, hidden, mask).backward()
    assert any(p.grad is not None and p.grad.any() for p in trainable.parameters())


def saved_bytes(top: Top, hidden: Tensor, mask: Tensor) -> tuple[int, set[tuple[int, ...]]]:
    """Return what the graph of a step holds: bytes, and shapes, of tensors beside parameters."""
    mine = {p.data_ptr() for p in top.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in mine:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(top, hidden, mask)
    loss.backward()
    shapes = {tuple(t.shape) for t in kept.values()}
    return sum(t.numel() * t.element_size() for t in kept.values()), shapes


def test_the_graph_of_a_step_holds_no_matrix(folders: dict[str, Path]) -> None:
    top = make_top(folders, "llama")
    shapes = {
        tuple(m.weight.shape) for m in probe(top.model).blocks.modules() if isinstance(m, nn.Linear)
    }
    store_frozen(top, "int8")
    make_trainable(top, "lora", rank=2)
    _, held = saved_bytes(top.train(), *batch(top))
    assert not held & (shapes | {s[::-1] for s in shapes})


@pytest.mark.parametrize(("family", "form"), [("bert", ""), ("llama", "int8"), ("gpt2", "")])
def test_recomputing_leaves_gradients_and_holds_less(
    folders: dict[str, Path], family: str, form: str
) -> None:
    found = {}
    for again in (False, True):
        top = make_top(folders, family)
        if form:
            store_frozen(top, form)
        trainable = make_trainable(top, "lora", rank=2)
        if again:
            recompute(top)
        hidden, mask = batch(top)
        for module in top.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # the halves of this test must draw alike
        held, _ = saved_bytes(top.train(), hidden.requires_grad_(), mask)
        assert hidden.grad is not None
        found[again] = held, [hidden.grad, *(p.grad for p in trainable.parameters())]
    assert found[True][0] < 0.75 * found[False][0]
    for mine, wanted in zip(found[True][1], found[False][1], strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-5, atol=1e-7)


def test_recomputing_below_a_tail_of_the_owners(folders: dict[str, Path]) -> None:
    found = []
    for again in (False, True):
        top = make_top(folders, "llama")
        make_trainable(top, "lora", rank=2)
        if again:
            recompute(top)
        hidden, mask = batch(top)
        top.train().hidden_states(hidden.requires_grad_(), mask, tail=1).pow(2).sum().backward()
        found.append(hidden.grad)
    assert torch.allclose(found[0], found[1], rtol=1e-5)


def test_contradictions_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"server\.frozen-weights='int8'.*train\.method='all'"):
        read_settings({"server.frozen-weights": "int8", "train.method": "all"})
    for setting in ({"server.frozen-weights": "nf4"}, {"server.checkpointing": True}):
        with pytest.raises(ConfigError, match=r"server\..*offsite"):
            read_settings({"strategy": "offsite-tuning", "train.method": "lora", **setting})
    assert read_settings({"server.frozen-weights": "nf4", "train.method": "lora"})
    with pytest.raises(ConfigError, match=r"frozen-weights='int4'"):
        store_frozen(make_top(folders, "llama"), "int4")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", FORMS)
def test_stored_tops_compute_the_same_on_a_gpu(folders: dict[str, Path], form: str) -> None:
    top = make_top(folders, "llama")
    store_frozen(top, form)
    hidden, mask = batch(top)
    with torch.no_grad():
        here = top(hidden, mask)[mask.bool()]
        top.model.to("cuda")
        there = top(hidden, mask).cpu()[mask.bool()]
    assert torch.allclose(here, there, rtol=1e-3, atol=1e-4)
