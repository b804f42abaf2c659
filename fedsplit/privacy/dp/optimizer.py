"""DP-SGD steps (Abadi et al., arXiv 1607.00133) with Opacus's optimizer and the owner's noise."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.errors import ConfigError, PrivacyError
from fedsplit.privacy.dp.accounting import MISSING
from fedsplit.privacy.secret import OwnerSecret


class PrivateOptimizer:
    """DP-SGD's optimizer: clip each sample's gradient, sum, add Gaussian noise, divide, step.

    Gradients come one sample at a time (any model, no per-layer rules, the memory of two gradients
    more); clipping, scaling and stepping are ``opacus.optimizers.DPOptimizer``'s.  Noise comes from
    the owner's secret, the summed gradient it hides and ``nonce``.

    Guarantee:
        See :func:`fedsplit.privacy.dp.accounting.spent_epsilon`; the unit is one sample of one
        owner.
        It is about the parameters that this optimizer steps, as they leave the owner, and about
        nothing else that leaves (representations, gradients at the cut, averages of a session).
        What the server sends is taken as given: a top that has learned from a sample, whose
        representation it received, can carry that sample into the states and gradients that it
        returns for other samples.  So the figure is for readers of the weights (other owners), as
        far as the sample reached the weights through the owner's own gradients.

    What breaks it:
        A server that works with the reader of the weights (see above).  A sample's gradient that
        depends on other samples' content: losses must be each sample's own mean.  Whoever reads the
        owner's secret can subtract the noise.

    Args:
        optimizer: steps the parameters.
        noise_multiplier: standard deviation of the noise in units of ``clip``, > 0.
        clip: bound on one sample's gradient norm.
        secret: the owner's.
        nonce: a new random one for each session.  With the same one equal sums have equal noise,
            which tells whoever sends two models that differ for one text alone whether it is there.

    Raises:
        ConfigError: Opacus is not installed (the extra ``dp``).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        clip: float,
        secret: OwnerSecret,
        nonce: bytes = b"",
    ) -> None:
        try:
            from opacus.optimizers import DPOptimizer
        except ImportError as error:
            raise ConfigError(
                f"dp.noise-multiplier={noise_multiplier}: must be 0 without {MISSING}"
            ) from error
        if not (noise_multiplier > 0 and clip > 0):
            raise PrivacyError(f"noise_multiplier={noise_multiplier}, clip={clip}: must be > 0")
        outer = self

        class SecretNoise(DPOptimizer):  # type: ignore[misc]
            """Opacus's optimizer over the parameters of one step, with the owner's noise."""

            @property
            def params(self) -> list[nn.Parameter]:
                """The parameters that this step is about."""
                return outer._parameters

            def add_noise(self) -> None:
                """Put the noisy sum into ``grad``."""
                outer._add_noise()

        self._secret = secret
        self._nonce = nonce
        self._steps = 0
        self._parameters: list[nn.Parameter] = []
        self._deviation = noise_multiplier * clip
        self._inner: Any = SecretNoise(
            optimizer, noise_multiplier=noise_multiplier, max_grad_norm=clip, expected_batch_size=1
        )

    def step(
        self, parameters: Sequence[nn.Parameter], gradients: Iterable[Sequence[Tensor]], batch: int
    ) -> None:
        """Take one step.

        Args:
            parameters: that are stepped; the optimizer's others stay as they are.
            gradients: per sample, one tensor per parameter; consumed one by one.
            batch: number of samples, which the noisy sum is divided by.

        Raises:
            PrivacyError: another number of samples than ``batch``, or none, or a gradient that is
                not finite; no step is taken.
        """
        self._parameters = list(parameters)
        for parameter in self._parameters:
            parameter.summed_grad = None  # type: ignore[attr-defined]
        self._inner.expected_batch_size = batch
        self._inner.zero_grad(set_to_none=True)
        waiting = iter(gradients)
        for seen in range(max(batch, 1)):
            sample = next(waiting, None) if batch else None
            if sample is None:
                raise PrivacyError(f"gradients of {seen} samples: must be {max(batch, 1)}")
            for parameter, gradient in zip(self._parameters, sample, strict=True):
                if not bool(torch.isfinite(gradient).all()):
                    raise PrivacyError("sample's gradient: must hold no NaN or infinite value")
                parameter.grad_sample = gradient.detach()[None].clone()  # type: ignore[attr-defined]
            last = seen == batch - 1
            if last and next(waiting, None) is not None:
                raise PrivacyError(f"gradients of over {batch} samples: must be {batch}")
            self._inner.signal_skip_step(do_skip=not last)
            self._inner.step()
            self._inner.zero_grad(set_to_none=True)

    def _add_noise(self) -> None:
        content = hashlib.sha256()
        sums: list[Tensor] = [p.summed_grad for p in self._parameters]  # type: ignore[attr-defined]
        for total in sums:
            content.update(total.detach().float().contiguous().numpy().tobytes())
        stream = self._secret.stream(
            "fedsplit.dp.v1", content.digest(), str(self._deviation), len(sums), *self._fresh()
        )
        for parameter, total in zip(self._parameters, sums, strict=True):
            noise = torch.from_numpy(stream.normal(tuple(total.shape))) * self._deviation
            parameter.grad = (total.double() + noise).to(total.dtype).view_as(parameter)

    def _fresh(self) -> tuple[bytes | int, ...]:
        """Return what makes this step's noise its own."""
        self._steps += 1
        return (self._nonce, self._steps) if self._nonce else ()
