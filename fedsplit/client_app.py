"""The Flower ClientApp that an owner runs: it opens sessions and answers; it decides nothing else.

This code is the copy the owner installed, not what the server sent: the app bundle names it by
``fedsplit.client_app:app`` and contains only the model owner's side.

Loading this module loads neither torch nor transformers: Flower loads the app in more processes
and threads than ever run it, and transformers cannot be imported by two threads at once.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsplit.wire.message_types import SECURE_TYPE, SERVE_TYPE, STEP_TYPE, WHO_TYPE

__all__ = ["app"]

app = ClientApp()


@app.train()
@app.evaluate()
@app.query(STEP_TYPE.partition(".")[2])  # frames, with the messages transport
@app.query(WHO_TYPE.partition(".")[2])  # the owner's name
@app.query(SERVE_TYPE.partition(".")[2])  # a model begins to serve
@app.query(SECURE_TYPE.partition(".")[2])  # keys and shares of a masked sum
def answer(message: Message, context: Context) -> Message:
    """Answer a message by the table in :mod:`fedsplit.client.dispatch`."""
    from fedsplit.client.dispatch import answer

    return answer(message, context)
