"""The environment of Flower's processes: own homes, own temp folders, bounded threads."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping

from fedsplit.deploy.flower_commands import scripts_path
from fedsplit.errors import check
from simulations.runtime.watchdog import MARK_VARIABLE

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
)
# Idle OpenMP threads sleep instead of spinning: libgomp reads the first two, LLVM/Intel the others.
WAITING = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    # The SuperExec asks for work every second by default: 0.5 s per start, and per message of a
    # deployment, for nothing.
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
}
RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",  # else equal lines of two clients are swallowed
    "RAY_COLOR_PREFIX": "0",
    # Ray would start a set of workers without the job's environment first, and throw them away.
    "RAY_prestart_worker_first_driver": "0",
    # Owners' work is the run's work: at Ray's 15 it comes to a stand beside anything else.
    "RAY_worker_niceness": "0",
}
# Ray's processes listen on every interface, and run what a peer sends them unless it shows a token.
RAY_AUTH_MODE, RAY_AUTH_TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
RAY_AUTH_TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
LOCAL_HOSTS = "127.0.0.1,localhost,::1"


def ray_credentials() -> dict[str, str]:
    """Return variables by which one Ray cluster talks to nobody else: a token of its own."""
    return {RAY_AUTH_MODE: "token", RAY_AUTH_TOKEN: secrets.token_hex(32)}


def thread_environment(threads: int | None, *, patient: bool = True) -> dict[str, str]:
    """Return the variables that bound a process to ``threads`` compute threads (None: no bound).

    Args:
        threads: compute threads.
        patient: let idle threads sleep.  Right for the many owners of a simulation, which would
            spin for each other; wrong for the one server, whose threads meet thousands of times a
            step, and waking them each time costs training speed.
    """
    waiting = WAITING if patient else {"TOKENIZERS_PARALLELISM": "false"}
    if threads is None:
        return dict(waiting)
    check(threads >= 1, "threads", threads, ">= 1")
    return {**dict.fromkeys(THREAD_VARIABLES, str(threads)), **waiting}


def base_environment(mark: str, extra: Mapping[str, str]) -> dict[str, str]:
    """Return the environment that all processes of one runtime share.

    The caller's own ``FLWR_*`` and ``RAY_*`` variables are left out: ``RAY_ADDRESS`` would join a
    cluster of somebody else's, ``FLWR_HOME`` would share state with other runs.  By
    ``mark`` its processes are found again; ``extra`` wins over everything here.
    """
    dropped = ("FLWR_", "RAY_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    for name in ("NO_PROXY", "no_proxy"):
        env[name] = ",".join(filter(None, [env.get(name, ""), LOCAL_HOSTS]))
    plain = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"}
    env |= {**FLOWER, MARK_VARIABLE: mark, "PATH": scripts_path(), **plain, "COLUMNS": "200"}
    return env | dict(extra)
