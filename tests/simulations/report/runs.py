"""Run folders as experiments leave them, with as much in them as a page can show."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from fedsplit.config import RunConfig
from fedsplit.errors import RunError
from simulations.core.run_folder import RunFolder

HOSTILE = "<script>alert(1)</script> [/b] $x^{ \N{GRINNING FACE} " + "verylongword" * 12


def attack(name: str, hidden: float) -> dict[str, Any]:
    return {
        "name": name,
        "empirical_privacy": hidden,
        "interval": [0.97 - hidden, 1.03 - hidden],
        "knowledge": f"white box: what {name} knows",
    }


def split_results(owners: int = 4, rounds: int = 3, name: str = "owner") -> dict[str, Any]:
    draw = random.Random(owners)
    names = [f"{name}-{index}" for index in range(owners)]

    def metrics(level: float) -> dict[str, Any]:
        each = {n: {"loss": level + draw.random() / 4, "accuracy": 0.8 - level / 4} for n in names}
        return {"loss": level, "accuracy": 0.8 - level / 4, "owners": each}

    rows = [
        {
            "round": number,
            "train": {"steps": 8, "metrics": metrics(2.0 / number)},
            "evaluate": {"metrics": metrics(2.1 / number)},
        }
        for number in range(1, rounds + 1)
    ]
    gate = {"verdict": "in_lineage", "pcs": 0.9998, "worst": 0.98, "action": "accept"}
    cost = {"eta": {"max": 10.0, "median": 10.0}}
    sent = {"bytes": 2_000_000, "sessions": 6, "tokens": 9000, "texts": 360, "cost": cost}
    sent |= {"views": {"max": 1, "median": 1}, "guarantee": "", "budget": {"budget.views_total": 3}}
    return {
        "about": "owners tune a model",
        "seed": 0,
        "owners": [
            {"name": n, "train": 360, "test": 90, "labels": [120, 40 * index + 1, 100]}
            for index, n in enumerate(names)
        ],
        "classes": ["networking", "files and OS", "text and markup"],
        "data_digest": "0" * 64,
        "lineage": [{"round": n, "score": 0.999 - n / 1e4, **gate} for n in range(1, rounds + 1)],
        "traffic": {
            "bytes_up": 8e6,
            "bytes_down": 3e6,
            "bytes_per_token": 64.0,
            "messages": 24,
        },
        "privacy": {
            "mechanism": "dchi",
            "eta": 10.0,
            "noise_ratio": 0.0,
            "cti": "off",
            "embedding_inversion": attack("nearest", 0.7),
            "map_inversion": attack("map", 0.4),
        },
        "utility": {
            "metric": "accuracy",
            "federated": 0.72,
            "centralised": 0.8,
            "baseline": 0.3,
            "baseline_is": "majority class",
        },
        "sent": [{"owner": n, **sent} for n in names],
        "rounds": rows,
        "model": {"trained_parameters": 21_400_000},
    }


def split_run(folder: Path, **changes: Any) -> Path:
    settings = {"privacy.mechanism": "dchi", "privacy.eta": changes.pop("eta", 10.0)}
    with RunFolder(folder, name="demo", kind="split") as run:
        run.write_config(RunConfig.from_flat(settings).to_flat())
        run.record(**split_results(**changes))
    return folder


def failed_run(folder: Path) -> Path:
    try:
        with RunFolder(folder, name="demo", kind="split") as run:
            whole = split_results()
            run.record(**{key: whole[key] for key in ("about", "owners", "classes", "sent")})
            raise RunError("serverapp: no owner took a step\n  | " + HOSTILE + "\n  | last line")
    except RunError:
        return folder


def table_run(folder: Path) -> Path:
    with RunFolder(folder, name="sweep", kind="table") as run:
        rows = [
            {"variant": v, "eta": e, "accuracy": 0.9 - e / 100, "empirical_privacy_map": e / 20}
            for v in ("plain", HOSTILE)
            for e in (8.0, 10.0, 12.0)
        ]
        run.record(about=HOSTILE, rows=rows * 10, summary=rows, broken=2)
    return folder
