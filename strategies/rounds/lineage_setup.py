"""Builds a run's :class:`~.lineage_watch.LineageWatch`."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from torch import Tensor, nn

from fedsplit import storage
from fedsplit.config import LineageConfig
from fedsplit.errors import LineageError, ModelError
from fedsplit.fingerprints.evidence.chain import Chain
from fedsplit.fingerprints.evidence.keys import load_key, load_or_create
from fedsplit.fingerprints.gate.lineage_gate import GateConfig, LineageGate
from fedsplit.fingerprints.gate.owner_updates import MatrixGate

from .lineage_watch import LineageWatch

log = logging.getLogger(__name__)

KEY_VARIABLE = "FEDSPLIT_LINEAGE_KEY"
KEY_FILE = "lineage-key.pem"
CHAIN_FILE = "lineage.jsonl"


def gate_config(config: LineageConfig, *, invariants: bool = True) -> GateConfig:
    """The gate's thresholds from the run's settings.

    Args:
        config: the run's lineage settings.
        invariants: also report HuRef's invariants, which decide nothing and cost half of a check.
    """
    tokens = GateConfig.tokens if invariants else 0
    return GateConfig(in_lineage=config.in_lineage, block=config.block, tokens=tokens)


def owners_gate(part: nn.Module, config: LineageConfig) -> LineageGate | MatrixGate | None:
    """A gate over what owners return, or None where it is off.

    A part without blocks (the embeddings of a bottom with k = 0) is judged by its matrices.
    """
    if config.gate == "off":
        return None
    try:
        return LineageGate(part, gate_config(config, invariants=False))
    except ModelError:
        return MatrixGate(dict(part.named_parameters()), gate_config(config))


def open_chain(folder: Path | None, config: LineageConfig) -> Chain | None:
    """The run's evidence, continued if the folder has some already; None where it is off.

    The key is the PEM file that ``FEDSPLIT_LINEAGE_KEY`` names, or one made in the folder (0600),
    with its public half beside it.

    Raises:
        LineageError: for an unreadable key, or evidence that is broken or another signer's.
    """
    if folder is None or config.gate == "off" or not config.evidence:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    named = os.environ.get(KEY_VARIABLE, "")
    key = load_key(named) if named else load_or_create(folder / KEY_FILE)
    mend_tail(folder / CHAIN_FILE)
    return Chain(folder / CHAIN_FILE, key)


def mend_tail(path: Path) -> None:
    """Move a last line that a crash cut off to ``lineage.torn``: no record was ever complete there.

    Raises:
        LineageError: it cannot be moved.
    """
    try:
        with path.open("r+b") as file:
            whole = file.read()
            end = whole.rfind(b"\n") + 1
            if end == len(whole):
                return
            storage.append(path.with_suffix(".torn"), whole[end:])
            file.truncate(end)
            os.fsync(file.fileno())
        log.warning("%s: its last %d bytes were cut off by a crash", path, len(whole) - end)
    except FileNotFoundError:
        return
    except OSError as error:
        raise LineageError(f"{path}: cannot be mended: {error}") from None


def build_watch(
    config: LineageConfig,
    folder: Path | None,
    *,
    model: nn.Module | None = None,
    rows: Tensor | None = None,
    owners: nn.Module | None = None,
) -> LineageWatch:
    """Build a run's watch.

    Args:
        config: the run's lineage settings.
        folder: where evidence is written; None = nowhere.
        model: what the server trains, before it is trained; None if it trains nothing.
        rows: the base's token embedding rows, (V, d), for a top without them.
        owners: what owners train and return; None if they return no weights.

    Raises:
        LineageError: for an unreadable key, or evidence that is broken or another signer's.
    """
    gate = None
    if config.gate != "off" and model is not None:
        gate = LineageGate(model, gate_config(config), rows=rows)
    returned = None if owners is None else owners_gate(owners, config)
    chain = open_chain(folder, config)
    return LineageWatch(config, gate, owners=returned, chain=chain)
