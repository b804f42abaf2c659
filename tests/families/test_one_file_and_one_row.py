"""A new attack, compressor, fingerprint, adapter method or data kind is one file and one row.

Each test adds a toy of its family to the table alone, as a row would, and sees it wherever the
project shows or takes such a name: settings, reports, lists and commands.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fedsplit.attacks import ATTACKS, Inversion, Public, TokenAttack, Truth, View, suited
from fedsplit.attacks.transcripts import Transcript, write_transcript, write_truth
from fedsplit.cli import app_cli
from fedsplit.config import RunConfig
from fedsplit.data import DATASETS, Request, Source, Table, docstrings_are_public, load_dataset
from fedsplit.emulators import COMPRESSORS, Compressor, Emulator, EmulatorPlan, build_emulator
from fedsplit.emulators.compressors.base import Forecast, Material, Sizes, plain_forecast
from fedsplit.emulators.settings import (
    check_offsite,
    compressor_settings,
    method_settings,
    needs_importance,
)
from fedsplit.errors import ConfigError
from fedsplit.fingerprints import FINGERPRINTS, Fingerprint, Similarity, WeightView
from fedsplit.models import load, probe
from fedsplit.models.adapters.methods import METHODS, AdapterMethod, BlockTuning, MethodSettings
from simulations.core.settings import Experiment
from tests.tiny_models import save_tiny_bert, save_tiny_llama

WIDE = {"COLUMNS": "200", "NO_COLOR": "1"}


def said(*words: object) -> str:
    done = CliRunner().invoke(app_cli, [str(w) for w in words], env=WIDE)
    assert done.exit_code in (0, 1, 2), f"{done.output}{done.exception!r}"
    return done.output


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


# --- an attack -------------------------------------------------------------------------------


@dataclass(frozen=True)
class AlwaysFive(TokenAttack):
    """Guess token 5 everywhere."""

    name: ClassVar[str] = "always-five"
    knows: ClassVar[str] = "nothing at all"
    budget: ClassVar[tuple[str, ...]] = ("guess",)
    guess: int = 5

    def read(self, view: View) -> Inversion:
        ids = [torch.full((len(x),), self.guess) for x in view.rows]
        return Inversion([x[:, None] for x in ids], 0.0)


def test_an_attack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(ATTACKS, "always-five", AlwaysFive)
    model = save_tiny_bert(tmp_path / "model")
    ids = torch.tensor([5, 9, 5, 7])
    write_transcript(
        tmp_path / "transcript.safetensors",
        Transcript(rows=[{("a", "train"): {0: torch.randn(4, 32)}}]),
    )
    write_truth(tmp_path / "truth.safetensors", {("a", "train"): {0: ids}})

    listed = said("attack", "list")
    out = tmp_path / "out.json"
    said(
        *("attack", "run", "always-five", tmp_path / "transcript.safetensors", "--model", model),
        *("--set", "model.labels=3", "--budget", "always-five.guess=9", "--json", out),
    )
    view = View(Public(candidate_set=None), gradients=[torch.zeros(2)])

    assert "always-five" in listed
    assert "nothing at all" in listed
    assert json.loads(out.read_text())[0]["success"] == 0.25
    assert "always-five" not in [attack.name for attack in suited(view)]  # no rows to read
    view.rows, view.public.bottom = [torch.zeros(4, 32)], load_bottom(model)
    found = [attack for attack in suited(view) if attack.name == "always-five"]
    assert found[0].run(view, Truth(ids=[ids])).success == 0.5


def load_bottom(model: Path) -> Any:
    from fedsplit.models import split

    return split(load(model, "sequence-classification", num_labels=3).model, 0)[0]


# --- a compressor ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Halved(Compressor):
    """Halve every frozen weight (beta = 1), or leave it."""

    name: ClassVar[str] = "halved"
    adapters: tuple[int, ...]
    factor: float = 1.0

    @classmethod
    def identity(cls, adapters: Sequence[int]) -> Self:
        return cls(tuple(adapters))

    @classmethod
    def run_settings(cls, offsite: Any) -> dict[str, Any]:
        return {"factor": 1.0 - offsite.beta / 2}

    @classmethod
    def variants(
        cls, layers: int, adapters: int, alphas: Sequence[float], betas: Sequence[float]
    ) -> dict[str, Self]:
        return {f"halved A={adapters}": cls((0,), 0.5)}

    def forecast(self, sizes: Sizes) -> Forecast:
        return plain_forecast(sizes, len(self.adapters), sizes.layers - len(self.adapters))

    def build(self, model: Any, material: Material) -> Emulator:
        plan = EmulatorPlan.with_adapters(probe(model).num_layers, self.adapters, "compress")

        def edit(position: int, block: nn.Module) -> None:
            with torch.no_grad():
                for parameter in block.parameters():
                    parameter.mul_(self.factor)

        details = {"settings": asdict(self)}
        return build_emulator(model, plan, edit=edit, method=self.name, details=details)


def test_a_compressor(monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    flat = {"offsite.compressor": "halved", "offsite.beta": 1.0, "offsite.positions": "0"}
    with pytest.raises(ConfigError, match=r"offsite\.compressor='halved': must be one of crash"):
        _ = Experiment("x", "split", "", flat).config
    monkeypatch.setitem(COMPRESSORS, "halved", Halved)

    config = Experiment("x", "split", "", flat).config
    settings = compressor_settings(config.offsite, layers=3)
    emulator = Halved(**settings).build(load(llama, "causal-lm").model, Material())
    listed = said("plan", llama, "--adapters", 1)

    assert settings == {"adapters": (0,), "factor": 0.5}
    assert not needs_importance(config.offsite)
    assert emulator.method == "halved"
    assert "halved A=1" in listed


# --- an adapter method -----------------------------------------------------------------------


def _norms_only(model: Any, block: nn.Module, settings: MethodSettings) -> set[int]:
    return {id(p) for n, p in block.named_parameters() if "norm" in n}


def test_an_adapter_method(monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    flat = {"offsite.method": "norms"}
    with pytest.raises(ConfigError, match=r"offsite\.method='norms': must be one of full, lora"):
        check_offsite(RunConfig.from_flat(flat).offsite)
    monkeypatch.setitem(METHODS, "norms", AdapterMethod(_norms_only, own=True))

    settings = method_settings(Experiment("x", "split", "", flat).config.offsite, 0)
    model = load(llama, "causal-lm").model
    anatomy = probe(model)
    block = {f"{anatomy.blocks_path}.0.": anatomy.blocks[0]}
    tuning = BlockTuning(model, block, settings)
    listed = said("plan", llama, "--adapters", 1, "--method", "norms")

    assert tuning.count() == 2 * anatomy.hidden_size
    assert set(tuning.dense(tuning.state())) == set(tuning.named_parameters())
    assert f"norms trains {tuning.count()} parameters" in listed


# --- a fingerprint ---------------------------------------------------------------------------


class Widths(Fingerprint):
    """1 if the widths agree."""

    name: ClassVar[str] = "widths"
    label: ClassVar[str] = "equal widths"
    colour: ClassVar[str] = "#000000"
    strangers: ClassVar[str] = "0.77"
    descendants: ClassVar[str] = "0.99"

    def compare(
        self, base: WeightView, suspect: WeightView, tokens: Sequence[int] | None = None
    ) -> Similarity:
        return Similarity(float(base.width == suspect.width), {})


def test_a_fingerprint(monkeypatch: pytest.MonkeyPatch, llama: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(FINGERPRINTS, "widths", Widths)
    out, maps = tmp_path / "compared.json", tmp_path / "maps.json"

    table = said("compare", llama, llama, "--no-run", "--json", out)
    said("attack", "lineage", llama, "--only", "ffn_permutation", "--json", maps)

    assert json.loads(out.read_text())["values"]["widths"] == 1.0
    assert "0.77" in table
    assert all(row["widths"] == 1.0 for row in json.loads(maps.read_text())["rows"])


# --- a data kind -----------------------------------------------------------------------------


def _colours(request: Request, split: str) -> Table:
    return Table(("red red", "blue blue"), ("warm", "cold"), name="colours")


def test_a_data_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="dataset='colours': must be one of choices, docstring"):
        load_dataset("colours")
    monkeypatch.setitem(DATASETS, "colours", Source(lambda request: ("train",), _colours))

    config = RunConfig.from_flat({"data.kind": "colours"}).data
    found = load_dataset(config.kind)

    assert found.texts == ("red red", "blue blue")
    assert found.label_names == ("cold", "warm")
    assert docstrings_are_public("colours")
    assert not docstrings_are_public("docstrings")


def test_tables_name_their_rows() -> None:
    for table in (ATTACKS, COMPRESSORS, FINGERPRINTS):
        assert all(row.name == name for name, row in table.items())  # type: ignore[attr-defined]
    keys = [row.result_key for row in ATTACKS.values() if row.result_key]
    assert len(keys) == len(set(keys))
