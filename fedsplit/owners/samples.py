"""An owner's samples as token ids in slots, the only names the server ever hears for them."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsplit.data import TextDataset
from fedsplit.data.choices import from_text as from_choices
from fedsplit.data.conversations import ASSISTANT, from_text, to_text
from fedsplit.errors import DataError
from fedsplit.models.chat_template import encode
from fedsplit.owners.alignment import align, tagged_words
from fedsplit.owners.own_tokens import encode_texts, fillers
from fedsplit.tasks import ChoiceGroups, TaggedWords, Task, task_type

log = logging.getLogger(__name__)

# A tokenizer keeps the truncation that it was last asked for, so that of several threads with the
# same one (simulated owners of one process) one at a time may use it.
tokenising = threading.RLock()


@dataclass(frozen=True)
class Samples:
    """Tokenised texts and private labels of one split, in slot order.

    Attributes:
        ids: one int64 tensor (T_i,) per slot, without padding.
        labels: one label per slot, (N, ...) as the task's loss takes them; None: the texts' own
            tokens are what is learnt.
        texts: what identifies each slot's raw text (:func:`text_identity`): views, draws and
            budgets are counted by it, whatever tokens a server's tokenizer makes of the text.
        completions: one flag per token, (T_i,) per slot: whether it is to be predicted; None: of a
            language model's text every token but the first is.  It never leaves the owner.
        raw: the texts themselves, for the owner's measurement of itself; empty of conversations.
        words: of texts whose words have tags (``labels`` is None then); which tokens have a target
            never leaves the owner.
        choices: of an evaluation of questions with choices.
    """

    ids: tuple[Tensor, ...]
    labels: Tensor | None
    texts: tuple[bytes, ...]
    completions: tuple[Tensor, ...] | None = None
    raw: tuple[str, ...] = field(default=(), repr=False)
    words: TaggedWords | None = None
    choices: ChoiceGroups | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def predicting(self, slot: int) -> Tensor:
        """Return the positions (n,) of a slot's text whose next token is a target."""
        if self.completions is None:
            return torch.arange(self.ids[slot].shape[0] - 1)
        return self.completions[slot][1:].nonzero().flatten()

    def targets_of(self, slots: Sequence[int]) -> tuple[Tensor | None, Tensor]:
        """Return (rows of output that are compared with something, what with) of some slots.

        Returns:
            Row numbers among the rows of ``slots``, in order (one per token), or None: all of them,
            one per text; and the targets, one per row.
        """
        if self.labels is not None:
            return None, self.labels[list(slots)]
        if self.words is not None:
            return self._tagged(slots)
        keep, following, at = [], [], 0
        for slot in slots:
            ids, own = self.ids[slot], self.predicting(slot)
            keep.append(at + own)
            following.append(ids[1 + own])
            at += int(ids.shape[0])
        return torch.cat(keep), torch.cat(following)

    @property
    def classes(self) -> Tensor | None:
        """The labels, (N,) int64, where each text is of one class; else None."""
        one = (
            self.labels is not None and self.labels.dtype == torch.int64 and self.labels.dim() == 1
        )
        return self.labels if one else None

    def _tagged(self, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the rows of words' first tokens, and the words' tags."""
        assert self.words is not None
        keep, tags, at = [], [], 0
        for slot in slots:
            words = self.words.texts[slot]
            known = words[words[:, 0] >= 0]
            keep.append(at + known[:, 0])
            tags.append(known[:, 1])
            at += int(self.ids[slot].shape[0])
        return torch.cat(keep), torch.cat(tags)

    def target_count(self, slot: int) -> int:
        """Return how many targets one text has."""
        if self.words is not None:
            return int((self.words.texts[slot][:, 0] >= 0).sum())
        return 1 if self.labels is not None else len(self.predicting(slot))

    def about(self, slots: Sequence[int]) -> TaggedWords | ChoiceGroups | None:
        """Return what a task is told of some slots beside their targets, in their order."""
        if self.words is not None:
            return replace(self.words, texts=tuple(self.words.texts[slot] for slot in slots))
        if self.choices is not None:
            at = list(slots)
            return ChoiceGroups(self.choices.questions[at], self.choices.characters[at])
        return None

    @property
    def lengths(self) -> list[int]:
        """Tokens per slot."""
        return [int(x.shape[0]) for x in self.ids]


def text_identity(text: str) -> bytes:
    """Return 32 bytes that identify a raw text: SHA-256 of its UTF-8 bytes, normalised in no way.

    No tokenizer, cut or bottom enters: what a server can change must not make another text of it.
    """
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def piece_identity(text: bytes, continuation: Sequence[int]) -> bytes:
    """Return what identifies a piece of a text that is being generated.

    Args:
        text: identity of the prompt.
        continuation: ids generated so far, the piece's own included; empty: the prompt itself.
    """
    if not continuation:
        return text
    ids = np.asarray(continuation, dtype="<i8").tobytes()
    return hashlib.sha256(text + ids).digest()


def tokenise(
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[Any] | None,
    *,
    max_tokens: int,
    classes: int = 0,
    task: Task | None = None,
    order: np.ndarray | None = None,
    shortest: int = 0,
    places: Sequence[str] = (),
) -> Samples:
    """Tokenise texts into slots.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the owner's texts; those of two parts (:func:`fedsplit.data.table.join_parts`) are
            pairs where the tokenizer knows pairs, else the parts are lines of one text.
        labels: label per text, or None for causal language modelling.
        max_tokens: longer texts are cut.
        classes: number of classes the parties agreed on, where no ``task`` is given.
        task: whose labels these are; None: a classification.
        order: permutation of the texts; slot i holds text ``order[i]``.  A source sorted by label
            would otherwise tell labels by slot.
        shortest: fewest tokens of a text; 0 = 1 with labels, 2 without, since a language-modelling
            sample needs a next token.  A shorter text is filled up with the tokenizer's end (or
            pad) token: leaving it out would tell a server that made the tokenizer which text it is.
        places: where each text is ("file:line"), for messages to its owner.

    Raises:
        DataError: no text, a label that is none of the task's, or a short text and no token to fill
            it up with.
    """
    if not texts:
        raise DataError("owner's split has 0 texts: must be >= 1")
    where = list(places) or [f"text {number}" for number in range(len(texts))]
    if order is not None:
        texts = [texts[i] for i in order]
        labels = None if labels is None else [labels[i] for i in order]
        where = [where[i] for i in order]
    targets = None
    if labels is not None:
        task = task or task_type("sequence-classification")(classes)
        targets = task.tensor(labels, where)
    encoded = encode_texts(tokenizer, texts, max_tokens)
    shortest = shortest or (1 if labels is not None else 2)
    fill = fillers(tokenizer)
    for place, ids in zip(where, encoded, strict=True):
        missing = shortest - len(ids)
        if missing <= 0:
            continue
        token = next((token for token in fill if token is not None), None)
        if token is None:
            raise DataError(
                f"{place}: {len(ids)} tokens: must be >= {shortest}, as the tokenizer has no end "
                "token to fill it up with"
            )
        ids += [token] * missing
    return Samples(
        tuple(torch.tensor(ids, dtype=torch.int64) for ids in encoded),
        targets,
        tuple(text_identity(text) for text in texts),
        raw=tuple(texts),
    )


def tokenise_chat(
    tokenizer: Any, texts: Sequence[str], *, max_tokens: int, order: np.ndarray | None = None
) -> Samples:
    """Lay out conversations by the tokenizer's chat template and tokenise them into slots.

    What a cut takes away is told in the log (see :func:`fedsplit.models.chat_template.encode`).

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the owner's, each a conversation (:mod:`fedsplit.data.conversations`).
        max_tokens: longer ones are cut, completions last.
        order: see :func:`tokenise`.

    Raises:
        DataError: no text, one that is no conversation, or a completion without tokens.
        ModelError: the chat template fails or breaks its bounds.
    """
    if not texts:
        raise DataError("owner's split has 0 texts: must be >= 1")
    if order is not None:
        texts = [texts[i] for i in order]
    encoded = encode(tokenizer, [from_text(text) for text in texts], max_tokens)
    short = sum(bool(e.lost_prompt) for e in encoded)
    cut = [e.lost_completion for e in encoded if e.lost_completion]
    lost = [f"{short} lost tokens of their prompts"] if short else []
    lost += [f"{len(cut)} lost {sum(cut)} tokens of their completions"] if cut else []
    if lost:
        told = " and ".join(lost)
        log.warning("of %d conversations, %s to max_tokens=%d", len(texts), told, max_tokens)
    return Samples(
        tuple(torch.tensor(e.ids, dtype=torch.int64) for e in encoded),
        None,
        tuple(text_identity(text) for text in texts),
        tuple(torch.tensor(e.targets) for e in encoded),
    )


def tokenise_words(
    tokenizer: Any, data: TextDataset, *, max_tokens: int, order: np.ndarray | None = None
) -> Samples:
    """Tokenise texts whose words have tags (:mod:`fedsplit.owners.alignment`) into slots.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        data: the owner's, with tags as labels.
        max_tokens: longer texts are cut.
        order: see :func:`tokenise`.

    Raises:
        DataError: there are no tags, or another number than of words; names the place.
        ModelError: the tokenizer cannot tell which characters a token covers.
    """
    if not data.labels:
        raise DataError(f"{data.name}: 0 tags: must be one for each word (data.kind=tagged)")
    rows = range(len(data)) if order is None else [int(row) for row in order]
    found = align(tokenizer, [data.texts[row] for row in rows], max_tokens)
    fill = next(filter(lambda token: token is not None, fillers(tokenizer)), 0)
    return Samples(
        tuple(torch.tensor(text.ids or (fill,), dtype=torch.int64) for text in found),
        None,
        tuple(text_identity(data.texts[row]) for row in rows),
        raw=tuple(data.texts[row] for row in rows),
        words=TaggedWords(
            data.label_names,
            tuple(
                tagged_words(data.place(row), text, data.labels[row])
                for row, text in zip(rows, found, strict=True)
            ),
        ),
    )


def tokenise_choices(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_tokens: int,
    order: np.ndarray | None = None,
    every: bool = False,
) -> Samples:
    """Tokenise questions with choices into slots: each a conversation that a choice completes.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the owner's (:mod:`fedsplit.data.choices`), the right choice first.
        max_tokens: see :func:`tokenise_chat`.
        order: permutation of the texts.
        every: lay out every choice, in slots that follow each other; else the right one alone.

    Raises:
        DataError: no text, one that is no question, or a choice without tokens.
        ModelError: as :func:`tokenise_chat`.
    """
    asked = [from_choices(text) for text in texts]
    if order is not None:
        asked = [asked[row] for row in order]
    pairs = [
        (number, question, choice)
        for number, (question, choices) in enumerate(asked)
        for choice in (choices if every else choices[:1])
    ]
    laid = [to_text([("user", question), (ASSISTANT, choice)]) for _, question, choice in pairs]
    samples = tokenise_chat(tokenizer, laid, max_tokens=max_tokens)
    if not every:
        return samples
    groups = ChoiceGroups(
        torch.tensor([number for number, _, _ in pairs], dtype=torch.int64),
        torch.tensor([len(choice) for _, _, choice in pairs], dtype=torch.int64),
    )
    return replace(samples, choices=groups)


def tokenise_set(
    tokenizer: Any,
    data: TextDataset,
    *,
    task: Task | None,
    max_tokens: int,
    order: np.ndarray | None = None,
    every_choice: bool = False,
) -> Samples:
    """Tokenise a data set of any form into slots, with a task's labels, if it has any.

    See :func:`tokenise`, :func:`tokenise_chat`, :func:`tokenise_words`, :func:`tokenise_choices`;
    ``every_choice`` is that one's ``every``.

    Raises:
        DataError: conversations where labels are wanted, questions with choices where none are or
            the other way round, and as those.
        ModelError: as :func:`tokenise_chat`.
    """
    if task is not None and data.choices != (task.form == "choices"):
        needed = "questions with choices" if task.form == "choices" else "other than choices"
        raise DataError(
            f"{data.name}: must be {needed} for model.task={task.name} (data.kind; node config "
            "data-kind)"
        )
    if task is not None and data.choices:
        return tokenise_choices(
            tokenizer, data.texts, max_tokens=max_tokens, order=order, every=every_choice
        )
    if task is not None and task.form == "words":
        return tokenise_words(tokenizer, data, max_tokens=max_tokens, order=order)
    if data.chat:
        if task is not None and task.labelled:
            raise DataError(f"{data.name}: conversations: must be of a causal-lm, without labels")
        return tokenise_chat(tokenizer, data.texts, max_tokens=max_tokens, order=order)
    labels = data.labels if task is not None and task.labelled else None
    return tokenise(
        tokenizer,
        data.texts,
        labels,
        max_tokens=max_tokens,
        task=task,
        order=order,
        places=data.places,
    )
