"""The table that a split run ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsplit.attacks import ATTACKS
from fedsplit.privacy import MECHANISMS
from fedsplit.registry import pick

# Result -> the attacker in words, from the weakest to the strongest.
ATTACKERS = {row.result_key: row.words for row in ATTACKS.values() if row.words}


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
        owners.add_column(
            column, justify="left" if column in ("owner", "mostly about") else "right"
        )
    for owner in results["owners"]:
        counts = owner.get("labels")
        mostly = ""
        if counts and len(labels) >= len(counts):
            best = sorted(range(len(counts)), key=lambda i: -counts[i])[:2]
            mostly = ", ".join(
                f"{labels[i]} {100 * counts[i] / max(1, sum(counts)):.0f} %" for i in best
            )
        cells = (owner["name"], owner["train"], owner["test"], owner["tokens"], mostly)
        owners.add_row(*map(str, cells))
    console.print(owners)


def table_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (what, figure, meaning) rows."""
    utility, privacy, traffic = results["utility"], results["privacy"], results["traffic"]
    percent = utility["metric"] == "accuracy"

    def figure(value: float | None) -> str:
        if value is None:
            return "not measured"
        return f"{100 * value:.1f} %" if percent else f"{value:.2f}"

    rows = [
        (
            f"{utility['metric']}, federated",
            figure(utility["federated"]),
            "the owners' held-out texts, answered by the server's tuned top",
        ),
        (
            f"{utility['metric']}, centralised",
            figure(utility["centralised"]),
            "same model and steps in one place, nothing protected",
        ),
        (
            f"{utility['metric']}, baseline",
            figure(utility["baseline"]),
            f"{utility.get('baseline_is', 'nothing learned')}",
        ),
    ]
    told = "empirical privacy"
    for key, attacker in ATTACKERS.items():
        if key not in privacy:
            continue
        low, high = privacy[key]["interval"]
        rows.append(
            (
                told,
                f"{100 * privacy[key]['empirical_privacy']:.1f} %",
                f"tokens the server cannot recover: {attacker} "
                f"({100 * (1 - high):.1f} to {100 * (1 - low):.1f} %)",
            )
        )
        told = ""
    rows.append(("mechanism", _mechanism(privacy), "noise drawn once per text, by its owner"))
    if privacy["cti"] != "off":
        rows.append(
            (
                "tokens with less noise",
                f"{100 * privacy['share_touched']:.2f} %",
                "contributing tokens (CTI): they lose most of their guarantee",
            )
        )
    rounds = [r for r in results["lineage"] if r["verdict"] != "off"]
    if rounds:
        last = rounds[-1]
        rows.append(
            (
                "lineage",
                last["verdict"].replace("_", " "),
                f"of the tuned top against its base: {_lineage(last)}",
            )
        )
    rows.append(
        (
            "sent by the owners",
            f"{traffic['bytes_up'] / 1e6:.1f} MB",
            f"{traffic['bytes_per_token']:.0f} bytes per token, each text once; "
            f"{traffic['messages']} Flower messages",
        )
    )
    rows.append(
        (
            "sent by the server",
            f"{traffic['bytes_down'] / 1e6:.1f} MB",
            f"the bottom ({traffic['bottom_bytes'] / 1e6:.1f} MB) to each owner, then logits",
        )
    )
    return rows


def _lineage(row: Mapping[str, Any]) -> str:
    if row.get("score") is None:
        return str(row.get("error") or row.get("note") or "not measured")
    return f"score {row['score']:.3f}, parameter cosine {row['pcs']:.3f}"


def _mechanism(privacy: Mapping[str, Any]) -> str:
    return pick(MECHANISMS, privacy["mechanism"], "mechanism").label(privacy)
