"""``bench gpu``: what a CUDA card computes beside the CPU, how fast, and in how much memory.

For whoever has a card (``make gpu-check``): at most eight minutes.  A row that would begin after its
share of them is left out and says so.  Where a row failed or is out of its bounds the command fails,
after every row is told and written.  Without a card nothing is run, and that is said.

| row | what it does |
| --- | --- |
| parity float32, bfloat16, nf4 | a small LLaMA's top: logits and gradients on the card and on the CPU |
| training | steps of a top of 0.1 billion parameters, float32 and bfloat16 weights: steps a second, memory |
| nf4 | the 1.1 billion LLaMA, its blocks stored as ``server.frozen-weights = "nf4"``, LoRA trained: steps a second, memory |
| nf4, bitsandbytes | the same with bitsandbytes' own 4-bit layers, where it is installed |
"""  # noqa: E501

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from torch import Tensor, nn
from typer import Option

from fedsplit.errors import RunError, check
from fedsplit.models.adapters.trainable import make_trainable
from fedsplit.models.frozen_linear import AS_LOADED, store_frozen
from fedsplit.models.layout.projections import read_config
from fedsplit.models.loading import HEADS
from fedsplit.models.placing import place
from fedsplit.models.splitting.equivalence import TOLERANCE, relative_difference
from fedsplit.models.splitting.halves import Bottom, Top, split
from simulations.bench.figures import JsonPath, publish
from simulations.bench.fingerprint import SHAPE
from simulations.core.tables import make_table
from simulations.runtime.machine import machine

Row = dict[str, Any]
NF4 = "nf4, LoRA"
NO_CARD = "no CUDA device here: nothing was checked (this needs an NVIDIA card and a CUDA build)"
GRADIENTS = {torch.float32: 1e-3, torch.bfloat16: 6e-2}  # sums of many rounded products
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}
MIDDLE = SMALL | {
    "hidden_size": 768,
    "intermediate_size": 2112,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
}
SHAPES = {"parity": SMALL, "training": MIDDLE, "nf4": SHAPE}


def run(
    console: Console,
    json_path: JsonPath = None,
    *,
    minutes: Annotated[float, Option(help="no row begins later than this")] = 7.0,
    steps: Annotated[int, Option(help="training steps timed in a row")] = 20,
) -> dict[str, Any]:
    """Check a CUDA card: parity with the CPU, steps a second, memory, a model in nf4."""
    check(minutes > 0, "minutes", minutes, "> 0")
    check(steps >= 1, "steps", steps, ">= 1")
    if not torch.cuda.is_available():
        console.print(NO_CARD)
        return {"machine": machine(), "rows": []}
    return check_device(
        console, torch.device("cuda"), json_path, minutes=minutes, steps=steps, shapes=SHAPES
    )


def check_device(
    console: Console,
    device: torch.device,
    json_path: Path | None = None,
    *,
    minutes: float,
    steps: int,
    shapes: Mapping[str, dict[str, int]],
) -> dict[str, Any]:
    """Make every row, print and write them, return the figures.

    Args:
        console: for the rows' names and the table.
        device: beside the CPU.
        json_path: where the figures are written too.
        minutes: no row begins later than this.
        steps: training steps timed in a row.
        shapes: of the models, by the keys of :data:`SHAPES`.

    Raises:
        RunError: a row failed or is out of its bounds; names them.
    """
    card = device.type == "cuda"
    rows: list[Row] = []
    began = time.monotonic()
    for name, make in checks(device, steps, shapes).items():
        if time.monotonic() - began > 60 * minutes:
            rows.append({"row": name, "told": f"left out: {minutes:g} minutes are over"})
            continue
        console.print(f"{name} ...")
        try:
            rows.append({"row": name, **make()})
        except Exception as error:  # the other rows are wanted whatever befalls one of them
            told = f"failed: {type(error).__name__}: {error}"[:200]
            rows.append({"row": name, "good": False, "told": told})
        if card:
            torch.cuda.empty_cache()
    name = torch.cuda.get_device_name(device) if card else str(device)
    figures = {"machine": machine(), "card": name, "rows": rows}
    publish(console, json_path, figures, [table(rows)])
    bad = [row["row"] for row in rows if not row.get("good", True)]
    if bad:
        raise RunError(f"bench gpu: {len(bad)} of {len(rows)} rows are not good: {', '.join(bad)}")
    return figures


def checks(
    device: torch.device, steps: int, shapes: Mapping[str, dict[str, int]]
) -> dict[str, Callable[[], Row]]:
    """Return each row's name and what makes it; a row whose ``good`` is false is a failure."""
    small, middle, large = (shapes[name] for name in SHAPES)
    rows: dict[str, Callable[[], Row]] = {
        "parity float32": lambda: parity(device, torch.float32, small),
        "parity bfloat16": lambda: parity(device, torch.bfloat16, small),
        "parity nf4": lambda: parity(device, torch.float32, small, "nf4"),
        "training float32": lambda: training(device, torch.float32, steps, middle),
        "training bfloat16": lambda: training(device, torch.bfloat16, steps, middle),
        NF4: lambda: quantised(device, steps, large, _stored),
    }
    if importlib.util.find_spec("bitsandbytes") is not None:
        rows[f"{NF4}, bitsandbytes"] = lambda: quantised(device, steps, large, _in_bitsandbytes)
    return rows


