"""``fedsplit evaluate``: the papers' columns, adapters on top, nothing fetched, nothing run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from fedsplit.cli import app_cli
from fedsplit.commands.evaluation.evaluate import read_text
from fedsplit.commands.evaluation.subjects import subjects
from fedsplit.emulators import Emulator, EmulatorPlan, adapter_state, make_compressor, plug_in
from fedsplit.emulators.build import tune_in_full
from fedsplit.emulators.compressors.base import Material
from fedsplit.emulators.files import load_tokenizer, save_emulator
from fedsplit.errors import ConfigError, DataError, ModelError
from fedsplit.evaluation.perplexity import text_ids, text_loss
from fedsplit.models import load
from fedsplit.models.adapters.files import save_adapter
from fedsplit.models.adapters.methods import MethodSettings
from tests.models.split_families import tiny
from tests.tiny_models import WORDS

ROOT = Path(__file__).parents[2]
TEXT = " ".join(WORDS * 3)


@pytest.fixture(scope="module")
def run(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Emulator]:
    """A run's folder as offsite tuning leaves it, with adapters that differ from the base's."""
    folder = tmp_path_factory.mktemp("run")
    loaded = load(llama, "causal-lm")
    emulator = make_compressor("layerdrop", adapters=(0, 2), keep=0).build(loaded.model, Material())
    save_emulator(emulator, folder / "emulator", tokenizer=loaded.tokenizer)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in adapter_state(emulator).items()
    }
    settings = {k: v for k, v in asdict(MethodSettings()).items() if k != "seed"}
    about = {"round": "1", "method": json.dumps(settings)}
    save_file(state, folder / "adapters.safetensors", metadata=about)
    plug_in(loaded.model, state, emulator.plan)
    loaded.model.save_pretrained(folder / "model")
    loaded.tokenizer.save_pretrained(folder / "model")
    return folder, emulator


def nats(subject: Any) -> float:
    return text_loss(subject.model, text_ids(subject.tokenizer, [TEXT])).nats


def test_a_run_gives_the_papers_four_columns(run: tuple[Path, Emulator], llama: Path) -> None:
    folder, emulator = run

    found = {s.label: (nats(s), s.parameters) for s in subjects(str(folder), base=str(llama))}

    assert list(found) == [
        *("full, zero-shot", "emulator, zero-shot", "emulator, tuned", "plug-in")
    ]
    assert len({value for value, _ in found.values()}) == 4
    assert found["emulator, tuned"][1] == emulator.parameter_count()
    (base,) = subjects(str(llama))
    (plugged,) = subjects(str(llama), adapter=str(folder))
    (bare,) = subjects(str(folder / "emulator"))
    (tuned,) = subjects(str(folder / "emulator"), adapter=str(folder / "adapters.safetensors"))
    assert nats(base) == found["full, zero-shot"][0]
    assert nats(plugged) == pytest.approx(found["plug-in"][0], abs=1e-6)
    assert nats(bare) == found["emulator, zero-shot"][0]
    assert nats(tuned) == found["emulator, tuned"][0]


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_an_emulator_is_evaluated_with_its_owners_tokens(tmp_path: Path, family: str) -> None:
    """By the folder's model type transformers would choose another tokenizer's rules."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "ab": 2, "cd": 3}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    emulator = make_compressor("layerdrop", adapters=(0,), keep=0).build(
        tiny(family, "causal-lm").float(), Material()
    )
    save_emulator(emulator, tmp_path / "emulator", tokenizer=tokenizer)
    owners = load_tokenizer(tmp_path / "emulator")
    (subject,) = subjects(str(tmp_path / "emulator"))
    text = "ab cd cd ab xy"
    assert subject.tokenizer(text)["input_ids"] == owners(text)["input_ids"] == [2, 3, 3, 2, 0]


