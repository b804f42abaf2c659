"""Base class of all tasks: what a model is tuned for, and everything that depends on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fedsplit.config import ModelConfig, RunConfig
from fedsplit.data.label_column import LabelColumn
from fedsplit.errors import ConfigError
from fedsplit.sums import Family, add_up

MAX_LOGIT = 30.0
"""Bound on a logit's distance from its row's mean, nats; beyond it a class's probability is 0 or 1
to every float, and what crafted logits could add is only how much a loss says of one sample."""


CLIPPED = 25.0
"""Distance from the mean beyond which an owner may have clipped a logit."""


@dataclass(frozen=True)
class TaggedWords:
    """Words of some texts and their tags.

    Attributes:
        names: of the tags, by index.
        texts: for each text its words, (W, 2) int64: position of the word's first token, or -1 for
            a word without one, and the tag's index.
    """

    names: tuple[str, ...]
    texts: tuple[Tensor, ...]


@dataclass(frozen=True)
class ChoiceGroups:
    """Texts of which each is one choice of a question; the right one comes first.

    Attributes:
        questions: (N,) int64, the question that each text belongs to; a question's texts are
            together.
        characters: (N,) of each text's choice.
    """

    questions: Tensor
    characters: Tensor

    @property
    def sizes(self) -> list[int]:
        """How many texts each question has, in order."""
        return list(torch.unique_consecutive(self.questions, return_counts=True)[1].tolist())


class Task(ABC):
    """Base of all tasks.  An instance is one run's: :func:`fedsplit.tasks.task_of`.

    Words: a *target* is what one row of the model's output is compared with; a text has one, or one
    per token that is to be predicted.  Settings, owners, servers, policies, reports and commands
    ask the task and name none.

    Attributes:
        name: row of :data:`fedsplit.tasks.TASKS`.
        words: what the model answers with, for messages.
        head: row of :data:`fedsplit.models.loading.HEADS`: which head the model has.
        problem: what Hugging Face calls the task's loss in a model's configuration; empty: the head
            has but one.
        labelled: whether there is a column of labels; else the text itself is what is learnt.
        per_token: whether the output has a row per token, not one per text.
        exclusive: whether each text is of exactly one of C classes.  What is done to labels class
            by class (randomised response, Marvell, statistics of words over classes) needs that.
        named: whether its outputs are classes with names.
        form: of the data sets it is for: ``texts``, ``words`` (that have labels each), ``choices``.
        metric: the headline among the scores of a run; empty: there is none.
        lower_is_better: whether a lower value of ``metric`` is the better one.
        outputs: numbers in a row of the output; None: as many as the vocabulary has.
    """

    name: ClassVar[str]
    words: ClassVar[str]
    head: ClassVar[str]
    problem: ClassVar[str] = ""
    labelled: ClassVar[bool] = True
    per_token: ClassVar[bool] = False
    exclusive: ClassVar[bool] = False
    named: ClassVar[bool] = False
    form: ClassVar[str] = "texts"
    metric: ClassVar[str]
    lower_is_better: ClassVar[bool] = False
    terms_setting: ClassVar[str] = ""
    """Setting of ``model`` (and key of an owner's node config) with what labels mean."""

    def __init__(self, outputs: int | None) -> None:
        self.outputs = outputs

    @classmethod
    def of(cls, model: ModelConfig) -> Task:
        """Return the task of a run's settings."""
        return cls(cls.outputs_of(model.labels))

    @classmethod  # noqa: B027  most tasks fit every run
    def check_settings(cls, config: RunConfig) -> None:
        """Refuse a run that this task does not fit.

        Raises:
            ConfigError: names the setting, its value and what it must be.
        """

    @classmethod
    @abstractmethod
    def outputs_of(cls, labels: int) -> int | None:
        """Return the numbers in a row of the output where ``model.labels`` is ``labels``."""

    # ---- labels -----------------------------------------------------------------------------

    def announced(self, model: ModelConfig) -> tuple[str, ...]:
        """Return what a server announces about the meaning of labels; empty: nothing.

        Raises:
            ConfigError: it cannot be read.
        """
        return ()

    def agreed(self, model: ModelConfig, own: str) -> tuple[str, ...]:
        """Return what labels mean, as both sides agree: names of classes, bounds of numbers ...

        Args:
            model: the server's settings.
            own: the owner's own value of :attr:`terms_setting`, often empty.

        Returns:
            Texts whose digest the parties compare; empty where there are no labels.

        Raises:
            ConfigError: the server announces something else than the owner's own.
        """
        return ()

    def column(self, agreed: Sequence[str]) -> LabelColumn | None:
        """Return how the column of labels is read; None: there is none.

        Args:
            agreed: from :meth:`agreed`; empty: nothing is known yet.
        """
        return None

    def tensor(self, labels: Sequence[Any], places: Sequence[str]) -> Tensor:
        """Return labels as the loss takes them, (N, ...).

        Args:
            labels: as the column reads them.
            places: where each is ("file:line"), for messages.

        Raises:
            DataError: a label is none of this task's; names its place.
        """
        raise NotImplementedError(f"{self.name} has no labels")

    def fewest(self, targets: Tensor) -> int:
        """Return the fewest numbers in a row of output with which ``targets`` have a loss."""
        return self.outputs or 1

    # ---- loss -------------------------------------------------------------------------------

    @abstractmethod
    def bounded(self, scores: Tensor) -> Tensor:
        """Return rows of output (N, C) within bounds; honest ones as they are, bit for bit.

        What a server crafts must not turn one text's loss into a channel of its own.
        """

    @abstractmethod
    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return each target's own loss, (N,), of rows of output (N, C)."""

    def weigh(self, weights: Sequence[float]) -> None:
        """Multiply losses of training by each target's class's weight.

        Raises:
            NotImplementedError: the task has no classes.
        """
        raise NotImplementedError(f"{self.name} has no classes")

    def loss(self, scores: Tensor, targets: Tensor, transition: Tensor | None = None) -> Tensor:
        """Return the mean loss over targets that training steps follow.

        Args:
            scores: rows of output, (N, C).
            targets: (N, ...).
            transition: (C, C), row = true class, of labels that were drawn; None: they were not.
        """
        return self.losses(scores, targets).mean()

    def right(self, scores: Tensor, targets: Tensor) -> Tensor | None:
        """Return whether each target is predicted rightly, (N,); None: nothing is ever right."""
        return None

    # ---- gradients --------------------------------------------------------------------------

    row_bound: float | None = None
    """Largest norm of an honest gradient row, by a row of output, times the number of targets that
    the loss is a mean of; None: there is no bound."""
    tolerance: float = 0.25
    """Largest distance, in the same units, of an honest row from what its label makes of what was
    sent: rounding to bfloat16 or int8 on the wire moves it by less than 0.1."""

    def unexplained(self, rows: Tensor, scores: Tensor) -> Tensor:
        """Return how far gradient rows are from what some target makes of the output, (N,).

        Args:
            rows: gradient rows times the number of targets, (N, C).
            scores: the output that they answer, (N, C), as its owner received it.
        """
        return torch.zeros(len(rows))

    # ---- reports ----------------------------------------------------------------------------

    def families(self) -> tuple[Family, ...]:
        """Return the additive numbers that owners may report of an evaluation."""
        return ()

    def count(
        self, scores: Tensor, targets: Tensor, parts: Sequence[int], about: object = None
    ) -> dict[str, float]:
        """Return the additive numbers of some texts, by their keys; zeros may be left out.

        Args:
            scores: rows of output, (N, C).
            targets: (N, ...).
            parts: how many of the N targets each text has, in order.
            about: what more is known of the texts: :class:`TaggedWords`, :class:`ChoiceGroups`.
        """
        return {}

    def averaged(self, about: object) -> list[bool] | None:
        """Return which texts of an evaluation the mean loss is of; None: all of them.

        Args:
            about: as :meth:`count` is told.
        """
        return None

    def scores(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """Return what owners' numbers, added up, say of all their texts together; JSON-able."""
        return {}

    def exact(self, scores: Tensor, targets: Tensor) -> dict[str, Any]:
        """Return scores that need all predictions at once, where a report has counts of them.

        They take the place of :meth:`scores`'s of the same name, where one party has every row.

        Args:
            scores: rows of output of all texts, (N, C).
            targets: (N, ...).
        """
        return {}

    def headline(self, metrics: Mapping[str, Any]) -> float | None:
        """Return :attr:`metric` of averages and scores; None where they do not tell it."""
        value = metrics.get(self.metric)
        return None if value is None else float(value)

    def headline_of(self, report: Mapping[str, float]) -> float | None:
        """Return :attr:`metric` of one owner's report; None where its policy keeps it back."""
        sums = add_up([report])
        return self.headline({**report, **(self.scores(sums) if sums else {})})

    # ---- what gradients tell of labels ------------------------------------------------------

    def hypotheses(self, targets: Tensor) -> list[Tensor] | None:
        """Return the targets that a reader of gradients tries: every text of the first kind, ...

        None: they cannot be listed; what leaves then counts as telling every label.
        """
        return None

    def truth(self, targets: Tensor) -> Tensor:
        """Return which hypothesis is each target's own, (N,)."""
        return torch.zeros(len(targets), dtype=torch.int64)

    # ---- answers ----------------------------------------------------------------------------

    answer_columns: ClassVar[tuple[str, ...]] = ()
    """Keys of an answer that a table shows."""

    def answers(self, scores: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return what each text's row of output (N, C) says, JSON-able; one key per column.

        Args:
            scores: rows of output.
            names: of the classes; empty: they have none.
        """
        raise NotImplementedError(f"{self.name} answers with text")

    def answer_words(
        self, words: Sequence[str], scores: Sequence[Tensor | None], names: Sequence[str]
    ) -> dict[str, Any]:
        """Return what the rows of output of a text's words say, JSON-able; one key per column.

        Args:
            words: of the text.
            scores: row of output (C,) of each word; None: the model saw no token of it.
            names: of the classes; empty: they have none.
        """
        raise NotImplementedError(f"{self.name} answers about whole texts")


class CrossEntropy(Task):
    """A task whose targets are each one of C classes, or one token: softmax and cross-entropy."""

    row_bound: float | None = 2.0**0.5
    """A row is p - q, both distributions: q the label, or what a drawn one may stand for."""
    weights: Tensor | None = None
    """(C,), of the classes in training; None: 1 for all, or see ``own_weights``."""
    own_weights: tuple[float, float] | None = None
    """Bounds of weights that every owner takes of its own labels; None: they are the run's."""

    def weigh(self, weights: Sequence[float]) -> None:
        """See :meth:`Task.weigh`."""
        self.weights = torch.tensor(weights)
        self.row_bound = 2.0**0.5 * max(weights)

    def let_owners_weigh(self, least: float, most: float) -> None:
        """Say that every owner has weights of its own in [least, most], which it alone knows.

        An owner sets them by :meth:`weigh`.  For the server a row is then honest at any scale
        between the two.
        """
        self.own_weights = least, most
        self.row_bound = 2.0**0.5 * most

    def bounded(self, scores: Tensor) -> Tensor:
        """Return logits with each within ``MAX_LOGIT`` of its row's mean."""
        own = scores.detach().float()
        mean = own.mean(1, keepdim=True)
        far = torch.maximum(own.amax(1, keepdim=True) - mean, mean - own.amin(1, keepdim=True))
        if float(far.max()) <= MAX_LOGIT:  # not where a sum overflows
            return scores
        mean = scores.detach().double().mean(1, keepdim=True)
        low, high = (mean - MAX_LOGIT).to(scores.dtype), (mean + MAX_LOGIT).to(scores.dtype)
        return torch.minimum(torch.maximum(scores, low), high)

    def fewest(self, targets: Tensor) -> int:
        """Return one more than the largest class."""
        return int(targets.max()) + 1

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return each target's cross-entropy (nats), (N,)."""
        return functional.cross_entropy(scores.float(), targets, reduction="none")

    def loss(self, scores: Tensor, targets: Tensor, transition: Tensor | None = None) -> Tensor:
        """See :meth:`Task.loss`; drawn labels: forward correction (arXiv 1609.03683).

        With weights the mean is still over targets, not over weights: owners' means, weighted by
        their targets, are then the mean of all.
        """
        if self.weights is not None:
            return (self.losses(scores, targets) * self.weights[targets]).mean()
        if self.own_weights is not None:
            raise ConfigError("train.class-weights='balanced': the owner's weights are not set")
        if transition is None:
            return functional.cross_entropy(scores.float(), targets)
        drawn = scores.float().softmax(dim=1) @ transition.float()  # (N, C)
        return functional.nll_loss(drawn.clamp_min(1e-30).log(), targets)

    def right(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return whether each target has the largest logit, (N,)."""
        return scores.argmax(dim=1) == targets

    def unexplained(self, rows: Tensor, scores: Tensor) -> Tensor:
        """See :meth:`Task.unexplained`: an honest row is p - its label's unit vector, weighted."""
        honest = scores.softmax(dim=1)  # (N, C)
        label = rows.argmin(dim=1, keepdim=True)  # the only negative number of an honest row
        honest = honest.scatter_add_(1, label, -torch.ones(label.shape))
        if self.weights is not None:
            rows = rows / self.weights[label]
        elif self.own_weights is not None:  # the scale that fits best
            along, square = (rows * honest).sum(1), honest.square().sum(1).clamp_min(1e-30)
            rows = rows / (along / square).clamp(*self.own_weights)[:, None]
        away: Tensor = (rows - honest).norm(dim=1)
        # Owners clip logits that are further from their mean than any honest one.
        return torch.where(scores.amax(dim=1) - scores.mean(dim=1) < CLIPPED, away, 0.0)
