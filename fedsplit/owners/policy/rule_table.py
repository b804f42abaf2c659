"""Table of the rules that an owner's policy may hold: what each may be, and what it means.

Rules that bound a mechanism's or a label protection's level come from the tables of those.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedsplit.owners.policy.rule_values import (
    DIGEST,
    Parse,
    count,
    digest,
    flag,
    moment,
    names,
    number,
    path,
)
from fedsplit.privacy.labels.table import LABEL_PROTECTIONS, label_bounds
from fedsplit.privacy.levels import PolicyBound
from fedsplit.privacy.mechanisms.table import strength_bounds

_NAME = re.compile(r"[A-Za-z0-9_.:/+-]{1,200}")
BEFORE = "before connecting"
MEASURED = "on first contact, before anything leaves"


@dataclass(frozen=True)
class Rule:
    """What one rule may be, and what it means.

    Attributes:
        parse: name and TOML value -> bound; raises ``ConfigError`` for anything else.
        says: bound -> sentence.
        absent: what its absence allows; ``-`` for nothing.
        when: the moment that decides it.
    """

    parse: Parse
    says: Callable[[Any], str]
    absent: str
    when: str = BEFORE


def _list(items: Any) -> str:
    return ", ".join(items)


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:g} {unit}"
    return f"{count} bytes"


_EACH = "before each frame"
_REPORT, _TRAINING = "before each report", "before training"
STRATEGY_NAMES = ("split-tuning", "serving", "offsite-tuning")
# Table and key of every rule that no other table brings.
_FIXED: dict[str, Rule] = {
    "noise.mechanisms": Rule(
        names(_NAME, "names of mechanisms"),
        lambda v: f"Representations leave only through: {_list(v)}.",
        "The server chooses the mechanism, none included: then the text itself can be read off.",
    ),
    "noise.min_ratio": Rule(
        number(0, strict=True),
        lambda v: (
            f"The noise is on average {v:g} times as long as the median representation of "
            "the bottom that really came, or as the norm that rows are clipped to."
        ),
        "An eta is worth nothing to a server that sends a bottom with long representations.",
        "when the bottom has arrived, and before each batch",
    ),
    "noise.require_clip": Rule(
        flag,
        lambda v: (
            "Every row is clipped before noise, to a norm C that you find in the bottom that came, "
            "or to one within noise.max_clip; noise ratios are to C."
            if v
            else "Rows need not be clipped."
        ),
        "Rows are clipped only where the server asks for it: words of a made-up bottom may be as "
        "long as it likes, and outshout the noise.",
        "before connecting, and when the bottom has arrived",
    ),
    "noise.max_clip": Rule(
        number(0, strict=True),
        lambda v: f"Rows are clipped to a norm C <= {v:g} (length units of the representation).",
        "The norm that rows are clipped to may be of any length.",
        "before connecting, and when the bottom has arrived",
    ),
    "model.names": Rule(
        names(_NAME, "names of models"),
        lambda v: f"Runs say that they tune: {_list(v)}.  The name is the server's word.",
        "Any model may be tuned.",
    ),
    "model.bottoms": Rule(
        names(DIGEST, "digests, 64 hexadecimal digits"),
        lambda v: f"Only these bottoms run on your text: {_list(x[:12] + '...' for x in v)}.",
        "Any bottom runs on your text; a made-up one can be built to show it.",
    ),
    "model.bottom": Rule(
        names(_NAME, "frozen, joint", ("frozen", "joint")),
        lambda v: f"The bottom may be: {_list(v)}.",
        "A joint bottom is allowed: it is changed by the server's gradients, and every epoch shows "
        "one more noisy view of each text.",
    ),
    "model.min_k": Rule(
        count(0),
        lambda v: f"At least {v} block(s) stay with you.",
        "The bottom may be the embeddings alone, whose vectors are tokens in other words.",
        "before connecting, and when the bottom has arrived",
    ),
    "model.max_tokens": Rule(
        count(1),
        lambda v: f"At most {v} tokens of a text are used.",
        "Texts are used whole, up to the server's bound.",
        "before connecting, and when the bottom has arrived",
    ),
    "labels.protection": Rule(
        names(_NAME, "names of label protections"),
        lambda v: f"Labels are protected by: {_list(v)} (or one of them with another).",
        "With the head at the server and no protection, gradients tell every training label.",
    ),
    "labels.require": Rule(
        names(_NAME, "names of label protections", tuple(LABEL_PROTECTIONS)),
        lambda v: f"Every run protects labels by all of: {_list(v)}.",
        "One accepted protection of labels is enough.",
    ),
    "labels.epsilon": Rule(
        number(0, strict=True),
        lambda v: f"Randomised response draws at epsilon = {v:g} nats, once for ever.",
        "The first epsilon that a run asks for is kept for ever.",
        "before connecting, and when labels are drawn",
    ),
    "labels.classes": Rule(
        count(2),
        lambda v: f"Labels have exactly {v} classes.",
        "The server says how many classes there are; labels drawn once keep to the first number.",
    ),
    "labels.max_recovery": Rule(
        number(0, 1),
        lambda v: (
            f"At most {100 * v:g} % of your labels can be read off the gradients that leave, by "
            "this project's own closed-form readers (two standard errors allowed)."
        ),
        "Gradients leave even where every label can be read off them.",
        "before each gradient",
    ),
    "measure.min_empirical_privacy": Rule(
        number(0, 1),
        lambda v: (
            f"At least {100 * v:g} % of the tokens of a sample of your own texts stay hidden from "
            "this project's strongest attackers, tried here on the bottom that came, at the mean "
            "of the views that budget.views_total allows."
        ),
        "Nobody tries what noise of the demanded strength hides behind the bottom that came.",
        MEASURED,
    ),
    "measure.max_label_recovery": Rule(
        number(0, 1),
        lambda v: (
            f"At most {100 * v:g} % of a sample of your labels can be read off gradients behind "
            "the run's label protection, tried here over all allowed passes with made-up outputs"
            + ("; of a language model every next token counts as read." if v < 1 else ".")
        ),
        "What gradients tell of labels is judged only as they leave, by labels.max_recovery.",
        MEASURED,
    ),
    "measure.texts": Rule(
        count(1),
        lambda v: f"Measurements are made on {v} of your texts.",
        "Measurements are made on 64 of your texts.",
        MEASURED,
    ),
    "measure.seconds": Rule(
        number(0, strict=True),
        lambda v: f"Attackers that learn (k > 0) take about {v:g} seconds.",
        "Attackers that learn (k > 0) take about a minute.",
        MEASURED,
    ),
    "measure.public_text": Rule(
        path,
        lambda v: f"Attackers know the language from {v}.",
        "Attackers know the language from what the interpreter ships, and from your other texts.",
        MEASURED,
    ),
    "reports.allow": Rule(
        flag,
        lambda v: "Averages are reported." if v else "No average of loss or accuracy is reported.",
        "Averages of loss and accuracy are reported.",
        _REPORT,
    ),
    "reports.counts": Rule(
        flag,
        lambda v: (
            "How many held-out texts of each class were taken for which is reported, exactly."
            if v
            else "No counts of true and predicted classes are reported."
        ),
        "Without any policy, counts of true and predicted classes of held-out texts are reported "
        "where no class has under 5 of them, of 20 in all.",
        _REPORT,
    ),
    "reports.min_texts": Rule(
        count(1),
        lambda v: f"Averages are over at least {v} texts.",
        "An average may be over one text, and tell its label.",
        _REPORT,
    ),
    "reports.epsilon": Rule(
        number(0, strict=True),
        lambda v: f"Averages carry your own Laplace noise, epsilon = {v:g} nats per report.",
        "Averages are exact: crafted outputs can pack many labels into one of them.",
        _REPORT,
    ),
    "reports.max_epsilon": Rule(
        number(0, strict=True),
        lambda v: f"All noisy reports together cost at most epsilon = {v:g} nats.",
        "Noisy reports may be asked for again and again, and averaged.",
        _REPORT,
    ),
    "reports.max_per_day": Rule(
        count(1),
        lambda v: f"At most {v} reports leave on one day (UTC).",
        "Any number of reports may leave.",
        _REPORT,
    ),
    "cti.max_share": Rule(
        number(0, 1),
        lambda v: (
            f"Reduced noise (CTI) touches at most {100 * v:g} % of the tokens."
            if v
            else "Every token keeps its full noise: CTI may touch none."
        ),
        "Any share of the tokens may have reduced noise (CTI).",
        "before connecting, when the bottom has arrived, and before each batch",
    ),
    "cti.min_rho": Rule(
        number(0, 1),
        lambda v: f"Reduced noise (CTI) is at least {v:g} times the full noise.",
        "Tokens that CTI selects may be sent in the clear (rho = 0).",
    ),
    "budget.rounds": Rule(
        count(1), lambda v: f"A run has at most {v} rounds.", "Runs may be of any length."
    ),
    "budget.epochs_per_run": Rule(
        number(0, strict=True),
        lambda v: (
            f"A run passes at most {v:g} times over your training texts, and as often over those "
            "held out."
        ),
        "A run may pass over your data any number of times; each pass tells something new.",
        "before connecting, and before each batch",
    ),
    "budget.epochs_per_bottom": Rule(
        number(0, strict=True),
        lambda v: f"All runs of one bottom together pass at most {v:g} times over them.",
        "Runs may be repeated without end.",
        _EACH,
    ),
    "budget.views_per_bottom": Rule(
        count(1),
        lambda v: f"A text is shown in at most {v} different noises per bottom, over all runs.",
        "A server may ask for the same text in ever new noise, and average it away.",
        _EACH,
    ),
    "budget.views_total": Rule(
        count(1),
        lambda v: f"A text is shown in at most {v} different noises, over all runs and bottoms.",
        "A server that changes one bit of its bottom or tokenizer gets every text in new noise.",
        _EACH,
    ),
    "budget.bytes_per_run": Rule(
        count(1),
        lambda v: f"At most {_size(v)} leave in one run.",
        "A run may send any amount.",
        _EACH,
    ),
    "budget.bytes_total": Rule(
        count(1),
        lambda v: f"At most {_size(v)} leave, ever.",
        "There is no bound over all runs.",
        _EACH,
    ),
    "budget.sessions_per_run": Rule(
        count(1),
        lambda v: f"A run opens at most {v} sessions (one per round, one per evaluation).",
        "A run may open any number of sessions.",
        "at the first frame",
    ),
    "budget.sessions_per_day": Rule(
        count(1),
        lambda v: f"At most {v} sessions open on one day (UTC).",
        "Any number of sessions may open on one day.",
        "at the first frame",
    ),
    "budget.max_dp_epsilon": Rule(
        number(0, strict=True),
        lambda v: f"DP-SGD costs at most epsilon = {v:g} over all runs together.",
        "DP-SGD's epsilon may add up without end.",
        _TRAINING,
    ),
    "budget.dp_delta": Rule(
        number(0, 1, strict=True),
        lambda v: f"DP-SGD's epsilons are at delta = {v:g}.",
        "DP-SGD's epsilons are at delta = 1e-05.",
        _TRAINING,
    ),
    "offsite.require_dp": Rule(
        flag,
        lambda v: (
            "Weights trained here (adapters, head, joint bottom) leave only after DP-SGD."
            if v
            else "Weights trained here may leave as they are."
        ),
        "Weights trained here leave as they are: an update of one step on one text shows the text.",
        f"{BEFORE}, and before training",
    ),
    "offsite.min_owners": Rule(
        count(1),
        lambda v: (
            f"Without DP-SGD, weights leave only in runs that announce at least {v} owners a round "
            "(the server's word: you cannot check it)."
        ),
        "Your update may be averaged with nobody else's.",
    ),
    "offsite.require_secure_aggregation": Rule(
        count(2),
        lambda v: (
            f"Weights trained here leave only inside a masked sum over at least {v} owners whose "
            "keys this one knows, itself included."
        ),
        "The server sees your own update of every round.",
        f"{BEFORE}, and before each step of the sum",
    ),
    "offsite.peers": Rule(
        path,
        lambda v: f"Other owners' identity keys are those in {v} (NAME.pub); others do not count.",
        "The key under which an owner's name is first seen in a masked sum is believed.",
        "before each step of a masked sum",
    ),
    "offsite.min_batch": Rule(
        count(1),
        lambda v: f"Every step that changes weights is over at least {v} samples.",
        "A step may be over one sample.",
        _TRAINING,
    ),
    "offsite.min_steps": Rule(
        count(1),
        lambda v: f"Weights leave after at least {v} steps.",
        "Weights may leave after one step.",
        _TRAINING,
    ),
    "offsite.max_epsilon": Rule(
        number(0, strict=True),
        lambda v: f"DP-SGD costs at most epsilon = {v:g} in one run.",
        "DP-SGD may cost any epsilon in one run.",
        _TRAINING,
    ),
    "offsite.max_rounds": Rule(
        count(1),
        lambda v: f"Weights trained here leave at most {v} times in one run.",
        "Weights may leave any number of times.",
        _TRAINING,
    ),
    "offsite.max_rounds_per_day": Rule(
        count(1),
        lambda v: f"Weights trained here leave at most {v} times on one day (UTC).",
        "Weights may leave any number of times on one day.",
        _TRAINING,
    ),
    "transport.allowed": Rule(
        names(_NAME, "stream, messages", ("stream", "messages")),
        lambda v: f"Tensors travel by: {_list(v)}.",
        "By a stream, or by Flower messages, which the SuperLink reads in the clear.",
    ),
    "transport.own_ca": Rule(
        flag,
        lambda v: (
            "The session's certificate is checked against your own session-ca."
            if v
            else "A certificate authority that the message brings is believed."
        ),
        "A certificate authority that the message brings is believed: whoever controls the "
        "SuperLink can be the session's server.",
    ),
    "valid.not_before": Rule(
        moment(False), lambda v: f"Nothing leaves before {v:%Y-%m-%d %H:%M} UTC.", "-"
    ),
    "valid.not_after": Rule(
        moment(True),
        lambda v: f"Nothing leaves from {v:%Y-%m-%d %H:%M} UTC on.",
        "The policy never expires.",
    ),
    "app.digest": Rule(
        digest,
        lambda v: f"The server's app has the digest {v[:12]}...",
        "The server's app may change from run to run without anybody here reading it.",
    ),
    "app.strategies": Rule(
        names(_NAME, ", ".join(STRATEGY_NAMES), STRATEGY_NAMES),
        lambda v: (
            f"Runs may be: {_list(v)}."
            + (" Adapters trained on your text leave." if "offsite-tuning" in v else "")
        ),
        "A run may be of any strategy that the other rules let pass.",
    ),
}


def _bounding(bound: PolicyBound, when: str) -> Rule:
    """Return the rule of a level's bound."""
    return Rule(number(0, strict=True), lambda v: bound.says.format(bound=v), bound.absent, when)


def policy_rules() -> dict[str, Rule]:
    """Return every rule by table and key; nothing else may stand in a policy."""
    levels = {
        "noise.mechanisms": (strength_bounds(), f"{BEFORE}, and when the bottom has arrived"),
        "labels.protection": (label_bounds(), BEFORE),
    }
    found = {}
    for name, rule in _FIXED.items():
        found[name] = rule
        bounds, when = levels.get(name, ({}, BEFORE))
        found |= {key: _bounding(bound, when) for key, bound in bounds.items()}
    return found
