"""The machine and the packages that a result depends on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

CHECKOUT = Path(__file__).resolve().parents[2]
GIT_TIMEOUT_S = 20.0
PACKAGES = ("fedsplit", "flwr", "ray", "torch", "transformers", "numpy")


def machine_cores() -> int:
    """Return the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads of this process inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that matter, without importing them.

    ``commit`` is that of the checkout that runs, with a ``+`` where its files differ from it.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {**found, "commit": commit()}


def commit(checkout: Path = CHECKOUT) -> str | None:
    """Return the git commit of a checkout, ``+`` behind it where tracked files differ from it.

    None where the folder is no checkout, or git is not installed.
    """
    if not (checkout / ".git").exists():
        return None
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(checkout), *arguments],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=GIT_TIMEOUT_S,
                check=True,
            ).stdout.strip()
            for arguments in (("rev-parse", "HEAD"), ("diff", "HEAD", "--name-only"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+" if changes else head


def machine() -> dict[str, Any]:
    """Return what the run's speed depends on: CPU model, usable cores, memory, platform, GPUs."""
    return {
        "cpu": _cpu_model(),
        "cores": machine_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(),
        "gpus": _gpus(),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Return the NVIDIA GPUs that the driver lists, without starting CUDA."""
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with contextlib.suppress(OSError):
            found = re.search(r"^Model:\s*(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            names.append(found.group(1) if found else path.parent.name)
    return names
