"""An emulator on disk: safetensors and JSON, rebuilt without the base, named by its content.

| file | what it holds |
| --- | --- |
| ``emulator.json`` | method, plan, base digest, scores and settings, shapes, ties |
| ``config.json`` | the base's configuration, without names, labels, paths or code |
| ``emulator.safetensors`` | the emulator's tensors, each once, and no others |
| ``tokenizer.json``, ``tokenizer_config.json`` | optional |

Nothing in a folder is executed, and nothing in it can name code, a path or a remote place.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedsplit import storage
from fedsplit.emulators.build import Emulator, freeze_but_adapters
from fedsplit.emulators.compression.linears import LowRankLinear
from fedsplit.emulators.compression.skeleton import FILE, describe, lay_out
from fedsplit.emulators.compression.structure import Model, tiny_logits
from fedsplit.emulators.pair_files import check_disk
from fedsplit.emulators.planning.plan import EmulatorPlan
from fedsplit.errors import ConfigError, ModelError
from fedsplit.models.bundle import tokenizer as bundle_tokenizer
from fedsplit.models.bundle.bottom import ATTENTION, EXPERTS, FLOATS, UNSHIPPED
from fedsplit.models.bundle.bounded_files import check_folder, check_size
from fedsplit.models.bundle.bounded_json import (
    dump_json,
    parse_json,
    refuse_config_keys,
    without_private_keys,
)

FORMAT = 1
WEIGHTS = "emulator.safetensors"
# Bytes that each file may have; no other file is accepted.
LIMITS = {
    "config.json": 1 << 20,
    FILE: 1 << 24,
    WEIGHTS: 1 << 38,
    "tokenizer.json": 1 << 27,
    "tokenizer_config.json": 1 << 20,
}
REQUIRED = ("config.json", FILE, WEIGHTS)
KEYS = {
    "format",
    "method",
    "plan",
    "base_digest",
    "details",
    "shapes",
    "ties",
    "attention",
    "experts",
}


@dataclass(frozen=True)
class Saved:
    """What was written.

    Attributes:
        folder: where.
        digest: sha256 (hex) of the content, see :func:`folder_digest`.
        bytes: of all files.
        parameters: of the emulator, tied and shared ones once.
    """

    folder: Path
    digest: str
    bytes: int
    parameters: int


def save_emulator(
    emulator: Emulator, folder: str | Path, tokenizer: Any = None, *, verify: bool = True
) -> Saved:
    """Write an emulator of a causal language model into a new folder, whole or not at all.

    Args:
        emulator: what to write.
        folder: must not exist, or be empty.
        tokenizer: shipped beside it, if given.
        verify: compare the logits of a tiny batch after reading it back, bit for bit.

    Raises:
        ModelError: if the folder is in use, the disk is too full, or the family cannot be rebuilt
            from its configuration.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder}: must be empty or not there")
    tensors, ties = _unique(emulator.model)
    need = sum(t.numel() * t.element_size() for t in tensors.values()) + (1 << 22)
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_disk(folder, need)
    raw = {k: v for k, v in emulator.base_config.items() if k not in UNSHIPPED}
    live = emulator.model.config
    about = {
        "format": FORMAT,
        "method": emulator.method,
        "plan": emulator.plan.to_json(),
        "base_digest": emulator.base_digest,
        "details": emulator.details,
        "shapes": describe(emulator),
        "ties": ties,
        "attention": getattr(live, "_attn_implementation", None),
        "experts": getattr(live, "_experts_implementation", None),
    }
    files = {"config.json": dump_json(without_private_keys(raw)), FILE: dump_json(about)}
    if tokenizer is not None:
        files.update(bundle_tokenizer.pack(tokenizer))
    with storage.new_folder(folder, mode=0o777) as part:
        for name, content in files.items():
            (part / name).write_bytes(content)
        save_file(_apart(tensors), str(part / WEIGHTS))
        again = load_emulator(part)
        if verify:
            _compare(emulator, again)
    size = sum(p.stat().st_size for p in folder.iterdir())
    return Saved(folder, folder_digest(folder), size, emulator.parameter_count())


