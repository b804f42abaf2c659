"""A hostile tokenizer against an owner in a process of its own, which may die of it.

``python -m simulations.adversary.child NAME FOLDER`` ends with 0 and one JSON line where the owner
lived, whatever it answered.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEMORY = 1 << 30  # bytes of address space beside what is mapped before the session
SECONDS = 6  # of processor time


def replacing(content: dict[str, Any]) -> None:
    """Double every letter forty times."""
    double = {"type": "Replace", "pattern": {"String": "w"}, "content": "ww"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [double] * 40}


def searching(content: dict[str, Any]) -> None:
    """Split by an expression that tries every way to cut a text before it fails."""
    pattern = {"Regex": r"((\w|\w\w|\s|\w\s)+)+(?!\w|\s|$)"}
    content["pre_tokenizer"] = {
        "type": "Split",
        "pattern": pattern,
        "behavior": "Isolated",
        "invert": False,
    }


HOSTILE: dict[str, Callable[[dict[str, Any]], None]] = {
    "chain of replacements": replacing,
    "costly expression": searching,
}


def survives(name: str, folder: Path) -> bool:
    """Return whether an owner lives through one session with a hostile tokenizer."""
    command = [sys.executable, "-m", "simulations.adversary.child", name, str(folder)]
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"RUST_BACKTRACE": "0", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            timeout=200,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main(name: str, folder: Path) -> None:
    """Play one session within the bounds on memory and processor time."""
    from simulations.adversary.material import corpus, pack, tiny, with_file, word_tokenizer
    from simulations.adversary.server import LyingServer, settings, split_script, zeros
    from simulations.adversary.victim import Victim, strict_policy

    texts = corpus(12)
    tokenizer = word_tokenizer(texts.words)
    bundle, _, _ = pack(tiny(tokenizer), 0, tokenizer)
    content = json.loads(bundle.files["tokenizer.json"])
    HOSTILE[name](content)
    changed = with_file(bundle, "tokenizer.json", json.dumps(content).encode())
    victim = Victim(folder, texts.texts, texts.labels, strict_policy())
    flat = settings(
        privacy__mechanism="dchi",
        privacy__noise_ratio=50.0,
        labels__protection="randomised-response",
    )
    used = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + SECONDS,) * 2)
    with LyingServer() as server:
        taken = server.session(victim, flat, split_script(changed, zeros(2)), digest=changed.digest)
    print(json.dumps({"told": taken.told}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
