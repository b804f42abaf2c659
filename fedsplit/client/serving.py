"""What the ClientApp does when a model begins to serve: keep the offer for later questions."""

from __future__ import annotations

from flwr.app import RecordDict

from fedsplit.client.task import ClientTask
from fedsplit.owners.serving.offers import save_offer
from fedsplit.wire.serving import ServingOffer


def serve(client: ClientTask) -> RecordDict:
    """Keep the offer for ``fedsplit predict``, unless the owner's rules forbid the run."""
    task = client.accept(warn=False)
    offer = ServingOffer.from_content(client.message.content)
    save_offer(client.home.root, offer, task.config.to_flat(), client.node_config)
    return client.introduce()