def test_a_peft_folder_counts_as_peft_itself_has_it(llama: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = load(llama, "causal-lm")
    tuned = get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    tuned.save_pretrained(str(tmp_path / "lora"))
    expected = text_loss(tuned, text_ids(base.tokenizer, [TEXT])).nats

    (found,) = subjects(str(llama), adapter=str(tmp_path / "lora"))

    assert nats(found) == pytest.approx(expected, abs=1e-6)
    assert found.parameters == sum(p.numel() for p in load(llama, "causal-lm").model.parameters())


@pytest.mark.parametrize("method", ["full", "lora", "bitfit", "bottleneck", "prefix"])
def test_what_a_run_exports_counts_as_the_model_it_was_exported_from(
    llama: Path, tmp_path: Path, method: str
) -> None:
    loaded = load(llama, "causal-lm")
    plan = EmulatorPlan.with_adapters(3, (0, 2))
    tuning = tune_in_full(loaded.model, plan, MethodSettings(method=method, rank=2, width=4))
    generator = torch.Generator().manual_seed(0)
    noise = {n: 0.2 * torch.randn(t.shape, generator=generator) for n, t in tuning.state().items()}
    tuning.load({n: t + noise[n] for n, t in tuning.state().items()})
    expected = text_loss(loaded.model.eval(), text_ids(loaded.tokenizer, [TEXT])).nats
    save_adapter(tuning, loaded.model, tmp_path, str(llama))

    (found,) = subjects(str(llama), adapter=str(tmp_path))

    (base,) = subjects(str(llama))
    assert nats(found) == pytest.approx(expected, abs=1e-5)
    assert abs(nats(base) - expected) > 1e-3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"megatron_core": "os"}, "megatron_core"),
        ({"megatron_config": {"x": 1}}, "megatron_config"),
        ({"qalora_group_size": 3}, "qalora_group_size"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type"),
        ({"r": 3}, "no adapter for this model"),
        ({"target_modules": ["k_proj"]}, "no place|no adapter"),
    ],
)
def test_a_peft_folder_that_names_code_or_does_not_fit_is_refused(
    llama: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    from peft import LoraConfig, get_peft_model

    base = load(llama, "causal-lm")
    get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        str(tmp_path)
    )
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    with pytest.raises(ModelError, match=said):
        list(subjects(str(llama), adapter=str(tmp_path)))


def test_pickled_adapters_are_not_opened(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")

    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        list(subjects(str(llama), adapter=str(tmp_path)))


def test_adapters_of_other_blocks_are_refused(
    run: tuple[Path, Emulator], llama: Path, tmp_path: Path
) -> None:
    for name in ("model.layers.9.mlp.up_proj.weight", "lm_head.weight", "model.layers.x.y"):
        save_file({name: torch.ones(2)}, tmp_path / "adapters.safetensors")
        with pytest.raises(ModelError, match="blocks"):
            list(subjects(str(llama), adapter=str(tmp_path)))
    with pytest.raises(ModelError):
        list(subjects(str(run[0] / "emulator"), adapter=str(tmp_path)))


def test_arguments_that_do_not_go_together(run: tuple[Path, Emulator], llama: Path) -> None:
    with pytest.raises(ConfigError, match="--base"):
        list(subjects(str(llama), base=str(llama)))
    with pytest.raises(ConfigError, match="--adapter"):
        list(subjects(str(run[0]), adapter=str(run[0])))
    done = CliRunner().invoke(app_cli, ["evaluate", str(llama)])
    assert isinstance(done.exception, ConfigError)


def test_a_text_without_tokens_has_no_perplexity_and_a_mark_is_no_text(
    llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("")
    done = CliRunner().invoke(
        app_cli, ["evaluate", str(llama), "--text", str(tmp_path / "empty.txt")]
    )
    assert isinstance(done.exception, DataError)
    assert "0 tokens" in str(done.exception)
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfw1 w2\r\n")
    assert read_text(tmp_path / "marked.txt", "--text") == "w1 w2\n"


def test_the_command_opens_no_connection(
    run: tuple[Path, Emulator], llama: Path, tmp_path: Path
) -> None:
    """In a process of its own whose sockets all fail, and say so."""
    pytest.importorskip("lm_eval")
    rows = [{"question": "w1", "choices": ["w2", "w3 w4"], "answer": i % 2} for i in range(3)]
    (tmp_path / "quiz_test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "text.txt").write_text(TEXT)
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k):\n    print('CONNECTS', a); raise OSError('no network here')\n"
        "socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse\n"
        "from fedsplit.cli import app_cli\n"
        "app_cli(sys.argv[1:])\n"
    )
    arguments = [
        *("evaluate", str(run[0]), "--base", str(llama), "--text", str(tmp_path / "text.txt")),
        *("--tasks", str(tmp_path / "quiz_test.jsonl"), "--out", str(tmp_path / "out.json")),
    ]

    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )

    assert done.returncode == 0, done.stderr
    assert "CONNECTS" not in done.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["label"] for row in written["models"]][-1] == "plug-in"
    for row in written["models"]:
        assert [score["metric"] for score in row["tasks"]] == ["acc", "acc_norm"]
        assert row["text"]["tokens"] == len(WORDS) * 3 - 1
        assert row["text"]["nats_per_token"] > 0