def load_emulator(
    folder: str | Path,
    *,
    expected_digest: str | None = None,
    expected_base: str | None = None,
) -> Emulator:
    """Rebuild an emulator, without the base, on the CPU, in evaluation mode.

    Args:
        folder: of :func:`save_emulator`; may be hostile, everything is checked.
        expected_digest: refuse other content (what the message said would come).
        expected_base: refuse an emulator of another base than the one with this weights' digest.

    Raises:
        ModelError: if anything is not as it must be; names the file and the bound.
    """
    folder = Path(folder)
    check_folder(folder, LIMITS, REQUIRED)
    if expected_digest is not None and folder_digest(folder) != expected_digest:
        raise ModelError(f"{folder}: digest {folder_digest(folder)}: must be {expected_digest}")
    about = parse_json(FILE, (folder / FILE).read_bytes())
    plan = _check_about(about)
    if expected_base is not None and about["base_digest"] != expected_base:
        raise ModelError(
            f"{FILE}: base_digest={about['base_digest']!r}: must be this base's {expected_base!r}"
        )
    refuse_config_keys(
        "config.json", config := parse_json("config.json", (folder / "config.json").read_bytes())
    )
    model = lay_out(folder, plan, about["shapes"], about["attention"], about["experts"])
    _fill(model, folder / WEIGHTS, about["ties"])
    emulator = Emulator(
        model.eval(), plan, about["method"], about["base_digest"], about["details"], config
    )
    freeze_but_adapters(emulator)
    return emulator


def load_tokenizer(folder: str | Path) -> Any:
    """Return the tokenizer shipped with an emulator, or None.

    Raises:
        ModelError: if its files are damaged or too large.
    """
    folder = Path(folder)
    check_folder(folder, LIMITS, REQUIRED)
    names = [n for n in LIMITS if n.startswith("tokenizer") and (folder / n).is_file()]
    return bundle_tokenizer.unpack({n: (folder / n).read_bytes() for n in names})


def folder_digest(folder: str | Path) -> str:
    """Return the sha256 (hex) over names, lengths and contents, in order of name."""
    sha = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        sha.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                sha.update(chunk)
    return sha.hexdigest()


def receive(files: Mapping[str, bytes], cache: str | Path, digest: str) -> Path:
    """Put an emulator that arrived into ``cache/digest``; one that is there already stays.

    Args:
        files: contents by name.
        cache: the owner's folder of emulators, kept across rounds and restarts.
        digest: announced content digest.

    Raises:
        ModelError: if a name or size is not allowed, the content is not the announced one, or the
            disk is too full.
    """
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ModelError(f"digest={digest!r}: must be 64 hexadecimal digits")
    folder = Path(cache) / digest
    if folder.is_dir():
        if folder_digest(folder) == digest:
            return folder
        shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        check_size(name, len(content), LIMITS)
    Path(cache).mkdir(parents=True, exist_ok=True)
    check_disk(folder, sum(map(len, files.values())))
    try:
        with storage.new_folder(folder, mode=0o777, concurrent=True) as part:
            for name, content in files.items():
                (part / name).write_bytes(content)
            check_folder(part, LIMITS, REQUIRED)
            if (found := folder_digest(part)) != digest:
                raise ModelError(f"emulator: digest {found}: must be {digest}")
    except OSError:
        # Else an owner that shares the folder was faster; what it put there is complete.
        if not folder.is_dir() or folder_digest(folder) != digest:
            raise
    return folder


