"""Two Ray nodes on one machine, of which the second can be killed."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

# A head and a second node, each with one processor, from one process that stays.
CLUSTER = """
import sys, ray
from ray.cluster_utils import Cluster
node = {"num_cpus": 1, "object_store_memory": 80 << 20}
cluster = Cluster(initialize_head=True, head_node_args=node)
second = cluster.add_node(**node)
cluster.wait_for_nodes()
print("address", cluster.address, flush=True)
for line in sys.stdin:
    if line.strip() == "kill":
        cluster.remove_node(second, allow_graceful=False)
        print("killed", flush=True)
    else:
        break
cluster.shutdown()
"""


@dataclass
class TwoNodes:
    """The cluster, and how to kill its second node."""

    address: str
    process: subprocess.Popen[str]
    folder: Path

    def kill_one(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("kill\n")
        self.process.stdin.flush()
