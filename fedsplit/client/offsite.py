"""What the ClientApp does in offsite tuning: fetch the emulator once, train, return adapters."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict

from fedsplit.client.task import Desk, answer, check_rules, settings_of
from fedsplit.config import RunConfig
from fedsplit.emulators.files import folder_digest, load_emulator, load_tokenizer, receive
from fedsplit.errors import ConfigError, SessionError
from fedsplit.owners.data_source import own_data
from fedsplit.owners.ledger.disclosure import Outbox, Trip
from fedsplit.owners.offsite.work import AdapterOwner, blocks_of
from fedsplit.owners.split.prepare import OwnerIdentity
from fedsplit.owners.split.session import hello, open_stream
from fedsplit.wire.frames import Kind
from fedsplit.wire.messages import WEIGHTS, SessionOffer, weights_record
from fedsplit.wire.replies import reply_schema
from fedsplit.wire.transfer import receive_files

STRATEGY = "offsite-tuning"


def session(message: Message, context: Context) -> Message:
    """One round: training or evaluation on the owner's own text."""
    return answer(message, context, _session)


def _session(message: Message, context: Context, desk: Desk) -> RecordDict:
    config = settings_of(context)
    identity = OwnerIdentity.from_node(config, desk.node_config)
    offer = SessionOffer.from_content(message.content)
    if offer.run != context.run_id or offer.node != context.node_id:
        raise SessionError("offer is for another run or node than this message's")
    if config.model.task != "causal-lm":
        raise ConfigError(f"model.task={config.model.task!r}: must be causal-lm for {STRATEGY}")
    flat = config.to_flat()
    policy = desk.home.policy(desk.node_config, warn=offer.round == 1)
    check_rules(policy, flat, offer, desk.node_config)
    trip = Trip(offer.run, offer.round, offer.mode, identity.name, offer.bottom, {})
    outbox = Outbox(desk.ledger, policy, trip, identity.secret)
    folder = _emulator(offer, config, desk, outbox)
    emulator = load_emulator(folder)  # its digest was verified on the way
    train, test = own_data(config.data, config.seed, False, desk.node_config)
    blocks = blocks_of(_tokenizer(folder), train.texts, test.texts, config.offsite.block)
    owner = AdapterOwner(emulator, blocks, config, identity.name, identity.secret)
    arrays = message.content.array_records.get(WEIGHTS)
    if arrays:
        owner.load({n: torch.from_numpy(a.numpy().copy()) for n, a in arrays.items()})
    weights: dict[str, torch.Tensor] = {}
    if offer.mode == "train":
        metrics = owner.train(offer.round)
        weights = owner.weights()
    else:
        metrics = owner.evaluate()
    content = reply_schema(STRATEGY, offer.mode).write(metrics, identity.name)
    outbox.report(metrics, weights)
    if weights:
        content[WEIGHTS] = weights_record({n: np.asarray(w.numpy()) for n, w in weights.items()})
    return content


@lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> Any:
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise ConfigError("emulator brings no tokenizer: the model owner must ship one")
    return tokenizer


def _emulator(offer: SessionOffer, config: RunConfig, desk: Desk, outbox: Outbox) -> Path:
    """Return the emulator's folder; fetched over a session unless the owner has that digest."""
    deadline_s = config.session.deadline_s
    cache = desk.home.root / "emulators"
    folder = cache / offer.bottom
    if offer.bottom.isalnum() and folder.is_dir() and folder_digest(folder) == offer.bottom:
        return folder
    link = open_stream(offer, config, desk.node_config)
    try:
        outbox.send(link, Kind.HELLO, hello(offer, desk.name))
        welcome: Mapping[str, Any] = link.expect(Kind.WELCOME, deadline_s).header
        if welcome["bottom"] != offer.bottom:
            raise SessionError(
                f"server's emulator {welcome['bottom']}: must be the announced {offer.bottom}"
            )
        outbox.send(link, Kind.NEED, {"bottom": offer.bottom})
        found = receive(receive_files(link, deadline_s), cache, offer.bottom)
        link.expect(Kind.BYE, deadline_s)
        link.close()
    except Exception as error:
        outbox.fail(link, error)
        raise
    return found
