"""What a compressor needs for ``truncation = "outputs"``, from its model and material."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fedsplit.emulators.compression.src import roots_of
from fedsplit.emulators.compression.structure import Model
from fedsplit.emulators.compressors.base import Material
from fedsplit.models.layout.projections import dense_layout_of


def truncation_roots(
    truncation: str,
    who: str,
    model: Model,
    material: Material,
    blocks: Sequence[int],
    *,
    attention: bool = True,
    ffn: bool = False,
) -> dict[int, dict[str, Tensor]]:
    """Return the roots of :func:`fedsplit.emulators.compression.src.roots_of`; none by weights.

    Args:
        truncation: a row of :data:`fedsplit.emulators.compression.src.TRUNCATIONS`.
        who: the compressor, for messages.
        model: the whole one.
        material: its tokens are what outputs are kept on.
        blocks: that are compressed.
        attention: compress Q, K, V and O.
        ffn: compress the FFN.

    Raises:
        ConfigError: there are no tokens.
        DataError, ModelError, UnsupportedModelError: see ``roots_of``.
    """
    if truncation != "outputs" or not blocks:
        return {}
    tokens = material.needed_tokens(f"{who} truncation='outputs'")
    return roots_of(
        model,
        dense_layout_of(model.config),
        blocks,
        tokens,
        attention=attention,
        ffn=ffn,
        batch_size=material.batch_size,
    )
