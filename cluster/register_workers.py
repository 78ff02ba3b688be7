"""Tells a running head of machines that are new in `worker_ips`; `ray up --no-restart` runs it there.

The autoscaler reads a changed file at once, but which machines there are only from its state file, which is
written when the provider is made (Ray 2.60). So it is made once more, next to the autoscaler.
"""

import json
from pathlib import Path

from ray.autoscaler._private.local.node_provider import LocalNodeProvider

config = json.loads((Path.home() / "ray_bootstrap_config.yaml").read_text())
LocalNodeProvider(config["provider"], config["cluster_name"])
