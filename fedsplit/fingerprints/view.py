"""What a fingerprint sees of a model: named weights read one by one, blocks and embedding rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.errors import LineageError, ModelError
from fedsplit.models.layout.projections import (
    BlockLayout,
    BlockProjections,
    block_prefixes,
    embedding_name,
    layout_of,
    read_block,
    tensors_of,
)
from fedsplit.seeding import numpy_generator

TOKENS = 4096
"""HuRef's K; smaller vocabularies use all their tokens."""


@dataclass(frozen=True)
class Similarity:
    """One fingerprint's comparison of a suspect with a base.

    Attributes:
        value: the similarity, 1 for identical models, near 0 for independent ones.
        parts: the same by kind of weight ("vo", "ffn" ...).
        per_block: the same by block of the base, where the fingerprint has one per block.
        notes: what had to be done to compare ("aligned by assignment", "32 of 64 rows shared").
        fit: cosine of the shared embedding rows once the residual bases are aligned, where that was
            done.  Related models keep it above 0.95; a suspect with a high fit and a low value has
            the base's embeddings under blocks that were worked on.
    """

    value: float
    parts: Mapping[str, float]
    per_block: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    fit: float | None = None


class WeightView:
    """A model, a part of one or a set of files, read tensor by tensor.

    Nothing is copied: a view of a live module follows the module.

    Args:
        layout: the block layout, from :func:`fedsplit.models.layout.projections.layout_of`.
        names: shapes of all parameters by name.
        get: reads one parameter.
        rows: token embedding for a part that has none (the server's rows for a top): a matrix
            (V, d), row i for token i.
        get_rows: reads some rows of a parameter, where that is cheaper than reading it whole.
        module: the model itself, if it can run.

    Raises:
        ModelError: if no block, or only part of a block's parameters, is among the names.
    """

    def __init__(
        self,
        layout: BlockLayout,
        names: Mapping[str, tuple[int, ...]],
        get: Callable[[str], Tensor],
        *,
        rows: Tensor | None = None,
        get_rows: Callable[[str, Sequence[int]], Tensor] | None = None,
        module: nn.Module | None = None,
    ) -> None:
        self.layout = layout
        self.module = module
        self._get_rows = get_rows
        self.names = dict(names)
        self.get = get
        self.prefixes = block_prefixes(layout, self.names)
        self._rows = rows
        self._embedding = embedding_name(layout, self.names) if rows is None else None
        shape = self.names[self._embedding] if self._embedding is not None else None
        shape = tuple(rows.shape) if rows is not None else shape
        self.factorised = shape is not None and shape[1] != self.width
        self._rows_shape = None if self.factorised else shape

    @classmethod
    def of_module(cls, module: nn.Module, *, rows: Tensor | None = None) -> WeightView:
        """View a live model, or a half (its ``model`` carries the config); adapters merged."""
        config = getattr(module, "config", None)
        config = config or getattr(getattr(module, "model", None), "config", None)
        if config is None:
            raise ModelError(f"{type(module).__name__}: has no config to tell its architecture")
        view = cls.of_tensors(tensors_of(module), config, rows=rows)
        view.module = module
        return view

    @classmethod
    def of_tensors(
        cls, tensors: Mapping[str, Tensor], config: Any, *, rows: Tensor | None = None
    ) -> WeightView:
        """View named tensors with the configuration (or the layout) of their model."""
        layout = config if isinstance(config, BlockLayout) else layout_of(config)
        shapes = {n: tuple(t.shape) for n, t in tensors.items()}
        return cls(layout, shapes, tensors.__getitem__, rows=rows)

    @property
    def depth(self) -> int:
        """Number of blocks present."""
        return len(self.prefixes)

    @property
    def width(self) -> int:
        """Width d of the residual stream."""
        site = self.layout.down
        shape = self.layout.shapes[site.weight]
        return int(shape[-1] if site.transposed else shape[-2])

    @property
    def vocabulary(self) -> int:
        """Rows of the token embedding; 0 if there is none of the residual's width."""
        return self._rows_shape[0] if self._rows_shape else 0

    def stored_dtype(self) -> torch.dtype:
        """Return the type that the projections are kept in, told from the last block's values."""
        return self.get(self.prefixes[-1] + self.layout.v.weight).dtype

    def block(self, index: int, *, fold: bool = True) -> BlockProjections:
        """Return the projections of block ``index`` (negative from the end)."""
        return read_block(self.layout, self.get, self.prefixes[index], fold=fold)

    def embeddings(self, tokens: Sequence[int] | None = None) -> Tensor:
        """Return the token embedding rows (K, d) as float32; all of them for ``tokens=None``.

        Raises:
            LineageError: if there is no embedding, or a token beyond it.
        """
        if self.factorised:
            raise LineageError(
                f"embedding: its width is not the residual width {self.width}; a factorised "
                f"embedding cannot be read through"
            )
        if self._rows is None and self._embedding is None:
            raise LineageError("embedding: the weights hold none; give the base's rows")
        if tokens is not None and (
            len(tokens) == 0 or min(tokens) < 0 or max(tokens) >= self.vocabulary
        ):
            low, high = (min(tokens), max(tokens)) if len(tokens) else (0, 0)
            raise LineageError(
                f"tokens={len(tokens)} in [{low}, {high}]: must be in [0, {self.vocabulary})"
            )
        name = self._embedding or ""
        if self._rows is None and tokens is not None and self._get_rows is not None:
            source = self._get_rows(name, tokens)
        else:
            source = self._rows if self._rows is not None else self.get(name)
            if tokens is not None:
                source = source[torch.as_tensor(list(tokens), device=source.device)]
        rows = source.detach().to("cpu", torch.float32)
        if not bool(torch.isfinite(rows).all()):
            raise ModelError("embedding: contains NaN or infinite values")
        return rows

    def canonical(self) -> dict[str, str]:
        """Return names that do not depend on how the model was wrapped -> its own names.

        Block i's parameters are "blocks.i.<name>", the token embedding is "embedding", everything
        else keeps its last two components.
        """
        out: dict[str, str] = {}
        for name in self.names:
            short = ".".join(name.split(".")[-2:])
            if name == self._embedding:
                short = "embedding"
            for index, prefix in enumerate(self.prefixes):
                if name.startswith(prefix):
                    short = f"blocks.{index}.{name[len(prefix) :]}"
            out[short] = name
        return out


