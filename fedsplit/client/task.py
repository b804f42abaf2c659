"""What the ClientApp does with a message: one session, one exchange of frames, or one name.

Apart from :mod:`fedsplit.client_app` because this module loads torch and transformers.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from safetensors.torch import load_file

from fedsplit import storage
from fedsplit.config import RunConfig
from fedsplit.errors import FedsplitError, LedgerError, SessionError
from fedsplit.owners.app_digest import digest_of_app, running_app
from fedsplit.owners.data_source import owner_name
from fedsplit.owners.home import OwnerHome, in_simulation
from fedsplit.owners.ledger.chain import Ledger
from fedsplit.owners.ledger.disclosure import Outbox, Trip
from fedsplit.owners.own_log import own_log
from fedsplit.owners.policy.refusals import tellable
from fedsplit.owners.policy.rules import Asked, Policy, refuse
from fedsplit.owners.split.message_session import MessageSession
from fedsplit.owners.split.owner import SplitOwner
from fedsplit.owners.split.prepare import OwnerIdentity, load_joint_state, prepare, save_joint_state
from fedsplit.owners.split.session import open_stream, run_stream_session
from fedsplit.settings import read_settings
from fedsplit.wire.logs import join_flower_log
from fedsplit.wire.messages import (
    FRAMES,
    OFFER,
    WEIGHTS,
    WHO,
    SessionOffer,
    pack_frames,
    unpack_frames,
    weights_record,
)
from fedsplit.wire.replies import reply_schema

log = logging.getLogger(__name__)

REFUSED = 100  # Flower leaves codes from 100 on to applications


def _refusal(message: Message, error: Exception, desk: Desk | None) -> Message:
    """Return an error reply that names what was wrong, never what the data was."""
    foreseen = isinstance(error, FedsplitError)
    log.error("refused: %s: %s", type(error).__name__, error, exc_info=not foreseen)
    told = tellable(error)
    reason = f"{type(told).__name__}: {told}"[:1000]
    if desk is not None:
        try:
            desk.words("error", reason)
        except LedgerError as broken:  # Flower must have a reply; it says nothing of what happened
            log.error("%s", broken)
            reason = "LedgerError: this owner's ledger cannot be written; nothing leaves"
    return Message(Error(code=REFUSED, reason=reason), reply_to=message)


def settings_of(context: Context) -> RunConfig:
    """Return the run's settings and let this process keep to its threads.

    Raises:
        ConfigError: an unknown key, a wrong type or a value out of range.
    """
    join_flower_log()
    config = read_settings(dict(context.run_config))
    torch.set_num_threads(config.output.owner_threads)
    return config


class Desk:
    """Whose machine this is: the owner's name, home and ledger, before anything is read or said."""

    def __init__(self, context: Context) -> None:
        self.node_config: dict[str, object] = dict(context.node_config)
        self.name = owner_name(self.node_config)
        self.home = OwnerHome.locate(self.node_config, self.name)
        sync_every: Any = self.node_config.get("ledger-sync", 1)
        self.ledger = Ledger(self.home.root, sync_every=sync_every)
        self._run = str(context.run_id)

    def words(self, kind: str, text: str) -> None:
        """Record words that leave in a Flower message."""
        data = text.encode("utf-8", "replace")
        digest = hashlib.sha256(data).hexdigest()
        line = {"kind": kind, "bytes": len(data), "digest": digest}
        self.ledger.append(lambda totals: {**line, "run": self._run, "owner": self.name})

    def log(self, message: Message, context: Context) -> AbstractContextManager[None]:
        """Let log lines say whose they are, and keep them where the owner wants them."""
        offer = message.content.config_records.get(OFFER)
        told: dict[str, str | int] = {}
        for key in ("round", "mode"):
            value = offer.get(key) if offer is not None else None
            if isinstance(value, (str, int)):
                told[key] = value
        return own_log(
            self.home.root,
            self.node_config,
            run=str(context.run_id),
            node=str(context.node_id),
            owner=self.name,
            **told,
        )

    def close(self) -> None:
        """Let the ledger's files go."""
        self.ledger.close()


def check_rules(
    policy: Policy,
    flat: Mapping[str, Any],
    offer: SessionOffer,
    node_config: Mapping[str, object],
) -> None:
    """Refuse a run that breaks a rule which its settings and its offer decide.

    Raises:
        PolicyError: names every broken rule; nothing has left.
    """
    app = running_app() if "app.digest" in policy else None
    asked = Asked(
        flat,
        transport=offer.transport,
        bottom=offer.bottom,
        round=max(1, offer.round),
        own_ca=bool(node_config.get("session-ca")),
        app_digest=digest_of_app(app) if app is not None else "",
    )
    refuse(policy.settings_breaches(asked))


