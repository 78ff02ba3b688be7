"""`ray up` and sweeps on several hosts, over real SSH; the hosts are namespaces of this machine (`hosts.py`).

One cluster for the whole file, and its tests in this order: up, a host dies and one joins, a job, down.
"""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import hosts

ROOT = Path(__file__).parents[2]
NEEDED = ("aiohttp_cors", "opencensus", "virtualenv", "boto3", "setuptools")


def why_not() -> str | None:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        return f"needs {', '.join(missing)}: pip install -e '.[dev]'"
    return hosts.unavailable()


pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

SWEEP = """
name: NAME
data: {name: digits, batch_size: 64, limit: 400, validation_fraction: 0.2}
model: {name: "paced:Net", pause: PAUSE}
densities: [0.3, 0.1]
pre_pruning: {epochs: 4, optimizer: {name: adam, lr: {loguniform: [1.0e-3, 1.0e-2]}}}
post_pruning: {epochs: 12, optimizer: {name: adam, lr: {loguniform: [1.0e-3, 1.0e-2]}}}
search: {trials_per_density: TRIALS, early_stopping: null}
resources: {trials_per_worker: 1}
"""

# A user's model. Its steps wait, so that a sweep is long enough for hosts to come and go on any machine.
MODEL = """
import time
from torch import nn

class Net(nn.Sequential):
    def __init__(self, input_shape, num_classes, pause):
        c, h, w = input_shape
        super().__init__(nn.Flatten(), nn.Linear(c * h * w, 16), nn.ReLU(), nn.Linear(16, num_classes))
        self.pause = pause
    def forward(self, x):
        time.sleep(self.pause * self.training)
        return super().forward(x)
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

    def records(self, sweep: str) -> list[dict[str, Any]]:
        """The trials' records in the storage."""
        paths = sorted((self.shared / "runs" / sweep / "trials").glob("*/*.json"))
        return [json.loads(path.read_text())["body"] for path in paths]

    def finished(self, sweep: str) -> int:
        return sum(record["status"] != "running" for record in self.records(sweep))

    def write_sweep(self, name: str, *, trials: int, pause: float) -> None:
        text = SWEEP.replace("NAME", name).replace("TRIALS", str(trials)).replace("PAUSE", str(pause))
        (self.project / "sweeps" / f"{name}.yaml").write_text(text)


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


