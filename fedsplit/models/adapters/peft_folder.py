"""A PEFT adapter folder put on a base model: safetensors only, and settings that name no code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedsplit.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = ("LORA", "LN_TUNING", "IA3")
# Settings that may have any value; every other one must be empty, off or its default.
PLAIN = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "lora_bias"),
    *("use_rslora", "use_dora", "target_modules", "exclude_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("feedforward_modules", "init_ia3_weights", "init_lora_weights"),
}
DEFAULTS: dict[str, Any] = {"megatron_core": "megatron.core", "qalora_group_size": 16}


def attach_peft(model: Any, folder: str | Path) -> Any:
    """Return ``model`` with a PEFT adapter folder's modules in it, for inference.

    The folder may be anybody's: a pickled weights file, and a setting that could name code or a
    remote place, is refused.  ``base_model_name_or_path`` in it is not looked at.

    Args:
        model: the base; changed in place.
        folder: of ``PeftModel.save_pretrained`` or an offsite-tuning run's ``adapter/``.

    Raises:
        ModelError: a file is missing, damaged or refused, or does not fit the model.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: must hold {CONFIG} and {WEIGHTS}")
    settings = read_settings(folder / CONFIG)
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        with safe_open(str(folder / WEIGHTS), framework="pt") as handle:
            names = set(handle.keys())
        config = PEFT_TYPE_TO_CONFIG_MAPPING[settings["peft_type"]](**settings)
        made = PeftModel.from_pretrained(model, str(folder), config=config, local_files_only=True)
    except Exception as error:  # whatever PEFT's own checks raise of anybody's settings
        text = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(f"{folder}: no adapter for this model: {text}") from None
    # PEFT only warns of names that it does not find a place for.
    placed = set(get_peft_model_state_dict(made))
    if placed != names:
        raise ModelError(
            f"{folder}: {len(names - placed)} tensors have no place in the model and "
            f"{len(placed - names)} places no tensor ({sorted(names ^ placed)[:2]}): must be of "
            "this base"
        )
    return made.eval()


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings that say what kind of adapter it is; one that says more is refused.

    Raises:
        ModelError: names the setting.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: must be readable JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") not in KINDS:
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise ModelError(f"{path}: peft_type={kind!r}: must be one of {', '.join(KINDS)}")
    for name, value in config.items():
        if name.startswith("init_") and not isinstance(value, bool):
            raise ModelError(f"{path}: {name}={value!r}: must be true or false")
        # PEFT writes a class name there that only its AutoPeftModel would import.
        if name not in PLAIN and name != "auto_mapping" and value and value != DEFAULTS.get(name):
            raise ModelError(f"{path}: {name}={value!r}: must be empty")
    return {name: config[name] for name in config if name in PLAIN - {"peft_version"}}
