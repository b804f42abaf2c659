"""A top moves to other devices and dtypes and still computes the same."""

from __future__ import annotations

import pytest
import torch

from fedsplit.errors import ConfigError
from fedsplit.models.anatomy import probe
from fedsplit.models.placing import place
from fedsplit.models.splitting.halves import Bottom, Top, split
from tests.models.split_families import batch, tiny


def _halves(name: str = "llama", task: str = "sequence-classification") -> tuple[Bottom, Top]:
    return split(tiny(name, task).float(), 1)


def test_one_device_and_a_dtype() -> None:
    bottom, top = _halves()
    ids, mask = batch()
    hidden = bottom(ids, mask)
    expected = top(hidden, mask)
    placed = place(top, "cpu", torch.bfloat16)
    logits = placed(hidden, mask)
    assert placed is top
    assert next(top.parameters()).dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("how", ["auto", "sequential", {"": "cpu"}])
def test_maps_on_the_cpu(how: object) -> None:
    bottom, top = _halves()
    ids, mask = batch()
    hidden = bottom(ids, mask).detach().requires_grad_()
    expected = top(hidden, mask)
    placed = place(top, how)  # type: ignore[arg-type]
    logits = placed(hidden, mask)
    logits.sum().backward()
    torch.testing.assert_close(logits, expected)
    assert hidden.grad is not None


def test_offloaded_parameters_are_fetched() -> None:
    """What accelerate does with the part of a top that does not fit on the device."""
    from accelerate import cpu_offload

    bottom, top = _halves()
    ids, mask = batch()
    hidden = bottom(ids, mask).detach().requires_grad_()
    expected = top(hidden, mask)
    cpu_offload(top.model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in top.parameters())
    logits = top(hidden, mask)
    logits.sum().backward()
    torch.testing.assert_close(logits, expected)
    assert hidden.grad is not None


@pytest.mark.parametrize("how", ["gpu7", "cuda:99", {"nothing": "cpu"}])
def test_impossible_places(how: object) -> None:
    with pytest.raises(ConfigError, match="device_map="):
        place(_halves()[1], how)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_top_spread_over_devices(name: str, task: str) -> None:
    """Blocks on the GPU, the rest on the CPU; the owner's tensors stay on the CPU."""
    bottom, top = _halves(name, task)
    ids, mask = batch()
    hidden = bottom(ids, mask).detach().requires_grad_()
    expected = top(hidden, mask)
    expected.sum().backward()
    gradient, hidden.grad = hidden.grad, None
    assert gradient is not None
    path = probe(top.model).blocks_path
    spread: dict[str, str | int] = {f"{path}.0": "cuda:0", f"{path}.1": "cpu"}
    for prefix, module in top.model.named_modules():
        inside = any(other.startswith(prefix) for other in spread) or prefix.startswith(path)
        leaf = not list(module.children())
        if leaf and not inside:
            spread[prefix] = "cuda:0"

    logits = place(top, spread)(hidden, mask)
    logits.sum().backward()

    keep = mask.bool() if logits.ndim == 3 else slice(None)
    torch.testing.assert_close(logits.cpu()[keep], expected[keep], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(hidden.grad, gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_top_on_the_gpu_in_bfloat16() -> None:
    bottom, top = _halves("bert")
    ids, mask = batch()
    hidden = bottom(ids, mask).detach().requires_grad_()
    logits = place(top, "cuda:0", torch.bfloat16)(hidden, mask)
    logits.sum().backward()
    assert (logits.device.type, logits.dtype) == ("cuda", torch.float32)
    assert hidden.grad is not None
    assert (hidden.grad.device.type, hidden.grad.dtype) == ("cpu", torch.float32)