def wait_for(condition: Callable[[], object], what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        found.boot()
        found.worker("worker1", 11)
        found.worker("worker2", 12)
        found.ray("get-auth-token", "--generate")
        found.write_sweep("elastic", trials=11, pause=0.2)
        found.write_sweep("submitted", trials=2, pause=0.0)
        found.up()
        wait_for(lambda: len(found.nodes()) == 3, "two workers")
        yield found
    finally:
        found.network.close()


def test_up_installs_the_project_on_every_node(cluster: Cluster) -> None:
    script = "import importlib.util as u; print(u.find_spec('prunetune').origin)"
    for name in ("head", "worker1", "worker2"):
        where = cluster.network.hosts[name].run(f'~/prunetune-venv/bin/python -c "{script}"').stdout
        assert where.startswith(f"{Path.home()}/prunetune-venv/"), where


def test_the_head_takes_no_trials(cluster: Cluster) -> None:
    resources = cluster.nodes()
    assert "CPU" not in resources[cluster.head.address]
    assert all("CPU" in resources[address] for address in cluster.workers)


def test_dashboard_and_mlflow_are_on_the_loopback(cluster: Cluster) -> None:
    worker = cluster.network.hosts["worker1"]
    for port in (5000, 8265):
        probe = f"timeout 5 bash -c '</dev/tcp/{{}}/{port}'"
        assert cluster.head.run(probe.format("127.0.0.1"), check=False).returncode == 0
        assert worker.run(probe.format(cluster.head.address), check=False).returncode != 0


def test_nobody_gets_in_without_the_token(cluster: Cluster) -> None:
    script = f"import ray; ray.init(address='{cluster.head.address}:6379'); print('IN')"
    worker = cluster.network.hosts["worker1"]
    command = f'. ~/.prunetune.sh; RAY_AUTH_TOKEN={64 * "0"} timeout 60 python -c "{script}"'
    ran = worker.run(command, check=False)
    assert ran.returncode != 0
    assert "IN" not in ran.stdout.splitlines()
    assert "token" in ran.stdout.lower()
    fetch = "import urllib.request as u; u.urlopen('http://127.0.0.1:8265/api/jobs/')"
    ran = cluster.head.run(f'. ~/.prunetune.sh; python -c "{fetch}"', check=False)
    assert "HTTP Error 401" in ran.stdout


def test_a_sweep_outlives_a_host_and_uses_a_new_one(cluster: Cluster) -> None:
    newcomer = cluster.machine("worker3", 13)
    sweep = cluster.begin(
        "exec", "cluster.yaml", "cd ~/prunetune/sweeps && python -m prunetune.sweep elastic.yaml"
    )
    try:
        wait_for(lambda: cluster.finished("elastic") >= 3, "the first trials")
        # What the driver needs is beside it, not where hosts come and go.
        assert cluster.head.run("pgrep -f ray::_Board", check=False).returncode == 0
        lost = cluster.network.hosts["worker1"]
        cluster.network.remove(lost)
        cluster.workers.append(newcomer.address)
        cluster.up("--no-restart")
        has_worker = lambda: newcomer.run("pgrep -f ray::Worker", check=False).returncode == 0  # noqa: E731
        wait_for(lambda: has_worker() or sweep.poll() is not None, "a trial on the new host")
        assert sweep.poll() is None, "the sweep was over before the new host had joined"
        out, _ = sweep.communicate(timeout=300)
    finally:
        sweep.kill()
    assert sweep.returncode == 0, out
    check_results(cluster, "elastic", trials=11)


def test_a_job_submitted_from_the_laptop(cluster: Cluster) -> None:
    tunnel = cluster.begin("dashboard", "cluster.yaml")
    try:
        probe = "timeout 5 bash -c '</dev/tcp/127.0.0.1/8265'"
        wait_for(lambda: cluster.laptop.run(probe, check=False).returncode == 0, "the tunnel")
        out = cluster.ray(
            *("job", "submit", "--address", "http://127.0.0.1:8265", "--working-dir", "sweeps"),
            *("--", "python", "-m", "prunetune.sweep", "submitted.yaml"),
        )
    finally:
        tunnel.kill()
        tunnel.wait()
    assert "succeeded" in out
    check_results(cluster, "submitted", trials=2)


def test_training_over_two_hosts(cluster: Cluster) -> None:
    options = subprocess.run(
        [sys.executable, "-m", "prunetune.train", "--help"], capture_output=True, text=True, check=True
    )
    if "--workers" not in options.stdout:
        pytest.skip("prunetune.train has no --workers")
    best = cluster.shared / "runs" / "elastic" / "best" / "density-0.1.yaml"
    cluster.on_head(f"cd ~/prunetune/sweeps && python -m prunetune.train {best} --workers 2 name=production")
    assert (cluster.shared / "runs/production/trained/density-0.1/model.safetensors").exists()


def test_up_again_keeps_mlflow_and_what_is_installed(cluster: Cluster) -> None:
    def state() -> str:
        return cluster.head.run(
            "pgrep -of 'mlflow server'; stat -c %Y ~/prunetune-venv/installed; cat ~/.bashrc"
        ).stdout

    before = state()
    cluster.up()
    assert state() == before
    check_results(cluster, "submitted", trials=2)


def test_down_stops_ray_on_all_hosts(cluster: Cluster) -> None:
    cluster.ray("down", "-y", "cluster.yaml")
    for host in (cluster.head, cluster.network.hosts["worker2"], cluster.network.hosts["worker3"]):
        wait_for(lambda: host.run("pgrep raylet", check=False).returncode != 0, f"{host.name}", 30)  # noqa: B023


def check_results(cluster: Cluster, sweep: str, trials: int) -> None:
    """Every trial has a result, in the storage and, once, on the MLflow server of the head."""
    records = cluster.records(sweep)
    assert len(records) == 2 * trials
    assert {record["status"] for record in records} <= {"complete", "collapsed"}
    script = f"""
import json
from mlflow import MlflowClient
client = MlflowClient("http://127.0.0.1:5000")
experiment = client.get_experiment_by_name({sweep!r})
runs = client.search_runs([experiment.experiment_id], max_results=1000)
print("RUNS", json.dumps([[run.data.tags.get("prunetune.trial"), run.info.status] for run in runs]))
"""
    (cluster.shared / "runs.py").write_text(script)
    out = cluster.head.run(f". ~/.prunetune.sh; python {cluster.shared}/runs.py").stdout
    runs = json.loads(out.partition("RUNS ")[2].splitlines()[0])
    assert sorted(uid for uid, _ in runs if uid) == sorted(record["uid"] for record in records)
    assert [uid for uid, _ in runs].count(None) == 1  # the sweep's own
    assert {status for _, status in runs} == {"FINISHED"}
