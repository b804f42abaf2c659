"""What the ClientApp does with a message: one session, one exchange of frames, or one name.

Apart from :mod:`fedsplit.client_app` because this module loads torch and transformers.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from safetensors.torch import load_file, save_file

from fedsplit.config import RunConfig
from fedsplit.errors import FedsplitError, SessionError
from fedsplit.owners.message_session import MessageSession
from fedsplit.owners.prepare import OwnerIdentity, load_joint_state, prepare, save_joint_state
from fedsplit.owners.refusals import tellable
from fedsplit.owners.session import open_stream, run_stream_session
from fedsplit.owners.share import owner_name
from fedsplit.owners.split_owner import SplitOwner
from fedsplit.wire.logs import join_flower_log
from fedsplit.wire.messages import (
    FRAMES,
    WEIGHTS,
    WHO,
    SessionOffer,
    pack_frames,
    report,
    unpack_frames,
    weights_record,
)

log = logging.getLogger(__name__)

REFUSED = 100  # Flower leaves codes from 100 on to applications


def _refusal(message: Message, error: Exception) -> Message:
    """Return an error reply that names what was wrong, never what the data was."""
    foreseen = isinstance(error, FedsplitError)
    log.error("refused: %s: %s", type(error).__name__, error, exc_info=not foreseen)
    told = tellable(error)
    reason = f"{type(told).__name__}: {told}"
    return Message(Error(code=REFUSED, reason=reason[:1000]), reply_to=message)


def _settings(context: Context) -> RunConfig:
    join_flower_log()
    config = RunConfig.from_flat(dict(context.run_config))
    torch.set_num_threads(config.output.owner_threads)
    return config


class _Work:
    """One message's work: config, identity and the averaged bottom it brought, if any."""

    def __init__(self, message: Message, context: Context) -> None:
        self.config = _settings(context)
        self.node_config: dict[str, object] = dict(context.node_config)
        self.identity = OwnerIdentity.from_node(self.config, self.node_config)
        self.offer = SessionOffer.from_content(message.content)
        if self.offer.run != context.run_id or self.offer.node != context.node_id:
            raise SessionError("offer is for another run or node than this message's")
        arrays = message.content.array_records.get(WEIGHTS)
        if arrays:
            # On disk, because a session over messages meets a new process each time.
            tensors = {n: torch.from_numpy(a.numpy().copy()) for n, a in arrays.items()}
            draft = self._averaged.with_suffix(".draft")
            save_file(tensors, draft)
            draft.replace(self._averaged)

    def prepare(self, digest: str) -> SplitOwner:
        """Build the owner and, for a joint bottom, continue from the averaged weights."""
        owner = prepare(self.config, self.identity, digest, self.offer.mode, self.offer.round)
        if self._averaged.exists():
            owner.load_weights(load_file(self._averaged))
        if self.offer.round > 1:
            load_joint_state(owner, self.folder)
        return owner

    @property
    def folder(self) -> Path:
        """The run's folder on the owner's disk."""
        return self.identity.home.run_dir(self.offer.run, self.offer.node)

    @property
    def _averaged(self) -> Path:
        return self.folder / "averaged.safetensors"


def session(message: Message, context: Context) -> Message:
    """Open the announced session, stay until the server says BYE, and reply with averages."""
    try:
        work = _Work(message, context)
        weights: dict[str, torch.Tensor] = {}
        if work.offer.transport == "messages":
            exchange = _message_session(work)
            metrics = exchange.close()
            if work.config.split.bottom == "joint" and work.offer.mode == "train":
                weights = exchange.weights()
        else:
            link = open_stream(work.offer, work.config, work.node_config)
            owner = run_stream_session(
                link, work.offer, work.config, work.identity.name, work.identity.home, work.prepare
            )
            metrics = owner.metrics()
            if owner.optimizer is not None:
                weights = owner.weights()
                save_joint_state(owner, work.folder)
        content = report(metrics, work.identity.name)
        if weights:
            arrays = {n: np.asarray(w.float().numpy()) for n, w in weights.items()}
            content[WEIGHTS] = weights_record(arrays)
        return Message(content, reply_to=message)
    except Exception as error:  # Flower itself would tell the server all of its message
        return _refusal(message, error)


def _message_session(work: _Work) -> MessageSession:
    return MessageSession(
        work.offer, work.config, work.identity.name, work.identity.home, work.prepare
    )


def step(message: Message, context: Context) -> Message:
    """One exchange of frames (messages transport)."""
    try:
        work = _Work(message, context)
        frames = unpack_frames(message.content, work.config.session.max_frame_mb << 20)
        answer = _message_session(work).answer(frames)
        content = RecordDict()
        content[FRAMES] = pack_frames(answer)
        return Message(content, reply_to=message)
    except Exception as error:  # Flower itself would tell the server all of its message
        return _refusal(message, error)


def who(message: Message, context: Context) -> Message:
    """Tell the owner's public name, so that the server can sample and order by it."""
    try:
        content = RecordDict()
        content[WHO] = ConfigRecord({"owner": owner_name(dict(context.node_config))})
        return Message(content, reply_to=message)
    except Exception as error:  # Flower itself would tell the server all of its message
        return _refusal(message, error)
