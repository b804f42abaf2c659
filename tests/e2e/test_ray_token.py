"""A simulation's Ray cluster is for its own processes: whoever has no token cannot join it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from simulations.runtime.environment import RAY_AUTH_TOKEN, ray_credentials

pytestmark = pytest.mark.e2e
START = """
import ray, sys
context = ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
print("address", context.address_info["gcs_address"], flush=True)
sys.stdin.readline()
"""
JOIN = """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False)
print("ran", ray.get(ray.remote(lambda: 6).remote()))
"""


def environment(more: dict[str, str]) -> dict[str, str]:
    rest = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**rest, "RAY_USAGE_STATS_ENABLED": "0", **more}


def joins(address: str, more: dict[str, str]) -> bool:
    done = subprocess.run(
        [sys.executable, "-c", JOIN, address],
        env=environment(more),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode == 0 and "ran 6" in done.stdout


def test_only_who_has_the_token_joins() -> None:
    mine = ray_credentials()
    cluster = subprocess.Popen(
        [sys.executable, "-c", START],
        env=environment(mine),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert cluster.stdout is not None
    try:
        address = next(x for x in cluster.stdout if x.startswith("address ")).split()[1]
        assert joins(address, mine)
        assert not joins(address, {})
        assert not joins(address, {**mine, RAY_AUTH_TOKEN: "0" * 64})
    finally:
        cluster.communicate("\n", timeout=60)


def test_no_two_clusters_share_a_token() -> None:
    assert ray_credentials()[RAY_AUTH_TOKEN] != ray_credentials()[RAY_AUTH_TOKEN]
