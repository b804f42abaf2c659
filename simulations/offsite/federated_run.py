"""The kind ``offsite``: one federated run of offsite tuning, with an answer before and after it.

Each owner trains inside the emulator on its own prompts and answers; the server plugs the average
into the full model.  What is compared is the full model before and after, on all owners' held-out
prompts (which the experimenter knows and no server does), and its answer to one of them.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedsplit.config import RunConfig
from fedsplit.data import TextDataset
from fedsplit.data.conversations import ASSISTANT, Message, from_text
from fedsplit.emulators.lm import mean_loss
from fedsplit.errors import ConfigError
from fedsplit.fingerprints import FINGERPRINTS
from fedsplit.fingerprints.gate.verdict import judge
from fedsplit.fingerprints.sources import open_source
from fedsplit.models.chat_template import encode_prompt
from fedsplit.models.loading import LoadedModel, load
from fedsplit.owners.data_source import simulated_shares
from fedsplit.owners.offsite.owner import Blocks, blocks_of_sets
from simulations.core.owner_samples import data_digest
from simulations.core.progress import RunProgress
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, read_options
from simulations.core.tables import make_table
from simulations.offsite.setting import perplexity_of
from simulations.runtime.federated import simulate
from strategies.base_model import load_base

OPTIONS: dict[str, Any] = {"cpus-per-owner": 1.0, "new-tokens": 40}
MODEL = "server/model"  # the plugged-in model that the run exports


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment; what is known is recorded after every stage."""
    options = read_options(experiment.options, OPTIONS)
    config = experiment.config
    if config.strategy != "offsite-tuning":
        raise ConfigError(f"strategy={config.strategy!r}: must be offsite-tuning for kind offsite")
    folder.write_config(config.to_flat())
    stages: dict[str, dict[str, float]] = {}
    with RunProgress(console) as progress:
        stage = _stages(progress, stages)
        with_base = stage("the model before", lambda: _Judged.of(config, options["new-tokens"]))
        folder.record(
            about=experiment.about,
            seed=config.seed,
            data_digest=data_digest(config),
            owners=with_base.owners,
            rows=[with_base.row("base")],
        )
        run_config, server = stage(
            f"federated run, {config.data.owners} owners",
            lambda: simulate(
                config,
                folder.path,
                cpus_per_owner=options["cpus-per-owner"],
                on_line=progress.on_line,
            ),
        )
        folder.record(**_told(server))
        exported = folder.path / MODEL
        if not (exported / "config.json").is_file():
            raise ConfigError(
                f"offsite.method={run_config.offsite.method!r}: must be one whose plugged-in model "
                "can be written as a folder, and output.save true"
            )
        after = stage("the model after", lambda: with_base.again(exported))
        lineage = stage("lineage", lambda: _verdict(config.model.name, exported))
        folder.record(rows=[with_base.row("base"), after.row("plugged in")], verdict=lineage)
        folder.record(stages_s=stages)
    _print(console, folder.results, with_base, after)


def _stages(
    progress: RunProgress, found: dict[str, dict[str, float]]
) -> Callable[[str, Callable[[], Any]], Any]:
    """Return a function that carries out a named stage and notes its wall and CPU seconds."""

    def stage(title: str, make: Callable[[], Any]) -> Any:
        progress.stage(title)
        began, before = time.perf_counter(), _cpu_seconds()
        try:
            return make()
        finally:
            wall = time.perf_counter() - began
            found[title] = {"wall": wall, "cpu": _cpu_seconds() - before}

    return stage


def _cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    parts = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(p.ru_utime + p.ru_stime for p in parts)


