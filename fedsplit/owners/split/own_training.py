"""What an owner trains itself, its joint bottom and its head: steps, weights, DP-SGD's cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedsplit.errors import ModelError
from fedsplit.owners.ledger.disclosure import Training
from fedsplit.owners.split.settings import DpSettings, SplitSettings, optimizer_of

HEAD = "head."  # before the names of the head's weights, when they travel beside the bottom's


class OwnTraining:
    """Steps the owner's own parameters and hands out and takes in their weights.

    One optimizer holds both parts; each is stepped when its gradient is there, the head with the
    loss, the bottom when the server's gradient has come.

    Args:
        bottom: the bottom's trained parameters by name; empty where it is frozen.
        head: the head's; empty where it is the server's, or not trained.
        settings: of the session.
        dp: noise for both, or None.
    """

    def __init__(
        self,
        bottom: Mapping[str, nn.Parameter],
        head: Mapping[str, nn.Parameter],
        settings: SplitSettings,
        dp: DpSettings | None = None,
    ) -> None:
        self.bottom = list(bottom.values())
        self.head = list(head.values())
        self._named = {**bottom, **{HEAD + name: p for name, p in head.items()}}
        self._settings = settings
        self._dp = dp
        self.optimizer: torch.optim.Optimizer | None = None
        if settings.mode != "train" or not self._named:
            return
        groups = [
            {"params": params, "lr": settings.bottom_lr, "part": part}
            for part, params in (("bottom", self.bottom), ("head", self.head))
            if params
        ]
        self.optimizer = optimizer_of(
            groups, settings.optimizer, settings.bottom_lr, settings.weight_decay
        )
        if dp is not None:
            self._private = dp.private(self.optimizer)

    @property
    def private(self) -> bool:
        """Whether steps are noisy."""
        return self._dp is not None

    def plan(self, batches: Sequence[Sequence[int]], samples: int) -> Training | None:
        """Return what a session's steps will train, for the owner's rules; None: nothing.

        Args:
            batches: slots of each step.
            samples: number of the owner's.
        """
        if self.optimizer is None:
            return None
        dp = self._dp
        return Training(
            steps=len(batches),
            batch=min(map(len, batches)),
            samples=samples,
            noise=None if dp is None else dp.noisy(batches, self._parts),
        )

    @property
    def _parts(self) -> int:
        """Number of parts that are stepped; each part's step is a release of its own."""
        return bool(self.bottom) + bool(self.head)

    def step_head(
        self,
        step: int,
        gradients: Sequence[Tensor],
        of_sample: Callable[[int], Sequence[Tensor]],
        batch: int,
    ) -> None:
        """Step the head, if it is the owner's to train.

        Args:
            step: of the session.
            gradients: of the step's mean loss, one per parameter of the head.
            of_sample: index in the batch -> gradients of that sample's own mean loss.
            batch: number of samples.
        """
        if not self.head or self.optimizer is None:
            return
        rates = self._settings.head_rates
        for group in self.optimizer.param_groups:
            if group["part"] == "head":
                group["lr"] = rates[step] if rates else 1e-3
        self._step(self.head, gradients, of_sample, batch)

    def step_bottom(
        self,
        backward: Callable[[], None],
        of_sample: Callable[[int], Sequence[Tensor]],
        batch: int,
    ) -> None:
        """Step the joint bottom.

        Args:
            backward: puts the step's gradient into the parameters' ``grad``.
            of_sample: see :meth:`step_head`.
            batch: number of samples.
        """
        assert self.optimizer is not None, "only a bottom that learns gets gradients"
        if self.private:
            self._step(self.bottom, [], of_sample, batch)
            return
        self.optimizer.zero_grad(set_to_none=True)
        backward()
        self._apply(self.bottom)

    def _step(
        self,
        parameters: list[nn.Parameter],
        gradients: Sequence[Tensor],
        of_sample: Callable[[int], Sequence[Tensor]],
        batch: int,
    ) -> None:
        assert self.optimizer is not None
        self.optimizer.zero_grad(set_to_none=True)  # the other part has its own turn
        if self.private:
            self._private.step(parameters, map(of_sample, range(batch)), batch)
            self.optimizer.zero_grad(set_to_none=True)
            return
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self._apply(parameters)

    def _apply(self, parameters: list[nn.Parameter]) -> None:
        assert self.optimizer is not None
        if self._settings.clip:
            nn.utils.clip_grad_norm_(parameters, self._settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def metrics(self, steps: int) -> dict[str, float | int]:
        """Return what DP-SGD has cost after ``steps`` steps of this session; empty without it."""
        dp = self._dp
        if dp is None or self.optimizer is None:
            return {}

        return dp.spent(self._parts * (dp.earlier_steps + steps))

    def weights(self) -> dict[str, Tensor]:
        """Return copies of what is trained, by name, for averaging."""
        return {n: p.detach().clone() for n, p in self._named.items()}

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Replace what is trained by the averaged tensors.

        Raises:
            ModelError: on a missing, foreign, misshapen or non-finite tensor; nothing is changed.
        """
        own = self._named
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())[:4]
            raise ModelError(f"bottom weights: missing or foreign names {odd}")
        for name, value in state.items():
            if value.shape != own[name].shape or not bool(torch.isfinite(value).all()):
                raise ModelError(
                    f"bottom weight {name}: must be finite, of shape {tuple(own[name].shape)}"
                )
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)
