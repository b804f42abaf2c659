"""GGUF files as model folders: checked, converted once by a bounded child process, kept.

A GGUF file holds quantised weights, a tokenizer and its chat template.  It is converted into an
ordinary folder (config.json, safetensors in float32, tokenizer.json) under the user's cache, by the
file's sha256; nothing else is read from the file afterwards.  Conversion needs the ``gguf`` package
(extra ``llm``); a folder that was converted before does not.
"""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
from pathlib import Path

from fedsplit import storage
from fedsplit.errors import ModelError

SUFFIX = ".gguf"
FORM = 1  # of the converted folder; another number converts again
MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_TENSORS = 1 << 16
MOST_FIELDS = 1 << 16
BASE_MEMORY = 3 << 30  # bytes: what Python, PyTorch and transformers take
MEMORY_PER_BYTE = 24  # of the file: two copies in float32 of weights of 2.7 bits
BASE_SECONDS = 600.0
SECONDS_PER_GB = 600.0
LOCK_S = 1800.0
MOST_TOLD = 400  # characters of the child's error


def cache_folder() -> Path:
    """Return where converted models are kept: ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "fedsplit" / "gguf"


def convert_once(file: Path, sha256: str = "") -> tuple[Path, str]:
    """Return (folder that a GGUF file was converted into, the file's sha256 in hex).

    Args:
        file: the GGUF file.
        sha256: what it must have; empty: any.

    Raises:
        ModelError: it is no GGUF file, has another digest, or cannot be converted within the
            bounds on memory (``BASE_MEMORY + MEMORY_PER_BYTE * size``) and time.
    """
    try:
        with file.open("rb") as stream:
            _check_header(file, stream.read(24))
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if sha256 and digest != sha256.lower():
            raise ModelError(f"{file}: sha256 {digest}: must be {sha256.lower()}")
        folder = cache_folder() / f"{digest}-{FORM}"
        if (folder / "config.json").is_file():
            return folder, digest
        folder.parent.mkdir(parents=True, exist_ok=True)
        with storage.FileLock(folder.parent / f"{digest}.lock", LOCK_S):
            if not (folder / "config.json").is_file():
                with storage.new_folder(folder, concurrent=True) as draft:
                    _run_child(file, draft)
    except OSError as error:
        raise ModelError(f"{file}: cannot be converted: {error}") from error
    return folder, digest


def _check_header(file: Path, head: bytes) -> None:
    if len(head) < 24 or head[:4] != MAGIC:
        raise ModelError(f"{file}: must be a GGUF file (begin with {MAGIC.decode()})")
    version, tensors, fields = struct.unpack("<IQQ", head[4:])
    for name, value, ok in (
        ("version", version, version in VERSIONS),
        ("tensors", tensors, 1 <= tensors <= MOST_TENSORS),
        ("fields", fields, 1 <= fields <= MOST_FIELDS),
    ):
        if not ok:
            bound = f"one of {VERSIONS}" if name == "version" else f"in [1, {1 << 16}]"
            raise ModelError(f"{file}: GGUF {name}={value}: must be {bound}")


def _run_child(file: Path, draft: Path) -> None:
    size = file.stat().st_size
    memory = BASE_MEMORY + MEMORY_PER_BYTE * size
    limit_s = BASE_SECONDS + SECONDS_PER_GB * size / 1e9
    command = [sys.executable, "-m", "fedsplit.models.gguf_conversion"]
    try:
        done = subprocess.run(
            [*command, str(file.resolve()), str(draft.resolve()), str(memory)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ModelError(f"{file}: conversion must end within {limit_s:.0f} s") from None
    if done.returncode:
        told = done.stderr.decode(errors="replace").strip().splitlines() or ["it ended"]
        raise ModelError(
            f"{file}: cannot be converted in {memory / 1e9:.1f} GB "
            f"(exit {done.returncode}): {told[-1][:MOST_TOLD]}"
        )
