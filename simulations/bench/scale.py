"""``bench scale``: what a simulated owner costs beyond its own compute, in seconds and memory.

One round of split tuning with a tiny classifier, in which every sampled owner takes one step with
two texts, so that nearly all of the time is what a simulation adds: starting the owner's code,
session, ledger, messages, waves.  The round's own seconds count, those until its owners could be
asked do not.  ``cpu_seconds_per_owner`` are the processor seconds of all processes of the run in
the round, which other work on the machine hardly moves; its own compute is given in the same.
Memory is the largest sum, over these processes, of what each has alone and its part of what it
shares (PSS).  A killed bench goes on with the next row where ``--rows`` names the file of those
that are finished.
"""

from __future__ import annotations

import json
import random
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from typer import Option

from fedsplit.config import RunConfig, Scalar
from fedsplit.errors import RunError, check
from fedsplit.models.splitting.halves import split
from fedsplit.models.splitting.representations import represent
from simulations.bench.figures import JsonPath, publish
from simulations.core.cells import CellStore, Row
from simulations.core.settings import numbers
from simulations.core.tables import make_table
from simulations.runtime.federated import ENGINES, simulate
from simulations.runtime.hosts.launch import MOST_AT_ONCE
from simulations.runtime.launcher import Launcher
from simulations.runtime.machine import commit, limited_threads, machine
from simulations.runtime.watchdog import marked_processes
from strategies.base_model import load_base
from strategies.split_tuning.cohort import pad_rows

TEXTS, BATCH, CLASSES = 4, 2, 3  # of an owner, of a step, of the task
WIDTH = 32
WORDS = [f"w{i}" for i in range(400)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LOOK_S = 1.0


def run(
    console: Console,
    json_path: JsonPath = None,
    owners: Annotated[str, Option(help="registered owners, a row each")] = "100,1000,10000",
    sampled: Annotated[int, Option(help="owners of a round at most", min=1)] = 1000,
    engine: Annotated[str, Option(help=f"one of {', '.join(ENGINES)}")] = ENGINES[0],
    wave: Annotated[
        int, Option(help="owners that step together; 0 = as without", min=0, max=MOST_AT_ONCE)
    ] = 64,
    rows: Annotated[Path | None, Option(help="file of finished rows, to go on from")] = None,
) -> dict[str, Any]:
    """Measure a round with 100 to 10,000 simulated owners: seconds and memory for each."""
    figures: dict[str, Any] = {"machine": machine(), "commit": commit(), "engine": engine}
    store = CellStore(rows, {"texts": TEXTS, "batch": BATCH, "machine": figures["machine"]})
    figures["rows"] = []
    with tempfile.TemporaryDirectory(prefix="fedsplit-bench-") as scratch:
        for count in numbers("owners", owners, int):
            config = scale_config(Path(scratch), count, min(sampled, count), wave)
            key = {"engine": engine, "owners": count, "sampled": min(sampled, count), "wave": wave}
            console.print(f"  {engine}: {count} owners, {key['sampled']} of them in the round")
            figures["rows"] += store.rows(key, partial(measure, config, engine))
    figures |= growth(figures["rows"])
    return publish(console, json_path, figures, [table(figures)])


def scale_config(folder: Path, owners: int, sampled: int, wave: int) -> RunConfig:
    """Return the settings of one row; its model and texts are written into ``folder``.

    Raises:
        ConfigError: no such number of owners.
    """
    check(1 <= owners <= 100_000, "owners", owners, "in [1, 100000]")
    texts = folder / f"texts-{owners}.jsonl"
    if not texts.exists():
        generator = random.Random(0)
        lines = []
        for row in range(TEXTS * owners):
            words = " ".join(generator.choices(WORDS, k=8))
            lines.append(json.dumps({"text": f"{words} {row}", "label": row % CLASSES}))
        texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    model = folder / "model"
    if not model.exists():
        save_tiny_classifier(model)
    flat: dict[str, Scalar] = {
        "model.name": str(model),
        "model.labels": CLASSES,
        "model.max-tokens": 16,
        "split.k": 1,
        "train.rounds": 1,
        "train.max-steps": 1,
        "train.batch-size": BATCH,
        "train.fraction": sampled / owners,
        "data.kind": "file",
        "data.path": str(texts),
        "data.owners": owners,
        "data.partition": "iid",
        "data.test-share": 0.25,
        "session.wave": wave,
        "session.wave-wait-s": 900.0,
        "session.deadline-s": 900.0,
        "lineage.gate": "off",
        "output.evaluate-every": 0,
        "output.threads": 1,
        "output.save": False,
    }
    return RunConfig.from_flat(flat)


def save_tiny_classifier(folder: Path) -> None:
    """Write a BERT of two blocks with random weights and a tokenizer of whole words."""
    folder.mkdir()
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    words.save(str(folder / "tokenizer.json"))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    config = {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification"],
        "vocab_size": len(vocabulary),
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": 32,
        "num_labels": CLASSES,
    }
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names}),
    ):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    save_file(random_bert(len(vocabulary)), folder / "model.safetensors", {"format": "pt"})


