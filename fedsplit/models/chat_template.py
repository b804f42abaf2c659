"""Conversations as token ids, laid out by a tokenizer's own chat template.

The template comes with the tokenizer, from the other party: it is run by a child process bounded in
time, memory and output (:mod:`fedsplit.models.chat_rendering`).  A tokenizer without one gets
:func:`plain`: contents on lines of their own, the end token after each completion.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedsplit.errors import DataError, ModelError, check

Conversation = Sequence[tuple[str, str]]  # (role, content) of each message

ASSISTANT = "assistant"
LONGEST_TEMPLATE = 1 << 16  # characters
SECONDS = 30.0  # of CPU, and for each conversation:
SECONDS_EACH = 0.05
PATIENCE = 10.0  # times the CPU seconds that may pass on the clock
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class LaidOut:
    """A conversation as text.

    Attributes:
        text: with the template's own marks.
        spans: from where to where (characters) each completion goes, its end mark included.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Attributes:
        ids: T token ids.
        targets: T flags: whether the token belongs to a completion.
        lost_prompt: tokens cut from the beginning, or after the last completion.
        lost_completion: tokens of completions that were cut.
    """

    ids: list[int]
    targets: list[bool]
    lost_prompt: int = 0
    lost_completion: int = 0


def lay_out(
    tokenizer: Any, conversations: Sequence[Conversation], *, prompt: bool = False
) -> list[LaidOut]:
    """Return conversations as texts.

    Args:
        tokenizer: a Hugging Face tokenizer; its ``chat_template`` counts where it has one.
        conversations: of ``(role, content)``.
        prompt: whether an answer is to follow, so that the text ends where it begins.

    Raises:
        ModelError: the template fails, breaks a bound, or does not lay out the beginning of a
            conversation as the beginning of its text.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return [plain(c, str(tokenizer.eos_token or "")) for c in conversations]
    if not isinstance(template, str) or len(template) > LONGEST_TEMPLATE:
        raise ModelError(
            f"chat template: must be one text of at most {LONGEST_TEMPLATE} characters"
        )
    seconds = SECONDS + SECONDS_EACH * len(conversations)
    request = {
        "template": template,
        "special": {name: str(t) for name in SPECIAL if (t := getattr(tokenizer, name, None))},
        "conversations": conversations,
        "prompt": prompt,
        "seconds": round(seconds),
    }
    answer = _ask(json.dumps(request).encode(), seconds * PATIENCE)
    return [LaidOut(str(a["text"]), tuple((int(x), int(y)) for x, y in a["spans"])) for a in answer]


def plain(conversation: Conversation, end: str) -> LaidOut:
    """Return the layout of a tokenizer without a template."""
    text, spans = "", []
    for role, content in conversation:
        text += content
        if role == ASSISTANT:
            text += end
            spans.append((len(text) - len(content) - len(end), len(text)))
        text += "\n"
    if conversation and conversation[-1][0] == ASSISTANT:  # no line follows the last one
        text = text[:-1]
    return LaidOut(text, tuple(spans))


def encode(tokenizer: Any, conversations: Sequence[Conversation], most: int) -> list[Encoded]:
    """Return conversations as ids, with the completions marked, each of at most ``most`` tokens.

    A completion ends with its end mark, the last special token in it: white space that a template
    puts behind the mark is never generated and is no target.  A token that a completion shares with
    what stands before it is the completion's.  What is too long loses tokens after its last
    completion and then from its beginning; only where the last completion itself is too long is its
    end cut, and :attr:`Encoded.lost_completion` says so.

    Args:
        tokenizer: a Hugging Face tokenizer.
        conversations: each ends with the assistant's message.
        most: >= 2.

    Raises:
        ConfigError: ``most`` is below 2.
        ModelError: see :func:`lay_out`.
        DataError: a completion has no token, or no token stands before it.
    """
    check(most >= 2, "max_tokens", most, ">= 2 for conversations (a token, and one that follows)")
    laid = lay_out(tokenizer, conversations)
    special = not getattr(tokenizer, "chat_template", None)  # a template puts its own

    def tokens(texts: list[str]) -> list[list[int]]:
        found = tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else []
        return [list(map(int, ids)) for ids in found]

    whole = tokens([one.text for one in laid])
    ends = [(i, at) for i, one in enumerate(laid) for span in one.spans for at in span]
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marks = {*tokenizer.all_special_ids, *(at for at, token in added.items() if token.special)}
    if tokenizer.unk_token_id != tokenizer.eos_token_id:
        marks.discard(tokenizer.unk_token_id)  # stands for text
    heads = iter(tokens([laid[i].text[:at] for i, at in ends]))
    out = []
    for number, (one, ids) in enumerate(zip(laid, whole, strict=True)):
        targets = [False] * len(ids)
        first = 0
        for _, end in one.spans:
            first, last = _shared(next(heads), ids), _shared(next(heads), ids)
            last = len(ids) if end == len(one.text) else last
            last = _after_end_mark(tokenizer, marks, ids, first, last)
            targets[first:last] = [True] * max(0, last - first)
        if not any(targets[1:]):
            raise DataError(f"conversation {number}: 0 tokens of a completion: must be >= 1")
        out.append(_cut(ids, targets, first, most))
    return out


def encode_prompt(tokenizer: Any, conversation: Conversation) -> list[int]:
    """Return the ids after which the answer to a conversation begins.

    Raises:
        ModelError: see :func:`lay_out`.
    """
    special = not getattr(tokenizer, "chat_template", None)
    text = lay_out(tokenizer, [conversation], prompt=True)[0].text
    return list(map(int, tokenizer(text, add_special_tokens=special)["input_ids"]))


def _shared(head: list[int], whole: list[int]) -> int:
    """Return how many tokens both begin with: an end token may follow the head alone."""
    pairs = enumerate(zip(head, whole, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(head), len(whole)))


def _after_end_mark(tokenizer: Any, marks: set[int], ids: list[int], first: int, last: int) -> int:
    """Return where a completion in ``ids[first:last]`` ends: behind its mark, if it has one."""
    mark = next((at for at in range(last - 1, first - 1, -1) if ids[at] in marks), last - 1)
    blank = not tokenizer.decode(ids[mark + 1 : last]).strip()
    return mark + 1 if blank else last


def _cut(ids: list[int], targets: list[bool], last_span: int, most: int) -> Encoded:
    """Cut one conversation to ``most`` tokens; its last completion begins at ``last_span``."""
    if len(ids) <= most:
        return Encoded(ids, targets)
    end = len(targets) - targets[::-1].index(True)
    begin = max(0, end - most)
    # Part of the prompt stays in any case: what a completion answers.
    begin = min(begin, max(0, last_span - max(1, most // 4)))
    end = min(end, begin + most)
    lost = [*targets[:begin], *targets[end:]]
    completion = sum(lost)
    return Encoded(ids[begin:end], targets[begin:end], len(lost) - completion, completion)


def _ask(request: bytes, patience: float) -> list[Any]:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "fedsplit.models.chat_rendering"],
            input=request,
            capture_output=True,
            timeout=patience,
            check=False,
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        raise ModelError(f"chat template: cannot be run: {error}") from None
    if done.returncode:
        told = done.stderr.decode(errors="replace").strip().splitlines() or ["over its bounds"]
        raise ModelError(f"chat template: {told[-1][:400]} (exit {done.returncode})")
    answer: list[Any] = json.loads(done.stdout)
    return answer
