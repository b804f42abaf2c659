"""``bench memory``: what a server and an owner hold of a large model that is cut or compressed.

A random bfloat16 checkpoint is written, and each way runs in a process of its own, forked from one
that has loaded the libraries and nothing else:

- ``server, whole``: load the model, then split it (what families with converted weights need);
- ``server, files``: each half straight from the files;
- ``owner, bytes``: a bundle read into memory, then unpacked;
- ``owner, mapped``: a bundle's folder, its tensors mapped;
- ``emulator, whole``: load the model, build an emulator of half of its blocks, write it;
- ``emulator, files``: the same emulator, the blocks read one at a time;
- ``importance``: a short importance run.  Where the run's dtype is the files', the frozen
  weights are pages of files, which the system drops and reads again.

Peaks are of the process: all resident memory, and without pages of files, which the system takes
back when it needs them.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from torch import nn
from typer import Option

from fedsplit.emulators import Compressor, Emulator, Material, make_compressor
from fedsplit.emulators.files import save_emulator
from fedsplit.emulators.from_files import build_from_files
from fedsplit.emulators.importance.files import ImportanceSettings
from fedsplit.emulators.importance.run import LayerReplace
from fedsplit.emulators.planning.plan import outer_blocks
from fedsplit.errors import RunError, check, one_of
from fedsplit.models.bundle.bottom import Bundle, pack_bottom, unpack_bottom
from fedsplit.models.loading import load
from fedsplit.models.splitting.from_files import read_halves
from fedsplit.models.splitting.halves import Bottom, Top, split
from simulations.bench.figures import JsonPath, publish
from simulations.bench.fingerprint import SHAPE, write_checkpoint
from simulations.core.tables import make_table
from simulations.runtime.machine import machine
from strategies.base_model import DTYPES

EVERY_S = 0.01  # between two looks at a process's memory
BUNDLE = "bundle"
TOKENIZER = {"[PAD]": 0, "[UNK]": 1, "word": 2}


def run(
    console: Console,
    json_path: JsonPath = None,
    *,
    layers: Annotated[int, Option(help="blocks; 22 at the default width: 1.1 billion")] = 22,
    width: Annotated[int, Option(help="of the residual stream, a multiple of 128")] = 2048,
    k: Annotated[int, Option(help="blocks in the bottom")] = 2,
    dtype: Annotated[str, Option(help="of the run: float32 or bfloat16")] = "bfloat16",
) -> dict[str, Any]:
    """Measure peak memory and seconds of loading halves, of emulators and importance."""
    check(width >= 128 and width % 128 == 0, "width", width, "a multiple of 128")
    check(1 <= k < layers, "k", k, f"in 1..{layers - 1}")
    one_of("dtype", dtype, sorted(DTYPES))
    shape = SHAPE | {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_attention_heads": width // 64,
        "num_key_value_heads": max(1, width // 512),
    }
    figures: dict[str, Any] = {"machine": machine(), "shape": shape, "k": k, "dtype": dtype}
    with tempfile.TemporaryDirectory(prefix="fedsplit-bench-") as folder:
        ways = _children(folder, json.dumps(shape), str(k), dtype)
    figures["parameters"] = ways.pop("write")["parameters"]
    figures["ways"] = ways
    rows = [
        (way, *(f"{row[name] / 1e6:.0f}" for name in ("held", "peak", "own")), f"{row['s']:.1f}")
        for way, row in figures["ways"].items()
    ]
    columns = ("", "holds, MB", "peak, MB", "peak without files, MB", "seconds")
    title = (
        f"{figures['parameters'] / 1e9:.2f} billion parameters in bfloat16, k = {k}, run in "
        f"{dtype}; bottom sent: {figures['ways']['server, files']['sent'] / 1e6:.0f} MB"
    )
    return publish(console, json_path, figures, [make_table(columns, rows, title=title)])


def _whole(folder: Path, k: int, dtype: torch.dtype) -> tuple[Bottom, Top]:
    return split(load(folder, "causal-lm", dtype=dtype).model, k)


def _files(folder: Path, k: int, dtype: torch.dtype) -> tuple[Bottom, Top]:
    read = read_halves(folder, "causal-lm", k, dtype=dtype)
    if read is None:
        raise RunError(f"{folder}: must be a plain checkpoint")
    return read.bottom, read.top


def _layerdrop(folder: Path) -> Compressor:
    layers = int(json.loads((folder / "config.json").read_text())["num_hidden_layers"])
    adapters = outer_blocks(layers, 2)
    kept = (layers - len(adapters)) // 2
    return make_compressor("layerdrop", adapters=adapters, keep=kept)


def _emulator_whole(folder: Path, k: int, dtype: torch.dtype) -> tuple[nn.Module]:
    loaded = load(folder, "causal-lm", dtype=dtype)
    material = Material(base_digest=loaded.digest)
    return _written(folder, _layerdrop(folder).build(loaded.model, material), loaded.tokenizer)


def _emulator_files(folder: Path, k: int, dtype: torch.dtype) -> tuple[nn.Module]:
    built = build_from_files(folder, _layerdrop(folder), dtype=dtype)
    if built is None:
        raise RunError(f"{folder}: must be a plain checkpoint")
    return _written(folder, built.emulator, built.tokenizer)


def _written(folder: Path, emulator: Emulator, tokenizer: Any) -> tuple[nn.Module]:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        save_emulator(emulator, Path(place) / "emulator", tokenizer)
    return (emulator.model,)


def _importance(folder: Path, k: int, dtype: torch.dtype) -> tuple[nn.Module]:
    loaded = load(folder, "causal-lm", dtype=dtype)
    settings = ImportanceSettings(steps=2, batch_size=2, rl_every=1, rl_draws=2, cost_batches=1)
    ids = torch.zeros(2, 64, dtype=torch.int64)
    LayerReplace(loaded.model, ids, ids, settings, base_digest=loaded.digest).run()
    return (loaded.model,)


def _owner_bytes(folder: Path, k: int, dtype: torch.dtype) -> tuple[Bottom]:
    return (unpack_bottom(Bundle.load(folder / BUNDLE))[0],)


def _owner_mapped(folder: Path, k: int, dtype: torch.dtype) -> tuple[Bottom]:
    return (unpack_bottom(folder / BUNDLE)[0],)


Way = Callable[[Path, int, torch.dtype], tuple[nn.Module, ...]]
WAYS: dict[str, Way] = {
    "server, whole": _whole,
    "server, files": _files,
    "owner, bytes": _owner_bytes,
    "owner, mapped": _owner_mapped,
    "emulator, whole": _emulator_whole,
    "emulator, files": _emulator_files,
    "importance": _importance,
}


def _children(*arguments: str) -> dict[str, dict[str, float]]:
    """Return what the writing process told, and each way's: folder, shape, k, dtype."""
    command = [sys.executable, "-m", "simulations.bench.memory", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode != 0:
        raise RunError(done.stderr.strip()[-400:])
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


def _fork_all(folder: str, shape: str, k: str, dtype: str) -> None:
    """Write the checkpoint, then measure each way; print a line ``[way, figures]`` of each.

    Nothing has been computed here yet, so no threads are lost in a fork.
    """
    for way in ("write", *WAYS):
        child = os.fork()
        if not child:
            code = 1
            try:
                figures = _work(way, folder, shape if way == "write" else k, dtype)
                print(json.dumps([way, figures]), flush=True)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            raise SystemExit(f"{way}: exit code {code}")


def _work(way: str, folder: str, setting: str, dtype: str) -> dict[str, float]:
    """Do a child's work: write the checkpoint, or measure one way."""
    path = Path(folder)
    if way == "write":
        _write_tokenizer(path)
        return {"parameters": write_checkpoint(path, json.loads(setting))}
    watch = _Watch()
    began = time.perf_counter()
    halves = WAYS[way](path, int(setting), DTYPES[dtype])
    row = {"s": time.perf_counter() - began, "sent": 0.0}
    held = {p.data_ptr(): p.numel() * p.element_size() for h in halves for p in h.parameters()}
    if way.startswith("server"):  # packing belongs to its start
        bundle = pack_bottom(halves[0], None)  # type: ignore[arg-type]
        row = {"s": time.perf_counter() - began, "sent": float(len(bundle.files[_LARGEST]))}
        if not (path / BUNDLE).exists():
            bundle.save(path / BUNDLE)
    own = watch.stop()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return row | {"held": float(sum(held.values())), "peak": float(peak), "own": own}


_LARGEST = "bottom.safetensors"


def _write_tokenizer(folder: Path) -> None:
    model = {"type": "WordLevel", "vocab": TOKENIZER, "unk_token": "[UNK]"}
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": model})
    )
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"unk_token": "[UNK]"}))


class _Watch:
    """The largest memory of this process's own, pages of files left out; NaN where not told."""

    def __init__(self) -> None:
        self._most, self._over = float("nan"), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        status = Path("/proc/self/status")
        while status.exists() and not self._over.wait(EVERY_S):
            found = re.search(r"RssAnon:\s*(\d+) kB", status.read_text())
            if found and not self._most >= 1024 * int(found[1]):
                self._most = 1024.0 * int(found[1])

    def stop(self) -> float:
        """Return what was found."""
        self._over.set()
        self._thread.join()
        return self._most


if __name__ == "__main__":
    _fork_all(*sys.argv[1:5])
