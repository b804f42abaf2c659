"""The kind ``split``: one federated split-tuning run, its centralised twin, and an attack on it."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console

from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, RunError
from fedsplit.privacy.labels.table import shows_text
from fedsplit.tasks import task_of
from simulations.core.owner_samples import OwnerSamples, data_digest, label_names, owner_samples
from simulations.core.progress import RunProgress
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, read_options
from simulations.runtime.federated import ENGINES, simulate
from simulations.runtime.ledgers import sent_by_owners
from simulations.split.centralised import CentralisedTwin, TwinReport
from simulations.split.results_table import print_table
from simulations.split.transcript_attacks import attack_transcript, summary_of, write_truth_file
from strategies.base_model import load_base

# Numbers of an evaluation that are no scores of the task's.
AVERAGES = ("num-examples", "owners", "loss", "accuracy", "share-touched", "targets")
OPTIONS: dict[str, Any] = {
    "cpus-per-owner": 0.5,
    "engine": ENGINES[0],
    "ray-address": "",
    "twin": True,
    "attack-samples": 400,
}


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment; what is known is recorded after every stage."""
    options = read_options(experiment.options, OPTIONS)
    config = experiment.config
    folder.write_config(config.to_flat())
    stages: dict[str, float] = {}
    with RunProgress(console) as progress:
        progress.stage("preparing data")
        began = time.perf_counter()
        tokenizer = load_base(config).tokenizer
        owners = owner_samples(config, tokenizer)
        _check_labels(config, owners)
        folder.record(
            about=experiment.about,
            seed=config.seed,
            owners=_owners(owners),
            classes=list(label_names(config)),
            data_digest=data_digest(config),
        )
        stages["prepare"] = time.perf_counter() - began

        progress.stage(f"federated run, {config.data.owners} owners")
        began = time.perf_counter()
        try:
            config, server = simulate(
                config,
                folder.path,
                cpus_per_owner=options["cpus-per-owner"],
                engine=options["engine"],
                ray_address=options["ray-address"],
                on_line=progress.on_line,
            )
        except RunError:  # what left by then is told all the same
            folder.record(sent=sent_by_owners(folder.path / "homes"))
            raise
        stages["federated"] = time.perf_counter() - began
        folder.record(**_federated_results(config, server))

        attack: dict[str, Any] = {}
        language = not task_of(config).labelled  # then gradients show the text of any bottom
        if config.output.transcript and (config.split.bottom == "frozen" or language):
            write_truth_file(folder.path, owners)
            progress.stage("attacking what the server received")
            began = time.perf_counter()
            path, samples = folder.path / "server/transcript.safetensors", options["attack-samples"]
            attack = attack_transcript(config, path, owners, samples=samples)
            stages["attack"] = time.perf_counter() - began
            folder.record(privacy=_privacy(config, server, attack))

        twin = None
        if options["twin"]:
            progress.stage("centralised twin: same model and steps, no split, no noise")
            began = time.perf_counter()
            waves = [r["train"]["waves"] for r in server["rounds"]]
            twin = CentralisedTwin(config, owners).run(
                waves, lambda done, whole: progress.update(done / whole)
            )
            stages["centralised"] = time.perf_counter() - began
        folder.record(utility=_utility(config, server, twin), stages_s=stages)
    print_table(console, folder.results, label_names(config))


def _check_labels(config: RunConfig, owners: list[OwnerSamples]) -> None:
    if task_of(config).exclusive:
        top = max(int(s.train.labels.max()) for s in owners if s.train.labels is not None)
        if top >= config.model.labels:
            raise ConfigError(f"model.labels={config.model.labels}: must be >= {top + 1}")


def _owners(owners: list[OwnerSamples]) -> list[dict[str, Any]]:
    rows = []
    for owner in owners:
        row: dict[str, Any] = {"name": owner.name, "train": len(owner.train)}
        row |= {"test": len(owner.test), "tokens": sum(owner.train.lengths)}
        if (classes := owner.train.classes) is not None:
            row["labels"] = classes.bincount().tolist()
        rows.append(row)
    return rows


def _federated_results(config: RunConfig, server: dict[str, Any]) -> dict[str, Any]:
    parts = [r[mode] for r in server["rounds"] for mode in ("train", "evaluate") if mode in r]
    names = ("bytes_up", "bytes_down", "row_bytes", "messages", "row_tokens")
    up, down, row_bytes, messages, tokens = (sum(p[name] for p in parts) for name in names)
    train_s = sum(r["train"]["seconds"] for r in server["rounds"])
    steps = sum(r["train"]["steps"] for r in server["rounds"])
    return {
        "lineage": [
            {k: v for k, v in r["lineage"].items() if k != "per_layer"} | {"round": r["round"]}
            for r in server["rounds"]
        ],
        "traffic": {
            "bytes_up": up,
            "bytes_down": down,
            "bytes_per_token": row_bytes / tokens if tokens else 0.0,
            "messages": messages,
            "tokens_sent": tokens,
            "bottom_bytes": server["bottom_bytes"],
        },
        "sent": server["sent"],
        "privacy": _privacy(config, server, {}),
        "speed": {"steps": steps, "session_s": train_s, "steps_per_s": steps / max(train_s, 1e-9)},
        "rounds": server["rounds"],
        "model": {
            key: server[key]
            for key in ("base_digest", "bottom_digest", "trainable_share", "trained_parameters")
        },
    }


def _privacy(config: RunConfig, server: dict[str, Any], attacks: dict[str, Any]) -> dict[str, Any]:
    # Only rounds in which something was perturbed anew know how many tokens were touched.
    touched = [r["train"]["metrics"].get("share-touched", 0.0) for r in server["rounds"]]
    p = config.privacy
    told: dict[str, Any] = {
        "mechanism": p.mechanism,
        "eta": p.eta,
        "noise_ratio": p.noise_ratio,
        "cti": p.cti,
    }
    told |= {"share_touched": max(touched), "denoise": p.denoise}
    if shows_text(config):
        told["text"] = "text is read"
    return {**told, **attacks, **summary_of(attacks)}


def _utility(config: RunConfig, server: dict[str, Any], twin: TwinReport | None) -> dict[str, Any]:
    evaluated = [r["evaluate"]["metrics"] for r in server["rounds"] if "evaluate" in r]
    last: dict[str, Any] = evaluated[-1] if evaluated else {}
    task = task_of(config)
    utility: dict[str, Any] = {
        "metric": task.metric,
        "federated": task.headline(last),
        "centralised": None,
        "baseline": None,
        "samples": last.get("num-examples", 0),
        "reporting": len(last.get("owners", ())),
        **{key: value for key, value in last.items() if key not in AVERAGES},
    }
    if twin is not None:
        utility["centralised"] = task.headline(twin.metrics)
        utility["centralised_scores"] = twin.metrics
        utility["baseline"] = twin.majority if task.exclusive else task.headline(twin.zero_shot)
        utility["baseline_is"] = "majority class" if task.exclusive else "zero-shot"
        utility["centralised_steps_per_s"] = twin.steps / max(twin.train_s, 1e-9)
    return utility
