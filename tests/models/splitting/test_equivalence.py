"""The law: bottom then top equals the whole model, outputs and gradients, for every family."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from fedsplit.errors import ConfigError, UnsupportedModelError
from fedsplit.models.anatomy import probe
from fedsplit.models.modes import keep_no_activations
from fedsplit.models.splitting.equivalence import check_equivalence
from fedsplit.models.splitting.halves import Bottom, Top, split
from tests.models.split_families import CASES, FAMILIES, LAYERS, batch, tiny

CUTS = (0, 1, LAYERS - 1)


def _loss(logits: Tensor, mask: Tensor) -> Tensor:
    if logits.ndim == 3:
        logits = logits[mask.bool()]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    return (logits * weights.to(logits.dtype)).sum()


def _whole_run(model: PreTrainedModel, k: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return logits, gradient of block k's input, gradients by name."""
    ids, mask = batch()
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden.retain_grad()
        seen.append(hidden)

    handle = probe(model).blocks[k].register_forward_pre_hook(keep, with_kwargs=True)
    logits = model(input_ids=ids, attention_mask=mask).logits
    handle.remove()
    _loss(logits, mask).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    assert seen[0].grad is not None
    return logits.detach(), seen[0].grad, grads


@pytest.mark.parametrize(("name", "task"), CASES)
def test_bottom_then_top_equals_the_whole(name: str, task: str) -> None:
    model = tiny(name, task)
    ids, mask = batch()
    close = (
        {"rtol": 1e-9, "atol": 1e-11}
        if model.dtype == torch.float64
        else {"rtol": 1e-4, "atol": 1e-5}
    )
    for k in CUTS:
        logits, hidden_grad, grads = _whole_run(model, k)
        bottom, top = split(model, k, share_tied=True, verify=k == 1)

        hidden = bottom(ids, mask)
        hidden.retain_grad()
        got = top(hidden, mask)
        _loss(got, mask).backward()

        compare = mask.bool() if got.ndim == 3 else slice(None)
        torch.testing.assert_close(got[compare], logits[compare], **close)
        torch.testing.assert_close(hidden.grad, hidden_grad, **close)
        # The halves hold the whole's own parameters: their gradients arrive there, under its names.
        for parameter_name, parameter in model.named_parameters():
            expected = grads[parameter_name]
            if expected is None:
                assert parameter.grad is None, parameter_name
            elif parameter.grad is None:
                assert not expected.any(), parameter_name
            else:
                torch.testing.assert_close(
                    parameter.grad, expected, **close, msg=lambda m, n=parameter_name: f"{n}: {m}"
                )
        model.zero_grad(set_to_none=True)
        _assert_owned(model, bottom, top)


def _assert_owned(model: PreTrainedModel, bottom: Bottom, top: Top) -> None:
    """No half holds a block, embedding matrix or head of the other."""
    anatomy = probe(model)
    below, above = ({id(p) for p in half.parameters()} for half in (bottom, top))
    lower = {id(p) for block in anatomy.blocks[: top.k] for p in block.parameters()}
    upper = {id(p) for block in anatomy.blocks[top.k :] for p in block.parameters()}
    assert lower <= below
    assert upper <= above
    assert not lower & above
    assert not upper & below
    embedding = id(anatomy.input_embeddings.weight)
    assert embedding in below
    assert (embedding in above) == anatomy.tied
    head = {id(p) for n, p in model.named_parameters() if not _inside(model, n)}
    assert not head & below
    # Nothing of the whole is lost that its logits depend on.
    assert below | above <= {id(p) for p in model.parameters()}


def _inside(model: PreTrainedModel, name: str) -> bool:
    return name.startswith(model.base_model_prefix + ".")


def test_at_least_thirty_families() -> None:
    assert len({family.model_type for family in FAMILIES.values()}) >= 30


def test_a_tied_head_is_copied_unless_shared() -> None:
    model = tiny("gpt2", "causal-lm")
    matrix = model.get_input_embeddings().weight

    bottom, top = split(model, 1)
    _, sharing = split(model, 1, share_tied=True)

    head = top.model.get_output_embeddings().weight
    assert bottom.model.get_input_embeddings().weight is matrix
    assert head is not matrix
    assert head.data_ptr() != matrix.data_ptr()
    torch.testing.assert_close(head, matrix)
    assert sharing.model.get_output_embeddings().weight is matrix


def test_split_leaves_the_whole_as_it_was() -> None:
    model = tiny("gemma3_text", "causal-lm").train()
    model.lm_head.weight.requires_grad_(False)
    before = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    config = model.config.to_dict()

    split(model, 1)

    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == before
    assert model.config.to_dict() == config
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("k", [-1, LAYERS, LAYERS + 5])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ConfigError, match=rf"k={k}: must be in 0\.\.2"):
        split(tiny("llama", "causal-lm"), k)


def _other(model_type: str, **settings: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **settings)
    return AutoModelForSequenceClassification.from_config(config).eval()


