"""One cell of a sweep: a whole federated run in this process, and attacks on what it received."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from fedsplit.config import RunConfig
from fedsplit.models.splitting.halves import split
from fedsplit.owners.policy.description import TEMPLATE
from fedsplit.owners.policy.rules import Policy
from fedsplit.privacy import build_mechanism
from simulations.core.owner_samples import owner_samples
from simulations.runtime.local_run import run_in_process
from simulations.split.transcript_attacks import attack_transcript, strongest
from simulations.sweep.plan import Cell
from strategies.base_model import load_base

FLOOR = "measure.min_empirical_privacy"


def run_cell(cell: Cell, folder: Path, attack_samples: int) -> dict[str, Any]:
    """Run one cell in ``folder``, which is removed at the end, and return its row.

    At most ``attack_samples`` samples are attacked; 0 = no attack.  Each attempt has a folder of
    its own below: what an attempt left that died with its node, owners' state above all, must not
    be found by the next, nor be written to by what is still dying.
    """
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    attempt = Path(tempfile.mkdtemp(prefix="attempt-", dir=folder))
    try:
        config, server = run_in_process(cell.config, attempt)
        row: dict[str, Any] = {**cell.columns(), **utility(server)}
        row["train_seconds"] = time.perf_counter() - began
        frozen = config.split.bottom == "frozen"  # a joint bottom's rows are not kept
        if attack_samples and config.output.transcript and frozen:
            owners = owner_samples(config, load_base(config).tokenizer)
            transcript = attempt / "server" / "transcript.safetensors"
            row |= privacy(attack_transcript(config, transcript, owners, samples=attack_samples))
            row["template"] = template(config, row.get("empirical_privacy_map"))
    finally:
        shutil.rmtree(attempt, ignore_errors=True)
        with contextlib.suppress(OSError):  # another attempt's is in it
            folder.rmdir()
    row["seconds"] = time.perf_counter() - began
    return row


def utility(server: dict[str, Any]) -> dict[str, Any]:
    """Return what the last evaluation and the rounds say of utility and of CTI."""
    last = [r["evaluate"]["metrics"] for r in server["rounds"] if "evaluate" in r][-1]
    touched = [r["train"]["metrics"].get("share-touched", 0.0) for r in server["rounds"]]
    return {
        "accuracy": last.get("accuracy"),
        "loss": last.get("loss"),
        "test_samples": last.get("num-examples"),
        "touched_share": max(touched),
    }


def privacy(attacks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return empirical privacy against the paper's attacker and the strongest, and what each read.

    Columns ``read_ATTACK`` are shares of tokens, with their intervals (``_low``, ``_high``).
    """
    if not attacks:
        return {}
    best = strongest(attacks)
    row: dict[str, Any] = {"strongest_attack": best}
    for name, found in attacks.items():
        row[f"read_{name}"] = found["success"]
        row[f"read_{name}_low"], row[f"read_{name}_high"] = found["interval"]
    for column, name in (
        ("empirical_privacy", "embedding_inversion"),
        ("empirical_privacy_map", best),
    ):
        if name in attacks:
            low, high = attacks[name]["interval"]
            row[column] = attacks[name]["empirical_privacy"]
            row[f"{column}_low"], row[f"{column}_high"] = 1.0 - high, 1.0 - low
    return row


def template_floor() -> float:
    """Return the empirical privacy that the policy of ``fedsplit policy init`` demands."""
    return float(Policy.parse(TEMPLATE.read_bytes()).rules.get(FLOOR, 0.0))


def template(config: RunConfig, empirical_privacy: float | None) -> str:
    """Return how the policy that ``fedsplit policy init`` writes takes this mechanism.

    Returns:
        ``yes``: its rules of noise and its floor of empirical privacy are kept; ``floor``: the
        floor alone; ``no``: neither, or what was measured is below the floor.
    """
    if empirical_privacy is None or empirical_privacy < template_floor():
        return "no"
    policy = Policy.parse(TEMPLATE.read_bytes())
    loaded = load_base(config)
    bottom = split(loaded.model, config.split.k, verify=False)[0].eval()
    mechanism = build_mechanism(config.privacy, bottom, bottom.vocab, loaded.tokenizer)
    ratio = mechanism.noise_ratio(bottom, bottom.vocab)
    breaches = policy.mechanism_breaches(mechanism.name, mechanism.describe(), ratio)
    return "floor" if breaches else "yes"
