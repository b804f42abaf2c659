"""What the ClientApp does in split tuning: one session, on a stream or over messages."""

from __future__ import annotations

from flwr.app import RecordDict
from torch import Tensor

from fedsplit.client.task import ClientTask, averaged_weights, reply
from fedsplit.owners.split.message_session import MessageSession
from fedsplit.owners.split.owner import SplitOwner
from fedsplit.owners.split.prepare import build_split_owner
from fedsplit.owners.split.run_state import RunState
from fedsplit.owners.split.session import run_session
from fedsplit.owners.task import OwnerTask
from fedsplit.privacy.labels.table import keeps_weights
from fedsplit.wire.messages import FRAMES, pack_frames, unpack_frames

STRATEGY = "split-tuning"


def session(client: ClientTask) -> RecordDict:
    """Take part in the announced session until the server says BYE, and return its averages."""
    task, state = _open(client)
    weights: dict[str, Tensor] = {}
    if task.offer.transport == "messages":
        exchange = _message_session(task, state)
        averages = exchange.close()
        weights = exchange.weights()
    else:
        owner = run_session(task.connect(), task, lambda: _build(task, state))
        averages = owner.averages()
        if owner.optimizer is not None:
            weights = owner.weights()
            state.save_optimizer(owner.optimizer, task.offer.round)
    if weights and keeps_weights(task.config):
        state.save_own(weights, task.offer.round)
        weights = {}
    return reply(client, task, STRATEGY, averages, weights, state.averaged())


def step(client: ClientTask) -> RecordDict:
    """Return the frames that answer a message's frames (messages transport)."""
    task, state = _open(client, "messages")
    frames = unpack_frames(client.message.content, task.config.session.max_frame_mb << 20)
    return RecordDict({FRAMES: pack_frames(_message_session(task, state).answer(frames))})


def _open(client: ClientTask, transport: str = "") -> tuple[OwnerTask, RunState]:
    """Accept the message's offer and keep what it brought: a later message meets a new process."""
    task = client.accept(transport=transport)
    state = RunState(task.run_folder, task.job_folder)
    if averaged := averaged_weights(client.message):
        state.save_averaged(averaged)
    return task, state


def _message_session(task: OwnerTask, state: RunState) -> MessageSession:
    return MessageSession(task, state, lambda: _build(task, state))


def _build(task: OwnerTask, state: RunState) -> SplitOwner:
    """Build the owner; what it trains itself continues from the averaged weights, or its own."""
    offer = task.offer
    owner = build_split_owner(task)
    started = state.averaged()
    if keeps_weights(task.config):
        started = state.own(through=offer.round - (offer.mode == "train"))
    if started is not None:
        owner.load_weights(started)
    if offer.round > 1:
        state.load_optimizer(owner.optimizer, offer.round)
    owner.resume_at(offer.first)
    return owner
