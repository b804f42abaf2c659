"""Second moments of linear layers: what they sum, and what they leave in memory."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from fedsplit.emulators.compression.moments import collect
from fedsplit.models.anatomy import probe
from tests.emulators.emulator_families import tiny, tokens

LAYERS = ((2, "self_attn.o_proj"), (2, "mlp.down_proj"))


def test_inputs_are_summed_whatever_the_batches() -> None:
    matrix, channel = LAYERS
    one, two = (collect(tiny(), tokens(), [matrix], [channel], size) for size in (12, 5))
    for key, name in ((matrix, "inputs"), (matrix, "gradients"), (channel, "taylor")):
        first, second = getattr(one[key], name), getattr(two[key], name)
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    seen: list[torch.Tensor] = []
    model = tiny()
    layer = probe(model).blocks[2].get_submodule("self_attn.o_proj")
    with layer.register_forward_hook(lambda module, args, out: seen.append(args[0])):
        model(input_ids=tokens())
    x = seen[0].detach().flatten(0, 1).double()
    torch.testing.assert_close(one[matrix].inputs, x.T @ x, rtol=1e-4, atol=1e-4)


def test_nothing_of_the_calibration_stays_in_memory() -> None:
    model, kept = tiny(), []
    layer = probe(model).blocks[2].get_submodule(LAYERS[1][1])

    def note(module: Any, args: Any, output: Any) -> None:
        kept.append(weakref.ref(args[0]))

    with layer.register_forward_hook(note):
        collect(model, tokens(), [LAYERS[0]], [LAYERS[1]], 4)
    # A layer's input held its whole graph, once for every batch of every build.
    assert [at() for at in kept] == [None] * 3
