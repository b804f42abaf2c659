"""Which Flower strategy averages what owners return; their ``aggregate_train`` does the work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    Strategy,
)
from flwr.serverapp.strategy.dp_adaptive_clipping import DifferentialPrivacyAdaptiveBase
from flwr.serverapp.strategy.dp_fixed_clipping import DifferentialPrivacyFixedClippingBase
from flwr.serverapp.strategy.fedopt import FedOpt

from fedsplit.config import RunConfig
from fedsplit.registry import pick
from fedsplit.wire.messages import weights_record

from .robust_rules import RULES

NDArray: TypeAlias = np.ndarray[Any, Any]
WEIGHT = "targets"  # an owner's tokens, so that the average of losses is the loss on all tokens
EQUAL = "equal-weight"  # put into replies by the server, where owners must weigh the same


def _robust(name: str) -> Callable[[RunConfig], Strategy]:
    return lambda c: RULES[name](c.robust.malicious, WEIGHT)


AVERAGINGS: dict[str, Callable[[RunConfig], Strategy]] = {
    "fedadam": lambda c: MeasuredFedAdam(c.offsite.server_lr),
    "fedavg": lambda c: FedAvg(weighted_by_key=WEIGHT),
    **{name: _robust(name) for name in RULES},
}


def make_averaging(config: RunConfig) -> Strategy:
    """Return the Flower strategy that averages what a run's owners train.

    Raises:
        ConfigError: an unknown name.
    """
    if config.strategy != "offsite-tuning":
        return pick(AVERAGINGS, config.split.averaging, "split.averaging")(config)
    if config.offsite.central_dp_clip:
        return CentralDp(config)
    return pick(AVERAGINGS, config.offsite.averaging, "offsite.averaging")(config)


def adds_noise(averaging: Strategy) -> bool:
    """Return whether noise is put on the sum of changes that are bounded one by one.

    A bound, weight or choice that depends on the other owners' changes would void its guarantee.
    """
    kinds = (DifferentialPrivacyFixedClippingBase, DifferentialPrivacyAdaptiveBase)
    found = [s for s in chain(averaging) if isinstance(s, kinds)]
    return any(strategy.noise_multiplier > 0 for strategy in found)


def chain(averaging: Strategy) -> Iterator[Strategy]:
    """Yield a strategy, and what it wraps."""
    while isinstance(averaging, Strategy):
        yield averaging
        averaging = getattr(averaging, "strategy", None)  # type: ignore[assignment]


def set_current_arrays(averaging: Strategy, arrays: ArrayRecord) -> None:
    """Tell strategies that work with the current weights what they are.

    Flower does so in ``configure_train``, which is not called here: sessions are opened instead.
    """
    for strategy in chain(averaging):
        if isinstance(strategy, FedOpt):
            strategy.current_arrays = {name: array.numpy() for name, array in arrays.items()}
        elif hasattr(strategy, "current_arrays"):
            strategy.current_arrays = arrays


@dataclass(frozen=True)
class AveragingState:
    """What an averaging strategy carries from round to round.

    Attributes:
        arrays: moments by ``<attribute>.<name of the weight>``.
        facts: measured numbers.
    """

    arrays: dict[str, NDArray] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)


MOMENTS = ("m_t", "v_t")  # of Flower's adaptive strategies, by weight
MEASURED = ("eta", "tau")  # of MeasuredFedAdam
NORM = "clipping_norm"  # adaptive clipping moves it


def state_of(averaging: Strategy) -> AveragingState:
    """Return what the strategy needs to go on as if it had not been interrupted; often nothing."""
    state = AveragingState()
    for strategy in chain(averaging):
        for key in MOMENTS if isinstance(strategy, FedOpt) else ():
            moments: dict[str, NDArray] = getattr(strategy, key) or {}
            state.arrays.update({f"{key}.{name}": array for name, array in moments.items()})
        if isinstance(strategy, FedAvgM):
            vector = strategy.momentum_vector or []
            state.arrays.update({f"momentum.{i:06d}": array for i, array in enumerate(vector)})
        if isinstance(strategy, MeasuredFedAdam) and strategy.measured:
            state.facts.update({key: float(getattr(strategy, key)) for key in MEASURED})
        if isinstance(strategy, DifferentialPrivacyAdaptiveBase):
            state.facts[NORM] = float(strategy.clipping_norm)
    return state


def restore(averaging: Strategy, state: AveragingState) -> None:
    """Put back what :func:`state_of` returned; an empty state: the beginning."""
    for strategy in chain(averaging):
        for key in MOMENTS if isinstance(strategy, FedOpt) else ():
            setattr(strategy, key, _below(f"{key}.", state.arrays) or None)
        if isinstance(strategy, FedAvgM):
            strategy.momentum_vector = list(_below("momentum.", state.arrays).values()) or None
        if isinstance(strategy, MeasuredFedAdam):
            strategy.measured = MEASURED[0] in state.facts
            for key in MEASURED if strategy.measured else ():
                setattr(strategy, key, state.facts[key])
        if isinstance(strategy, DifferentialPrivacyAdaptiveBase) and NORM in state.facts:
            strategy.clipping_norm = state.facts[NORM]


def _below(prefix: str, arrays: Mapping[str, NDArray]) -> dict[str, NDArray]:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


Aggregate = tuple[ArrayRecord | None, MetricRecord | None]


class MeasuredFedAdam(FedAdam):
    """FedAdam (Reddi et al., arXiv 2003.00295) whose step is as long as the owners' own changes.

    Its ``eta`` is the length that one weight's step tends to, whatever owners changed, and ``tau``
    the size of change below which it stops being adaptive: both are in units of the weights, so no
    constant suits every model, rate and number of local steps.  Both are therefore measured on the
    first average: ``tau`` is a tenth of the root mean square d of its changes (what the square root
    of the second moment starts with is a tenth of the change), and with ``eta`` the first step has
    root mean square ``server_lr``, or d.
    Both are part of every saved state, as the moments are, so that a run goes on after a crash with
    the same step.  Averages are float32, as what owners sent is: Flower's arithmetic makes float64
    of them, twice the bytes for no information.

    Args:
        server_lr: root mean square of the first step over all weights; 0: d.
    """

    def __init__(self, server_lr: float = 0.0) -> None:
        super().__init__(weighted_by_key=WEIGHT)
        self._server_lr = server_lr
        self.measured = False

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """Step from the current weights along the owners' mean change."""
        replies = list(replies)
        if not self.measured:
            mean = FedAvg.aggregate_train(self, server_round, replies)[0]
            if mean is not None and self.current_arrays is not None:
                self._measure(mean, server_round)
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is not None:
            arrays = weights_record({n: a.numpy().astype(np.float32) for n, a in arrays.items()})
        return arrays, metrics

    def _measure(self, mean: ArrayRecord, server_round: int) -> None:
        assert self.current_arrays is not None
        flat = [(a.numpy() - self.current_arrays[n]).ravel() for n, a in mean.items()]
        change = np.concatenate(flat).astype(np.float64)
        size = float(np.sqrt(np.mean(change**2)))
        if not size > 0:
            return  # nobody changed anything: the next round may tell
        self.tau = 0.1 * size
        first = (1 - self.beta_1) * change
        raw = first / (np.sqrt(1 - self.beta_2) * np.abs(change) + self.tau)
        # Flower's correction of both moments, one power ahead of Kingma and Ba's.
        ahead = server_round + 1.0
        raw *= np.sqrt(1 - self.beta_2**ahead) / (1 - self.beta_1**ahead)
        self.eta = (self._server_lr or size) / float(np.sqrt(np.mean(raw**2)))
        self.measured = True


