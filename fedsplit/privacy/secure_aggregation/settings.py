"""What secure aggregation excludes: every rule that needs to see one owner's update."""

from __future__ import annotations

from fedsplit.config import RunConfig
from fedsplit.errors import check
from fedsplit.privacy.labels.table import averages_head, keeps_weights
from fedsplit.privacy.secure_aggregation.numbers import quantiser_of

MEANS = ("fedavg", "fedadam")


def check_secure(config: RunConfig) -> None:
    """Refuse secure aggregation beside what it makes impossible, or where nothing is averaged.

    Raises:
        ConfigError: names the setting, its value and why not.
    """
    secure, robust, offsite = config.secure, config.robust, config.offsite
    if not secure.aggregation:
        return
    adapters = config.strategy == "offsite-tuning"
    trained = config.split.bottom == "joint" or averages_head(config)
    split = config.strategy == "split-tuning" and trained and not keeps_weights(config)
    averaged = adapters or split
    bound = "false where no weights of owners are averaged (frozen bottoms, serving)"
    check(averaged, "secure.aggregation", True, bound)
    rule, name = (
        (offsite.averaging, "offsite.averaging")
        if adapters
        else (config.split.averaging, "split.averaging")
    )
    unseen = "with secure.aggregation, where the server sees no single update"
    check(rule in MEANS, name, rule, f"one of {', '.join(MEANS)} {unseen}")
    check(not robust.screen, "robust.screen", robust.screen, f"false {unseen}")
    cap = robust.weight_cap
    check(cap == 0, "robust.weight-cap", cap, f"0 {unseen}; secure.most-targets bounds weights")
    if adapters:  # in split tuning it bounds gradients too, which the server does see
        told = f"0 {unseen}; secure.norm is kept by the owner"
        check(robust.clip == 0, "robust.clip", robust.clip, told)
    clip = offsite.central_dp_clip
    told = f"0 {unseen}: the server could not clip; use dp.* at the owners"
    check(not adapters or clip == 0, "offsite.central-dp-clip", clip, told)
    fewest = max(config.train.min_owners, secure.min_owners)
    quantiser_of(config, fewest)  # could it wrap around even then, it is refused here
