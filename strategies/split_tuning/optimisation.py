"""The optimizer of the top, its learning-rate schedule, and one step of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.config import TrainConfig
from fedsplit.config.schedule import rate_factor
from fedsplit.errors import ModelError


class Optimisation:
    """AdamW or SGD with warm-up and decay by progress.

    The rate follows the share of the run that is done, not a step count, because nobody knows
    beforehand how many steps the owners' data will make.

    Args:
        body: parameters trained with ``config.lr``.
        head: parameters trained with ``config.head_lr`` (or ``config.lr`` where that is 0).
        config: the training settings.
    """

    def __init__(
        self, body: Iterable[nn.Parameter], head: Iterable[nn.Parameter], config: TrainConfig
    ) -> None:
        groups = [(list(body), config.lr), (list(head), config.head_lr or config.lr)]
        self.parameters = [p for group, _ in groups for p in group]
        filled = [(group, lr) for group, lr in groups if group] or groups[:1]  # torch wants a group
        options = [{"params": group, "lr": lr} for group, lr in filled]
        self._peaks = [lr for _, lr in filled]
        decay = config.weight_decay
        if config.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(options, weight_decay=decay)
        else:
            self.optimizer = torch.optim.AdamW(options, weight_decay=decay, foreach=True)
        self._config = config
        self._pending = 0  # cohort steps whose gradients wait
        self._weight = 0.0  # targets of these

    @property
    def pending(self) -> bool:
        """Whether gradients wait for those of further cohort steps (``train.accumulate``)."""
        return self._pending > 0

    def begin(self) -> None:
        """Begin a cohort step: forget the gradients of an optimizer step that was taken."""
        if not self._pending:
            self.zero_grad()

    def scale(self, targets: float) -> float:
        """Return what a cohort step's mean gradient is multiplied by before it is added."""
        return 1.0 if self._config.accumulate == 1 else targets

    def end(self, targets: float, progress: float) -> None:
        """End a cohort step; the optimizer's is taken after ``train.accumulate`` of them.

        It then equals one on the union of their batches.

        Args:
            targets: of the cohort step.
            progress: of the run, in [0, 1].

        Raises:
            ModelError: see :meth:`step`.
        """
        self._pending += 1
        self._weight += targets
        if self._pending >= self._config.accumulate:
            self.flush(progress)

    def flush(self, progress: float) -> None:
        """Take the optimizer's step with what has been added so far, if anything.

        Raises:
            ModelError: see :meth:`step`.
        """
        if not self._pending:
            return
        if self._config.accumulate > 1:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad /= self._weight
        self._pending, self._weight = 0, 0.0
        self.step(progress)

    def factor(self, progress: float) -> float:
        """Return the share of the peak rate at ``progress`` in [0, 1] of the run."""
        return rate_factor(self._config, progress)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, progress: float) -> float:
        """Apply the gradients at that progress of the run and return their norm before clipping.

        Raises:
            ModelError: if the gradient is not finite; nothing is changed.
        """
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self._config.clip or float("inf")))
        if norm != norm or norm == float("inf"):
            self.zero_grad()
            raise ModelError(f"gradient norm {norm}: must be finite; the step was not taken")
        factor = self.factor(progress)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        self.optimizer.step()
        return norm

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return (tensors, numbers) of the optimizer's memory, by parameter's index and key."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, float] = {}
        for index, memory in self.optimizer.state_dict()["state"].items():
            for key, value in memory.items():
                if isinstance(value, Tensor):
                    tensors[f"{index}.{key}"] = value
                elif value is not None:
                    numbers[f"{index}.{key}"] = float(value)
        return tensors, numbers

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
        """Continue from :meth:`state` of an equal optimizer.

        Raises:
            ModelError: it is of other parameters.
        """
        memory: dict[int, dict[str, Any]] = {}
        for name, value in (*tensors.items(), *numbers.items()):
            index, _, key = name.partition(".")
            memory.setdefault(int(index), {})[key] = value
        if memory.keys() - set(range(len(self.parameters))):
            raise ModelError(
                f"optimizer state of {max(memory) + 1} parameters: must be of at most "
                f"{len(self.parameters)}"
            )
        whole = self.optimizer.state_dict()
        whole["state"] = memory
        self.optimizer.load_state_dict(whole)
