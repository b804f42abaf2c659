"""Which handler answers a message: one table, by the run's strategy and the message's type.

Apart from :mod:`fedsplit.client_app` because what it imports loads torch and transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Context, Error, Message, RecordDict

from fedsplit.client import offsite, secure, serving, split
from fedsplit.client.task import ClientTask
from fedsplit.errors import FedsplitError, LedgerError, SessionError
from fedsplit.observe import printable
from fedsplit.owners.policy.refusals import tellable
from fedsplit.registry import pick
from fedsplit.wire.message_types import SECURE_TYPE, SERVE_TYPE, STEP_TYPE, WHO_TYPE

log = logging.getLogger(__name__)

REFUSED = 100  # Flower leaves codes from 100 on to applications


@dataclass(frozen=True)
class Handler:
    """What answers messages of one type.

    Attributes:
        run: makes the reply.
        modes: that the message's offer may ask for; empty: it carries none.
    """

    run: Callable[[ClientTask], RecordDict]
    modes: frozenset[str] = frozenset()


_TRAIN, _EVALUATE = frozenset({"train"}), frozenset({"evaluate"})
# Strategy -> message type -> what answers it.  Whatever is not here is refused.
HANDLERS: dict[str, dict[str, Handler]] = {
    "split-tuning": {
        "train": Handler(split.session, _TRAIN),
        "evaluate": Handler(split.session, _EVALUATE),
        STEP_TYPE: Handler(split.step, _TRAIN | _EVALUATE),
        SECURE_TYPE: Handler(secure.exchange, _TRAIN),
        WHO_TYPE: Handler(ClientTask.introduce),
    },
    "offsite-tuning": {
        "train": Handler(offsite.session, _TRAIN),
        "evaluate": Handler(offsite.session, _EVALUATE),
        SECURE_TYPE: Handler(secure.exchange, _TRAIN),
        WHO_TYPE: Handler(ClientTask.introduce),
    },
    "serving": {
        SERVE_TYPE: Handler(serving.serve, frozenset({"predict"})),
        WHO_TYPE: Handler(ClientTask.introduce),
    },
}


def answer(message: Message, context: Context) -> Message:
    """Return the reply to a message, or the reason why there is none."""
    task = None
    try:
        task = ClientTask(message, context)
        with task.log():
            try:
                handler = _handler(message, context)
                task.modes = handler.modes
                return Message(handler.run(task), reply_to=message)
            except Exception as error:  # here, so that the owner's own log has it
                return _refusal(message, error, task)
    except Exception as error:  # Flower itself would tell the server all of its message
        return _refusal(message, error, task)
    finally:
        if task is not None:
            task.close()


def _handler(message: Message, context: Context) -> Handler:
    """Return what answers a message.

    Raises:
        ConfigError: the strategy is not known.
        SessionError: the strategy has no such messages.
    """
    strategy = str(context.run_config.get("strategy", "split-tuning"))
    kinds = pick(HANDLERS, strategy, "strategy")
    kind = message.metadata.message_type
    if kind not in kinds:
        raise SessionError(f"{kind} message: {strategy} has {', '.join(kinds)}")
    return kinds[kind]


def _refusal(message: Message, error: Exception, task: ClientTask | None) -> Message:
    """Return an error reply that names what was wrong, never what the data was."""
    foreseen = isinstance(error, FedsplitError)
    log.error("refused: %s: %s", type(error).__name__, printable(error), exc_info=not foreseen)
    told = tellable(error)
    reason = f"{type(told).__name__}: {told}"[:1000]
    if task is not None:
        try:
            task.tell("error", reason)
        except LedgerError as broken:  # Flower must have a reply; it says nothing of what happened
            log.error("%s", broken)
            reason = "LedgerError: this owner's ledger cannot be written; nothing leaves"
    return Message(Error(code=REFUSED, reason=reason), reply_to=message)
