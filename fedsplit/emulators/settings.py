"""What a run's settings ask of emulators: checked names, and each compressor's own settings."""

from __future__ import annotations

from typing import Any

from fedsplit.config import OffsiteConfig
from fedsplit.emulators.compression.src import TRUNCATIONS
from fedsplit.emulators.compressors.scaleot import RANKS
from fedsplit.emulators.compressors.table import COMPRESSORS
from fedsplit.emulators.planning.plan import outer_blocks
from fedsplit.errors import one_of
from fedsplit.models.adapters.methods import METHODS, MethodSettings


def check_offsite(offsite: OffsiteConfig) -> None:
    """Check the names that the settings give: compressor, ranking and method.

    Called when settings are read (:mod:`fedsplit.settings`): their own layer knows no families.

    Raises:
        ConfigError: an unknown name; the message lists the known ones.
    """
    one_of("offsite.compressor", offsite.compressor, sorted(COMPRESSORS))
    one_of("offsite.method", offsite.method, METHODS)
    one_of("offsite.rank-by", offsite.rank_by, RANKS)
    one_of("offsite.truncation", offsite.truncation, TRUNCATIONS)


def by_importance(offsite: OffsiteConfig) -> bool:
    """Return whether an importance run decides which blocks are A."""
    return offsite.asks_importance or (
        COMPRESSORS[offsite.compressor].places and not offsite.chosen
    )


def needs_importance(offsite: OffsiteConfig) -> bool:
    """Return whether the emulator is made with an importance run."""
    row = COMPRESSORS[offsite.compressor]
    return offsite.asks_importance or bool(row.needs_importance(offsite))


def compressor_settings(
    offsite: OffsiteConfig, layers: int, placed: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Return the compressor's own settings from the run's.

    Args:
        offsite: the run's.
        layers: blocks of the model.
        placed: A's blocks where importance decides and the compressor knows nothing of it.
    """
    row = COMPRESSORS[offsite.compressor]
    chosen = offsite.chosen or placed
    where: dict[str, Any] = {"adapters": chosen}
    if not chosen:
        outer = {"adapters": outer_blocks(layers, offsite.adapters)}
        where = {"n_adapters": offsite.adapters} if row.places else outer
    return {**where, **row.run_settings(offsite)}


def method_settings(offsite: OffsiteConfig, seed: int) -> MethodSettings:
    """Return what a run's settings say about what is trained inside A."""
    return MethodSettings(
        method=offsite.method,
        rank=offsite.rank,
        lora_alpha=offsite.lora_alpha,
        width=offsite.width,
        prefix=offsite.prefix,
        seed=seed,
        lora_dropout=offsite.lora_dropout,
        lora_targets=offsite.lora_targets,
        lora_form=offsite.lora_form,
    )
