"""What the ClientApp does when a model begins to serve: check the owner's rules, keep the leave."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedsplit.client.task import Desk, answer, check_rules, settings_of
from fedsplit.errors import SessionError
from fedsplit.owners.serving.offers import keep_offer
from fedsplit.wire.messages import WHO
from fedsplit.wire.serving import ServingOffer


def serve(message: Message, context: Context) -> Message:
    """Keep the offer for ``fedsplit predict``, unless the owner's rules forbid the run."""
    return answer(message, context, _serve)


def _serve(message: Message, context: Context, desk: Desk) -> RecordDict:
    config = settings_of(context)
    offer = ServingOffer.from_content(message.content)
    if offer.session.run != context.run_id or offer.session.node != context.node_id:
        raise SessionError("offer is for another run or node than this message's")
    flat = config.to_flat()
    policy = desk.home.policy(desk.node_config, warn=False)
    check_rules(policy, flat, offer.session, desk.node_config)
    keep_offer(desk.home.root, offer, flat, desk.node_config)
    desk.words("name", desk.name)
    content = RecordDict()
    content[WHO] = ConfigRecord({"owner": desk.name})
    return content
