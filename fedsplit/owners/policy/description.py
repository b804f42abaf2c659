"""A policy in words: what it lets out, what it keeps, and what it says nothing about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedsplit.owners.policy.rules import Policy

Says = Callable[[Any], str]


@dataclass(frozen=True)
class Words:
    """What one rule means.

    Attributes:
        says: bound -> sentence.
        absent: what its absence allows.
        when: the moment that decides it.
    """

    says: Says
    absent: str
    when: str = "before connecting"


def _list(items: Any) -> str:
    return ", ".join(items)


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:g} {unit}"
    return f"{count} bytes"


_BUILT = "when the bottom has arrived"
_EACH = "before each frame"

WORDS: dict[str, Words] = {
    "noise.mechanisms": Words(
        lambda v: f"Representations leave only through: {_list(v)}.",
        "The server chooses the mechanism, none included: then the text itself can be read off.",
    ),
    "noise.max_eta": Words(
        lambda v: (
            f"d_chi noise has eta <= {v:g}; no noise, and mechanisms that no rule bounds, "
            "are refused."
        ),
        "The server chooses how weak d_chi noise is, unless noise.min_ratio bounds it.",
        "before connecting, and when the bottom has arrived",
    ),
    "noise.max_epsilon": Words(
        lambda v: f"Gaussian noise has epsilon <= {v:g} nats per token and draw.",
        "Gaussian noise may be as weak as the server asks, unless noise.min_ratio bounds it.",
        _BUILT,
    ),
    "noise.max_nats": Words(
        lambda v: f"PAC noise lets out <= {v:g} nats per token and draw, on average.",
        "PAC noise may be as weak as the server asks, unless noise.min_ratio bounds it.",
        _BUILT,
    ),
    "noise.min_ratio": Words(
        lambda v: (
            f"The noise is on average {v:g} times as long as the median representation of "
            "the bottom that really came."
        ),
        "An eta is worth nothing to a server that sends a bottom with long representations.",
        "when the bottom has arrived, and before each batch",
    ),
    "model.names": Words(
        lambda v: f"Runs say that they tune: {_list(v)}.  The name is the server's word.",
        "Any model may be tuned.",
    ),
    "model.bottoms": Words(
        lambda v: f"Only these bottoms run on your text: {_list(x[:12] + '...' for x in v)}.",
        "Any bottom runs on your text; a made-up one can be built to show it.",
    ),
    "model.bottom": Words(
        lambda v: f"The bottom may be: {_list(v)}.",
        "A joint bottom is allowed: it is changed by the server's gradients, and every epoch shows "
        "one more noisy view of each text.",
    ),
    "model.min_k": Words(
        lambda v: f"At least {v} block(s) stay with you.",
        "The bottom may be the embeddings alone, whose vectors are tokens in other words.",
        "before connecting, and when the bottom has arrived",
    ),
    "model.max_tokens": Words(
        lambda v: f"At most {v} tokens of a text are used.",
        "Texts are used whole, up to the server's bound.",
        "before connecting, and when the bottom has arrived",
    ),
    "labels.protection": Words(
        lambda v: f"Labels are protected by: {_list(v)} (or one of them with another).",
        "With the head at the server and no protection, gradients tell every training label.",
    ),
    "labels.max_epsilon": Words(
        lambda v: f"Randomised response has epsilon <= {v:g} nats.",
        "Randomised response may be as weak as the server asks.",
    ),
    "cti.max_share": Words(
        lambda v: (
            f"Reduced noise (CTI) touches at most {100 * v:g} % of the tokens."
            if v
            else "Every token keeps its full noise: CTI may touch none."
        ),
        "Any share of the tokens may have reduced noise (CTI).",
        "before connecting, when the bottom has arrived, and before each batch",
    ),
    "cti.min_rho": Words(
        lambda v: f"Reduced noise (CTI) is at least {v:g} times the full noise.",
        "Tokens that CTI selects may be sent in the clear (rho = 0).",
    ),
    "budget.rounds": Words(
        lambda v: f"A run has at most {v} rounds.", "Runs may be of any length."
    ),
    "budget.epochs_per_run": Words(
        lambda v: f"A run trains on your data at most {v:g} times over.",
        "A run may pass over your data any number of times; each pass sends new gradients.",
        "before connecting, and before each batch",
    ),
    "budget.epochs_per_bottom": Words(
        lambda v: f"All runs of one bottom together train at most {v:g} times over.",
        "Runs may be repeated without end.",
        _EACH,
    ),
    "budget.views_per_bottom": Words(
        lambda v: f"A text is shown in at most {v} different noises per bottom, over all runs.",
        "A server may ask for the same text in ever new noise, and average it away.",
        _EACH,
    ),
    "budget.views_total": Words(
        lambda v: f"A text is shown in at most {v} different noises, over all runs and bottoms.",
        "A server that changes one bit of its bottom gets every text in new noise.",
        _EACH,
    ),
    "budget.bytes_per_run": Words(
        lambda v: f"At most {_size(v)} leave in one run.", "A run may send any amount.", _EACH
    ),
    "budget.bytes_total": Words(
        lambda v: f"At most {_size(v)} leave, ever.", "There is no bound over all runs.", _EACH
    ),
    "budget.sessions_per_run": Words(
        lambda v: f"A run opens at most {v} sessions (one per round, one per evaluation).",
        "A run may open any number of sessions.",
        "at the first frame",
    ),
    "budget.sessions_per_day": Words(
        lambda v: f"At most {v} sessions open on one day (UTC).",
        "Any number of sessions may open on one day.",
        "at the first frame",
    ),
    "transport.allowed": Words(
        lambda v: f"Tensors travel by: {_list(v)}.",
        "By a stream, or by Flower messages, which the SuperLink reads in the clear.",
    ),
    "transport.own_ca": Words(
        lambda v: (
            "The session's certificate is checked against your own session-ca."
            if v
            else "A certificate authority that the message brings is believed."
        ),
        "A certificate authority that the message brings is believed: whoever controls the "
        "SuperLink can be the session's server.",
    ),
    "valid.not_before": Words(lambda v: f"Nothing leaves before {v:%Y-%m-%d %H:%M} UTC.", "-"),
    "valid.not_after": Words(
        lambda v: f"Nothing leaves from {v:%Y-%m-%d %H:%M} UTC on.", "The policy never expires."
    ),
    "app.digest": Words(
        lambda v: f"The server's app has the digest {v[:12]}...",
        "The server's app may change from run to run without anybody here reading it.",
    ),
    "app.strategies": Words(
        lambda v: (
            f"Runs may be: {_list(v)}."
            + (" Adapters trained on your text leave." if "offsite-tuning" in v else "")
        ),
        "A run may be of any strategy that the other rules let pass.",
    ),
}

# What leaves in every run, whatever the rules say.
ALWAYS = (
    "your public name, the number of your samples and their lengths in tokens, which samples share "
    "a step, averages of loss and accuracy, and the text of refusals"
)

TEMPLATE = """\
# What this owner lets out.  fedsplit checks it before it connects, when the bottom has arrived, and
# before every frame; no setting of a run can weaken it.  Lines that are missing restrict nothing:
# `fedsplit policy check owner.toml` says what that means.  Nobody else may be able to write this
# file.  Put it at HOME/owner.toml (HOME is ~/.fedsplit, or state-dir in the node config), or name
# it in the node config: policy="/path/owner.toml".

