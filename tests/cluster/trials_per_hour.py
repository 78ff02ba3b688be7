"""Trials per hour with 1, 2 and 3 hosts, of trials that wait: what a cluster adds, the network included.

Like the tests beside it for Linux, as root. The hosts share this machine's processors, so the trials' steps
sleep; all else is a real sweep on a real `ray up`: a worker per CPU that a host sees, records and stages on a
shared folder, every trial on the MLflow server of the head.

    PYTHONPATH=tests python -m cluster.trials_per_hour
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from cluster.laptop import Cluster, wait_for, why_not

PAUSE = 0.1
"""Seconds per step; a trial has 16 epochs of 5 steps."""
TRIALS = 24
"""Per host."""
HOSTS = (1, 2, 3)


def trials_per_hour(cluster: Cluster, hosts: int) -> float:
    """Of a sweep on the hosts that are there, from the first trial's begin to the last one's end."""
    name = f"waiting-{hosts}"
    cluster.on_head(f"cd ~/prunetune/sweeps && python -m prunetune.sweep {name}.yaml")
    found = [(path.stat().st_mtime, record["seconds"]) for path, record in cluster.records(name).items()]
    begun, ended = min(end - seconds for end, seconds in found), max(end for end, _ in found)
    return 3600 * len(found) / (ended - begun)


def main() -> None:
    """The command."""
    if problem := why_not():
        sys.exit(f"no cluster can be made here: {problem}")
    with tempfile.TemporaryDirectory(prefix="prunetune-") as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.boot()
            cluster.ray("get-auth-token", "--generate")
            for hosts in HOSTS:  # `ray up` takes the files along
                # Every trial computes all of its stages; else the branches would be shorter.
                trials = TRIALS * hosts // 2
                cluster.write_sweep(f"waiting-{hosts}", trials=trials, pause=PAUSE, exploration=1.0)
            for hosts in HOSTS:
                cluster.worker(f"worker{hosts}", 10 + hosts)
                cluster.up(*(["--no-restart"] if hosts > 1 else []))
                wait_for(lambda: len(cluster.nodes()) == hosts + 1)  # noqa: B023
                slots = sum(resources.get("CPU", 0) for resources in cluster.nodes().values())
                rate = trials_per_hour(cluster, hosts)
                print(f"{hosts} hosts, {slots:g} workers: {rate:,.0f} trials per hour", flush=True)
        finally:
            cluster.network.close()


if __name__ == "__main__":
    main()
