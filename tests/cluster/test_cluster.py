"""`ray up` and sweeps on several hosts, over real SSH; the hosts are namespaces of this machine (`hosts.py`).

One cluster for the whole file, and its tests in this order: up, a host dies and one joins, a job, down.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.laptop import Cluster, wait_for, why_not

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        found.boot()
        found.worker("worker1", 11)
        found.worker("worker2", 12)
        found.ray("get-auth-token", "--generate")
        found.write_sweep("submitted", trials=2)
        found.up()
        wait_for(lambda: len(found.nodes()) == 3)
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
    command = f'. ~/.prunetune.sh; RAY_AUTH_TOKEN={64 * "0"} python -c "{script}"'
    ran = worker.run(command, check=False)
    assert ran.returncode != 0
    assert "IN" not in ran.stdout.splitlines()
    assert "token" in ran.stdout.lower()
    fetch = "import urllib.request as u; u.urlopen('http://127.0.0.1:8265/api/jobs/')"
    ran = cluster.head.run(f'. ~/.prunetune.sh; python -c "{fetch}"', check=False)
    assert "HTTP Error 401" in ran.stdout


def test_a_sweep_outlives_a_host_and_uses_a_new_one(cluster: Cluster) -> None:
    newcomer = cluster.machine("worker3", 13)
    # A trial takes a whole host, so that those which wait for the new one leave most of them to be run.
    (cpus,) = {cluster.nodes()[address]["CPU"] for address in cluster.workers}
    cluster.write_sweep("elastic", trials=11, newcomer=newcomer.name, cpus=cpus)
    cluster.ray("rsync-up", "cluster.yaml", "sweeps/elastic.yaml", "~/prunetune/sweeps/elastic.yaml")
    sweep = cluster.begin(
        "exec", "cluster.yaml", "cd ~/prunetune/sweeps && python -m prunetune.sweep elastic.yaml"
    )

    def wait(condition: Callable[[], object]) -> None:
        def holds() -> object:
            assert sweep.poll() is None, sweep.communicate()[0]
            return condition()

        wait_for(holds)

    try:
        wait(lambda: cluster.finished("elastic") >= 3)
        # What the driver needs is beside it, not where hosts come and go.
        assert cluster.head.run("pgrep -f ray::_Board", check=False).returncode == 0
        assert not cluster.trained_on("worker3").exists()
        cluster.network.remove(cluster.network.hosts["worker1"])
        cluster.workers.append(newcomer.address)
        cluster.up("--no-restart")
        wait(cluster.trained_on("worker3").exists)
        out, _ = sweep.communicate()
    finally:
        sweep.kill()
    assert sweep.returncode == 0, out
    check_results(cluster, "elastic", trials=11)


def test_a_job_submitted_from_the_laptop(cluster: Cluster) -> None:
    tunnel = cluster.begin("dashboard", "cluster.yaml")
    try:
        probe = "timeout 5 bash -c '</dev/tcp/127.0.0.1/8265'"
        wait_for(lambda: cluster.laptop.run(probe, check=False).returncode == 0)
        out = cluster.ray(
            *("job", "submit", "--address", "http://127.0.0.1:8265", "--working-dir", "sweeps"),
            *("--", "python", "-m", "prunetune.sweep", "submitted.yaml"),
        )
    finally:
        tunnel.kill()
        tunnel.wait()
    assert "succeeded" in out
    check_results(cluster, "submitted", trials=2)


def test_training_over_two_hosts_with_data_that_only_the_head_has(cluster: Cluster) -> None:
    write_images(cluster.head.home / "images")
    best = cluster.shared / "runs" / "elastic" / "best" / "density-0.1.yaml"
    data = "data.name=image_folder data.root=$HOME/images data.batch_size=16"
    out = cluster.on_head(
        f"cd ~/prunetune/sweeps && python -m prunetune.train {best} {data} --workers 2 name=production"
    )
    assert "epochs trained, 0 taken from the store" in out
    assert (cluster.shared / "runs/production/trained/density-0.1/model.safetensors").exists()


def write_images(folder: Path) -> None:
    """Bright and dark pictures, as `image_folder` has them."""
    draws = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for index, name in enumerate(("bright", "dark")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draws.integers(0, 128, (8, 8), dtype=np.uint8) + 127 * (1 - index)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{number}.png")


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
        wait_for(lambda: host.run("pgrep raylet", check=False).returncode != 0)  # noqa: B023


def check_results(cluster: Cluster, sweep: str, trials: int) -> None:
    """Every trial has a result, in the storage and, once, on the MLflow server of the head."""
    records = list(cluster.records(sweep).values())
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
