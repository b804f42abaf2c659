"""One Flower message at one owner: who the owner is, what is asked, and what its rules allow."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.errors import SessionError
from fedsplit.owners.home import OwnerHome, in_simulation
from fedsplit.owners.identity import OwnerIdentity
from fedsplit.owners.ledger.chain import Ledger
from fedsplit.owners.ledger.check import DisclosureCheck
from fedsplit.owners.ledger.disclosure import Averages, Weights, Words
from fedsplit.owners.ledger.session import SessionFacts
from fedsplit.owners.naming import owner_name
from fedsplit.owners.own_log import own_log
from fedsplit.owners.samples import tokenising
from fedsplit.owners.secure_aggregation.part import SumPart
from fedsplit.owners.task import OwnerTask
from fedsplit.privacy.empirical import Exposed, Reading
from fedsplit.settings import read_settings
from fedsplit.tasks import task_of
from fedsplit.wire.logs import join_flower_log
from fedsplit.wire.messages import OFFER, WEIGHTS, WHO, SessionOffer, weights_record
from fedsplit.wire.replies import reply_schema
from fedsplit.wire.secure_sum import MASKED, NUMBERS, masked_record, read_record


class ClientTask:
    """One message's work, before and after the owner has accepted what it offers.

    Args:
        message: from the server.
        context: from the owner's SuperNode.

    Raises:
        ConfigError: no usable name, or a home that cannot be written.
        LedgerError: the owner's ledger cannot be written: then nothing may leave.
    """

    def __init__(self, message: Message, context: Context) -> None:
        self.message = message
        self.modes: frozenset[str] = frozenset()  # that the message's type lets an offer ask for
        self.node_config: dict[str, object] = dict(context.node_config)
        self.name = owner_name(self.node_config)
        self.home = OwnerHome.locate(self.node_config, self.name)
        sync_every: Any = self.node_config.get("ledger-sync", 1)
        durable = not in_simulation()  # a simulated owner does not outlive a power cut
        self.ledger = Ledger(self.home.root, sync_every=sync_every, durable=durable)
        self._context = context
        self._check = DisclosureCheck(self.ledger, SessionFacts(context.run_id, self.name))

    def settings(self) -> RunConfig:
        """Return the run's settings and let this process keep to its threads.

        Raises:
            ConfigError: an unknown key, a wrong type or a value out of range.
        """
        join_flower_log()
        config = read_settings(dict(self._context.run_config))
        torch.set_num_threads(config.output.owner_threads)
        return config

    def offer(self) -> SessionOffer:
        """Return the message's session offer.

        Raises:
            SessionError: there is none, it is for another run or node, or it asks for what its
                message's type does not stand for.
        """
        offer = SessionOffer.from_content(self.message.content)
        if offer.run != self._context.run_id or offer.node != self._context.node_id:
            raise SessionError("offer is for another run or node than this message's")
        if offer.mode not in self.modes:
            kind = self.message.metadata.message_type
            raise SessionError(f"{kind} message: mode {offer.mode!r}: must be {sorted(self.modes)}")
        return offer

    def accept(
        self, files: str = "bottom", *, transport: str = "", warn: bool | None = None
    ) -> OwnerTask:
        """Return what the owner has agreed to do.

        Args:
            files: what the server hands out, ``bottom`` or ``emulator``.
            transport: what this very message is part of; empty: the offer's is only opened later.
            warn: whether to log that there is no policy; None: in the first round.

        Raises:
            ConfigError, SessionError: the settings or the offer are not acceptable.
            PolicyError: names every rule that they break; nothing has left.
        """
        config, offer = self.settings(), self.offer()
        if transport and offer.transport != transport:  # rules about transports judge the offer's
            raise SessionError(f"offer of {offer.transport!r}: must be of {transport!r}")
        return OwnerTask.accept(
            config,
            offer,
            OwnerIdentity.from_node(config, self.node_config, self.home),
            self.ledger,
            files=files,
            in_app=True,
            measure=run_attackers,
            warn=offer.round == 1 if warn is None else warn,
        )

    def tell(self, kind: str, text: str) -> None:
        """Record words that leave in a Flower message.

        Raises:
            LedgerError: they cannot be recorded, and must not leave.
        """
        self._check.release(Words(kind=kind, text=text))

    def introduce(self) -> RecordDict:
        """Return a reply with the owner's public name."""
        self.tell("name", self.name)
        return RecordDict({WHO: ConfigRecord({"owner": self.name})})

    def log(self) -> AbstractContextManager[None]:
        """Let log lines say whose they are, and keep them where the owner wants them."""
        offer = self.message.content.config_records.get(OFFER)
        told: dict[str, str | int] = {}
        for key in ("round", "mode"):
            value = offer.get(key) if offer is not None else None
            if isinstance(value, (str, int)):
                told[key] = value
        return own_log(
            self.home.root,
            self.node_config,
            run=str(self._context.run_id),
            node=str(self._context.node_id),
            owner=self.name,
            **told,
        )

    def close(self) -> None:
        """Let the ledger's files go."""
        self.ledger.close()


def run_attackers(exposed: Exposed) -> list[Reading]:
    """Run the project's attackers on what this owner would send.

    Loaded only where a policy asks for a measurement that was not made before.
    """
    from fedsplit.attacks.measuring import measure

    with tokenising:
        return measure(exposed)


def averaged_weights(message: Message) -> dict[str, Tensor]:
    """Return the averaged weights that a message brings; empty where it brings none."""
    arrays: ArrayRecord | None = message.content.array_records.get(WEIGHTS)
    if arrays is None:
        return {}
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}


def reply(
    client: ClientTask,
    task: OwnerTask,
    strategy: str,
    averages: Averages,
    weights: dict[str, Tensor],
    start: Mapping[str, Tensor] | None = None,
) -> RecordDict:
    """Return the reply that closes a session, once its report and weights may leave.

    Args:
        client: the message that is answered.
        task: what the owner has agreed to.
        strategy: of the run.
        averages: the session's.
        weights: that were trained and are to leave; empty: none.
        start: what they were before the round, for a masked sum of changes.

    Raises:
        WireError: the report does not fit the strategy's schema.
        PrivacyError: the masked sum that the weights are for would not protect them.
        PolicyError, LedgerError: it may not leave.
    """
    masked = bool(weights) and task.config.secure.aggregation
    mode, told = task.offer.mode, averages.metrics
    if masked and strategy == "offsite-tuning":  # what the sum says is not said beside it
        schema = reply_schema(strategy, f"masked-{mode}")
        told = {k: v for k, v in told.items() if k in {**schema.required, **schema.optional}}
    else:
        schema = reply_schema(strategy, mode, task_of(task.config).families())
    content = schema.write(told, task.identity.name)
    task.check.release(averages)
    if masked:
        values = read_record(client.message.content, NUMBERS)
        found = SumPart(task).mask(values, weights, start or {}, averages.metrics)
        content[MASKED] = masked_record(found)
    elif weights:
        task.check.release(Weights(tensors=weights))
        content[WEIGHTS] = weights_record({n: w.float().numpy() for n, w in weights.items()})
    return content
