"""``fedsplit fingerprint``: what a model owner publishes instead of parameters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fedsplit.commands.options import Generator
from fedsplit.observe.console import console

if TYPE_CHECKING:
    from fedsplit.fingerprints.evidence.public_file import PublicFingerprint
    from fedsplit.fingerprints.sources import Source

FULL, SMALL = 32, 16


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(fingerprint)


def fingerprint(
    model: Annotated[
        str,
        typer.Argument(help="folder, .safetensors, .gguf, package:NAME, hub, run, or fingerprint"),
    ],
    out: Annotated[Path | None, typer.Option(help="write the public fingerprint here")] = None,
    key: Annotated[
        Path | None, typer.Option(help="Ed25519 private key (PEM) to sign it with")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="write the portrait: .png or .svg")] = None,
    generator: Generator = None,
    sketch: Annotated[
        bool, typer.Option("--sketch", help="a smaller file that reveals a quarter as much")
    ] = False,
    tokens_of: Annotated[
        str | None,
        typer.Option(help="a base's fingerprint whose token list is used: to compare with it"),
    ] = None,
    name: Annotated[str, typer.Option(help="the model's name in the file")] = "",
    run_base: Annotated[
        str, typer.Option("--base", help="with a split run's folder: its base, if elsewhere now")
    ] = "",
) -> None:
    """Make a model's public fingerprint, and say what it reveals."""
    from fedsplit.commands.models import portrait_vector, write_picture
    from fedsplit.errors import ConfigError, LineageError
    from fedsplit.fingerprints.evidence.keys import load_key, public_hex
    from fedsplit.fingerprints.evidence.public_file import make, read, write
    from fedsplit.fingerprints.sources import open_source

    signing = None if key is None else load_key(key)
    base = None if tokens_of is None else read(tokens_of)
    source = open_source(model, base=run_base)
    if run_base and source.model is None:
        raise ConfigError(f"--base: must not be given with {model}, which is no split run's folder")
    if source.public is not None and (out is not None or base is not None):
        raise LineageError(f"{model}: is a fingerprint already; a new one needs the weights")
    tokens = None if base is None else base.tokens
    if source.public is not None:
        made = source.public
    else:
        assert source.view is not None
        made = make(
            source.view,
            name or source.name,
            tokens=tokens,
            size=SMALL if sketch else FULL,
            vocabulary=None if base is None else base.vocabulary,
        )
        if out is not None:
            write(made, out, signing)
    signer = made.signer if signing is None else public_hex(signing)
    console.print(summary(made, source, signer if out is not None else made.signer))
    if out is not None:
        console.print(f"written to {out} ({out.stat().st_size / 1e6:.2f} MB)", highlight=False)
        if signing is None:
            console.print("not signed: give --key (fedsplit lineage key FILE makes one)")
    if picture is not None:
        write_picture(picture, portrait_vector(source, tokens), generator)
        console.print(f"portrait: {picture}", highlight=False)


def summary(made: PublicFingerprint, source: Source, signer: str) -> Table:
    """What the fingerprint is, and what whoever reads it learns."""
    numbers = made.sketches.numel()
    table = Table("", "", title=f"fingerprint of {made.model}", title_justify="left")
    table.show_header = False
    table.add_row("model", f"{made.depth} blocks of width {made.width}")
    drawn = "the public draw" if made.standard_tokens else "NOT the public draw: look who chose it"
    table.add_row("tokens", f"{len(made.tokens)} of {made.vocabulary or '?'}, {drawn}")
    table.add_row("weights", f"sha256 {made.weights}")
    table.add_row("signed by", signer or "nobody")
    revealed = f"{numbers:,} numbers: {made.size} x {made.size} random functionals of each product"
    if source.view is not None:
        count = sum(math.prod(shape) for shape in source.view.names.values())
        revealed += f" ({numbers / count:.2%} of {count:,} parameters)"
    unknown = made.width**2 - made.size**2
    table.add_row("reveals", revealed)
    table.add_row("", "the token list, the shape above and the digest of the weights")
    table.add_row(
        "does not",
        f"determine any product ({unknown:,} of {made.width**2:,} directions stay unknown), "
        f"embeddings or single projections",
    )
    table.add_row("allows", "to test a model one holds already: that is its purpose")
    table.add_row("accuracy", accuracy(made.size))
    return table


def accuracy(size: int) -> str:
    """What the sketch costs against the exact fingerprint."""
    from fedsplit.fingerprints.gate.verdict import SKETCH_ERROR

    known = SKETCH_ERROR.get(size)
    if known is None:
        return f"one product's cosine is off by about 1/{size} for strangers"
    return (
        f"score within {known.relatives:.3f} of the exact one for relatives, {known.strangers:.3f} "
        f"for strangers (root mean square, {known.pairs} pairs)"
    )
