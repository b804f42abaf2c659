"""What ``fedsplit evaluate`` can be given: a base, an emulator, a run's folder, adapters on top."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsplit.errors import ConfigError, ModelError
from fedsplit.models.trained import FILE, SERVER, server_folder

EMULATOR = "emulator.json"
SENT = f"emulator/{EMULATOR}"
ADAPTERS = "adapters.safetensors"


@dataclass(frozen=True)
class Subject:
    """One model to evaluate.

    Attributes:
        label: its column: the paper's names where they apply.
        source: where it came from.
        model: in evaluation mode.
        tokenizer: its own.
        parameters: tied and shared ones once.
    """

    label: str
    source: str
    model: Any
    tokenizer: Any
    parameters: int


def subjects(model: str, adapter: str = "", base: str = "") -> Iterator[Subject]:
    """Yield what is to be evaluated, one after another, so that one model is in memory at a time.

    Args:
        model: a model folder (``package:`` or hub name), an emulator's folder, or a run's folder
            (the server's own, or an experiment's that has it as ``server/``): one of offsite tuning
            gives every column that it has, one of split tuning the whole model that it trained.
        adapter: for a model or an emulator: a run's ``adapters.safetensors`` (or the folder with
            it), or for a model a PEFT folder.
        base: the run's base, for the column "full, zero-shot" and, where the run exported no
            model, for the plug-in.

    Raises:
        ConfigError: arguments that do not go together.
        ModelError: something is missing, damaged or does not fit.
    """
    folder = Path(model).expanduser()
    run = server_folder(folder, SENT, FILE)
    if run is not None:
        if adapter:
            raise ConfigError("--adapter: must not be given with a run's folder, which has its own")
        columns = _run_columns if (run / SENT).is_file() else _split_columns
        yield from columns(run, base)
        return
    if base:
        raise ConfigError(f"--base: must not be given with {model}, which is no run's folder")
    if (folder / EMULATOR).is_file():
        yield _emulator(folder, adapter)
    elif folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{model}: must hold config.json (a model) or {EMULATOR} (an emulator), or itself or "
            f"in {SERVER}/ what a run leaves: {FILE} (split tuning) or {SENT} (offsite tuning)"
        )
    else:
        yield _model(model, adapter)


def is_local(model: str) -> bool:
    """Whether nothing of ``model`` would have to come from a hub."""
    return model.startswith("package:") or Path(model).expanduser().exists()


def _run_columns(folder: Path, base: str) -> Iterator[Subject]:
    if base:
        yield _model(base, "", "full, zero-shot")
    yield _emulator(folder / "emulator", "", "emulator, zero-shot")
    if (folder / ADAPTERS).is_file():
        yield _emulator(folder / "emulator", str(folder), "emulator, tuned")
    if (folder / "model" / "config.json").is_file():
        yield _model(str(folder / "model"), "", "plug-in")
    elif base and (folder / ADAPTERS).is_file():
        yield _model(base, str(folder), "plug-in")


def _split_columns(folder: Path, base: str) -> Iterator[Subject]:
    from fedsplit.models.trained.whole import whole_of_run

    whole = whole_of_run(folder, base)
    if whole.top.task != "causal-lm":
        raise ModelError(
            f"{folder}: trained a {whole.top.task}: must be a causal-lm; --data "
            "measures it on texts with labels"
        )
    count = sum(p.numel() for p in whole.loaded.model.parameters())
    if base:
        yield _model(base, "", "full, zero-shot")
    tokenizer = whole.loaded.tokenizer
    yield Subject("tuned by split", str(folder), whole.loaded.model, tokenizer, count)


def _model(name: str, adapter: str, label: str = "") -> Subject:
    from fedsplit.models import load

    loaded = load(name, "causal-lm")
    model: Any = loaded.model
    count = sum(p.numel() for p in model.parameters())
    if adapter:
        model = _with_adapter(model, Path(adapter).expanduser())
    return Subject(
        label or ("model + adapter" if adapter else "model"),
        f"{name} + {adapter}" if adapter else name,
        model,
        loaded.tokenizer,
        count,
    )


def _emulator(folder: Path, adapter: str, label: str = "") -> Subject:
    from fedsplit.emulators.build import tune_inside
    from fedsplit.emulators.files import load_emulator, load_tokenizer

    emulator = load_emulator(folder)
    tokenizer = load_tokenizer(folder)  # as owners do: transformers would choose by the family
    if tokenizer is None:
        raise ModelError(f"{folder}: must hold a tokenizer")
    count = emulator.parameter_count()
    if adapter:
        state, settings = read_adapters(Path(adapter).expanduser())
        tune_inside(emulator, settings).load(state)
    return Subject(
        label or ("emulator + adapter" if adapter else "emulator"),
        f"{folder} + {adapter}" if adapter else str(folder),
        emulator.model.eval(),
        tokenizer,
        count,
    )


def _with_adapter(model: Any, folder: Path) -> Any:
    from fedsplit.models.adapters.files import OWN_SETTINGS, attach_saved
    from fedsplit.models.adapters.peft_folder import CONFIG, attach_peft

    if (folder / CONFIG).is_file():
        return attach_peft(model, folder)
    if (folder / OWN_SETTINGS).is_file():
        attach_saved(model, folder)
        return model.eval()
    from fedsplit.emulators.build import tune_in_full
    from fedsplit.emulators.planning.plan import EmulatorPlan
    from fedsplit.models.anatomy import probe

    state, settings = read_adapters(folder)
    anatomy = probe(model)
    plan = EmulatorPlan.with_adapters(
        anatomy.num_layers, positions(state, anatomy.blocks_path, anatomy.num_layers)
    )
    tune_in_full(model, plan, settings).load(state)
    return model.eval()


def positions(names: Any, blocks_path: str, layers: int) -> tuple[int, ...]:
    """Return which blocks of the full model the names belong to.

    Raises:
        ModelError: a name is outside all of them.
    """
    found = set()
    for name in names:
        number = name.removeprefix(f"{blocks_path}.").partition(".")[0]
        inside = name.startswith(f"{blocks_path}.") and number.isascii() and number.isdigit()
        if not inside or int(number) >= layers:
            raise ModelError(f"{name}: must be in one of the {layers} blocks of {blocks_path}")
        found.add(int(number))
    return tuple(sorted(found))


def read_adapters(path: Path) -> tuple[dict[str, Any], Any]:
    """Return (tensors by name, how they were trained) of a run's adapters."""
    from safetensors import SafetensorError, safe_open

    from fedsplit.models.adapters.methods import MethodSettings

    file = (server_folder(path, ADAPTERS) or path) / ADAPTERS if path.is_dir() else path
    try:
        with safe_open(str(file), framework="pt") as handle:
            about = json.loads((handle.metadata() or {}).get("method", "{}"))
            state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        settings = MethodSettings(**about)
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise ModelError(f"{file}: {error}") from None
        raise ModelError(f"{file}: no readable adapters: {error}") from None
    if not state:
        raise ModelError(f"{file}: 0 tensors: must be >= 1")
    return state, settings