def random_bert(vocabulary: int) -> dict[str, Tensor]:
    """Return the tensors of a BERT of two blocks, by their names in a checkpoint."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings": (vocabulary, WIDTH),
        "embeddings.position_embeddings": (32, WIDTH),
        "embeddings.token_type_embeddings": (2, WIDTH),
        "pooler.dense": (WIDTH, WIDTH),
    }
    norms = ["embeddings.LayerNorm"]
    for block in ("encoder.layer.0", "encoder.layer.1"):
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes[f"{block}.attention.{part}"] = (WIDTH, WIDTH)
        shapes[f"{block}.intermediate.dense"] = (2 * WIDTH, WIDTH)
        shapes[f"{block}.output.dense"] = (WIDTH, 2 * WIDTH)
        norms += [f"{block}.attention.output.LayerNorm", f"{block}.output.LayerNorm"]
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        found[f"bert.{name}.weight"] = 0.02 * torch.randn(shape, generator=generator)
        if not name.endswith("embeddings"):
            found[f"bert.{name}.bias"] = torch.zeros(shape[0])
    for name in norms:
        found |= {f"bert.{name}.weight": torch.ones(WIDTH), f"bert.{name}.bias": torch.zeros(WIDTH)}
    return found


def measure(config: RunConfig, engine: str) -> list[Row]:
    """Run one round and return its row, the only one of its cell.

    Raises:
        RunError: the run failed, or not all of its owners finished the round.
    """
    began = time.perf_counter()
    watchers: list[Watcher] = []
    with tempfile.TemporaryDirectory(prefix="fedsplit-bench-") as folder, ExitStack() as stack:

        def on_start(launched: Launcher) -> None:
            watchers.append(Watcher(launched, Path(folder) / "server" / "progress.json"))
            stack.callback(watchers[0].stop)

        ran, server = simulate(config, Path(folder), engine=engine, on_start=on_start)
    round_ = server["rounds"][0]["train"]
    sampled = round(config.train.fraction * config.data.owners)
    if len(round_["finished"]) != sampled:
        lost = "; ".join(f"{who}: {why}" for who, why in list(round_["lost"].items())[:3])
        raise RunError(f"{len(round_['finished'])} of {sampled} owners finished the round: {lost}")
    # One message and one reply for each sampled owner, and for each that was asked for its name.
    asked = 0 if sampled == config.data.owners <= ran.session.wave else config.data.owners
    row = {
        "owners": config.data.owners,
        "sampled": sampled,
        "wave": ran.session.wave,
        "seconds_per_owner": round_["wall_s"] / sampled,
        "compute_seconds_per_owner": compute_seconds(config, ran.session.wave),
        "cpu_seconds_per_owner": watchers[0].cpu_s / sampled,
        "peak_mib": watchers[0].peak_mib,
        "messages": server.get("hosts", {}).get("messages", 2 * (sampled + asked)),
        "start_s": time.perf_counter() - began - round_["wall_s"],
    }
    return [row]


def compute_seconds(config: RunConfig, wave: int, repeats: int = 5) -> float:
    """Return an owner's share of the processor seconds of the same step without a federation.

    Its texts through the bottom, and its part of a wave's step of the top: forward, loss, backward
    and optimizer.
    """
    loaded = load_base(config)
    bottom, top = split(loaded.model, config.split.k)
    parameters = [p for p in top.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    texts = Path(config.data.path).read_text(encoding="utf-8").splitlines()[: BATCH * wave]
    rows = [json.loads(line) for line in texts]
    labels = torch.tensor([row["label"] for row in rows])
    began = 0.0
    with limited_threads(1):
        for repeat in range(1 + repeats):  # the first is not counted
            began = time.process_time() if repeat == 1 else began
            hidden = []
            for at in range(0, len(rows), BATCH):
                found = loaded.tokenizer([row["text"] for row in rows[at : at + BATCH]])
                ids = [torch.tensor(x[: config.model.max_tokens]) for x in found["input_ids"]]
                with torch.no_grad():
                    hidden += represent(bottom, ids)
            torch.autograd.backward(nn.functional.cross_entropy(top(*pad_rows(hidden)), labels))
            optimizer.step()
            optimizer.zero_grad()
    return (time.process_time() - began) / repeats / (len(rows) / BATCH)


class Watcher:
    """Looks at a simulation's processes while it runs: their memory, and their work in the round.

    Args:
        launched: the simulation.
        page: of its server, which says when the round begins and ends.

    Attributes:
        peak_mib: largest sum of the processes' memory.
        cpu_s: processor seconds of all of them, while the round went on.
    """

    def __init__(self, launched: Launcher, page: Path) -> None:
        self.peak_mib = self.cpu_s = 0.0
        self._mark, self._folder = launched.processes.mark, str(launched.processes.root)
        self._page = page
        self._spent: dict[int, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no longer."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        begun: float | None = None
        while not self._over.wait(LOOK_S):
            memory = 0
            for process in marked_processes(self._mark, self._folder):
                with suppress(psutil.Error):
                    times = process.cpu_times()
                    self._spent[process.pid] = times.user + times.system
                    memory += process.memory_full_info().pss
            self.peak_mib = max(self.peak_mib, memory / 2**20)
            spent = sum(self._spent.values())
            with suppress(OSError, ValueError):
                page = json.loads(self._page.read_bytes())
                if begun is None and page["status"] == "running":
                    begun = spent
                if page["rounds_done"]:
                    begun = -1.0
            if begun is not None and begun >= 0.0:
                self.cpu_s = spent - begun


def growth(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a further registered owner costs in memory: between rows of equal rounds."""
    same = [row for row in rows if row["sampled"] == rows[-1]["sampled"]]
    if len(same) < 2:
        return {}
    first, last = same[0], same[-1]
    more = (last["peak_mib"] - first["peak_mib"]) / (last["owners"] - first["owners"])
    return {"mib_per_registered_owner": more}


def table(figures: dict[str, Any]) -> Table:
    """Return the figures as a table."""
    told = [
        (
            *(row[name] for name in ("owners", "sampled", "wave")),
            *(f"{row[f'{n}seconds_per_owner']:.4f}" for n in ("", "cpu_", "compute_")),
            *(f"{row['peak_mib']:.0f}", row["messages"], f"{row['start_s']:.0f}"),
        )
        for row in figures["rows"]
    ]
    heads = (
        "owners",
        "sampled",
        "wave",
        "s/owner",
        "cpu s",
        "own compute s",
        "MiB",
        "messages",
        "start, s",
    )
    more = figures.get("mib_per_registered_owner")
    title = f"engine {figures['engine']}"
    if more is not None:
        title += f": {more:.4f} MiB for each registered owner"
    return make_table(heads, told, title=title)
