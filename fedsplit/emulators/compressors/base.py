"""What every way to make an emulator has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol, Self, cast

from torch import Tensor, nn

from fedsplit.config import OffsiteConfig
from fedsplit.emulators.build import Edit, Emulator, Read, build_emulator
from fedsplit.emulators.compression.structure import Model
from fedsplit.emulators.importance.files import Importance
from fedsplit.emulators.lm import check_tokens
from fedsplit.emulators.planning.plan import EmulatorPlan, check_positions
from fedsplit.errors import ConfigError, UnsupportedModelError, check
from fedsplit.models.layout.projections import BlockLayout


@dataclass(frozen=True)
class Material:
    """What a compressor may use besides the model; nothing of it is an owner's.

    Attributes:
        tokens: task-independent ids (N, T), for calibration and distillation.
        importance: scores and harmonizers of this model.
        base_digest: of the model, if known; None: computed.
        batch_size: token blocks at a time.
        read: gives the model's blocks their weights one at a time, where they are in files
            (:mod:`fedsplit.emulators.from_files`).
    """

    tokens: Tensor | None = None
    importance: Importance | None = None
    base_digest: str | None = None
    batch_size: int = 8
    read: Read | None = None

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, "batch_size", self.batch_size, ">= 1 (blocks)")

    def needed_tokens(self, who: str) -> Tensor:
        """Return the calibration tokens.

        Raises:
            ConfigError: if there are none.
            DataError: if they are not ids (N, T).
        """
        if self.tokens is None:
            raise ConfigError(f"{who}: needs task-independent tokens to calibrate on; found none")
        return check_tokens("tokens", self.tokens)


@dataclass(frozen=True)
class Sizes:
    """What a forecast needs to know of a base; parameters unless said otherwise.

    Attributes:
        layers: L.
        hidden: d.
        block: one block (their mean, where they differ).
        matrices: of a block, in its linear layers' weights.
        rows: of a block, output features over all linear layers.
        attention: of a block, in Q, K, V and O; 0 where the layout is not known.
        ffn: of a block, in up, gate and down; 0 likewise.
        layout: of the blocks; None where it cannot be told (mixtures of experts).
        width: bytes of a parameter.
    """

    layers: int
    hidden: int
    block: int
    matrices: int
    rows: int
    attention: int
    ffn: int
    layout: BlockLayout | None
    width: int

    def known_layout(self, who: str) -> BlockLayout:
        """Return the layout.

        Raises:
            UnsupportedModelError: if there is none.
        """
        if self.layout is None:
            raise UnsupportedModelError(f"{who}: the block's projections cannot be told")
        return self.layout


@dataclass(frozen=True)
class Forecast:
    """An emulator's blocks before it is built; parameters unless said otherwise.

    Attributes:
        adapters: blocks in A.
        depth: blocks that run.
        frozen: stored in the blocks outside A.
        frozen_bytes: their bytes.
        run: applied to each token outside A (a shared block counts each time).
        verbatim: of the base's weights in the blocks, A included, how many are there bit for bit.
        head_verbatim: whether the head (and with it a tied embedding) is.
    """

    adapters: int
    depth: int
    frozen: int
    frozen_bytes: int
    run: int
    verbatim: int
    head_verbatim: bool = True


def plain_forecast(
    sizes: Sizes, adapters: int, kept: int, *, runs: int | None = None, depth: int | None = None
) -> Forecast:
    """Return the forecast of an emulator of A and ``kept`` frozen blocks as they are."""
    frozen = kept * sizes.block
    runs = kept if runs is None else runs
    return Forecast(
        adapters=adapters,
        depth=adapters + runs if depth is None else depth,
        frozen=frozen,
        frozen_bytes=frozen * sizes.width,
        run=runs * sizes.block,
        verbatim=(adapters + kept) * sizes.block,
    )


def whole_forecast(sizes: Sizes, adapters: Sequence[int]) -> tuple[Forecast, int]:
    """Return the forecast with every block outside A as it is, and how many these are."""
    chosen = len(adapters_in(sizes.layers, adapters))
    rest = sizes.layers - chosen
    return plain_forecast(sizes, chosen, rest), rest


class Compressor(Protocol):
    """A frozen dataclass of settings that builds emulators.

    At :meth:`identity` the emulator computes what the base computes, bit for bit.

    Attributes:
        name: its row in :data:`fedsplit.emulators.COMPRESSORS`.
        adapters: A's positions.
        places: whether it chooses A's blocks itself, from an importance run, where none are given.
    """

    name: ClassVar[str]
    places: ClassVar[bool] = False
    adapters: tuple[int, ...]

    def build(self, model: Model, material: Material) -> Emulator:
        """Return the emulator; ``model`` is left as it was."""
        ...

    def forecast(self, sizes: Sizes) -> Forecast:
        """Return the emulator's size without building it."""
        ...

    @classmethod
    def identity(cls, adapters: Sequence[int]) -> Self:
        """Return the settings that compress nothing."""
        return cls(adapters=tuple(adapters))  # type: ignore[call-arg]  # a dataclass's own

    def made(
        self,
        model: Model,
        plan: EmulatorPlan,
        material: Material,
        *,
        edit: Edit | None = None,
        details: Mapping[str, Any] | None = None,
        harmonizers: Mapping[int, nn.Module] | None = None,
    ) -> Emulator:
        """Return the emulator of a plan; its details begin with this compressor's settings."""
        settings = asdict(cast(Any, self))
        return build_emulator(
            model,
            plan,
            harmonizers=harmonizers,
            edit=edit,
            method=self.name,
            base_digest=material.base_digest,
            details={"settings": settings, **(details or {})},
            read=material.read,
        )

    @property
    def streams(self) -> bool:
        """Whether each block is looked at alone and once, so that it may come from files."""
        return False

    @classmethod
    def run_settings(cls, offsite: OffsiteConfig) -> dict[str, Any]:
        """Return its own settings from a run's, without A's positions."""
        return {}

    @classmethod
    def needs_importance(cls, offsite: OffsiteConfig) -> bool:
        """Return whether a run's settings ask it for an importance run."""
        return cls.places and not offsite.chosen

    @classmethod
    def variants(
        cls, layers: int, adapters: int, alphas: Sequence[float], betas: Sequence[float]
    ) -> dict[str, Self]:
        """Return what ``fedsplit plan`` compares for one number of adapter blocks, by its label."""
        return {}


def adapters_in(layers: int, adapters: Sequence[int]) -> tuple[int, ...]:
    """Return A's positions in order.

    Raises:
        ConfigError: if there is none, or one is repeated or outside 0..L-1.
    """
    chosen = tuple(sorted(check_positions(layers, adapters)))
    check(len(chosen) >= 1, "adapters", chosen, "at least one position")
    return chosen
