"""What records of earlier versions meant by settings that did not exist yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsplit.config.offsite import INSTEAD

TRUNCATING = ("scaleot", "withholding")  # GradOT's beta means something else


def with_defaults(record: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's settings, those that it says nothing of as they were then.

    A setting that is new is at its default, but for one: ranks were always compressed by weights.
    What offsite tuning does not read, and may not be set now, is as it must be.

    Args:
        record: flat settings as they were written down.
        defaults: flat settings that it may lack.
    """
    found = {**defaults, **record}
    unsaid = "offsite.truncation" in defaults and "offsite.truncation" not in record
    truncates = found.get("offsite.compressor") in TRUNCATING
    if unsaid and truncates and float(record.get("offsite.beta", 0.0)) > 0:
        found["offsite.truncation"] = "weights"
    if found.get("strategy") == "offsite-tuning":
        found |= {key: defaults[key] for key in INSTEAD if key in defaults}
        if "labels.protection" in found:  # settings that were read say what ``auto`` stands for
            found["labels.protection"] = "none"
    return found
