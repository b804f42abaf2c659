"""``bench fingerprint``: corrected ICS of a large checkpoint beside loading the whole model.

A checkpoint of random bfloat16 weights is written to a temporary folder; each way then runs in a
process of its own, so that its peak memory (``ru_maxrss``, mapped pages included) is its own.
Every way ends with the same thing in memory: the invariants of the last two blocks over the same
K tokens, ready to be compared.

- ``corrected``: this project; reads two blocks and K rows, keeps the invariants as factors.
- ``corrected-fp32``: the same, multiplied in float32 throughout.
- ``published``: loads the whole model in float32, as ``from_pretrained`` did when the script was
  published, and builds the z-scored (6, K, K) stack in float32.
- ``published-bf16``: the same script with the model loaded and multiplied as stored.

Seconds are counted after the imports, which are the same for all.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from typer import Option

from fedsplit.errors import RunError, check
from fedsplit.fingerprints.methods.ics import ICS, inner
from fedsplit.fingerprints.view import choose_tokens
from fedsplit.fingerprints.weights_file import open_view
from fedsplit.models.loading import HEADS
from fedsplit.models.shards import INDEX
from fedsplit.registry import pick
from fedsplit.seeding import torch_generator
from simulations.bench.figures import JsonPath, publish
from simulations.core.tables import formatted, make_table
from simulations.runtime.machine import machine

# TinyLlama's shape: 1.10 billion parameters
SHAPE: dict[str, int] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
BLOCKS_PER_SHARD = 4
GOALS = {"memory": 0.2, "speed": 5.0}


def run(
    console: Console,
    json_path: JsonPath = None,
    *,
    layers: Annotated[int, Option(help="blocks; 22 at the default width: 1.1 billion")] = 22,
    width: Annotated[int, Option(help="of the residual stream, a multiple of 128")] = 2048,
    tokens: Annotated[int, Option(help="K, rows of the embedding read")] = 4096,
    repeats: Annotated[int, Option(help="runs of each way; the fastest counts")] = 3,
) -> dict[str, Any]:
    """Measure memory and seconds of corrected ICS from disk beside loading the whole model."""
    check(layers >= 2, "layers", layers, ">= 2 (the invariants read the last two)")
    check(width >= 128 and width % 128 == 0, "width", width, "a multiple of 128")
    check(1 <= tokens <= SHAPE["vocab_size"], "tokens", tokens, f"in 1..{SHAPE['vocab_size']}")
    check(repeats >= 1, "repeats", repeats, ">= 1")
    shape = SHAPE | {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_attention_heads": width // 64,
        "num_key_value_heads": max(1, width // 512),
    }
    figures: dict[str, Any] = {"machine": machine(), "shape": shape, "tokens": tokens}
    with tempfile.TemporaryDirectory(prefix="fedsplit-bench-") as folder:
        console.print("writing a random bfloat16 checkpoint ...")
        # Not in this process: a child's ru_maxrss begins at what its parent held.
        figures["parameters"] = _child(["write", folder, json.dumps(shape)])["parameters"]
        for way in [*WAYS] * repeats:
            row = _child([way, folder, str(tokens)])
            figures.setdefault(way, {"runs": []})["runs"].append(row["seconds"])
            figures[way]["peak_bytes"] = max(row["peak_bytes"], figures[way].get("peak_bytes", 0.0))
            figures[way]["seconds"] = min(figures[way]["runs"])
            console.print(f"  {way}: {row['seconds']:.1f} s, {row['peak_bytes'] / 1e6:.0f} MB")
    ours = figures["corrected"]
    for way in ("published", "published-bf16"):
        figures[way]["memory_ratio"] = ours["peak_bytes"] / figures[way]["peak_bytes"]
        figures[way]["speed_ratio"] = figures[way]["seconds"] / ours["seconds"]
    return publish(console, json_path, figures, [_table(figures)])


def write_checkpoint(folder: Path, shape: dict[str, int]) -> int:
    """Write a LLaMA checkpoint of random bfloat16 weights, a few blocks at a time.

    Returns:
        Number of parameters.
    """
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    (folder / "config.json").write_text(
        json.dumps(config | shape | {"tie_word_embeddings": False, "hidden_act": "silu"})
    )
    generator = torch_generator(0, "bench-fingerprint")
    where: dict[str, str] = {}
    count = 0
    for number, tensors in enumerate(_shards(shape, generator)):
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
        count += sum(t.numel() for t in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return count


def _shards(shape: dict[str, int], generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    d, i, v = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    kv = d * shape["num_key_value_heads"] // shape["num_attention_heads"]

    def draw(*size: int) -> Tensor:
        return 0.02 * torch.randn(*size, generator=generator, dtype=torch.float32).bfloat16()

    sizes = {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d)}
    matrices = {f"self_attn.{name}_proj": size for name, size in sizes.items()}
    matrices |= {"mlp.gate_proj": (i, d), "mlp.up_proj": (i, d), "mlp.down_proj": (d, i)}
    held: dict[str, Tensor] = {"model.embed_tokens.weight": draw(v, d)}
    for block in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{block}."
        held |= {f"{prefix}{name}.weight": draw(*size) for name, size in matrices.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            held[f"{prefix}{norm}.weight"] = 1 + draw(d)
        if block % BLOCKS_PER_SHARD == BLOCKS_PER_SHARD - 1:
            yield held
            held = {}
    held |= {"model.norm.weight": 1 + draw(d), "lm_head.weight": draw(v, d)}
    yield held


def _child(arguments: list[str]) -> dict[str, float]:
    """Run one way in a process of its own and return what it printed."""
    command = [sys.executable, "-m", "simulations.bench.fingerprint", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode != 0:
        last = done.stderr.strip()[-400:]
        raise RunError(f"{arguments[0]}: exit code {done.returncode}: {last}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def corrected(folder: Path, tokens: int, *, bf16: bool = True) -> float:
    """Compute corrected ICS from the files: the factors, and the norms to divide by."""
    view = open_view(folder)
    picked = choose_tokens(view.vocabulary, tokens)
    memo: dict[tuple[int, int], Tensor] = {}
    found = list(ICS(bf16=bf16).factors(view, picked))
    return sum(math.sqrt(inner(f, f, memo)) for _, f in found)


def published(folder: Path, tokens: int, *, dtype: torch.dtype = torch.float32) -> float:
    """Compute ICS as the public script does: whole model in memory, six dense K x K matrices."""
    model = HEADS["causal-lm"].from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, local_files_only=True, use_safetensors=True
    )
    weights = dict(model.named_parameters())
    layers = model.config.num_hidden_layers
    repeat = model.config.num_attention_heads // model.config.num_key_value_heads
    with torch.no_grad():
        table = weights["model.embed_tokens.weight"]
        x = table[torch.tensor(choose_tokens(table.shape[0], tokens))]  # (K, d)
        channels = []
        for layer in (layers - 2, layers - 1):
            names = [f"self_attn.{n}" for n in "qkvo"] + ["mlp.gate", "mlp.up", "mlp.down"]
            q, k, v, o, gate, up, down = (
                weights[f"model.layers.{layer}.{name}_proj.weight"] for name in names
            )
            k, v = k.repeat(repeat, 1), v.repeat(repeat, 1)
            channels += [x @ q.T @ k @ x.T, x @ v.T @ o.T @ x.T]
            channels.append(x @ (gate * up).T @ down.T @ x.T)
        stack = torch.stack([c.float() for c in channels])  # (6, K, K)
        mean, sd = stack.mean((1, 2), keepdim=True), stack.std((1, 2), keepdim=True)
        return float(((stack - mean) / sd).abs().max())


Way = Callable[[Path, int], float]
WAYS: dict[str, Way] = {
    "corrected": corrected,
    "corrected-fp32": lambda folder, tokens: corrected(folder, tokens, bf16=False),
    "published": published,
    "published-bf16": lambda folder, tokens: published(folder, tokens, dtype=torch.bfloat16),
}


def _work(way: str, folder: str, setting: str) -> dict[str, float]:
    """Do a child's work: write the checkpoint, or measure one way."""
    torch.set_num_threads(int(machine()["cores"]))
    if way == "write":
        return {"parameters": write_checkpoint(Path(folder), json.loads(setting))}
    carry_out = pick(WAYS, way, "way")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    carry_out(Path(folder), int(setting))
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak_bytes": peak * 1024, "start_bytes": before * 1024}


def _table(figures: dict[str, Any]) -> Table:
    """Return the figures as a table; the title tells the goals against ``published``."""

    rows = []
    for way in WAYS:
        row = {**figures[way], "peak": figures[way]["peak_bytes"] / 1e6}
        seconds, peak, memory, speed = formatted(
            row, {"seconds": ".1f", "peak": ".0f", "memory_ratio": ".3f", "speed_ratio": ".1f"}
        )
        rows.append((way, seconds, f"{peak} MB", memory and f"{memory} x", speed and f"{speed} x"))
    return make_table(
        ("", "seconds", "peak memory", "ours takes", "ours is faster"),
        rows,
        title=f"Fingerprint of a {figures['parameters'] / 1e9:.2f} billion parameter bfloat16 "
        f"checkpoint, K = {figures['tokens']} (goals: at most {GOALS['memory']} x the memory of "
        f"`published`, at least {GOALS['speed']:.0f} x faster)",
    )


if __name__ == "__main__":
    print(json.dumps(_work(*sys.argv[1:4])))
