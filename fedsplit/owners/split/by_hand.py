"""An owner's measurement made by hand: any model, settings and texts, and no server."""

from __future__ import annotations

from typing import Any

from fedsplit.config import RunConfig
from fedsplit.data import TextDataset, docstrings_are_public
from fedsplit.models.splitting.halves import split
from fedsplit.models.splitting.heads import detach_head
from fedsplit.models.splitting.representations import check_alone
from fedsplit.owners.measuring import Figures, OwnTexts, measured_labels, measured_tokens
from fedsplit.owners.policy.rules import Policy
from fedsplit.owners.samples import tokenise_set
from fedsplit.owners.split.protected_labels import label_channel, protected_labels
from fedsplit.owners.split.schedule import slot_order
from fedsplit.privacy import SamplePerturber, build_mechanism, choose_tokens
from fedsplit.privacy.empirical import Measure
from fedsplit.privacy.labels.table import head_at_owner
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.tasks import task_of


def measure_by_hand(
    policy: Policy,
    config: RunConfig,
    model: Any,
    tokenizer: Any,
    texts: TextDataset,
    secret: OwnerSecret,
    measure: Measure,
) -> list[Figures]:
    """Return what the owner's attackers read under a run's settings, as on first contact.

    Args:
        policy: says how much is measured, and how many views are averaged.
        config: the run's settings; its ``split.k`` blocks become the bottom.
        model: the whole model.
        tokenizer: of the model.
        texts: the owner's; gradients are measured too where there are labels.
        secret: keys the noise.
        measure: runs the attackers.

    Raises:
        DataError, ConfigError, ModelError, PrivacyError: whatever cannot be used.
    """
    bottom, top = split(model, config.split.k)
    check_alone(bottom.eval())
    train = tokenise_set(
        tokenizer,
        texts,
        task=task_of(config),
        max_tokens=config.model.max_tokens,
        order=slot_order(secret, "train", len(texts)),
    )
    head = detach_head(top) if head_at_owner(config.labels.protection) else None
    shown, side = protected_labels(config, secret, train, train, bottom.vocab, head=head)
    mechanism = build_mechanism(config.privacy, bottom, bottom.vocab, tokenizer, own=train.ids)
    cti = choose_tokens(config, train.ids, shown, tokenizer)
    rho = config.privacy.cti_rho if cti is not None else 1.0
    perturber = SamplePerturber(mechanism, secret, f"by hand:{config.split.k}", cti, rho)
    public = docstrings_are_public(config.data.kind)
    own = OwnTexts(tokenizer, lambda: train, None, config.model.max_tokens, public)
    found = [measured_tokens(measure, policy, bottom, perturber, own)]
    labels = label_channel(side, train)
    if labels is not None:
        found.append(measured_labels(policy, labels, secret))
    return found
