"""What the ClientApp does between training messages of a run with secure aggregation."""

from __future__ import annotations

from flwr.app import RecordDict

from fedsplit.client.task import ClientTask
from fedsplit.owners.secure_aggregation.part import SumPart
from fedsplit.wire.secure_sum import SECURE, read_record, secure_record


def exchange(client: ClientTask) -> RecordDict:
    """Answer one message of a masked sum: keys, shares, a confirmation or shares in the clear."""
    values = read_record(client.message.content)
    files = "emulator" if client.settings().strategy == "offsite-tuning" else "bottom"
    task = client.accept(files, warn=False)
    found = SumPart(task).answer(values)
    return RecordDict({SECURE: secure_record(str(values["phase"]), **found)})
