"""Attacks on files: what a run recorded, its truth where there is one, and the run's settings.

:func:`attack_files` reads a folder or file of :mod:`fedsplit.attacks.transcripts` into a
:class:`~fedsplit.attacks.base.View` and a :class:`~fedsplit.attacks.base.Truth`, and runs attacks
of the one table on them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsplit.attacks.base import Confidences, Public, Step, Truth, Update, View
from fedsplit.attacks.gradients.known_head import LinearHead
from fedsplit.attacks.gradients.token_recovery import GradientNoise
from fedsplit.attacks.membership.lira import confidence
from fedsplit.attacks.recorded_frames import read_capture
from fedsplit.attacks.scoring import AttackResult
from fedsplit.attacks.table import ATTACKS, make_attack, suited
from fedsplit.attacks.transcripts import (
    CAPTURE,
    TRANSCRIPT,
    TRUTH,
    Samples,
    Transcript,
    choose,
    chosen_samples,
    read_tensors,
    read_true_labels,
    read_truth,
    read_whole_transcript,
)
from fedsplit.config import RunConfig
from fedsplit.data import docstrings_are_public
from fedsplit.errors import AttackError, ConfigError, check
from fedsplit.models.trained import SERVER, server_folder
from fedsplit.privacy.denoising.posterior import Touched
from fedsplit.privacy.labels.table import build_protection, head_at_owner
from fedsplit.privacy.public_text import public_ids, public_texts
from fedsplit.seeding import numpy_generator
from fedsplit.settings import read_settings
from fedsplit.tasks import task_of

SETTINGS = "config.toml"
Budget = Mapping[str, Mapping[str, Any]]
"""attack -> its fields that are not the defaults."""


def attack_files(
    recorded: Path,
    *,
    settings: Iterable[str] = (),
    truth: Path | None = None,
    attacks: Sequence[str] = (),
    reads: str = "",
    public: str = "",
    samples: int = 400,
    known: int = 8,
    budget: Budget | None = None,
    seed: int = 0,
) -> list[AttackResult]:
    """Attack what was recorded.

    Args:
        recorded: a file of :mod:`fedsplit.attacks.transcripts`, or a run's folder (the server's
            own, or an experiment's that has it as ``server/``; ``config.toml`` in either gives the
            settings).
        settings: ``key=value`` in TOML, on top of the folder's.
        truth: the file; None: beside what was recorded, or in the run's folder.
        attacks: rows of :data:`fedsplit.attacks.table.ATTACKS`; none: those that fit.
        reads: of those that fit, only the ones that read this (``tokens``, ``labels`` ...).
        public: the attacker's text, one per line; empty: the server's, or what the interpreter
            ships.
        samples: samples attacked at most.
        known: samples whose private label the attacker has been told, for attacks that ask for it.
        budget: what the attackers may spend, see :func:`parse_budget`.
        seed: of the choice of samples and of the attackers.

    Raises:
        AttackError: a file is missing or damaged, or the bottom moved during the run.
        FedsplitError: whatever does not fit, named.
    """
    made = [make_attack(name, seed, budget) for name in attacks]
    wanted = {need for attack in made for need in attack.needs}
    folder = recorded if recorded.is_dir() else None
    flat: dict[str, Any] = read_config(_settings_of(folder)) if folder else {}
    flat.update(parse_settings(settings))
    config = read_settings(flat)
    if folder is not None:
        recorded = _recorded_in(folder, frames=bool(wanted & {"gradients", "repeats"}))
    if truth is None:
        beside = [recorded.parent / TRUTH, recorded.parent.parent / TRUTH]
        truth = next((p for p in beside if p.exists()), beside[0])
    trained = "gradients" in wanted
    view, true = _view(recorded, truth, samples, known, seed, trained=trained)
    if (view.rows or view.update) and (not made or wanted & {"rows", "update", "steps"}):
        view.public = public_knowledge(config, public=public, whole=view.update is not None)
    made = made or [a for a in suited(view, seed, budget) if reads in ("", a.reads)]
    if not made:
        raise AttackError(f"{recorded}: no attack fits it: must be one of {', '.join(ATTACKS)}")
    return [attack.run(view, true) for attack in made]


def _settings_of(folder: Path) -> Path:
    """Return the settings of a run's folder; an experiment's are above its server's folder."""
    above = folder.resolve().parent / SETTINGS
    below = folder.resolve().name == SERVER and not (folder / SETTINGS).exists()
    return above if below and above.exists() else folder / SETTINGS


