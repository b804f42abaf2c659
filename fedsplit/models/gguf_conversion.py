"""The child process that turns a GGUF file into a model folder.

``python -m fedsplit.models.gguf_conversion FILE FOLDER BYTES``: reads nothing but FILE, writes into
FOLDER alone, and holds no more than BYTES of data (where the system can bound that).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from fedsplit.errors import ModelError


def main(arguments: list[str]) -> None:
    """Convert as the arguments say; an error is told in the last line of standard error."""
    file, folder, memory = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    _bound_memory(memory)
    try:
        convert(file, folder)
    except Exception as error:
        text = " ".join(str(error).split()) or "no more is known"
        sys.exit(f"{type(error).__name__}: {text}")


def convert(file: Path, folder: Path) -> None:
    """Write config.json, model.safetensors (float32) and the tokenizer of a GGUF file.

    Raises:
        ModelError: the file lacks weights that its architecture needs, or ``gguf`` is missing.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ModelError("needs the gguf package: pip install 'fedsplit[llm]'") from None
    # In a folder of its own: transformers would also read a config.json that lies beside it.
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / "model.gguf").symlink_to(file)
        model, tokenizer = _read(alone)
    _plain(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read(folder: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **where)
    auto: Any = AutoModelForCausalLM
    model, info = auto.from_pretrained(
        folder,
        use_safetensors=True,
        trust_remote_code=False,
        dtype=torch.float32,
        output_loading_info=True,
        **where,
    )
    if info["missing_keys"]:
        shown = ", ".join(sorted(map(str, info["missing_keys"]))[:5])
        raise ModelError(f"{len(info['missing_keys'])} weights are missing: {shown}")
    return model, tokenizer


def _plain(model: Any) -> Any:
    """Return the model as one that was never quantised: transformers would not save it else."""
    import torch

    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(model)(type(model.config).from_dict(settings))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _bound_memory(most: int) -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    except (ImportError, ValueError, OSError):  # not a POSIX system, or one that has no such bound
        return


if __name__ == "__main__":
    main(sys.argv[1:])
