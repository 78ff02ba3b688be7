"""A cluster of hosts (`hosts.py`) as a person with a laptop makes it: `ray up` with the on-premises file."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shlex
import shutil
import site
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from cluster import hosts

ROOT = Path(__file__).parents[2]
NEEDED = ("aiohttp_cors", "opencensus", "virtualenv", "boto3", "setuptools")


def why_not() -> str | None:
    """Why there can be no such cluster here, or None."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        return f"needs {', '.join(missing)}: pip install -e '.[dev]'"
    return hosts.unavailable()


SWEEP = """
name: NAME
data: {name: digits, batch_size: 64, limit: 400, validation_fraction: 0.2}
model: {name: "paced:Net", pause: PAUSE, newcomer: NEWCOMER, trials: RECORDS}
densities: [0.3, 0.1]
pre_pruning: {epochs: 4, optimizer: {name: adam, lr: {loguniform: [1.0e-3, 1.0e-2]}}}
post_pruning: {epochs: 12, optimizer: {name: adam, lr: {loguniform: [1.0e-3, 1.0e-2]}}}
search: {trials_per_density: TRIALS, exploration: EXPLORATION, early_stopping: null}
resources: {cpus: CPUS, trials_per_worker: 1}
"""

# A user's model. A step takes `pause` seconds at least. With `newcomer`, a file in a folder where every host
# that trains leaves its name: once three trials of the sweep have ended, training waits for that file.
MODEL = """
import json, socket, time
from pathlib import Path
from torch import nn

class Net(nn.Sequential):
    def __init__(self, input_shape, num_classes, pause, newcomer, trials):
        c, h, w = input_shape
        super().__init__(nn.Flatten(), nn.Linear(c * h * w, 16), nn.ReLU(), nn.Linear(16, num_classes))
        self.pause, self.newcomer, self.trials = pause, newcomer, trials
    def forward(self, x):
        time.sleep(self.pause * self.training)
        if self.training and self.newcomer:
            Path(self.newcomer).with_name(socket.gethostname()).touch()
            while not Path(self.newcomer).exists() and self.ended() >= 3:
                time.sleep(0.1)
        return super().forward(x)
    def ended(self):
        texts = [path.read_text() for path in Path(self.trials).glob("*/*.json")]
        return sum(json.loads(text)["body"]["status"] != "running" for text in texts)
"""


