"""What the lineage commands share: opening models, drawing portraits, errors with an exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import typer
from typer.core import TyperCommand

from fedsplit.errors import FedsplitError, LineageError, ModelError
from fedsplit.observe.console import console

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedsplit.fingerprints.portraits.sheet import Painter
    from fedsplit.fingerprints.sources import Source
    from fedsplit.fingerprints.view import WeightView

FAILED = 3
USAGE = 4


class CodedCommand(TyperCommand):
    """A command whose results have exit codes 0, 1 and 2: errors take 3, wrong usage 4."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as usual; a mistake in the arguments exits with :data:`USAGE`."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.exit_code = USAGE  # type: ignore[misc]  # click reads it from the instance
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Carry out as usual; an error made on purpose exits with :data:`FAILED`."""
        try:
            return super().invoke(ctx)
        except FedsplitError as error:
            console.error(error)
            raise typer.Exit(FAILED) from None


def load_running(text: str) -> Any:
    """Load a whole model that can run: a language model where its family is one.

    Raises:
        ModelError, UnsupportedModelError: see :func:`fedsplit.models.load`.
    """
    from fedsplit.errors import UnsupportedModelError
    from fedsplit.models import load

    try:
        return load(text, "causal-lm").model
    except UnsupportedModelError:
        return load(text, "sequence-classification", num_labels=2).model


def painter(generator: Path | None) -> Painter:
    """Return the chosen generator of pictures.

    Raises:
        ModelError: for an ONNX file that is no generator.
    """
    if generator is None:
        from fedsplit.fingerprints.portraits.sheet import paint_dog

        return paint_dog
    from fedsplit.fingerprints.portraits.onnx_generator import OnnxGenerator

    return OnnxGenerator(generator)


def portrait_vector(source: Source, tokens: tuple[int, ...] | None = None) -> NDArray[np.float64]:
    """The 512-vector of a model or of a published fingerprint.

    Args:
        source: what was opened.
        tokens: the base's list, where the source is to be seen as its descendant.

    Raises:
        LineageError: for a fingerprint too small for a portrait, or a model too narrow.
    """
    from fedsplit.fingerprints.evidence.public_file import make
    from fedsplit.fingerprints.portraits.encoder import vector

    if source.public is not None:
        return vector(source.public)
    view: WeightView | None = source.view
    assert view is not None
    return vector(make(view, source.name, tokens=tokens))


def write_picture(
    path: Path, vector: NDArray[np.float64], generator: Path | None, size: int = 512
) -> None:
    """Draw a portrait as PNG, or as SVG with the built-in generator.

    Raises:
        LineageError: for another file type, SVG of an ONNX generator, or a file not writable.
    """
    kind = path.suffix.lower()
    if kind not in (".png", ".svg") or (kind == ".svg" and generator is not None):
        allowed = ".png" if generator is not None else ".png or .svg"
        raise LineageError(f"picture={str(path)!r}: must end in {allowed}")
    if kind == ".svg":
        from fedsplit.fingerprints.portraits.portrait import portrait_svg

        data = portrait_svg(vector, size)
        write_file(path, lambda p: p.write_text(data, encoding="utf-8"))
    else:
        picture = painter(generator)(vector, size)
        write_file(path, lambda p: picture.save(p, format="PNG", optimize=True))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file, its folder made first.

    Raises:
        ModelError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be written: {error.strerror or error}") from error
