"""Find and end every process of one runtime.

Flower's SuperExec and Ray's daemons leave their parent's process group and session, and orphans are
adopted by init, so neither a group nor the process tree reaches them all.  Two things do: each
child gets ``FEDSPLIT_RUNTIME=<mark>`` in its environment and hands it down; and it works in a
folder of the runtime's.  The second is for Ray's agents and actors, which overwrite their
environment's memory when they set their process title.

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


def marked_processes(mark: str, folder: str | None = None) -> list[psutil.Process]:
    """Return the live processes (zombies excluded) of the runtime with ``mark``.

    Args:
        mark: what ``FEDSPLIT_RUNTIME`` is set to in their environment.
        folder: the runtime's temporary folder; a process without any readable environment that
            works below it counts too.
    """
    return [process for process in psutil.process_iter() if _belongs(process, mark, folder)]


def _belongs(process: psutil.Process, mark: str, folder: str | None) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        environment = process.environ()
        if "PATH" in environment or folder is None:
            return environment.get(MARK_VARIABLE) == mark
        return f"{process.cwd()}/".startswith(f"{folder}/")
    except (psutil.Error, OSError):  # gone, or somebody else's
        return False


def lives(process: psutil.Process) -> bool:
    """Return whether a process still runs; a zombie, which waits for its parent, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def end_marked(mark: str, folder: str | None = None, grace_s: float = 2.0) -> int:
    """End all processes of a runtime: SIGTERM, ``grace_s`` seconds later SIGKILL.

    Repeats until none is found, since a process that is being ended may just have started another.

    Returns:
        How many processes were alive when it began.
    """
    first = 0
    for attempt in range(5):
        processes = marked_processes(mark, folder)
        first = first or len(processes)
        if not processes:
            break
        for process in processes:
            try:
                process.terminate() if attempt == 0 else process.kill()
            except psutil.Error:
                continue
        deadline = time.monotonic() + (grace_s if attempt == 0 else 1.0)
        while time.monotonic() < deadline and any(map(lives, processes)):
            time.sleep(0.05)
    return first


def main(mark: str, folders: list[str]) -> None:
    """Wait for the launcher to go, then end its processes and remove its folders."""
    try:
        while sys.stdin.buffer.read(4096):
            pass
    except (OSError, KeyboardInterrupt):
        pass
    end_marked(mark, folders[0])
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