def _recorded_in(folder: Path, *, frames: bool) -> Path:
    """Return what a run's folder holds; its frames where they are wanted, and are there."""
    names = (CAPTURE, TRANSCRIPT) if frames else (TRANSCRIPT, CAPTURE)
    for name in names:
        if (server := server_folder(folder, name)) is not None:
            return server / name
    raise AttackError(
        f"{folder}: must hold {TRANSCRIPT} (output.transcript) or {CAPTURE}/ (output.capture), "
        f"itself or in {SERVER}/; there is no transcript"
    )


def _view(
    recorded: Path, truth: Path, samples: int, known: int, seed: int, *, trained: bool
) -> tuple[View, Truth]:
    """Return what was recorded, and what it is scored against."""
    if recorded.is_dir():
        return _of_samples(read_capture(recorded), truth, samples, known, seed, trained=trained)
    keys: set[str] = set()
    if recorded.exists():
        keys = {key.partition("/")[0] for key in read_tensors(recorded)}
    if keys & {"before", "after", "gradient"}:
        return _of_update(read_tensors(recorded), truth, seed)
    if "logits" in keys:
        return _of_answers(read_tensors(recorded), truth, seed)
    found = read_whole_transcript(recorded)
    return _of_samples(found, truth, samples, known, seed, trained=trained)


def _of_samples(
    found: Transcript, truth: Path, samples: int, known: int, seed: int, *, trained: bool
) -> tuple[View, Truth]:
    ids, labels = read_truth(truth), read_true_labels(truth)
    chosen = choose(_about(found, trained), samples, seed)
    view, true = recorded_view(found, ids, samples, seed, trained=trained)
    classes: Tensor | None = None
    told: dict[int, int] = {}
    if chosen and all(slot in labels.get(key, {}) for key, slot in chosen):
        classes = torch.stack([labels[key][slot] for key, slot in chosen])
        order = numpy_generator(seed, "attack", "known").permutation(len(chosen))[:known]
        told = {int(i): int(classes[i]) for i in order}
    view.known = told
    return view, Truth(ids=true, labels=classes)


def _about(found: Transcript, trained: bool) -> Samples:
    """Return the samples that attacks are about; ``trained`` for those that gradients came for."""
    received = found.answered() or found.received
    first = found.gradients[0] if trained and found.gradients else {}
    if not first:
        return received
    held = {
        key: {slot: row for slot, row in rows.items() if slot in first.get(key, {})}
        for key, rows in received.items()
    }
    return {key: rows for key, rows in held.items() if rows}


def recorded_view(
    found: Transcript, ids: Samples, samples: int, seed: int, *, trained: bool = False
) -> tuple[View, list[Tensor]]:
    """Return everything that crossed of up to ``samples`` samples, and their true ids.

    With ``trained`` only those are chosen that gradients came back for: held-out texts have none.

    Raises:
        AttackError: see :func:`fedsplit.attacks.transcripts.chosen_samples`.
    """
    received = _about(found, trained)
    _, true = chosen_samples(received, ids, samples, seed)
    chosen = choose(received, samples, seed)

    def of(view: Samples) -> list[Tensor]:
        whole = all(slot in view.get(key, {}) for key, slot in chosen)
        return [view[key][slot] for key, slot in chosen] if whole and chosen else []

    views = [v for v in map(of, found.rows) if v]
    passes = [g for g in map(of, found.gradients) if g]
    pairs = list(zip(found.outputs, found.gradients, strict=False))
    steps = [
        [Step(o[key][slot], g[key][slot]) for o, g in pairs if slot in o.get(key, {})]
        for key, slot in chosen
    ]
    return View(
        rows=views[0] if views else [],
        repeats=views[1:],
        gradients=passes[0] if passes else [],
        steps=steps if found.answered() else [],
        seed=seed,
    ), true


def _of_update(tensors: Mapping[str, Tensor], truth: Path, seed: int) -> tuple[View, Truth]:
    def part(name: str) -> dict[str, Tensor]:
        return {
            key.removeprefix(f"{name}/"): tensor
            for key, tensor in tensors.items()
            if key.startswith(f"{name}/")
        }

    size = tensors["shape"].tolist() if "shape" in tensors else []
    check(len(size) in (0, 2), "shape", size, "(2,) = B, T")
    update = Update(
        before=part("before"),
        after=part("after"),
        gradient=part("gradient"),
        shape=(int(size[0]), int(size[1])) if size else None,
        labels=tensors.get("labels"),
    )
    if update.before.keys() != update.after.keys():
        raise AttackError("before/*, after/*: must be the same tensors")
    ids = [x for held in read_truth(truth).values() for x in held.values()]
    labels = [x for held in read_true_labels(truth).values() for x in held.values()]
    true = torch.stack(labels) if labels else None
    return View(update=update, seed=seed), Truth(ids=ids, labels=true)


