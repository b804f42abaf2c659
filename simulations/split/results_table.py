"""The table that a split run ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsplit.attacks import ATTACKS
from fedsplit.privacy import MECHANISMS
from fedsplit.registry import pick
from simulations.core.units import score
from simulations.report.score_tables import score_rows
from simulations.report.words import extent
from simulations.split.transcript_attacks import FORWARD

# Result -> the attacker in words, from the weakest to the strongest.
ATTACKERS = {row.result_key or row.name: row.words for row in ATTACKS.values() if row.words}


def print_table(console: Console, results: Mapping[str, Any], labels: Sequence[str]) -> None:
    """Print what the run showed, each line with what it means."""
    table = Table(title="What this run showed", title_justify="left", show_lines=False)
    table.add_column("", style="bold")
    table.add_column("", justify="right")
    table.add_column("what it means")
    for row in table_rows(results):
        table.add_row(*row)
    console.print(table)
    owners = Table(title="Who took part", title_justify="left")
    for column in ("owner", "training texts", "held-out texts", "tokens", "mostly about"):
        left = column in ("owner", "mostly about")
        owners.add_column(column, justify="left" if left else "right")
    for owner in results["owners"]:
        counts = owner.get("labels")
        mostly = ""
        if counts and len(labels) >= len(counts):
            best = sorted(range(len(counts)), key=lambda i: -counts[i])[:2]
            shares = (100 * counts[i] / max(1, sum(counts)) for i in best)
            mostly = ", ".join(f"{labels[i]} {s:.0f} %" for i, s in zip(best, shares, strict=True))
        cells = (owner["name"], owner["train"], owner["test"], owner["tokens"], mostly)
        owners.add_row(*map(str, cells))
    console.print(owners)


def table_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (what, figure, meaning) rows."""
    utility, privacy, traffic = results["utility"], results["privacy"], results["traffic"]
    meanings = {
        "federated": "the owners' held-out texts, answered by the server's tuned top",
        "centralised": "same model and steps in one place, nothing protected",
        "baseline": f"{utility.get('baseline_is', 'nothing learned')}",
    }
    metric = utility["metric"]
    own = extent(utility)
    whose = f"texts of {own} together" if own else "all owners' texts together"
    rows = [(f"{metric}, {k}", score(metric, utility[k]), why) for k, why in meanings.items()]
    if "mcc" in utility:
        found = f"{100 * utility['macro-f1']:.1f} %, {utility['mcc']:.3f}"
        worst = 100 * min(utility["recalls"])
        why = f"of the federated model, {whose}; worst recall {worst:.1f} %"
        rows.append(("macro-F1, Matthews' correlation", found, why))
    else:
        why = f"of the federated model, {whose}; in one place: {{}}"
        found_scores = [s for s in score_rows(utility) if s[0] not in (metric, "spearman-error")]
        rows += [(n, here, why.format(there or "not measured")) for n, here, there in found_scores]
    if "strongest" in privacy:
        best = privacy["strongest"]
        why = f"against the strongest attacker over all that crossed: {_words(best['attacker'])}"
        if best["text_recovery"] is not None:
            why += f"; it reads {100 * best['text_recovery']:.1f} % of the texts without an error"
        rows.append(("empirical privacy", f"{100 * best['empirical_privacy']:.1f} %", why))
    if "text" in privacy:
        why = "the gradient of each next token spells it, and nothing is done to gradients"
        rows.append(("text", privacy["text"], why))
    told = "... by attacker"
    for key, attacker in ATTACKERS.items():
        if key not in privacy:
            continue
        attacker += " (representations alone)" if key in FORWARD else ""
        low, high = privacy[key]["interval"]
        between = f"({100 * (1 - high):.1f} to {100 * (1 - low):.1f} %)"
        why = f"tokens the server cannot recover: {attacker} {between}"
        rows.append((told, f"{100 * privacy[key]['empirical_privacy']:.1f} %", why))
        told = ""
    mechanism = pick(MECHANISMS, privacy["mechanism"], "mechanism").label(privacy)
    rows.append(("mechanism", mechanism, "noise drawn once per text, by its owner"))
    if privacy["cti"] != "off":
        why = "contributing tokens (CTI): they lose most of their guarantee"
        rows.append(("tokens with less noise", f"{100 * privacy['share_touched']:.2f} %", why))
    rounds = [r for r in results["lineage"] if r["verdict"] != "off"]
    if rounds:
        verdict = rounds[-1]["verdict"].replace("_", " ")
        why = f"of the tuned top against its base: {_lineage(rounds[-1])}"
        rows.append(("lineage", verdict, why))
    each = f"{traffic['bytes_per_token']:.0f} bytes per token, each text once; "
    each += f"{traffic['messages']} Flower messages"
    then = f"the bottom ({traffic['bottom_bytes'] / 1e6:.1f} MB) to each owner, then logits"
    for who, key, why in (("owners", "bytes_up", each), ("server", "bytes_down", then)):
        rows.append((f"sent by the {who}", f"{traffic[key] / 1e6:.1f} MB", why))
    return rows


def _words(attacker: str) -> str:
    return ATTACKERS.get(attacker, attacker)


def _lineage(row: Mapping[str, Any]) -> str:
    if row.get("score") is None:
        return str(row.get("error") or row.get("note") or "not measured")
    return f"score {row['score']:.3f}, parameter cosine {row['pcs']:.3f}"
