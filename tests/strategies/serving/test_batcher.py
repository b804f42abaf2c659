"""Dynamic batching: everybody gets its own answer, together with whoever waits at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fedsplit.errors import ModelError, SessionError
from strategies.serving.batcher import Batcher


def sums(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack([row.sum(dim=0) for row in rows])


def test_everybody_gets_its_own_answer() -> None:
    batcher = Batcher(sums, max_batch=16, max_wait_ms=2.0)
    generator = torch.Generator().manual_seed(0)
    asked = [
        [torch.randn(1 + i % 4, 3, generator=generator) for _ in range(1 + i % 3)]
        for i in range(60)
    ]
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda rows: batcher.answer(rows, 10.0), asked))
    for rows, answer in zip(asked, answers, strict=True):
        assert torch.equal(answer, sums(rows))
    assert batcher.report.texts == sum(map(len, asked))
    batcher.close()


def test_what_waits_together_shares_a_forward() -> None:
    gate = threading.Event()
    sizes: list[int] = []

    def slow(rows: Sequence[Tensor]) -> Tensor:
        sizes.append(len(rows))
        gate.wait(10.0)
        return sums(rows)

    batcher = Batcher(slow, max_batch=8, max_wait_ms=0.0)
    with ThreadPoolExecutor(20) as pool:
        first = pool.submit(batcher.answer, [torch.ones(1, 2)], 10.0)
        while not sizes:
            time.sleep(0.001)
        others = [pool.submit(batcher.answer, [torch.ones(1, 2)], 10.0) for _ in range(12)]
        time.sleep(0.1)  # all of them wait by now: the worker is held by the gate
        gate.set()
        for future in (first, *others):
            future.result()
    assert sizes[0] == 1
    assert max(sizes) == 8
    assert sum(sizes) == 13
    batcher.close()


def test_a_failure_costs_those_in_the_batch_and_nobody_else() -> None:
    def picky(rows: Sequence[Tensor]) -> Tensor:
        if any(bool(row.isnan().any()) for row in rows):
            raise ModelError("not finite")
        return sums(rows)

    batcher = Batcher(picky, max_batch=4, max_wait_ms=0.0)
    with pytest.raises(ModelError):
        batcher.answer([torch.full((1, 2), float("nan"))], 5.0)
    assert batcher.answer([torch.ones(2, 2)], 5.0).tolist() == [[2.0, 2.0]]
    batcher.close()


def test_an_overloaded_server_refuses_instead_of_growing() -> None:
    gate = threading.Event()

    def stuck(rows: Sequence[Tensor]) -> Tensor:
        gate.wait(10.0)
        return sums(rows)

    batcher = Batcher(stuck, max_batch=1, max_wait_ms=0.0, depth=2)
    refused = []

    def ask() -> None:
        try:
            batcher.answer([torch.ones(1, 2)], 10.0)
        except SessionError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    gate.set()
    for thread in threads:
        thread.join()
    assert refused
    assert all("overloaded" in text for text in refused)
    batcher.close()