def table(rows: list[Row]) -> Any:
    """Return the rows as a table."""
    columns = ("", "logits differ", "gradients differ", "steps/s", "memory, MB", "")
    shown = []
    for row in rows:
        cells = [f"{row[k]:.1e}" if k in row else None for k in ("logits", "gradients")]
        cells.append(f"{row['steps_s']:.1f}" if "steps_s" in row else None)
        cells.append(f"{row['bytes'] / 1e6:.0f}" if "bytes" in row else None)
        shown.append((row["row"], *cells, row.get("told", "")))
    return make_table(columns, shown, title="This card beside this machine's CPU")


def parity(
    device: torch.device, dtype: torch.dtype, shape: dict[str, int], form: str = AS_LOADED
) -> Row:
    """Compare a top's logits and gradients on ``device`` with the CPU's in the same dtype.

    Differences are relative to the largest logit, and to the largest gradient of each parameter.
    With a ``form`` of :mod:`fedsplit.models.frozen_linear` the blocks' matrices are stored in it.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    bottom, top = _halves(shape, dtype)
    if form != AS_LOADED:
        store_frozen(top, form)
    ids = _ids(bottom, 4, 33)
    hidden = bottom(ids).detach()
    here, mine = _outcome(top, hidden, ids)
    top.model.to(device)  # type: ignore[arg-type]
    there, theirs = _outcome(top, hidden.to(device), ids.to(device))
    logits = relative_difference(here, there.cpu())
    worst = max(relative_difference(mine[n], theirs[n].cpu()) for n in mine)
    good = logits <= TOLERANCE[dtype] and worst <= GRADIENTS[dtype]
    bound = f"{TOLERANCE[dtype]:g}, {GRADIENTS[dtype]:g}"
    return {
        "logits": logits,
        "gradients": worst,
        "good": good,
        "told": f"within {bound}" if good else f"NOT within {bound}",
    }


def _outcome(top: Top, hidden: Tensor, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    top.zero_grad(set_to_none=True)
    logits = top(hidden)
    _loss(logits, ids).backward()  # type: ignore[no-untyped-call]
    found = {n: p.grad.float() for n, p in top.named_parameters() if p.grad is not None}
    return logits.detach(), found


def training(device: torch.device, dtype: torch.dtype, steps: int, shape: dict[str, int]) -> Row:
    """Time steps of a whole top on rows as owners send them, and tell its largest memory."""
    bottom, top = _halves(shape, dtype)
    ids = _ids(bottom, 8, 128)
    hidden = bottom(ids).detach().to(device)
    top.model.to(device)  # type: ignore[arg-type]
    return _timed(top, list(top.parameters()), hidden, ids.to(device), device, steps)


def quantised(
    device: torch.device, steps: int, shape: dict[str, int], store: Callable[[Top], object]
) -> Row:
    """Time LoRA steps of a top with frozen blocks in nf4; weights are random.

    Args:
        device: where it trains.
        steps: timed.
        shape: of the model.
        store: puts a bfloat16 top's blocks into nf4, in place.
    """
    bottom, top = _halves(shape, torch.bfloat16)
    parameters = sum(p.numel() for half in (bottom, top) for p in half.parameters())
    ids = _ids(bottom, 8, 128)
    hidden = bottom(ids).detach().to(device)
    whole = sum(p.numel() * p.element_size() for p in top.parameters())
    store(top)
    trainable = make_trainable(top, "lora")
    place(top, device, torch.bfloat16)
    held = sum(t.numel() * t.element_size() for t in (*top.parameters(), *top.buffers()))
    row = _timed(top, trainable.parameters(), hidden, ids.to(device), device, steps)
    size = f"{parameters / 1e6:,.0f} million parameters"
    told = f"{size}; the top holds {held / 1e6:.0f} MB, {whole / 1e6:.0f} MB in bfloat16"
    return {"told": told, **row, "top_bytes": float(held)}


def _stored(top: Top) -> None:
    store_frozen(top, "nf4")


def _in_bitsandbytes(top: Top) -> None:
    """Replace the linear layers of a top's blocks by 4-bit ones, quantised when they are moved."""
    import bitsandbytes as bnb

    for path, module in list(top.model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in f".{path}":
            new = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
            )
            new.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4"
            )
            top.model.set_submodule(path, new)


def _timed(
    top: Top,
    parameters: list[nn.Parameter],
    hidden: Tensor,
    ids: Tensor,
    device: torch.device,
    steps: int,
) -> Row:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    card = device.type == "cuda"
    if card:
        torch.cuda.reset_peak_memory_stats()

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = _loss(top(hidden), ids)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    first = float(step())
    began = time.perf_counter()
    for _ in range(steps):
        last = step()
    final = float(last)  # waits for the card
    row: Row = {"steps_s": steps / (time.perf_counter() - began), "first": first, "last": final}
    row["good"] = math.isfinite(final)
    if not row["good"]:
        row["told"] = f"the loss is {final}"
    if card:
        row["bytes"] = float(torch.cuda.max_memory_allocated())
    return row


def _halves(shape: dict[str, int], dtype: torch.dtype) -> tuple[Bottom, Top]:
    with tempfile.TemporaryDirectory() as folder:
        about = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shape}
        (Path(folder) / "config.json").write_text(json.dumps(about))
        config = read_config(Path(folder))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = HEADS["causal-lm"].from_config(config, dtype=dtype)
    return split(model.eval(), 1, verify=False)


def _ids(bottom: Bottom, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(bottom.vocab, (rows, length), generator=generator)


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