def _check_about(about: Mapping[str, Any]) -> EmulatorPlan:
    if about.get("format") != FORMAT:
        raise ModelError(f"{FILE}: format={about.get('format')!r}: must be {FORMAT}")
    if set(about) != KEYS:
        raise ModelError(f"{FILE}: keys {sorted(about)}: must be {sorted(KEYS)}")
    for name, kind in (
        ("method", str),
        ("base_digest", str),
        ("details", dict),
        ("shapes", dict),
        ("ties", dict),
    ):
        if not isinstance(about[name], kind):
            raise ModelError(f"{FILE}: {name}: must be of type {kind.__name__}")
    for name, allowed in (("attention", ATTENTION), ("experts", EXPERTS)):
        if about[name] not in allowed:
            raise ModelError(f"{FILE}: {name}={about[name]!r}: must be one of {allowed}")
    try:
        return EmulatorPlan.from_json(about["plan"])
    except (ConfigError, TypeError) as error:
        raise ModelError(f"{FILE}: plan: {error}") from error


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _unique(model: Model) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor once under its first name, and the other names: alias -> first."""
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in _named(model).items():
        if id(tensor) in first:
            ties[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor
    return tensors, ties


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, each alone in its storage: copies only of those that are not.

    An emulator's own tensors are, so that writing it does not hold it twice.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        one = tensor.detach().cpu().contiguous()
        storage_of = one.untyped_storage()
        alone = storage_of.nbytes() == one.numel() * one.element_size()
        found[name] = one if alone and storage_of.data_ptr() not in seen else one.clone()
        seen.add(storage_of.data_ptr())
    return found


def _fill(model: Model, path: Path, ties: Mapping[str, Any]) -> None:
    """Give a laid-out emulator its tensors: all of them, and no others."""
    expected = _named(model)
    for alias, name in ties.items():
        if alias not in expected or name not in expected or name in ties or alias == name:
            raise ModelError(f"{FILE}: ties: {alias!r} -> {name!r}: must be two of its tensors")
    try:
        opened: Any = safe_open(str(path), framework="pt", device="cpu")
        with opened as handle:
            names = set(handle.keys())
            _check_names(expected, names, ties)
            for name in names:
                shape = tuple(handle.get_slice(name).get_shape())
                if shape != tuple(expected[name].shape):
                    raise ModelError(
                        f"{path.name}: {name}: shape {shape}: must be "
                        f"{tuple(expected[name].shape)} by {FILE} and config.json"
                    )
            tensors = {name: handle.get_tensor(name) for name in names}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ModelError(f"{path.name}: not a readable safetensors file: {error}") from error
    for name, tensor in tensors.items():
        like = expected[name]
        same = tensor.dtype in FLOATS if like.is_floating_point() else tensor.dtype == like.dtype
        if not same:
            raise ModelError(
                f"{path.name}: {name}: dtype {tensor.dtype}: must be like {like.dtype}"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelError(f"{path.name}: {name}: must be finite")
    placed: dict[str, Tensor] = {
        n: nn.Parameter(t, False) if isinstance(expected[n], nn.Parameter) else t
        for n, t in tensors.items()
    }
    for alias, name in ties.items():
        if expected[alias].shape != expected[name].shape:
            raise ModelError(f"{FILE}: ties: {alias!r} -> {name!r}: must be of one shape")
        placed[alias] = placed[name]
    for prefix, module in model.named_modules():
        path_of = f"{prefix}." if prefix else ""
        for store in (module._parameters, module._buffers):
            for name, old in list(store.items()):
                if old is not None:
                    store[name] = placed[path_of + name]
        if isinstance(module, LowRankLinear):
            module.check(prefix)
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise ModelError(f"config.json: {path_of}{name} cannot be rebuilt from a file")


def _check_names(expected: Mapping[str, Tensor], names: set[str], ties: Mapping[str, Any]) -> None:
    missing = sorted(expected.keys() - names - ties.keys())
    extra = sorted((names - expected.keys()) | (names & ties.keys()))
    if missing or extra:
        raise ModelError(
            f"{WEIGHTS}: missing {missing[:3]} ({len(missing)}), must not be there {extra[:3]} "
            f"({len(extra)})"
        )


def _compare(emulator: Emulator, again: Emulator) -> None:
    expected, got = tiny_logits(emulator.model), tiny_logits(again.model)
    assert expected is not None
    assert got is not None
    if not torch.equal(expected.cpu().nan_to_num(), got.nan_to_num()):
        kind = emulator.base_config.get("model_type")
        raise ModelError(
            f"emulator: a {kind} read back from its files gives other logits: must be the same"
        )
