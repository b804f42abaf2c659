"""The emulator that an offsite-tuning run ships: built once, kept with what it was built from.

The run's folder gets ``importance/`` (resumed when it is of the same base, settings and text),
``emulator/`` (what owners are sent) and ``emulator-recipe.json``.  A restarted server that finds
an emulator of the same recipe takes it as it is: nothing is trained again, and its digest, by which
owners cache it and adapters are kept, stays the same even where a machine does not repeat the same
bits.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsplit import storage
from fedsplit.config import RunConfig
from fedsplit.data import docstrings_are_public
from fedsplit.emulators import COMPRESSORS, Emulator, Material, make_compressor
from fedsplit.emulators.compressors.scaleot import ScaleOT
from fedsplit.emulators.files import load_emulator, save_emulator
from fedsplit.emulators.importance.files import Importance, ImportanceSettings, load_scores
from fedsplit.emulators.importance.run import LayerReplace
from fedsplit.emulators.lm import pack
from fedsplit.emulators.settings import by_importance, compressor_settings, needs_importance
from fedsplit.errors import FedsplitError, RunError
from fedsplit.models.loading import LoadedModel
from fedsplit.privacy.public_text import public_texts
from fedsplit.seeding import derive_seed

log = logging.getLogger(__name__)

RECIPE = "emulator-recipe.json"
TEXT = "text.sha256"  # beside an importance run: of the public text that it was made with


@dataclass(frozen=True)
class Shipped:
    """An emulator on disk.

    Attributes:
        emulator: loaded, on the full model's device.
        folder: its files.
        digest: of them.
        facts: JSON values: what building took, sizes, and whether it was kept from before.
    """

    emulator: Emulator
    folder: Path
    digest: str
    facts: dict[str, Any]

    def files(self) -> dict[str, bytes]:
        """Return the files' contents by name."""
        return {path.name: path.read_bytes() for path in sorted(self.folder.iterdir())}


