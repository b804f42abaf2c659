"""Private inference: an owner's texts, answered by the model owner's top over one stream.

What leaves is what leaves in training: representations after the owner's mechanism, with noise that
depends on the text, so that asking twice shows nothing new; under the same policy, in the same
ledger.  What comes back (logits, or hidden states for the owner's own head) is read here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fedsplit.data.conversations import to_text
from fedsplit.data.tagged import join_words, words_of
from fedsplit.errors import ConfigError, DataError, PrivacyError, check
from fedsplit.models.chat_template import encode_prompt
from fedsplit.models.positions import check_length
from fedsplit.owners.alignment import LOST, AlignedText, align
from fedsplit.owners.home import OwnerHome
from fedsplit.owners.identity import OwnerIdentity
from fedsplit.owners.ledger.chain import Ledger
from fedsplit.owners.own_tokens import lines_of, token_counts
from fedsplit.owners.samples import text_identity, tokenise
from fedsplit.owners.serving.generation import Choose, GeneratingOwner
from fedsplit.owners.serving.offers import TakenOffer, take_offer
from fedsplit.owners.serving.prediction import PredictionOwner
from fedsplit.owners.split.output import OutputReader
from fedsplit.owners.split.prepare import inference_parts, received_head
from fedsplit.owners.split.schedule import evaluation_steps
from fedsplit.owners.split.session import FrameAnswerer, run_session
from fedsplit.owners.task import OwnerTask
from fedsplit.privacy.empirical import Measure
from fedsplit.privacy.perturb import SamplePerturber
from fedsplit.tasks import TASKS, Task, task_of

MOST_TEXTS = 1 << 20


class _Perturbing(FrameAnswerer, Protocol):
    perturber: SamplePerturber


A = TypeVar("A", bound=_Perturbing)


@dataclass(frozen=True)
class Answered:
    """What a session came to.

    Attributes:
        model: name of the base model that answered.
        mechanism: what protected the representations, in words.
        bytes_up: bytes that left.
        bytes_down: bytes that came.
        tokens: tokens that crossed.
        cut: numbers of the texts that were longer than the run's ``model.max-tokens``.
    """

    model: str
    mechanism: str
    bytes_up: int
    bytes_down: int
    tokens: int
    cut: tuple[int, ...] = ()


def classify(
    root: Path, texts: Sequence[str], measure: Measure | None = None
) -> tuple[Tensor, Answered]:
    """Ask which class each text is of.

    Args and raises as :func:`ask`.

    Returns:
        Probabilities (texts, classes), and what the session cost.
    """
    scores, task, answered = ask(root, texts, measure)
    if not task.exclusive:
        raise ConfigError(f"model.task={task.name!r}: must be one of classes, one for each text")
    return torch.softmax(scores.double(), dim=1), answered


def ask(
    root: Path, texts: Sequence[str], measure: Measure | None = None
) -> tuple[Tensor, Task, Answered]:
    """Ask the model about texts.

    Args:
        root: the owner's home.
        texts: at least one.
        measure: the owner's attackers on itself; without them a policy that asks for a
            measurement refuses.

    Returns:
        A row of output for each text (texts, C), the task, which says what it means
        (:meth:`fedsplit.tasks.Task.answers`), and what the session cost.

    Raises:
        DataError: no texts, or one without tokens.
        PolicyError: the owner's rules forbid it; nothing has left.
        SessionError: no model serves this owner, or the session failed.
    """
    rows, task, answered = _ask(root, texts, measure, "texts")
    return torch.cat(rows), task, answered


def tag(
    root: Path, texts: Sequence[str], measure: Measure | None = None
) -> tuple[list[tuple[list[str], list[Tensor | None]]], Task, Answered]:
    """Ask the model about every word of some texts.

    Args:
        root: the owner's home.
        texts: at least one, none of them blank; their words are apart by white space.
        measure: see :func:`ask`.

    Returns:
        For each text its words and their rows of output (C,), None for a word without a token (the
        text was cut before it, or the tokenizer makes nothing of it); the task; what it cost.

    Raises:
        As :func:`ask`, and ModelError for a tokenizer that cannot tell words.
    """
    joined = [join_words(f"text {n + 1}", text.split()) for n, text in enumerate(texts)]
    aligned: list[AlignedText] = []
    rows, task, answered = _ask(root, joined, measure, "words", aligned)
    found = []
    for text, own, at in zip(joined, rows, aligned, strict=True):
        each = [None if position == LOST else own[position] for position in at.first]
        found.append((words_of(text), each))
    return found, task, answered


def _ask(
    root: Path,
    texts: Sequence[str],
    measure: Measure | None,
    form: str,
    aligned: list[AlignedText] | None = None,
) -> tuple[list[Tensor], Task, Answered]:
    """Return each text's rows of output; ``aligned`` gets where each one's words are."""
    if not 1 <= len(texts) <= MOST_TEXTS:
        raise DataError(f"texts={len(texts)}: must be in [1, {MOST_TEXTS}]")
    offer = take_offer(root)
    model, task = offer.config.model, task_of(offer.config)
    if not task.labelled or task.form != form:
        known = [n for n, other in TASKS.items() if other.labelled and other.form == form]
        names = " or ".join(known)
        raise ConfigError(f"model.task={model.task!r}: must be {names}, to answer about {form}")
    outputs = task.outputs or 1
    cut: list[int] = []

    def build(accepted: OwnerTask) -> PredictionOwner:
        parts = inference_parts(accepted)
        lengths = token_counts(parts.tokenizer, texts)
        cut.extend(n for n, length in enumerate(lengths) if length > model.max_tokens)
        most = model.max_tokens
        samples = tokenise(parts.tokenizer, texts, None, max_tokens=most, shortest=1)
        if aligned is not None:
            aligned[:] = align(parts.tokenizer, texts, most)
        head = received_head(accepted.config, accepted.bottom_folder)
        return PredictionOwner(
            parts.bottom,
            OutputReader(
                samples, classify=not task.per_token, head=head, classes=outputs, exact=True
            ),
            evaluation_steps(len(samples), accepted.config.train.batch_size),
            parts.perturber,
            classes=outputs,
            codec=accepted.config.session.codec,
            own=parts.own,
        )

    owner, answered = _run(root, offer, build, measure)
    return owner.rows(), task, replace(answered, cut=tuple(cut))


def generate(
    root: Path,
    prompt: str,
    *,
    choose: Choose,
    most: int,
    on_text: Callable[[str], None] = lambda piece: None,
    chat: bool = False,
    system: str = "",
    measure: Measure | None = None,
) -> tuple[str, Answered]:
    """Let the model continue ``prompt``, token by token, with a cache on each side.

    Args:
        root: the owner's home.
        prompt: at least one token.
        choose: see :func:`fedsplit.owners.serving.generation.sampler`.
        most: new tokens at most.
        on_text: called with each piece of text as it is known.
        chat: whether ``prompt`` is a user's message, to be laid out by the tokenizer's template.
        system: with ``chat``: the system's message before it; empty: the template's own, if any.
        measure: see :func:`classify`.

    Returns:
        The continuation, and what the session cost.

    Raises:
        As :func:`classify`.
    """
    offer = take_offer(root)
    config = offer.config
    if task_of(config).labelled:
        raise ConfigError(f"model.task={config.model.task!r}: must be causal-lm to generate")
    if system and not chat:
        raise ConfigError("system: must be left out without chat")
    messages = [*([("system", system)] if system else []), ("user", prompt)]
    bound = config.serving.new_tokens
    check(1 <= most <= bound, "new tokens", most, f"in [1, {bound}], as the server allows")
    said: list[int] = []
    shown = decoded = ""

    def build(task: OwnerTask) -> GeneratingOwner:
        parts = inference_parts(task)
        mechanism = parts.perturber.mechanism
        if not mechanism.token_by_token:
            raise PrivacyError(f"mechanism {mechanism.name}: must work token by token to generate")
        tokenizer = parts.tokenizer
        if chat:
            ids = encode_prompt(tokenizer, messages)
        else:
            ids = tokenizer(lines_of(prompt))["input_ids"]
        if not ids:
            raise DataError("prompt has 0 tokens: must be >= 1")
        if len(ids) > config.model.max_tokens:  # its end is what is to be continued
            raise DataError(
                f"prompt has {len(ids)} tokens: must be <= {config.model.max_tokens}, the run's "
                "model.max-tokens"
            )
        check_length(parts.bottom.model, len(ids) + most, "prompt's and new tokens")

        def on_token(token: int) -> None:
            nonlocal shown, decoded
            said.append(token)
            decoded = str(tokenizer.decode(said, skip_special_tokens=True))
            if not decoded.endswith("\ufffd"):  # half a character
                on_text(decoded[len(shown) :])
                shown = decoded

        return GeneratingOwner(
            parts.bottom,
            torch.tensor(ids, dtype=torch.int64),
            text_identity(to_text(messages) if chat else prompt),
            parts.perturber,
            config.session.codec,
            choose=choose,
            stop=frozenset({tokenizer.eos_token_id} - {None}),
            most=most,
            on_token=on_token,
            own=parts.own,
        )

    _, answered = _run(root, offer, build, measure)
    return decoded, answered


def _run(
    root: Path,
    offer: TakenOffer,
    build: Callable[[OwnerTask], A],
    measure: Measure | None,
) -> tuple[A, Answered]:
    """Open the stream, stay to the end, and return what it came to."""
    identity = OwnerIdentity.from_node(offer.config, offer.node_config, OwnerHome(root))
    with Ledger(root) as ledger:
        task = OwnerTask.accept(offer.config, offer.session, identity, ledger, measure=measure)
        link = task.connect()
        owner = run_session(link, task, lambda: build(task))
    report = owner.perturber.report()
    return owner, Answered(
        offer.config.model.name,
        str(report["guarantee"]),
        link.traffic.bytes_out,
        link.traffic.bytes_in,
        int(report["tokens"]),
    )
