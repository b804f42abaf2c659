"""Find and end every process of one runtime, by a mark in its environment.

Flower's SuperExec and Ray's daemons leave their parent's process group and session, and orphans are
adopted by init, so neither a group nor the process tree reaches them all.  The environment does:
each child gets ``FEDSPLIT_RUNTIME=<mark>`` and hands it down.

Run as a script this is the watchdog: it waits until the launcher's end of its standard input
closes, which happens even when the launcher is killed with SIGKILL, then ends whatever is left and
removes the runtime's temporary folders.  It imports nothing of the project, so that it runs from
anywhere.
"""

from __future__ import annotations

import shutil
import sys
import time

import psutil

MARK_VARIABLE = "FEDSPLIT_RUNTIME"


def marked_processes(mark: str) -> list[psutil.Process]:
    """Return the live processes (zombies excluded) whose environment carries ``mark``."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(MARK_VARIABLE) == mark:
                found.append(process)
        except (psutil.Error, OSError):  # gone, or somebody else's
            continue
    return found


def end_marked(mark: str, grace_s: float = 2.0) -> int:
    """End all processes that carry ``mark``: SIGTERM, ``grace_s`` seconds later SIGKILL.

    Repeats until none is found, since a process that is being ended may just have started another.

    Returns:
        How many processes were still alive when it began.
    """
    first = 0
    for attempt in range(5):
        processes = marked_processes(mark)
        first = first or len(processes)
        if not processes:
            break
        for process in processes:
            try:
                process.terminate() if attempt == 0 else process.kill()
            except psutil.Error:
                continue
        deadline = time.monotonic() + (grace_s if attempt == 0 else 1.0)
        while time.monotonic() < deadline and marked_processes(mark):
            time.sleep(0.05)
    return first


def main(mark: str, folders: list[str]) -> None:
    """Wait for the launcher to go, then end its processes and remove its folders."""
    try:
        while sys.stdin.buffer.read(4096):
            pass
    except (OSError, KeyboardInterrupt):
        pass
    end_marked(mark)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
