"""A new task is one file and one row: nothing else in the project names it.

The toy: how far down its scale a text is, 0 to 3, as three yes-or-no questions (ordinal).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedsplit.data.label_column import ClassColumn, LabelColumn
from fedsplit.errors import ConfigError
from fedsplit.settings import read_settings
from fedsplit.sums import Family
from fedsplit.tasks import TASKS, Task
from simulations.core.owner_samples import owner_samples
from simulations.split.centralised import CentralisedTwin
from strategies.base_model import load_base
from tests.strategies.conftest import make_config, run_locally, texts, tiny_bert

__all__ = ["make_config", "run_locally", "texts", "tiny_bert"]  # fixtures
STEPS = 3


class Ordinal(Task):
    """Is the text above step 1, 2, 3?"""

    name: ClassVar[str] = "ordinal"
    words: ClassVar[str] = "steps"
    head: ClassVar[str] = "sequence-classification"
    metric: ClassVar[str] = "off-by"
    row_bound: float | None = 1.0

    @classmethod
    def outputs_of(cls, labels: int) -> int:
        return STEPS

    def column(self, agreed: Sequence[str]) -> LabelColumn:
        return ClassColumn(tuple(str(i) for i in range(STEPS + 1)))

    def tensor(self, labels: Sequence[Any], places: Sequence[str]) -> Tensor:
        return torch.tensor([[float(y > i) for i in range(STEPS)] for y in labels])

    def bounded(self, scores: Tensor) -> Tensor:
        return scores.clamp(-30, 30)

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        each = functional.binary_cross_entropy_with_logits(scores, targets, reduction="none")
        return each.mean(1)

    def families(self) -> tuple[Family, ...]:
        return (Family("off", (STEPS + 1,), all_targets=True),)

    def count(
        self, scores: Tensor, targets: Tensor, parts: Sequence[int], about: object = None
    ) -> dict[str, float]:
        off = ((scores > 0).sum(1) - targets.sum(1)).abs().long()
        return {f"off-{i}": float(n) for i, n in enumerate(off.bincount().tolist()) if n}

    def scores(self, sums: Mapping[str, float]) -> dict[str, Any]:
        told = {int(key.split("-")[1]): value for key, value in sums.items()}
        return {"off-by": sum(i * n for i, n in told.items()) / sum(told.values())}


def test_a_new_task_runs_reports_and_equals_its_twin(
    make_config: Any, run_locally: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"model\.task='ordinal': must be one of"):
        read_settings({"model.task": "ordinal"})
    monkeypatch.setitem(TASKS, "ordinal", Ordinal)
    path = tmp_path / "steps.jsonl"
    rows = [{"text": f"w{i % 9} w{i % 7}", "label": i % 4} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="not ordinal"):
        make_config(model__task="ordinal", labels__protection="randomised-response")
    config = make_config(
        model__task="ordinal",
        data__path=str(path),
        split__k=1,
        train__optimizer="sgd",
        train__lr=0.1,
    )
    run = run_locally(config)
    found = run.server["rounds"][-1]["evaluate"]["metrics"]
    twin = CentralisedTwin(config, owner_samples(config, load_base(config).tokenizer))
    report = twin.run([row["train"]["waves"] for row in run.server["rounds"]])
    assert found["off-by"] == pytest.approx(report.metrics["off-by"])
    assert found["loss"] == pytest.approx(report.loss, rel=1e-3)
    assert "accuracy" not in found