class _Work:
    """One message's work: config, identity, rules and the averaged bottom it brought, if any.

    Raises:
        PolicyError: the run breaks a rule that its settings and its offer decide; nothing has left.
    """

    def __init__(self, message: Message, context: Context, desk: Desk) -> None:
        self.config = settings_of(context)
        self.node_config = desk.node_config
        self.identity = OwnerIdentity.from_node(self.config, self.node_config)
        self.offer = SessionOffer.from_content(message.content)
        if self.offer.run != context.run_id or self.offer.node != context.node_id:
            raise SessionError("offer is for another run or node than this message's")
        flat = self.config.to_flat()
        policy = desk.home.policy(self.node_config, warn=self.offer.round == 1)
        check_rules(policy, flat, self.offer, self.node_config)
        trip = Trip(
            self.offer.run,
            self.offer.round,
            self.offer.mode,
            self.identity.name,
            self.offer.bottom,
            {k: v for k, v in flat.items() if k.startswith("labels.")},
        )
        self.outbox = Outbox(desk.ledger, policy, trip, self.identity.secret)
        self._name_session()
        arrays = message.content.array_records.get(WEIGHTS)
        if arrays:
            # On disk, because a session over messages meets a new process each time.
            tensors = {n: torch.from_numpy(a.numpy().copy()) for n, a in arrays.items()}
            storage.write_tensors(self._averaged, tensors, durable=False)

    @property
    def _session_path(self) -> Path:
        return self.folder / f"session-{self.offer.mode}.name"

    def _name_session(self) -> None:
        if self.offer.transport == "stream" or self.offer.exchange == 0:
            self._session_path.write_text(secrets.token_hex(16), encoding="ascii")

    def _session_name(self) -> str:
        """Return what tells this session's noise from any other's, for a bottom that moves.

        Drawn by the owner: were it the round or the token, a server could ask for the same twice.
        """
        if in_simulation():
            return f"round {self.offer.round}"
        return self._session_path.read_text(encoding="ascii")

    def prepare(self, digest: str) -> SplitOwner:
        """Build the owner and, for a joint bottom, continue from the averaged weights."""
        owner = prepare(
            self.config,
            self.identity,
            digest,
            self.offer.mode,
            self.offer.round,
            self._session_name(),
        )
        if self._averaged.exists():
            owner.load_weights(load_file(self._averaged))
        if self.offer.round > 1:
            load_joint_state(owner, self.job_folder, self.offer.round)
        owner.begin_at(self.offer.first)
        return owner

    @property
    def folder(self) -> Path:
        """The run's folder on the owner's disk."""
        return self.identity.home.run_dir(self.offer.run, self.offer.node)

    @property
    def job_folder(self) -> Path:
        """The folder of what outlives a restart of the server, which comes with a new run id."""
        if not self.offer.job:
            return self.folder
        return self.identity.home.job_dir(self.offer.job, self.identity.name)

    @property
    def _averaged(self) -> Path:
        return self.folder / "averaged.safetensors"


def session(message: Message, context: Context) -> Message:
    """Open the announced session, stay until the server says BYE, and reply with averages."""
    if context.run_config.get("strategy") == "offsite-tuning":
        from fedsplit.client import offsite as client_offsite

        return client_offsite.session(message, context)
    return answer(message, context, _session)


def answer(
    message: Message, context: Context, work: Callable[[Message, Context, Desk], RecordDict]
) -> Message:
    """Return the reply that ``work`` has the content for, or the reason why there is none."""
    desk = None
    try:
        desk = Desk(context)
        with desk.log(message, context):
            try:
                return Message(work(message, context, desk), reply_to=message)
            except Exception as error:  # here, so that the owner's own log has it
                return _refusal(message, error, desk)
    except Exception as error:  # Flower itself would tell the server all of its message
        return _refusal(message, error, desk)
    finally:
        if desk is not None:
            desk.close()


def _session(message: Message, context: Context, desk: Desk) -> RecordDict:
    work = _Work(message, context, desk)
    weights: dict[str, torch.Tensor] = {}
    if work.offer.transport == "messages":
        exchange = _message_session(work)
        metrics = exchange.close()
        weights = exchange.weights()
    else:
        link = open_stream(work.offer, work.config, work.node_config)
        owner = run_stream_session(
            link, work.offer, work.config, work.outbox, work.identity.home, work.prepare
        )
        metrics = owner.metrics()
        if owner.optimizer is not None:
            weights = owner.weights()
            save_joint_state(owner, work.job_folder, work.offer.round)
    content = reply_schema("split-tuning", work.offer.mode).write(metrics, work.identity.name)
    work.outbox.report(metrics, weights)
    if weights:
        arrays = {n: np.asarray(w.float().numpy()) for n, w in weights.items()}
        content[WEIGHTS] = weights_record(arrays)
    return content


def _message_session(work: _Work) -> MessageSession:
    return MessageSession(
        work.offer,
        work.config,
        work.outbox,
        work.identity.home,
        work.prepare,
        work.job_folder,
    )


def step(message: Message, context: Context) -> Message:
    """One exchange of frames (messages transport)."""
    return answer(message, context, _step)


def _step(message: Message, context: Context, desk: Desk) -> RecordDict:
    work = _Work(message, context, desk)
    frames = unpack_frames(message.content, work.config.session.max_frame_mb << 20)
    answer = _message_session(work).answer(frames)
    content = RecordDict()
    content[FRAMES] = pack_frames(answer)
    return content


def who(message: Message, context: Context) -> Message:
    """Tell the owner's public name, so that the server can sample and order by it."""
    return answer(message, context, _who)


def _who(message: Message, context: Context, desk: Desk) -> RecordDict:
    desk.words("name", desk.name)
    content = RecordDict()
    content[WHO] = ConfigRecord({"owner": desk.name})
    return content
