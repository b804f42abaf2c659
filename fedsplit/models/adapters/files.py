"""Trained adapters on disk: in PEFT's own format where PEFT can express them, else in ours.

| method | format | what is in it |
| --- | --- | --- |
| lora | PEFT, ``LORA`` | the factors, restricted to A's projections |
| full, bitfit | PEFT, ``LN_TUNING`` | trained copies of A's modules, run in the base's place |
| bottleneck, prefix | ours | PEFT has no bottleneck, and its prefix goes into all blocks |

PEFT's loads by ``PeftModel.from_pretrained(base, folder)``, ours by :func:`attach_saved`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedsplit.errors import ConfigError, ModelError
from fedsplit.models.adapters.methods import BlockTuning, MethodSettings
from fedsplit.models.anatomy import probe

OWN_SETTINGS = "fedsplit_adapter.json"
OWN_WEIGHTS = "fedsplit_adapter.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
WRAPPED = "base_model.model."  # before every name in PEFT's files
FORMAT = 1


def save_adapter(tuning: BlockTuning, model: Any, folder: str | Path, base: str) -> str:
    """Write what was trained into a folder.

    Args:
        tuning: of A in the full model.
        model: that model, with the tuning's modules in it.
        folder: made if it is not there.
        base: name or path of the base, as PEFT's configuration names it.

    Returns:
        ``"peft"`` or ``"fedsplit"``: the format.

    Raises:
        UnsupportedModelError: a trained tensor belongs to no module that PEFT can stand in for.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tuning.row.peft_form is None:
        prefixes = [int(p.rstrip(".").rpartition(".")[2]) for p in tuning.blocks]
        about = {"format": FORMAT, "blocks": prefixes, **asdict(tuning.settings)}
        (folder / OWN_SETTINGS).write_text(json.dumps(about, indent=1) + "\n")
        _save(tuning.state(), folder / OWN_WEIGHTS)
        return "fedsplit"
    state, blocks = tuning.state(), list(tuning.blocks)
    config, tensors = tuning.row.peft_form(state, tuning.settings, model, blocks)
    save_peft(config, tensors, folder, base)
    return "peft"


def save_peft(
    config: Any, tensors: Mapping[str, Tensor], folder: Path, base: str, task: str = "CAUSAL_LM"
) -> None:
    """Write a folder that ``PeftModel.from_pretrained`` loads.

    Args:
        config: PEFT's.
        tensors: by their names below the model.
        folder: made if it is not there.
        base: name or path of the base.
        task: PEFT's name of the task.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.task_type = task
    config.base_model_name_or_path = base
    config.inference_mode = True
    _save({WRAPPED + name: t for name, t in tensors.items()}, folder / PEFT_WEIGHTS)
    config.save_pretrained(str(folder))


def attach_saved(model: Any, folder: str | Path) -> BlockTuning:
    """Put adapters of our own format into a base model.

    Args:
        model: the base that they were trained for; changed in place.
        folder: of :func:`save_adapter`; everything in it is checked.

    Raises:
        ModelError: files are missing or damaged, or do not fit the model.
        ConfigError: a setting is out of range.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / OWN_SETTINGS).read_text(encoding="utf-8"))
        state = load_file(folder / OWN_WEIGHTS)
        number, blocks = about.pop("format"), about.pop("blocks")
        if number != FORMAT or not all(type(i) is int for i in blocks):
            raise ValueError(f"format={number!r}, blocks={blocks!r}")
        settings = MethodSettings(**about)
    except ConfigError:
        raise
    except (
        *(OSError, ValueError, KeyError, TypeError),
        *(AttributeError, RuntimeError, SafetensorError),
    ) as error:
        raise ModelError(f"{folder}: no readable adapter: {error}") from None
    anatomy = probe(model)
    odd = [i for i in blocks if not 0 <= i < anatomy.num_layers]
    if odd or not blocks:
        raise ModelError(f"{folder}: blocks {blocks}: must be in 0..{anatomy.num_layers - 1}")
    inside = {f"{anatomy.blocks_path}.{i}.": anatomy.blocks[i] for i in blocks}
    tuning = BlockTuning(model, inside, settings)
    tuning.load(state)
    return tuning


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})
