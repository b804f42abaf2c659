"""``fedsplit compare``: is B a descendant of A, how sure is that, and which blocks are not?"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fedsplit.commands.models import CodedCommand
from fedsplit.commands.options import Generator, JsonFile, write_json
from fedsplit.observe.console import console

if TYPE_CHECKING:
    from fedsplit.fingerprints import Fingerprint
    from fedsplit.fingerprints.gate.verdict import Judgement
    from fedsplit.fingerprints.sources import Source
    from fedsplit.fingerprints.view import Similarity, WeightView

RUN_BYTES = 1 << 30
BAR = 24
WORDS = {
    "in_lineage": ("green", "in lineage", "B descends from A"),
    "not_shown": ("yellow", "not shown", "neither a descendant nor plainly a stranger"),
    "independent": ("red", "independent", "B is as far from A as strangers are"),
}


@dataclass
class Comparison:
    """What was found between two models."""

    judgement: Judgement
    judged: str
    similarity: Similarity
    values: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(cls=CodedCommand)(compare)


def compare(
    base: Annotated[
        str,
        typer.Argument(
            metavar="A", help="folder, .safetensors, .gguf, package:NAME, hub, run, or fingerprint"
        ),
    ],
    suspect: Annotated[str, typer.Argument(metavar="B", help="the same")],
    signer: Annotated[
        str | None, typer.Option(help="public key (hex or file) that A's fingerprint must have")
    ] = None,
    pictures: Annotated[Path | None, typer.Option(help="write both portraits here")] = None,
    generator: Generator = None,
    run: Annotated[
        bool | None,
        typer.Option("--run/--no-run", help="also run both (REEF); default: if small"),
    ] = None,
    run_base: Annotated[
        str, typer.Option("--base", help="of A or B, a split run: its base, if it is elsewhere now")
    ] = "",
    json_: JsonFile = None,
) -> None:
    """Compare two models: every fingerprint, a verdict with its error rate, block by block.

    Exit code: 0 in lineage, 1 not shown, 2 independent, 3 error, 4 wrong usage.
    """
    from fedsplit.errors import ConfigError
    from fedsplit.fingerprints.evidence.keys import read_public
    from fedsplit.fingerprints.sources import open_source

    wanted = None if signer is None else read_public(signer)
    ours = open_source(base, signer=wanted, base=run_base)
    theirs = open_source(suspect, base=run_base)
    if run_base and ours.model is None and theirs.model is None:
        raise ConfigError(f"--base {run_base}: must be left out: neither is a split run's folder")
    if ours.view is not None and theirs.view is not None:
        found = between_weights(ours, theirs, run)
    else:
        found = between_public(ours, theirs)
    show(found, ours, theirs)
    figures = asdict(found.judgement) | {"judged": found.judged, "values": found.values}
    write_json(json_, figures)
    if pictures is not None:
        draw(pictures, ours, theirs, generator)
    raise typer.Exit(found.judgement.exit_code)


def between_weights(base: Source, suspect: Source, run: bool | None) -> Comparison:
    """Every fingerprint of two models at hand; the verdict is the aligned products'.

    Models of different width are compared by
    :func:`fedsplit.fingerprints.methods.widths.compare_widths`.

    Raises:
        LineageError: for no shared token rows.
        ModelError: for missing tensors, NaN or infinite values.
    """
    from fedsplit.errors import LineageError
    from fedsplit.fingerprints import FINGERPRINTS
    from fedsplit.fingerprints.gate.verdict import judge

    assert base.view is not None
    assert suspect.view is not None
    if base.width == suspect.width:
        score = FINGERPRINTS["score"]().compare(base.view, suspect.view)
        found = Comparison(judge(score, base.width), "score", score, {"score": score.value})
    else:
        found = between_widths(base.view, suspect.view)
    for name, fingerprint in FINGERPRINTS.items():
        try:
            if fingerprint.needs_running:
                found.values[name] = _of_running(fingerprint(), base, suspect, run)
            elif name != "score":
                found.values[name] = fingerprint().compare(base.view, suspect.view).value
        except LineageError as error:
            found.reasons[name] = str(error)
    return found


def between_widths(base: WeightView, suspect: WeightView) -> Comparison:
    """The products in the directions that both embeddings know, for models of different width."""
    from fedsplit.errors import LineageError
    from fedsplit.fingerprints.gate.verdict import judge_widths, not_comparable
    from fedsplit.fingerprints.methods.widths import compare_widths

    try:
        score = compare_widths(base, suspect)
    except LineageError as error:
        nothing, judgement = not_comparable(str(error))
        return Comparison(judgement, "none", nothing, reasons={"score": str(error)})
    judgement = judge_widths(score, min(base.width, suspect.width))
    return Comparison(judgement, "score", score, {"score": score.value})


def between_public(base: Source, suspect: Source) -> Comparison:
    """The whitened invariants' sketches, where at least one side is a published file.

    Raises:
        LineageError: for files made with other tokens, sizes or seeds, or different widths.
        ModelError: for missing tensors, NaN or infinite values.
    """
    from fedsplit.fingerprints.evidence import public_file
    from fedsplit.fingerprints.gate.verdict import judge_public

    if base.public is not None and suspect.public is not None:
        found = public_file.compare_files(base.public, suspect.public)
    elif base.public is not None:
        assert suspect.view is not None
        found = public_file.compare_public(base.public, suspect.view)
    else:
        assert suspect.public is not None
        assert base.view is not None
        found = public_file.compare_public(suspect.public, base.view)
    published = base.public or suspect.public
    assert published is not None
    judgement = judge_public(found, published.width, published.size)
    return Comparison(judgement, "ics_whitened", found, {"ics_whitened": found.value})


def _of_running(fingerprint: Fingerprint, base: Source, suspect: Source, run: bool | None) -> float:
    from fedsplit.commands.models import load_running
    from fedsplit.errors import FedsplitError, LineageError
    from fedsplit.fingerprints.view import WeightView

    if run is False:
        raise LineageError("not run (--run loads both models)")
    if run is None:
        size = sum(_bytes(source) for source in (base, suspect))
        if size > RUN_BYTES:
            raise LineageError(f"not run: {size / 2**30:.1f} GiB of weights (--run loads them)")
    try:
        ours, theirs = (
            WeightView.of_module(load_running(str(s.folder)) if s.model is None else s.model)
            for s in (base, suspect)
        )
    except FedsplitError as error:
        raise LineageError(f"not run: {error}") from error
    return fingerprint.compare(ours, theirs).value


def _bytes(source: Source) -> int:
    if source.model is not None:
        return sum(p.numel() * p.element_size() for p in source.model.parameters())
    assert source.folder is not None
    return sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))


def show(found: Comparison, base: Source, suspect: Source) -> None:
    """Print the table of fingerprints, the blocks and the verdict."""
    from fedsplit.fingerprints import FINGERPRINTS

    console.print(f"A = {_described(base)}\nB = {_described(suspect)}")
    for source in (base, suspect):
        if source.public is not None and not source.public.standard_tokens:
            console.print(
                f"{source.name}: its token list is not the public draw; whoever chose it could "
                "forge likeness",
                style="yellow",
            )
    table = Table("fingerprint", "B to A", "strangers, most", "descendants, least", "")
    for name, fingerprint in FINGERPRINTS.items():
        strangers, descendants = fingerprint.strangers, fingerprint.descendants
        if name in found.values:
            remark = "the verdict's" if name == found.judged else ""
            value = f"{found.values[name]:.4f}"
            table.add_row(name, value, strangers, descendants, remark)
        elif name in found.reasons:
            table.add_row(name, "-", strangers, descendants, found.reasons[name])
    console.print(table)
    console.print(blocks(found))
    for note in found.similarity.notes:
        console.print(f"note: {note}")
    judged = found.judgement
    colour, words, meaning = WORDS[judged.verdict]
    console.print(Text.assemble((words, colour), f": {meaning}"))
    console.print(
        f"score {judged.score:.4f}, p = {judged.p_value:.1e} under independence, {judged.z:.1f} "
        f"standard deviations; needed {judged.threshold:.4f} for a false-positive rate of "
        f"{judged.false_positive_rate:.0e}",
        highlight=False,
    )
    if judged.diverged:
        where = ", ".join(map(str, judged.diverged))
        console.print(f"blocks that look like a stranger's (replaced or spliced): {where}")


def blocks(found: Comparison) -> Table:
    """Which blocks are related: a bar and a p-value each."""
    table = Table("block of A", "likeness", "", "p", "")
    judged = found.judgement
    for index, value in enumerate(found.similarity.per_block):
        bar = "█" * round(BAR * min(1.0, max(0.0, value)))
        remark = "a stranger's" if index in judged.diverged else ""
        table.add_row(
            str(index), f"{value:.3f}", bar.ljust(BAR, "·"), f"{judged.block_p[index]:.1e}", remark
        )
    return table


def _described(source: Source) -> str:
    kind = "weights"
    if source.public is not None:
        by = source.public.signer
        kind = f"published fingerprint, signed by {by[:16]}..." if by else "unsigned fingerprint"
    return f"{source.name} ({kind}; {source.depth} blocks of width {source.width})"


def draw(folder: Path, base: Source, suspect: Source, generator: Path | None) -> None:
    """Write A.png and B.png; both are seen through the same token list."""
    from fedsplit.commands.models import portrait_vector, write_picture

    published = base.public or suspect.public
    tokens: Any = None if published is None else published.tokens
    if tokens is None:
        from fedsplit.fingerprints.view import choose_tokens, shared_rows

        assert base.view is not None
        assert suspect.view is not None
        tokens = choose_tokens(shared_rows(base.view, suspect.view))
    for letter, source in (("A", base), ("B", suspect)):
        path = folder / f"{letter}.png"
        write_picture(path, portrait_vector(source, tokens), generator)
        console.print(f"portrait of {letter}: {path}", highlight=False)
    if base.width != suspect.width:
        console.print(
            f"portraits of widths {base.width} and {suspect.width} differ even between a model and "
            "its descendant: go by the verdict"
        )