def test_albert_shares_its_blocks_and_is_refused() -> None:
    model = _other("albert", **FAMILIES["bert"].base, embedding_size=8)
    with pytest.raises(
        UnsupportedModelError,
        match=r"length num_hidden_layers=3, found 0.*albert_layer_groups\[1\]",
    ):
        split(model, 1)


def test_t5_is_refused() -> None:
    model = _other("t5", vocab_size=37, d_model=16, d_ff=24, num_layers=3, num_heads=4, d_kv=4)
    with pytest.raises(UnsupportedModelError, match=r"encoder-decoder.*block\[3\]"):
        split(model, 1)


def test_a_convolution_beside_the_blocks_is_measured_and_refused() -> None:
    model = _other("deberta-v2", **FAMILIES["bert"].base, conv_kernel_size=3, conv_act="gelu")
    with pytest.raises(UnsupportedModelError, match=r"differ from the whole by \d.*must be <="):
        split(model, 1)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = tiny("llama", "causal-lm")
    ids, mask = batch()
    bottom, top = split(model, 1)
    hidden = bottom(ids, mask).detach().requires_grad_()
    _loss(top(hidden, mask), mask).backward()
    expected = hidden.grad
    hidden.grad = None

    keep_no_activations(top.model)
    top.train()
    _loss(top(hidden, mask), mask).backward()

    assert expected is not None
    torch.testing.assert_close(hidden.grad, expected)


def test_a_copied_top_stands_alone() -> None:
    bottom, top = split(tiny("llama", "causal-lm"), 1)
    ids, mask = batch()
    hidden = bottom(ids, mask)
    expected = top(hidden, mask)
    twin = copy.deepcopy(top)
    with torch.no_grad():
        for parameter in top.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(hidden, mask), expected)


def test_threads_do_not_mix_their_hidden_states() -> None:
    _, top = split(tiny("llama", "sequence-classification"), 1)
    inputs = [torch.randn(2, 5, 16, dtype=torch.float64) for _ in range(16)]
    expected = [top(h) for h in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(top, inputs), expected, strict=True):
            torch.testing.assert_close(got, wanted)


def test_a_wrong_half_is_measured() -> None:
    model = tiny("llama", "causal-lm")
    bottom, top = split(model, 1)
    assert check_equivalence(model, bottom, top) < 1e-12
    top = copy.deepcopy(top)
    with torch.no_grad():
        probe(top.model).blocks[0].input_layernorm.weight[0] += 1e-3
    with pytest.raises(UnsupportedModelError, match="differ from the whole by"):
        check_equivalence(model, bottom, top)


def test_layerdrop_never_skips_the_cut() -> None:
    bottom, top = split(tiny("opt", "causal-lm"), 1)
    ids, mask = batch()
    for half in (bottom, top):
        half.train()
    outputs = [top(bottom(ids, mask), mask).shape for _ in range(20)]
    assert set(outputs) == {(3, 6, 37)}


def test_half_precision_in_logits_float32_out() -> None:
    model = tiny("llama", "sequence-classification").to(torch.bfloat16)
    bottom, top = split(model, 1)
    ids, mask = batch()
    hidden = bottom(ids, mask)
    logits = top(hidden.float(), mask)
    assert hidden.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(input_ids=ids, attention_mask=mask).logits.float())


@pytest.mark.parametrize("shape", [(3, 6, 15), (3, 16), (1, 3, 6, 16)])
def test_hidden_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    _, top = split(tiny("llama", "causal-lm"), 1)
    with pytest.raises(ConfigError, match=r"must be \(B, T, 16\)"):
        top(torch.zeros(shape))


def test_a_mask_of_a_wrong_shape() -> None:
    _, top = split(tiny("llama", "causal-lm"), 1)
    with pytest.raises(ConfigError, match=r"attention_mask \(3, 5\): must be \(3, 6\)"):
        top(torch.zeros(3, 6, 16, dtype=torch.float64), torch.ones(3, 5))


def test_no_mask_means_no_padding() -> None:
    bottom, top = split(tiny("bert", "sequence-classification"), 1)
    ids = batch()[0]
    torch.testing.assert_close(
        top(bottom(ids)), top(bottom(ids, torch.ones_like(ids)), torch.ones_like(ids))
    )


def test_hidden_states_come_before_the_head() -> None:
    model = tiny("llama", "causal-lm")
    bottom, top = split(model, 1)
    ids, mask = batch()
    expected = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(top.hidden_states(bottom(ids, mask), mask), expected)


def test_facts_about_the_halves() -> None:
    bottom, top = split(tiny("gpt2", "causal-lm"), 2)
    assert (bottom.k, bottom.hidden_size, bottom.vocab, bottom.task) == (2, 16, 37, "causal-lm")
    assert (top.k, top.hidden_size, top.vocab, top.num_labels) == (2, 16, 37, None)
    _, classifier = split(tiny("gpt2", "sequence-classification"), 0)
    assert (classifier.num_labels, classifier.vocab) == (3, None)
    assert classifier.task == "sequence-classification"
