"""The Flower ClientApp that an owner runs: it opens sessions and answers; it decides nothing else.

This code is the copy the owner installed, not what the server sent: the app bundle names it by
``fedsplit.client_app:app`` and contains only the model owner's side.

Loading this module loads neither torch nor transformers: Flower loads the app in more processes
and threads than ever run it, and transformers cannot be imported by two threads at once.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsplit.wire.message_types import SERVE_TYPE, STEP_TYPE, WHO_TYPE

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of training: open the announced session and stay until the server says BYE."""
    from fedsplit.client.task import session

    return session(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluation on the owner's held-out samples; only counts and averages are reported."""
    from fedsplit.client.task import session

    return session(message, context)


@app.query(STEP_TYPE.partition(".")[2])
def step(message: Message, context: Context) -> Message:
    """One exchange of frames (messages transport)."""
    from fedsplit.client.task import step

    return step(message, context)


@app.query(WHO_TYPE.partition(".")[2])
def who(message: Message, context: Context) -> Message:
    """Tell the owner's public name, so that the server can sample and order by it."""
    from fedsplit.client.task import who

    return who(message, context)


@app.query(SERVE_TYPE.partition(".")[2])
def serve(message: Message, context: Context) -> Message:
    """A model serves: keep the leave to ask it, if the owner's rules allow."""
    from fedsplit.client.serving import serve

    return serve(message, context)