def public_blocks(config: RunConfig, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return (calibration, evaluation) blocks (N, T) of the server's public text.

    Raises:
        DataError: less than two blocks.
    """
    texts = public_texts(config.offsite.public, docstrings=docstrings_are_public(config.data.kind))
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    blocks = pack(torch.tensor(ids, dtype=torch.int64), config.offsite.block)
    held = max(1, min(64, len(blocks) // 8))
    return blocks[held:], blocks[:held]


def _importance_settings(config: RunConfig) -> ImportanceSettings:
    seed = derive_seed(config.seed, "importance") % 2**31
    o = config.offsite
    return ImportanceSettings(steps=o.importance_steps, bf16=o.bf16, seed=seed)


def importance_for(
    config: RunConfig, loaded: LoadedModel, tokens: Tensor, folder: Path | None
) -> Importance | None:
    """Return the importance run that the compressor needs, or None.

    One in ``folder`` that was made with the same text is gone on with; of one that the settings
    name (``offsite.scores``) the scores and costs are read.

    Raises:
        ModelError: the named one is damaged, or of another base.
    """
    if not needs_importance(config.offsite):
        return None
    if config.offsite.scores:
        return load_scores(config.offsite.scores, loaded.model, base_digest=loaded.digest)
    half = max(1, len(tokens) // 2)
    resume = None
    if folder is not None:
        text, mine = folder / TEXT, _digest(tokens)
        if text.exists() and text.read_text(encoding="utf-8") != mine:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text.write_text(mine, encoding="utf-8")
        resume = folder if (folder / "importance.json").exists() else None
    run = LayerReplace(
        loaded.model,
        tokens[:half],
        tokens[half:] if half < len(tokens) else tokens,
        _importance_settings(config),
        base_digest=loaded.digest,
        resume=resume,
    )
    return run.run(checkpoint=folder)


def make_emulator(
    config: RunConfig, loaded: LoadedModel, tokens: Tensor, folder: Path | None
) -> tuple[Emulator, dict[str, Any]]:
    """Return the emulator and what building it took."""
    began = time.perf_counter()
    importance = importance_for(config, loaded, tokens, folder)
    scored = time.perf_counter()
    layers = int(loaded.model.config.num_hidden_layers)
    o = config.offsite
    material = Material(tokens=tokens, importance=importance, base_digest=loaded.digest)
    placed: tuple[int, ...] = ()
    if by_importance(o) and not COMPRESSORS[o.compressor].places:
        ranking = ScaleOT(n_adapters=o.adapters, rank_by=o.rank_by)
        placed = ranking.plan(loaded.model, material).adapters
        material = replace(material, importance=None)
    made = make_compressor(o.compressor, **compressor_settings(o, layers, placed))
    emulator = made.build(loaded.model, material)
    return emulator, {
        "importance_s": scored - began,
        "build_s": time.perf_counter() - scored,
        "emulator_parameters": emulator.parameter_count(),
        "adapter_parameters": emulator.trainable_count(),
        "adapters": list(emulator.plan.adapters),
        "roles": list(emulator.plan.roles),
        "scores": list(importance.scores) if importance is not None else None,
    }


def shipped_emulator(
    config: RunConfig, loaded: LoadedModel, tokens: Tensor, folder: Path
) -> Shipped:
    """Return the folder's emulator if it was built from the same, else build and write it.

    Args:
        config: of the run.
        loaded: the full model.
        tokens: (N, T) blocks of public text for importance, settling and calibration.
        folder: of the run.

    Raises:
        ConfigError: settings that the compressor refuses.
        RunError: the recipe cannot be written.
    """
    recipe = _recipe(config, loaded, tokens)
    shipped = folder / "emulator"
    if (kept := _kept(folder, recipe, loaded)) is not None:
        log.info("emulator %s is kept from an earlier start", kept.digest[:12])
        return kept
    (folder / RECIPE).unlink(missing_ok=True)
    shutil.rmtree(shipped, ignore_errors=True)
    emulator, facts = make_emulator(config, loaded, tokens, folder / "importance")
    saved = save_emulator(emulator, shipped, tokenizer=loaded.tokenizer)
    facts |= {"digest": saved.digest, "bytes": saved.bytes}
    try:
        content = json.dumps({"recipe": recipe, "facts": facts}, indent=1)
        storage.write(folder / RECIPE, content, durable=False)
    except OSError as error:
        raise RunError(f"cannot write {folder / RECIPE}: {error}") from None
    return Shipped(emulator, shipped, saved.digest, {**facts, "kept": False})


def _kept(folder: Path, recipe: dict[str, Any], loaded: LoadedModel) -> Shipped | None:
    path, shipped = folder / RECIPE, folder / "emulator"
    if not path.is_file():
        return None
    try:
        about = json.loads(path.read_bytes())
        if about["recipe"] != recipe:
            log.info("%s: an emulator of other settings, base or text: a new one is built", path)
            return None
        facts = dict(about["facts"])
        digest = str(facts["digest"])
        emulator = load_emulator(shipped, expected_digest=digest, expected_base=loaded.digest)
    except (OSError, ValueError, KeyError, TypeError, FedsplitError) as error:
        log.warning("%s: no usable emulator, a new one is built: %s", shipped, error)
        return None
    emulator.model.to(next(loaded.model.parameters()).device)
    return Shipped(emulator, shipped, digest, {**facts, "kept": True})


def _file_digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise RunError(f"offsite.scores={path!r}: cannot be read: {error}") from None


def _digest(tokens: Tensor) -> str:
    shape = str(tuple(tokens.shape)).encode()
    return hashlib.sha256(shape + tokens.contiguous().numpy().tobytes()).hexdigest()


def _recipe(config: RunConfig, loaded: LoadedModel, tokens: Tensor) -> dict[str, Any]:
    """Return all that decides an emulator, as JSON gives it back."""
    o = config.offsite
    layers = int(loaded.model.config.num_hidden_layers)
    scored: Any = None
    if needs_importance(o):
        scored = asdict(_importance_settings(config))
        if o.scores:
            scored = _file_digest(o.scores)
    settings = compressor_settings(o, layers)
    if o.beta == 0 or settings.get("truncation") == "weights":
        settings.pop("truncation", None)  # as recipes were before it could be chosen
    about = {
        "compressor": o.compressor,
        "settings": settings,
        "placed": [o.adapters, o.rank_by] if by_importance(o) else None,
        "importance": scored,
        "base": loaded.digest,
        "dtype": config.model.dtype,
        "text": _digest(tokens),
    }
    made: dict[str, Any] = json.loads(json.dumps(about))
    return made
