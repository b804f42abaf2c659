"""``fedsplit export``: a split run's result as files that Hugging Face and PEFT load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsplit.errors import ConfigError, ModelError
from fedsplit.observe.console import console


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(export)


def export(
    run: Annotated[Path, typer.Argument(help="a split-tuning run's folder, at the model owner")],
    out: Annotated[
        Path | None, typer.Option(help="write here; default: beside the run's top.safetensors")
    ] = None,
    base: Annotated[str, typer.Option(help="the base, if it is elsewhere now")] = "",
    owners_agreed: Annotated[
        bool,
        typer.Option("--owners-agreed", help="export what owners trained together, too"),
    ] = False,
) -> None:
    """Write model/ (a Hugging Face folder) and, where there are adapters, adapter/.

    Who has the top and the base has everything: this is the model owner's command. A joint bottom
    and an owners' head are the owners' work as well: they are exported with --owners-agreed alone.
    An owner holds its bottom (and head) and no top: there is nothing that it could export.
    """
    from fedsplit.models.trained import FILE, find_server_folder, server_folder
    from fedsplit.models.trained.whole import whole_of_run

    written = server_folder(run, "model/config.json")
    if written is not None and server_folder(run, FILE) is None:
        raise ModelError(f"{run}: holds {written / 'model'} already, written when its run ended")
    place = find_server_folder(run, FILE, left_by="a split run with output.save")
    whole = whole_of_run(place, base)
    if whole.owners and not owners_agreed:
        parts = [p for p, who in whole.holders().items() if "owners" in who]
        raise ConfigError(
            f"{run}: {' and '.join(parts)} were trained by the owners together: must be given "
            "--owners-agreed, once they have agreed"
        )
    folder = out or place
    folder.mkdir(parents=True, exist_ok=True)
    about = whole.write(folder)
    console.print(f"{folder / 'model'}: the whole model", highlight=False)
    if about["adapter"] is not None:
        form, on = about["adapter"]["format"], about["adapter"]["on"]
        console.print(
            f"{folder / 'adapter'}: {form} adapter on {on}",
            highlight=False,
        )
