"""Inversion attacks on files: a transcript, its truth, and the settings of its run."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fedsplit.attacks.inversion.suite import Attacker, Budget
from fedsplit.attacks.scoring import AttackResult
from fedsplit.attacks.transcripts import TRUTH, chosen_samples, read_transcript, read_truth
from fedsplit.config import RunConfig
from fedsplit.errors import AttackError, ConfigError
from fedsplit.privacy.denoising.posterior import Touched
from fedsplit.privacy.public_text import public_ids, public_texts

TRANSCRIPT = "transcript.safetensors"


def attack_files(
    transcript: Path,
    *,
    settings: Iterable[str] = (),
    truth: Path | None = None,
    attacks: Sequence[str] = (),
    public: str = "",
    samples: int = 400,
    budget: Budget | None = None,
    seed: int = 0,
) -> list[AttackResult]:
    """Attack a recorded transcript.

    Args:
        transcript: the file, or a run's folder (then ``config.toml`` gives the settings).
        settings: ``key=value`` in TOML, on top of the folder's.
        truth: the file; None: beside the transcript, or in the run's folder.
        attacks: rows of :data:`fedsplit.attacks.inversion.suite.INVERSIONS`; none: those that fit.
        public: the attacker's text, one per line; empty: the server's, or what the interpreter
            ships.
        samples: samples attacked at most.
        budget: what the attacker may spend.
        seed: of the choice of samples and of the attackers.

    Raises:
        AttackError: a file is missing or damaged, or the bottom moved during the run.
        FedsplitError: whatever does not fit, named.
    """
    folder = transcript if transcript.is_dir() else None
    flat: dict[str, Any] = read_config(folder / "config.toml") if folder else {}
    flat.update(parse_settings(settings))
    config = RunConfig.from_flat(flat)
    if folder is not None:
        found = [folder / "server" / TRANSCRIPT, folder / TRANSCRIPT]
        transcript = next((p for p in found if p.exists()), found[0])
    if truth is None:
        places = [transcript.parent / TRUTH, transcript.parent.parent / TRUTH]
        truth = next((p for p in places if p.exists()), places[0])
    received, true = read_transcript(transcript), read_truth(truth)
    rows, ids = chosen_samples(received, true, samples, seed)
    attacker = build_attacker(config, public=public, budget=budget, seed=seed)
    return [attacker.run(name, rows, ids) for name in attacks or attacker.suited()]


def build_attacker(
    config: RunConfig, *, public: str = "", budget: Budget | None = None, seed: int = 0
) -> Attacker:
    """Return the attacker that knows a run's settings, its initial bottom and public text.

    Raises:
        FedsplitError: the model cannot be loaded or split.
    """
    from fedsplit.models.loading import load
    from fedsplit.models.splitting.halves import split
    from fedsplit.privacy import build_mechanism

    m = config.model
    labels = m.labels if m.task == "sequence-classification" else None
    loaded = load(m.name, m.task, num_labels=labels, dropout=0.0, expected_sha256=m.sha256 or None)
    bottom, _ = split(loaded.model, config.split.k, verify=False)
    bottom.eval()
    # Docstrings are no public text where they are the owners' own.
    path = public or config.privacy.public_text
    texts = public_texts(path, docstrings=config.data.kind != "docstrings")
    return Attacker(
        bottom=bottom,
        mechanism=build_mechanism(config.privacy, bottom, bottom.vocab, loaded.tokenizer),
        public_ids=public_ids(loaded.tokenizer, texts, m.max_tokens),
        special_ids=frozenset(int(i) for i in loaded.tokenizer.all_special_ids),
        touched=announced_touch(config),
        budget=budget or Budget(),
        seed=seed,
    )


def announced_touch(config: RunConfig) -> Touched | None:
    """Return what the settings say of tokens with reduced noise (CTI)."""
    from fedsplit.privacy import mechanism_type

    p = config.privacy
    if p.cti == "off" or p.cti_rho == 1.0 or not mechanism_type(p).protects():
        return None
    return Touched(share=min(p.cti_max_share, 0.99), rho=p.cti_rho)


def read_config(path: Path) -> dict[str, Any]:
    """Return a run folder's settings, flat.

    Raises:
        AttackError: if they cannot be read.
    """
    try:
        return dict(_flat(tomllib.loads(path.read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise AttackError(f"{path}: must be a run's settings: {error}") from None


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """Return ``key=value`` pairs; values are TOML, and what is no TOML value is text.

    Raises:
        ConfigError: for a pair without key or equals sign.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {pair!r}: must be key=value")
        try:
            found[key.strip()] = tomllib.loads(f"x = {text}")["x"]
        except tomllib.TOMLDecodeError:
            found[key.strip()] = text
    return found


def parse_budget(pairs: Iterable[str]) -> Budget:
    """Return the budget that ``key=number`` pairs ask for.

    Raises:
        ConfigError: for an unknown key, or a value that is no integer.
    """
    known = [f.name.replace("_", "-") for f in fields(Budget)]
    given = parse_settings(pairs)
    for key, value in given.items():
        if key not in known or type(value) is not int:
            raise ConfigError(f"budget {key}={value!r}: must be an integer, of {', '.join(known)}")
    return Budget(**{key.replace("-", "_"): value for key, value in given.items()})
