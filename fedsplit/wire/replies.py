"""What an owner's reply reports, per strategy and mode: one schema, written and checked by it.

The owner writes its report with the schema and the server reads it with the very same: a number
that is missing, unknown or out of its bounds is refused.  So is a report of another schema, such as
an owner with an older fedsplit sends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedsplit.errors import WireError
from fedsplit.registry import pick
from fedsplit.sums import Family
from fedsplit.wire.messages import REPORT, WHO

_VERSION = 1
_LARGEST = 1e30


@dataclass(frozen=True)
class Bounds:
    """Bounds of one number in a report.

    Attributes:
        low: smallest value.
        high: largest value.
        above: whether ``low`` itself is excluded.
    """

    low: float = -_LARGEST
    high: float = _LARGEST
    above: bool = False

    def admit(self, value: float) -> bool:
        """Return whether ``value`` is within the bounds."""
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        if self.high < _LARGEST:
            return f"in [{self.low:g}, {self.high:g}]"
        return f"{'>' if self.above else '>='} {self.low:g}"


_ANY, _COUNT, _SHARE = Bounds(), Bounds(0.0), Bounds(0.0, 1.0)
_POSITIVE = Bounds(0.0, above=True)
_ONE_AT_LEAST = Bounds(1.0)
_DP = {"dp-epsilon": _COUNT, "dp-delta": _SHARE, "dp-steps": _COUNT}


@dataclass(frozen=True)
class ReplySchema:
    """The numbers that one kind of reply reports.

    Attributes:
        strategy: name of the run's strategy.
        mode: ``train`` or ``evaluate``; ``masked-train`` beside a masked sum that has the
            counts and losses.
        required: number -> its bounds; ``num-examples`` and ``targets`` weight averages.
        optional: numbers that may be missing.
        families: additive numbers that may be there (:mod:`fedsplit.sums`).
    """

    strategy: str
    mode: str
    required: Mapping[str, Bounds]
    optional: Mapping[str, Bounds] = field(default_factory=dict)
    families: tuple[Family, ...] = ()

    @property
    def name(self) -> str:
        """The text by which a report names its schema."""
        return f"{self.strategy}/{self.mode}/{_VERSION}"

    def check(self, metrics: Mapping[str, float]) -> None:
        """Check a report's numbers.

        Raises:
            WireError: a number is missing, unknown, not finite or out of its bounds; names it.
        """
        for key in self.required:
            if key not in metrics:
                raise WireError(f"reply's report: must have {key!r}")
        for key, value in metrics.items():
            bounds = self.required.get(key) or self.optional.get(key)
            if bounds is None and any(family.has(key) for family in self.families):
                continue
            if bounds is None:
                raise WireError(f"reply's report: {key[:60]!r} is no number of {self.name}")
            if not bounds.admit(value):
                raise WireError(f"reply's {key}={value}: must be {bounds}")
        for family in self.families:
            fault = family.fault(metrics, metrics["targets"])
            if fault is not None:
                raise WireError(f"reply's {fault}")

    def write(self, metrics: Mapping[str, float | int], owner: str) -> RecordDict:
        """Return the content of an owner's reply: its numbers and its public name.

        Raises:
            WireError: as :meth:`check`.
        """
        self.check(metrics)
        content = RecordDict()
        content[REPORT] = MetricRecord(dict(metrics))
        content[WHO] = ConfigRecord({"owner": owner, "schema": self.name})
        return content

    def read(self, content: RecordDict) -> tuple[dict[str, float], str]:
        """Return (metrics, owner name) of a reply.

        Raises:
            WireError: no report, one of another schema, a number that :meth:`check` refuses, or an
                owner's name that cannot be shown in a log.
        """
        # A second record would weigh the reply by numbers that nobody has looked at.
        if others := sorted(set(content.metric_records) - {REPORT}):
            raise WireError(f"reply's metric record {others[0][:60]!r}: must be {REPORT!r} alone")
        record = content.metric_records.get(REPORT)
        who = content.config_records.get(WHO)
        if record is None or who is None or not isinstance(who.get("owner"), str):
            raise WireError("reply carries no report of its session")
        if who.get("schema") != self.name:
            raise WireError(
                f"reply's schema {str(who.get('schema', 'none'))[:60]!r}: must be {self.name!r}; "
                "the owner needs the server's version of fedsplit"
            )
        metrics: dict[str, float] = {}
        for key, value in record.items():
            if isinstance(value, list) or not abs(value) < _LARGEST:
                raise WireError(f"reply metric {str(key)[:60]!r}: must be one finite number")
            metrics[str(key)] = float(value)
        self.check(metrics)
        owner = str(who["owner"])
        if not owner or len(owner) > 200 or not owner.isprintable():
            raise WireError("reply's owner name: must be 1 to 200 printable characters")
        return metrics, owner


# A median of counts is what others' are cut to: one that is next to nothing would count them out.
_COUNTED = {"num-examples": _ONE_AT_LEAST, "targets": _ONE_AT_LEAST}
# In split tuning targets are weighted by their classes; the server has its own sum of those.
_SPLIT = {**_COUNTED, "targets": _POSITIVE, "steps": _COUNT, "share-touched": _SHARE}
_LOSS = {"loss": _ANY}  # an owner's policy may keep its averages back
_AVERAGED = {**_LOSS, "accuracy": _SHARE}
_SCHEMAS = (
    ReplySchema("split-tuning", "train", _SPLIT, {**_AVERAGED, **_DP}),
    ReplySchema("split-tuning", "evaluate", _SPLIT, _AVERAGED),
    ReplySchema(
        "offsite-tuning",
        "train",
        {**_COUNTED, "steps": _COUNT, "train-seconds": _COUNT},
        {**_LOSS, **_DP},
    ),
    ReplySchema("offsite-tuning", "masked-train", {"train-seconds": _COUNT}, _DP),
    ReplySchema("offsite-tuning", "evaluate", _COUNTED, _LOSS),
)
REPLIES: dict[str, ReplySchema] = {f"{s.strategy}/{s.mode}": s for s in _SCHEMAS}


def reply_schema(strategy: str, mode: str, families: Sequence[Family] = ()) -> ReplySchema:
    """Return the schema of a strategy's replies.

    Args:
        strategy: its name.
        mode: ``train`` or ``evaluate``.
        families: additive numbers that the run's task lets owners report of an evaluation.

    Raises:
        ConfigError: the strategy has no replies of that mode; lists those that there are.
    """
    found = pick(REPLIES, f"{strategy}/{mode}", "reply")
    return replace(found, families=tuple(families)) if mode == "evaluate" else found
