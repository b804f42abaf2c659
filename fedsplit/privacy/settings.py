"""Check of the settings of mechanisms, contributing tokens, label protections and DP-SGD."""

from __future__ import annotations

from fedsplit.config import RunConfig
from fedsplit.errors import check
from fedsplit.privacy.contributing_tokens import PUBLIC_STATISTICS, STATISTICS
from fedsplit.privacy.labels.table import (
    check_labels,
    owner_trains_head,
    parts_of,
    said,
    shows_text,
)
from fedsplit.privacy.mechanisms.table import mechanism_type
from fedsplit.tasks import task_type


def check_privacy(config: RunConfig) -> None:
    """Refuse settings that no table knows, or that are right one by one and wrong together.

    Raises:
        ConfigError: names the setting, its value and what it needs.
    """
    mechanism_type(config.privacy)
    statistics = ("off", *STATISTICS, *PUBLIC_STATISTICS)
    cti = config.privacy.cti
    check(cti in statistics, "privacy.cti", cti, "one of " + ", ".join(statistics))
    check(
        cti not in STATISTICS or task_type(config.model.task).exclusive,
        "privacy.cti",
        cti,
        f"{' or '.join(('off', *PUBLIC_STATISTICS))} with model.task={config.model.task}: its "
        "texts are not each of one class",
    )
    check_labels(config)
    _check_sampler(config)
    _check_text(config)
    _check_dp(config)


def _check_sampler(config: RunConfig) -> None:
    """Refuse draws by class where they show what is to be hidden, or void what is counted."""
    name, value, asked = "train.sampler", config.train.sampler, config.labels.protection
    if value == "uniform":
        return
    one = config.strategy == "split-tuning" and task_type(config.model.task).exclusive
    check(one, name, value, "uniform but for texts of one class each (sequence-classification)")
    parts = parts_of(asked)
    told = any(p.changes_labels() for p in parts) or said(asked).split("+")[-1] == "none"
    bound = (
        f"uniform with labels.protection={asked!r}: how often a slot is drawn tells its class "
        "('none', 'client-head+none' and 'randomised-response' allow for it)"
    )
    check(told, name, value, bound)
    bound = "uniform with split.bottom='joint', where every draw of a text is one more view of it"
    check(config.split.bottom == "frozen", name, value, bound)
    bound = "uniform with dp.noise-multiplier, whose accounting is of draws alike for all texts"
    check(config.dp.noise_multiplier == 0, name, value, bound)


def _check_text(config: RunConfig) -> None:
    """Refuse noise on a language model's representations whose gradients spell the text.

    Unless ``none`` says that this is known.
    """
    asked, mechanism = config.labels.protection, config.privacy.mechanism
    check(
        not (mechanism_type(config.privacy).protects() and shows_text(config))
        or asked.split("+")[-1] == "none",
        "labels.protection",
        asked,
        f"one that changes gradients with model.task='causal-lm' and privacy.mechanism="
        f"{mechanism!r}: the gradient of each next token spells it, whatever noise the "
        "representations carry; 'none' or 'client-head+none' says that the text may be read",
    )


def _check_dp(config: RunConfig) -> None:
    """Refuse DP-SGD where owners train nothing themselves."""
    if config.strategy == "offsite-tuning":  # owners train their adapters, whatever the split says
        return
    check(
        config.dp.noise_multiplier == 0
        or owner_trains_head(config)
        or config.split.bottom == "joint",
        "dp.noise-multiplier",
        config.dp.noise_multiplier,
        "0 where owners train nothing themselves (split.bottom='joint' or a client head)",
    )