[noise]
mechanisms = ["dchi"]     # "none" would send what the text can be read off
min_ratio = 2.0           # mean noise / median representation, measured on the bottom that came
# max_eta = 10.0          # 1 / length unit of the representation: means little without min_ratio

[model]
bottom = ["frozen"]       # "joint": each epoch shows one more noisy view of each text
max_tokens = 128
# min_k = 1               # blocks that stay here
# bottoms = ["..."]       # digests of the bottoms that may run on your text

[labels]
# without one of these, the gradients tell every training label
protection = ["client-head", "randomised-response", "marvell", "max-norm"]
max_epsilon = 2.0         # of randomised response, nats

[cti]
max_share = 0.01          # tokens with reduced noise; 0 forbids it
min_rho = 0.2             # their noise, as a share of the full one

[budget]
rounds = 20
epochs_per_run = 20
epochs_per_bottom = 60
views_per_bottom = 1      # different noises of one text, over all runs of one bottom
views_total = 4           # ... and over all bottoms
bytes_per_run = 2_000_000_000
bytes_total = 20_000_000_000
sessions_per_run = 50
sessions_per_day = 100

[transport]
allowed = ["stream"]      # "messages" pass through the SuperLink, which reads them
# own_ca = true           # needs session-ca in the node config

[valid]
# not_before = 2026-01-01
# not_after = 2026-12-31

[app]
strategies = ["split-tuning", "serving"]    # "offsite-tuning": adapters trained here leave as well
# digest = "..."          # fedsplit owner digest app.fab
"""


def restrictions(policy: Policy) -> list[tuple[str, str, str]]:
    """Return (rule, sentence, moment) of every rule that the policy has."""
    return [(r, w.says(policy[r]), w.when) for r, w in WORDS.items() if r in policy]


def openings(policy: Policy) -> list[tuple[str, str]]:
    """Return (rule, what its absence allows) of every rule that the policy does not have."""
    bounded = "noise.min_ratio" in policy
    only = policy.rules.get("noise.mechanisms")
    found = []
    for rule, words in WORDS.items():
        mute = rule in policy or words.absent == "-"
        # A bound on one mechanism's parameter is not missed where that mechanism is not allowed.
        mute |= rule in ("noise.max_epsilon",) and only is not None and "gaussian" not in only
        mute |= rule in ("noise.max_nats",) and only is not None and "pac" not in only
        mute |= rule == "noise.max_eta" and (
            bounded or (only is not None and not {"dchi", "nearest-token"} & set(only))
        )
        if not mute:
            found.append((rule, words.absent))
    return found


def undecided(policy: Policy, flat: Mapping[str, Any]) -> list[str]:
    """Return the rules that the settings of a run cannot decide, which are checked later."""
    late = [r for r, w in WORDS.items() if r in policy and w.when != "before connecting"]
    if flat["privacy.cti"] == "off":
        late = [r for r in late if not r.startswith("cti.")]
    return late