def _of_answers(tensors: Mapping[str, Tensor], truth: Path, seed: int) -> tuple[View, Truth]:
    if "labels" not in tensors:
        raise AttackError("labels: missing: must stand beside logits")
    labels = tensors["labels"]
    shadows = tensors.get("shadow_logits")
    seen = Confidences(
        confidence(tensors["logits"], labels),
        None if shadows is None else np.stack([confidence(x, labels) for x in shadows]),
        tensors["shadow_members"].numpy().astype(bool) if "shadow_members" in tensors else None,
    )
    true = read_tensors(truth)
    if "members" not in true:
        raise AttackError(f"{truth}: must hold members (N,)")
    return View(confidences=seen, seed=seed), Truth(members=true["members"].numpy())


def public_knowledge(config: RunConfig, *, public: str = "", whole: bool = False) -> Public:
    """Return what everyone knows of a run: its settings, its initial bottom, and public text.

    Args:
        config: the run's settings.
        public: the attacker's text; empty: the server's, or what the interpreter ships.
        whole: also keep the whole model (for attacks on updates).

    Raises:
        FedsplitError: the model cannot be loaded or split.
    """
    from fedsplit.models.loading import load
    from fedsplit.models.splitting.halves import split
    from fedsplit.privacy import build_mechanism

    m = config.model
    task = task_of(config)
    labels = task.outputs
    loaded = load(m.name, m.task, num_labels=labels, dropout=0.0, expected_sha256=m.sha256 or None)
    bottom, top = split(loaded.model, config.split.k, verify=False)
    bottom.eval()
    # Docstrings are no public text where they are the owners' own.
    path = public or config.privacy.public_text
    texts = public_texts(path, docstrings=docstrings_are_public(config.data.kind))
    head = None if task.labelled else _known_head(top)
    return Public(
        bottom=bottom,
        mechanism=build_mechanism(config.privacy, bottom, bottom.vocab, loaded.tokenizer),
        public_ids=public_ids(loaded.tokenizer, texts, m.max_tokens),
        special_ids=frozenset(int(i) for i in loaded.tokenizer.all_special_ids),
        touched=announced_touch(config),
        model=loaded.model if whole or not task.labelled else None,
        head=head,
        gradient_noise=gradient_law(config, bottom.vocab, head),
    )


def _known_head(top: Any) -> LinearHead | None:
    """Return the vocabulary projection of ``top``; None where it is not linear."""
    from fedsplit.models.splitting.heads import detach_head

    try:
        return LinearHead.of(detach_head(top, share=True))
    except AttackError:
        return None


def gradient_law(config: RunConfig, vocab: int, head: LinearHead | None) -> GradientNoise:
    """Return the announced law of a language model's gradients, of each target's own loss.

    Args:
        config: the run's settings.
        vocab: V, the width of logits.
        head: what maps hidden states to logits, where the owner holds it.
    """
    width = vocab
    if head_at_owner(config.labels.protection):
        width = 0 if head is None else int(head.weight.shape[1])
    law = build_protection(config.labels).row_law(width) if width else None
    return GradientNoise(*law) if law else GradientNoise()


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
        return dict(_flat(tomllib.loads(path.read_text(encoding="utf-8-sig"))))
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


def parse_budget(pairs: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the budget that ``key=value`` pairs ask for.

    A key is ``ATTACK.FIELD``, or the short name that an attack has for its field.

    Raises:
        ConfigError: for an unknown key, or a value of another type.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, value in parse_settings(pairs).items():
        targets = _targets(key)
        if not targets:
            known = sorted({k for attack in ATTACKS.values() for k in attack.keys})
            raise ConfigError(
                f"budget {key}={value!r}: must be ATTACK.FIELD, or one of {', '.join(known)}"
            )
        for name, field, factor in targets:
            default = getattr(ATTACKS[name](), field)
            if type(value) is not type(default) and not (
                type(value) is int and isinstance(default, float)
            ):
                kind = type(default).__name__
                raise ConfigError(f"budget {key}={value!r}: must be of type {kind}")
            found.setdefault(name, {})[field] = value * factor if factor != 1 else value
    return found


def _targets(key: str) -> list[tuple[str, str, int]]:
    """Return (attack, field, factor) of everything that a budget's key sets."""
    name, dot, field = key.partition(".")
    if dot:
        known = name in ATTACKS and field.replace("-", "_") in ATTACKS[name].budget
        return [(name, field.replace("-", "_"), 1)] if known else []
    return [(name, *row.keys[key]) for name, row in ATTACKS.items() if key in row.keys]
