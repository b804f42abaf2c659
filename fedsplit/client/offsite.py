"""What the ClientApp does in offsite tuning: fetch the emulator once, train, return adapters."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import RecordDict
from torch import Tensor

from fedsplit.client.task import ClientTask, averaged_weights, reply
from fedsplit.emulators.files import folder_digest, load_emulator, load_tokenizer, receive
from fedsplit.errors import ConfigError
from fedsplit.models.positions import check_length
from fedsplit.owners.data_source import own_data
from fedsplit.owners.handshake import greet, request_files
from fedsplit.owners.ledger.disclosure import Averages
from fedsplit.owners.offsite.owner import AdapterOwner, blocks_of_sets
from fedsplit.owners.reports import SessionReport
from fedsplit.owners.task import OwnerTask
from fedsplit.wire.frames import Kind
from fedsplit.wire.transfer import receive_files

STRATEGY = "offsite-tuning"


def session(client: ClientTask) -> RecordDict:
    """Train or evaluate for one round on the owner's own text, and return averages and adapters."""
    task = client.accept("emulator")
    config, identity, offer = task.config, task.identity, task.offer
    if config.model.task != "causal-lm":
        raise ConfigError(f"model.task={config.model.task!r}: must be causal-lm for {STRATEGY}")
    folder = _emulator(task)
    identity.home.evict("emulators", folder.name, identity.node_config)
    emulator = load_emulator(folder)  # its digest was verified on the way
    check_length(emulator.model, config.offsite.block, "offsite.block")
    train, test = own_data(config, identity.node_config, identity.secret)
    report = SessionReport(task.check.policy, identity.secret)
    # Noisy reports promise something about each text: it then has a block of its own.
    packing = config.offsite.packing and not report.per_text
    blocks = blocks_of_sets(_tokenizer(folder), train, test, config.offsite.block, packing=packing)
    owner = AdapterOwner(emulator, blocks, config, identity.name, identity.secret, report)
    averaged = averaged_weights(client.message)
    if averaged:
        owner.load(averaged)
    weights: dict[str, Tensor] = {}
    if offer.mode == "train":
        task.check.release(owner.plan(offer.round))
        metrics = owner.train(offer.round)
        weights = owner.weights()
    else:
        metrics = owner.evaluate()
    texts = len(train.texts) if offer.mode == "train" else len(test.texts)
    averages = Averages(metrics=metrics, texts=texts, epsilon=report.epsilon)
    return reply(client, task, STRATEGY, averages, weights, averaged)


@lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> Any:
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise ConfigError("emulator brings no tokenizer: the model owner must ship one")
    return tokenizer


def _emulator(task: OwnerTask) -> Path:
    """Return the emulator's folder; fetched over a session unless the owner has that digest."""
    offer, check, deadline_s = task.offer, task.check, task.config.session.deadline_s
    cache = task.identity.home.received("emulators")
    folder = cache / offer.digest
    # Hashed in every session: each message of a deployment is a new process, so a cache by size and
    # time of change would be a file, which whoever can change the emulator can change too; and
    # loading reads the same bytes anyway.
    if offer.digest.isalnum() and folder.is_dir() and folder_digest(folder) == offer.digest:
        check.count_session()  # as the HELLO of a fetch does
        return folder
    link = task.connect()
    try:
        greet(link, offer, check, deadline_s)
        request_files(link, offer, check)
        found = receive(receive_files(link, deadline_s), cache, offer.digest)
        link.expect(Kind.BYE, deadline_s)
        link.close()
    except Exception as error:
        check.fail(link, error)
        raise
    return found
