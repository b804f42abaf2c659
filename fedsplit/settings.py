"""Reading of a run's settings: their syntax first, then what each family's table says of them.

:mod:`fedsplit.config` knows groups, types and ranges.  Which mechanisms and protections there are,
and what each of them needs, is known by their tables alone, which that layer cannot import.
Whoever receives settings (an owner, a server, a command, an experiment) reads them here, before
anything else happens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from fedsplit.config import RunConfig, Scalar
from fedsplit.config.devices import AUTOMATIC
from fedsplit.config.offsite import INSTEAD
from fedsplit.emulators.settings import check_offsite
from fedsplit.errors import check, one_of
from fedsplit.models.adapters.trainable import TRAINABLE
from fedsplit.models.frozen_linear import AS_LOADED, FORMS
from fedsplit.privacy.labels.table import head_at_owner, said
from fedsplit.privacy.secure_aggregation.settings import check_secure
from fedsplit.privacy.settings import check_privacy
from fedsplit.tasks import check_task, task_type


def _check_trainable(config: RunConfig) -> None:
    method, known = config.train.method, ", ".join(TRAINABLE)
    check(method in TRAINABLE, "train.method", method, f"one of {known}")
    train, offsite = config.train, config.strategy == "offsite-tuning"
    if train.accumulate > 1:
        own = config.split.bottom == "joint" or head_at_owner(config.labels.protection)
        good = "1 with offsite-tuning (offsite.micro-batch splits a step's batch)"
        check(not offsite, "train.accumulate", train.accumulate, good)
        good = "1 where owners train a part: theirs is stepped with every batch"
        check(not own, "train.accumulate", train.accumulate, good)
    if train.patience:
        every = config.output.evaluate_every
        check(every >= 1, "output.evaluate-every", every, ">= 1 with train.patience")
    if train.watch == "metric":
        told = "'loss' with train.patience=0, which watches nothing"
        check(train.patience > 0, "train.watch", train.watch, told)
        told = f"'loss' with model.task={config.model.task!r}, which has no main score"
        check(bool(task_type(config.model.task).metric), "train.watch", train.watch, told)


def _check_offsite(config: RunConfig) -> None:
    check_offsite(config.offsite)
    bad = config.offsite.packing and config.dp.noise_multiplier > 0
    told = "false with dp.noise-multiplier: its unit is a block, which is then several texts"
    check(not bad, "offsite.packing", config.offsite.packing, told)


def _check_buffer(config: RunConfig) -> None:
    size, alone = config.buffer.size, not config.secure.aggregation
    good = config.strategy == "offsite-tuning" and alone
    bound = "0 but in offsite tuning without secure.aggregation, whose sums are of fixed owners"
    check(good or size == 0, "buffer.size", size, bound)


def _check_server(config: RunConfig) -> None:
    server = config.server
    good = not server.devices or len(server.devices.split(",")) == server.workers
    check(
        good, "server.devices", server.devices, f"one for each of server.workers={server.workers}"
    )
    stored = server.frozen_weights
    one_of("server.frozen-weights", stored, (AS_LOADED, *FORMS))
    if stored != AS_LOADED:
        told = f"{AS_LOADED} with train.method='all', which trains the matrices that it would round"
        check(config.train.method != "all", "server.frozen-weights", stored, told)
    for name, plain in (
        ("frozen-weights", stored == AS_LOADED),
        ("checkpointing", not server.checkpointing),
    ):
        value = getattr(server, name.replace("-", "_"))
        told = "its default with offsite-tuning, where owners train (see offsite.checkpointing)"
        check(plain or config.strategy != "offsite-tuning", f"server.{name}", value, told)


def _check_unread(config: RunConfig) -> None:
    """Refuse what the strategy would silently not do."""
    clip, device = config.offsite.central_dp_clip, config.model.device
    if config.strategy != "offsite-tuning":
        told = f"0 with strategy={config.strategy!r}, which does not read it: use dp.*, robust.clip"
        check(clip == 0, "offsite.central-dp-clip", clip, told)
        return
    asked, usual = config.to_flat(), RunConfig().to_flat()
    for flat in (asked, usual):
        flat["labels.protection"] = said(str(flat["labels.protection"]))
    for name, instead in INSTEAD.items():
        told = f"{usual[name]!r} with offsite-tuning, which does not read it: use {instead}"
        check(asked[name] == usual[name], name, asked[name], told)
    told = "one device (cpu, cuda or cuda:N) with offsite-tuning"
    check(device not in AUTOMATIC, "model.device", device, told)


CHECKS: tuple[Callable[[RunConfig], None], ...] = (
    check_task,
    _check_trainable,
    check_privacy,
    _check_offsite,
    check_secure,
    _check_buffer,
    _check_server,
    _check_unread,
)
"""One check per family of tables; each raises ``ConfigError``."""


def read_settings(flat: Mapping[str, Scalar]) -> RunConfig:
    """Return the settings of a flat run config, checked against every table.

    Raises:
        ConfigError: an unknown key or name, a wrong type, a value out of range, or settings that
            exclude each other; names the setting, its value and its bound.
    """
    return check_settings(RunConfig.from_flat(flat))


def check_settings(config: RunConfig) -> RunConfig:
    """Return ``config`` after every family's check, with what ``auto`` stands for said.

    Raises:
        ConfigError: as :func:`read_settings`.
    """
    for check_family in CHECKS:
        check_family(config)
    protection = said(config.labels.protection)
    return replace(config, labels=replace(config.labels, protection=protection))