class CentralDp(DifferentialPrivacyClientSideFixedClipping):
    """Flower's central DP over the plain mean (McMahan et al., arXiv 1710.06963), made exact.

    Every owner's change of a round is clipped to C, and noise of standard deviation z C is put on
    their sum (z C / n on the mean).  Owners clip before they send, and the server clips again,
    since nobody has to believe an owner: not by Flower's server-side wrapper, which zips tensors in
    the order in which they were sent and divides by zero where an owner changed nothing.  Two more
    things that Flower leaves to its user: owners weigh the same (a weight of an owner's choice
    would undo the bound), and n is the number of owners that did answer.

    Guarantee:
        (epsilon, delta)-DP of the sequence of averages for adding or removing one owner's updates,
        with epsilon from :func:`fedsplit.privacy.dp.accounting.spent_epsilon` at sample rate 1, the
        number of owners that answer taken as known.  The server itself sees every clipped update;
        owners' reported averages are not covered.  Flower draws the noise from NumPy's global
        generator, which is seeded anew by the operating system for each draw: whoever calls
        ``numpy.random.seed`` elsewhere does not decide it.

    Args:
        config: of the run; bound and noise are those of its group ``offsite``.
    """

    def __init__(self, config: RunConfig) -> None:
        offsite = config.offsite
        inner = (
            FedAvg(weighted_by_key=EQUAL)
            if offsite.central_dp_noise
            else pick(AVERAGINGS, offsite.averaging, "offsite.averaging")(config)
        )
        super().__init__(inner, offsite.central_dp_noise, offsite.central_dp_clip, 1)
        self.current_arrays = ArrayRecord()

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """Clip, average, add noise."""
        found = list(replies)
        start = {name: array.numpy() for name, array in self.current_arrays.items()}
        for reply in found:
            (key,) = reply.content.array_records
            sent = {n: a.numpy() for n, a in reply.content.array_records[key].items()}
            reply.content[key] = weights_record(_clipped(sent, start, self.clipping_norm))
            for metrics in reply.content.metric_records.values():
                metrics[EQUAL] = 1.0
        self.num_sampled_clients = max(1, len(found))
        with _numpy_seeded_by_the_system():
            return super().aggregate_train(server_round, found)


@contextmanager
def _numpy_seeded_by_the_system() -> Iterator[None]:
    before = np.random.get_state()
    np.random.seed(np.frombuffer(os.urandom(4 * 624), dtype=np.uint32))
    try:
        yield
    finally:
        np.random.set_state(before)


def _clipped(
    sent: dict[str, NDArray], start: dict[str, NDArray], bound: float
) -> dict[str, NDArray]:
    """Return ``sent`` moved toward ``start`` until their L2 distance is at most ``bound``."""
    changes = {name: sent[name].astype(np.float64) - value for name, value in start.items()}
    norm = float(np.sqrt(sum(float((c**2).sum()) for c in changes.values())))
    share = min(1.0, bound / norm) if norm > 0 else 1.0
    return {n: (start[n] + share * c).astype(np.float32) for n, c in changes.items()}
