"""The kind ``lineage-llm`` on a small random LLaMA: every suspect has its row and its verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from fedsplit.errors import ConfigError
from fedsplit.models import load
from simulations.core.kinds import KINDS
from simulations.core.run_folder import RunFolder, read_results
from simulations.core.settings import load_experiment
from simulations.lineage import large_model
from simulations.lineage.large_model import MADE, UNTRAINED, cut_width, drop_blocks
from tests.tiny_models import save_tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base"), layers=4, width=64)


def carry_out(base: Path, folder: Path, *more: str, force: bool = False) -> list[dict[str, Any]]:
    small = (
        "options.steps=0",
        'options.transforms=["rotation"]',
        "options.threads=1",
        "options.windows=2",
    )
    experiment = load_experiment("lineage-llm", [f"model={base}", *small, *more])
    with RunFolder(folder, name="x", kind=experiment.result_kind, force=force) as run_folder:
        KINDS[experiment.kind](experiment, run_folder, Console(quiet=True))
    rows: list[dict[str, Any]] = read_results(folder)["rows"]
    return rows


def test_every_suspect_has_a_row_and_none_is_made_twice(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = carry_out(base, tmp_path / "run")
    found = {row["suspect"]: row for row in rows}
    assert list(found) == [*UNTRAINED, "map rotation", f"stranger {MADE}"]
    assert found["width-pruned"]["width"] == 48
    assert found["blocks-dropped"]["blocks"] == 3
    assert abs(found[f"stranger {MADE}"]["score"]) < 0.5
    for name in ("pruned", "quantised-8", "quantised-4", "map rotation"):
        assert found[name]["score"] > 0.8, name
    assert all(row["seconds"] > 0 and row["peak_mb"] > 0 for row in rows)
    assert found["map rotation"]["pcs"] < 0.5 < found["map rotation"]["reef"]
    assert found["width-pruned"]["pcs"] is None
    unchanged = found["map rotation"]
    assert unchanged["perplexity"] == pytest.approx(unchanged["perplexity_base"], rel=1e-3)
    with Image.open(tmp_path / "run" / "sheet.png") as sheet:
        assert min(sheet.size) > 2 * 128

    def never(*_: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(large_model.LargeModel, "cell", never)
    assert carry_out(base, tmp_path / "run", force=True) == rows


def test_cuts_run_and_keep_what_they_keep(base: Path) -> None:
    model: Any = load(base, "causal-lm").model
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        narrow, short = cut_width(model, 0.5), drop_blocks(model, 2)
        assert narrow(input_ids=ids).logits.shape == model(input_ids=ids).logits.shape
        assert short(input_ids=ids).logits.shape == model(input_ids=ids).logits.shape
        whole, part = model.model.embed_tokens.weight, narrow.model.embed_tokens.weight
    assert part.shape == (whole.shape[0], whole.shape[1] // 2)
    columns = {tuple(c.tolist()) for c in whole.T}
    assert all(tuple(c.tolist()) in columns for c in part.T)
    assert len(short.model.layers) == 2


@pytest.mark.parametrize(
    "change",
    [
        "options.width=1.0",
        "options.drop=1",
        "options.steps=-1",
        'options.transforms=["x"]',
        'options.fingerprints=["score"]',
    ],
)
def test_options_out_of_range_are_refused(base: Path, tmp_path: Path, change: str) -> None:
    with pytest.raises(ConfigError, match=r"options\.\w+="):
        carry_out(base, tmp_path / "run", change)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("offsite-llm", "offsite-table"),
        ("offsite-llm-answers", "offsite-table"),
        ("offsite-llm-sweep", "offsite-sweep"),
        ("sap-llm", "sap-depth"),
        ("sap-llm-accuracy", "sweep"),
    ],
)
def test_the_other_configs_on_this_model_can_be_read(name: str, kind: str) -> None:
    assert load_experiment(name, ["model=x"]).kind == kind