class Cluster:
    """The hosts, and what a person does on the laptop among them."""

    def __init__(self, folder: Path) -> None:
        self.shared = folder / "shared"
        self.project = self.shared / "project"
        self.project.mkdir(parents=True)
        packages = [Path(path) for path in sys.path if path.endswith("site-packages")]
        fixed = dict.fromkeys([Path(sys.base_prefix), Path(sys.prefix), *packages])
        self.network = hosts.Network(
            folder,
            shared=[self.shared],
            fixed=list(fixed),
            environment={
                "RAY_USAGE_STATS_ENABLED": "0",
                # The hosts have no way to a package index.
                "PIP_NO_INDEX": "1",
                "PIP_NO_BUILD_ISOLATION": "0",
            },
        )
        self.workers: list[str] = []

    def boot(self) -> None:
        """A laptop with an SSH key and the project; a head."""
        self.laptop = self.network.add("laptop", 2)
        prepare(self.laptop)
        keys = self.laptop.home / ".ssh"
        keys.mkdir(mode=0o700)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / "id_ed25519"], check=True)
        self.public_key = (keys / "id_ed25519.pub").read_text()
        self.head = self.machine("head", 10)
        template = yaml.safe_load((ROOT / "cluster-onprem.yaml").read_text())
        copy_project([name for name in template["file_mounts"].values() if "~" not in name], self.project)
        (self.project / "sweeps" / "paced.py").write_text(MODEL)

    def machine(self, name: str, number: int) -> hosts.Host:
        """A machine that lets the laptop in."""
        host = self.network.add(name, number, self.public_key)
        prepare(host)
        return host

    def worker(self, name: str, number: int) -> hosts.Host:
        """A machine that the next `ray up` adds."""
        host = self.machine(name, number)
        self.workers.append(host.address)
        return host

    def up(self, *options: str) -> str:
        """`ray up` with the file for machines that one owns, for these machines."""
        config = yaml.safe_load((ROOT / "cluster-onprem.yaml").read_text())
        config["provider"].update(head_ip=self.head.address, worker_ips=self.workers)
        config["auth"]["ssh_user"] = "root"
        (setup,) = config["setup_commands"]
        config["setup_commands"] = [setup.replace("/shared/prunetune", f"{self.shared}/runs")]
        assert config["setup_commands"] != [setup]
        (self.project / "cluster.yaml").write_text(yaml.safe_dump(config))
        return self.ray("up", "-y", "cluster.yaml", *options)

    def ray(self, *words: str) -> str:
        """What a `ray` command on the laptop, in the project's folder, prints."""
        return self.laptop.run(self._line(words), RAY_AUTH_MODE="token").stdout

    def begin(self, *words: str) -> subprocess.Popen[str]:
        """A `ray` command on the laptop that goes on for a while."""
        return subprocess.Popen(
            self.laptop.command(self._line(words), RAY_AUTH_MODE="token"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _line(self, words: tuple[str, ...]) -> str:
        return f"cd {self.project} && exec ~/prunetune-venv/bin/{shlex.join(['ray', *words])}"

    def on_head(self, command: str) -> str:
        """A command on the head by `ray exec`."""
        return self.ray("exec", "cluster.yaml", command)

    def nodes(self) -> dict[str, dict[str, float]]:
        """The resources of the nodes that are alive, by address."""
        script = (
            "import json, ray; ray.init(address='auto', log_to_driver=False);"
            "alive = [node for node in ray.nodes() if node['Alive']];"
            "print('NODES', json.dumps({n['NodeManagerAddress']: n['Resources'] for n in alive}))"
        )
        out = self.head.run(f'. ~/.prunetune.sh; python -c "{script}"').stdout
        found: dict[str, dict[str, float]] = json.loads(out.partition("NODES ")[2].splitlines()[0])
        return found

    def records(self, sweep: str) -> dict[Path, dict[str, Any]]:
        """The trials' records in the storage, by file."""
        paths = sorted((self.shared / "runs" / sweep / "trials").glob("*/*.json"))
        return {path: json.loads(path.read_text())["body"] for path in paths}

    def finished(self, sweep: str) -> int:
        """How many trials have ended."""
        return sum(record["status"] != "running" for record in self.records(sweep).values())

    def write_sweep(
        self,
        name: str,
        *,
        trials: int,
        pause: float = 0.0,
        exploration: float = 0.125,
        newcomer: str | None = None,
        cpus: float = 1,
    ) -> None:
        """A sweep file on the laptop, of so many trials at each of two densities.

        With `newcomer` the trials after the third wait until the host of that name trains one of them.
        """
        values = {
            "NAME": name,
            "TRIALS": trials,
            "PAUSE": pause,
            "EXPLORATION": exploration,
            "NEWCOMER": self.trained_on(newcomer) if newcomer else "null",
            "RECORDS": self.shared / "runs" / name / "trials",
            "CPUS": f"{cpus:g}",
        }
        text = SWEEP
        for key, value in values.items():
            text = text.replace(key, str(value))
        self.trained_on(name).parent.mkdir(exist_ok=True)
        (self.project / "sweeps" / f"{name}.yaml").write_text(text)

    def trained_on(self, host: str) -> Path:
        """The file that is there once the host has trained a network of a sweep with a newcomer."""
        return self.shared / "hosts" / host


def prepare(host: hosts.Host) -> None:
    """What a machine's image has: an environment with all that the project needs, but not the project."""
    venv = host.home / "prunetune-venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    lines = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
    (packages / "image.pth").write_text("".join(lines))
    for name, target in {"ray": "ray.scripts.scripts:main", "mlflow": "mlflow.cli:cli"}.items():
        module, _, function = target.partition(":")
        script = venv / "bin" / name
        text = f"#!{Path.home()}/prunetune-venv/bin/python\nfrom {module} import {function}\n{function}()\n"
        script.write_text(text)
        script.chmod(0o755)


def copy_project(names: list[str], target: Path) -> None:
    """The project as a laptop has it; the versions to install are those which are here."""
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target / name)
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    pins = [
        line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    ]
    lines = [f"{name}=={installed[name.lower()]}\n" for name in pins if name.lower() in installed]
    (target / "constraints.txt").write_text("".join(lines))


def wait_for(condition: Callable[[], object]) -> None:
    """Until the condition holds, however slow the machine is; pytest ends a test that hangs."""
    while not condition():
        time.sleep(0.5)