class _Judged:
    """A model's loss on all owners' held-out prompts, and its answer to the first of them."""

    def __init__(
        self, loaded: LoadedModel, parts: list[Blocks], prompt: list[Message], new_tokens: int
    ) -> None:
        self._parts, self._new_tokens, self._tokenizer = parts, new_tokens, loaded.tokenizer
        self.prompt = prompt
        labels = torch.cat([part.test_labels for part in parts])
        ids = torch.cat([part.test for part in parts])
        packed = [part.test_positions for part in parts if part.test_positions is not None]
        positions = torch.cat(packed) if packed else None
        self.loss = mean_loss(loaded.model, ids, labels=labels, positions=positions)
        self.answer = _answer(loaded, prompt[:-1], new_tokens)
        self.owners = [
            {"name": f"owner-{n}", "train": len(part.train), "test": len(part.test)}
            for n, part in enumerate(parts)
        ]

    @classmethod
    def of(cls, config: RunConfig, new_tokens: int) -> _Judged:
        """Judge a run's base model.

        Raises:
            ConfigError: the data are no conversations.
        """
        shares = simulated_shares(config.data, config.seed, False)
        if not shares[0][0].chat:
            raise ConfigError(f"data.kind={config.data.kind!r}: must have prompts and answers")
        loaded = load_base(config)
        o = config.offsite
        parts = [
            blocks_of_sets(loaded.tokenizer, *share, o.block, packing=o.packing) for share in shares
        ]
        return cls(loaded, parts, _shown(shares[0][1]), new_tokens)

    def again(self, folder: Path) -> _Judged:
        """Judge another model on the same."""
        loaded = load(folder, "causal-lm")
        return _Judged(loaded, self._parts, self.prompt, self._new_tokens)

    def row(self, model: str) -> dict[str, Any]:
        """Return the row of a model in the results."""
        return {
            "model": model,
            "loss": self.loss,
            "perplexity": perplexity_of(self.loss),
            "prompt": self.prompt[-2][1],
            "owner_answer": self.prompt[-1][1],
            "answer": self.answer,
        }


def _shown(held_out: TextDataset) -> list[Message]:
    """Return the conversation whose answers are shown: the first of the held-out ones."""
    messages = from_text(held_out.texts[0])
    last = max(i for i, (role, _) in enumerate(messages) if role == ASSISTANT)
    return messages[: last + 1]


@torch.no_grad()
def _answer(loaded: LoadedModel, asked: list[Message], most: int) -> str:
    """Return the most probable continuation of a prompt, token by token."""
    ids = torch.tensor([encode_prompt(loaded.tokenizer, asked)])
    made: Any = loaded.model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=most,
        do_sample=False,
        pad_token_id=loaded.tokenizer.pad_token_id,
    )
    text = loaded.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return " ".join(str(text).split())


def _verdict(base: str, tuned: Path) -> dict[str, Any]:
    """Return what the weights say of descent: the aligned products of base and tuned model."""
    ours, theirs = open_source(base), open_source(str(tuned))
    assert ours.view is not None
    assert theirs.view is not None
    found = judge(FINGERPRINTS["score"]().compare(ours.view, theirs.view), ours.width)
    return {
        "verdict": found.verdict,
        "score": found.score,
        "z": found.z,
        "p": found.p_value,
        "threshold": found.threshold,
    }


def _told(server: dict[str, Any]) -> dict[str, Any]:
    names = ("base_digest", "emulator", "full_zero_shot_loss", "emulator_zero_shot_loss", "rounds")
    rounds = [{"round": r["round"], **r.get("lineage", {})} for r in server["rounds"]]
    return {
        **{name: server[name] for name in names},
        "lineage": [row for row in rounds if "verdict" in row],
        "sent": server["sent"],
    }


def _print(console: Console, results: dict[str, Any], before: _Judged, after: _Judged) -> None:
    told, verdict = results["emulator"], results["verdict"]
    whole, sent = told["full_parameters"], told["emulator_parameters"]
    gates = ", ".join(str(r["verdict"]).replace("_", " ") for r in results["lineage"]) or "off"
    descent = (
        f"{verdict['verdict'].replace('_', ' ')} (score {verdict['score']:.3f}, needed "
        f"{verdict['threshold']:.3f}; {verdict['z']:.0f} standard deviations)"
    )
    rows = [
        ("owners have", f"{sent / 1e6:.1f} M of {whole / 1e6:.1f} M parameters, trained "
         f"{told['trained_parameters'] / 1e6:.2f} M in blocks {told['adapters']}"),
        ("held-out answers", f"perplexity {perplexity_of(before.loss):.2f} before, "
         f"{perplexity_of(after.loss):.2f} after"),
        ("asked (held out)", before.prompt[-2][1]),
        ("its owner's answer", before.prompt[-1][1]),
        ("the model before", before.answer),
        ("the model after", after.answer),
        ("lineage, by round", gates),
        ("lineage, at the end", descent),
    ]  # fmt: skip
    console.print(make_table(("", "what this run showed"), rows, left=2))
    if not math.isfinite(after.loss):
        console.print("the model after has no finite loss", style="red")