def choose_tokens(vocabulary: int, count: int = TOKENS, seed: int = 2312) -> tuple[int, ...]:
    """Return the public token list of ``vocabulary`` rows: all, or ``count`` by a fixed draw.

    HuRef takes the rarest tokens of English Wikipedia, which needs a corpus; a fixed pseudo-random
    list serves the same purpose, that nobody can choose inputs which forge a similarity, for any
    tokenizer.  A descendant with more tokens is compared on the BASE's list; one with fewer only on
    those that both have, which is another list (and another public file).

    Raises:
        LineageError: for an empty vocabulary.
    """
    if vocabulary < 1 or count < 1:
        raise LineageError(f"vocabulary={vocabulary}, tokens={count}: must be >= 1")
    if vocabulary <= count:
        return tuple(range(vocabulary))
    draw = numpy_generator(seed, "fingerprint-tokens", vocabulary, count)
    return tuple(sorted(int(i) for i in draw.choice(vocabulary, size=count, replace=False)))


def same_width(base: WeightView, suspect: WeightView) -> int:
    """Return the common width.

    Raises:
        LineageError: if the widths differ: weights of one cannot be laid over the other's.
    """
    if base.width != suspect.width:
        raise LineageError(
            f"width={suspect.width}: the base's is {base.width}; weights of models of different "
            f"width cannot be compared"
        )
    return base.width


def shared_rows(base: WeightView, suspect: WeightView) -> int:
    """Return how many leading token rows both have (an extension keeps the base's ids).

    Raises:
        LineageError: if one of them has no embedding.
    """
    shared = min(base.vocabulary, suspect.vocabulary)
    if shared < 1:
        raise LineageError(
            f"vocabularies {base.vocabulary} and {suspect.vocabulary}: no shared token rows"
        )
    return shared
