"""The files for clusters: accepted by Ray's own checks, and as closed as they say.

The manifests for Kubernetes are checked for what KubeRay wants of them (fields, references, versions). With
PRUNETUNE_KUBERAY_CRD, a copy of KubeRay's ray.io_rayjobs.yaml, they are validated against its whole schema.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
FILES = ("cluster.yaml", "cluster-onprem.yaml")
MANIFESTS = ("kubernetes/rayjob.yaml", "kubernetes/mlflow.yaml")


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return found


def prepared(name: str) -> dict[str, Any]:
    """As `ray up` prepares it: with Ray's defaults."""
    found: dict[str, Any] = prepare_config(read(name))
    return found


def commands(config: dict[str, Any]) -> list[str]:
    return [command for key, listed in config.items() if key.endswith("_commands") for command in listed]


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file(name: str) -> None:
    validate_config(prepared(name))


@pytest.mark.parametrize("name", FILES)
def test_what_is_mounted_is_there_and_small(name: str) -> None:
    # Ray reads all of it at every `ray up`, and on the head as often as it likes.
    for source in read(name)["file_mounts"].values():
        if not source.startswith("~"):
            assert (ROOT / source).exists()
            assert source not in (".", "./")


@pytest.mark.parametrize("name", FILES)
def test_every_node_installs_the_mounted_project(name: str) -> None:
    config = read(name)
    (setup,) = config["setup_commands"]
    assert setup.split()[-1] == "~/prunetune/cluster/setup.sh"
    assert config["file_mounts"]["~/prunetune/cluster"] == "cluster"
    needed = {"pyproject.toml", "constraints.txt", "prunetune", "README.md", "LICENSE"}
    assert needed <= {target.removeprefix("~/prunetune/") for target in config["file_mounts"]}
    assert "-c constraints.txt" in (ROOT / "cluster/setup.sh").read_text()


@pytest.mark.parametrize("name", FILES)
def test_nodes_have_the_token_and_ask_for_it(name: str) -> None:
    assert prepared(name)["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "export RAY_AUTH_MODE=token" in (ROOT / "cluster/setup.sh").read_text()


@pytest.mark.parametrize("name", FILES)
def test_dashboard_and_mlflow_listen_on_the_loopback(name: str) -> None:
    config = prepared(name)
    (start,) = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert "--head" in start
    assert "--dashboard-host=127.0.0.1" in start
    assert not [line for line in commands(config) if "0.0.0.0" in line]
    assert config["head_start_ray_commands"][-1] == "~/prunetune/cluster/mlflow.sh"
    server = (ROOT / "cluster/mlflow.sh").read_text()
    assert "--host 127.0.0.1" in server
    assert "0.0.0.0" not in server


def test_the_head_takes_no_trials() -> None:
    aws = prepared("cluster.yaml")
    assert aws["available_node_types"][aws["head_node_type"]]["resources"]["CPU"] == 0
    start = " ".join(prepared("cluster-onprem.yaml")["head_start_ray_commands"])
    assert "--num-cpus=0" in start
    assert "--num-gpus=0" in start


def test_autoscaler_of_the_local_provider() -> None:
    # Version 2 adds no node there, and `ray up` exports 1 in front of the command.
    (start,) = [c for c in prepared("cluster-onprem.yaml")["head_start_ray_commands"] if "--head" in c]
    assert re.search(r"RAY_enable_autoscaler_v2=0 .*ray start --head", start)


def test_aws_workers_are_spot_instances_of_several_zones() -> None:
    config = prepared("cluster.yaml")
    zones = config["provider"]["availability_zone"].split(",")
    assert len(set(zones)) == len(zones) >= 2
    assert all(zone.startswith(config["provider"]["region"]) for zone in zones)
    worker = config["available_node_types"]["worker"]
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert (worker["min_workers"], worker["max_workers"]) == (0, config["max_workers"])
    assert "InstanceMarketOptions" not in config["available_node_types"]["head"]["node_config"]


def test_aws_nodes_run_one_pinned_image() -> None:
    types = prepared("cluster.yaml")["available_node_types"].values()
    images = {kind["node_config"]["ImageId"] for kind in types}
    assert len(images) == 1
    assert re.fullmatch(r"ami-[0-9a-f]{17}", images.pop())


def test_aws_rights_come_with_the_instance() -> None:
    for kind in prepared("cluster.yaml")["available_node_types"].values():
        node = kind["node_config"]
        assert set(node["IamInstanceProfile"]) == {"Name"}  # an ARN would hold an account's number
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])
    text = (ROOT / "cluster.yaml").read_text()
    assert not re.search(r"AKIA|aws_secret|arn:|\b\d{12}\b", text)


@pytest.mark.parametrize("script", ["setup.sh", "mlflow.sh"])
def test_scripts_can_be_run(script: str) -> None:
    path = ROOT / "cluster" / script
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)


def manifests() -> dict[str, dict[str, Any]]:
    """All objects by kind."""
    objects = [found for name in MANIFESTS for found in yaml.safe_load_all((ROOT / name).read_text())]
    return {found["kind"]: found for found in objects}


def pods() -> list[dict[str, Any]]:
    cluster = manifests()["RayJob"]["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_rayjob_has_what_kuberay_wants() -> None:
    job = manifests()["RayJob"]
    assert job["apiVersion"] == "ray.io/v1"
    cluster = job["spec"]["rayClusterSpec"]
    assert job["spec"]["entrypoint"].split()[:3] == ["python", "-m", "prunetune.sweep"]
    assert (ROOT / job["spec"]["entrypoint"].split()[3]).exists()
    assert cluster["rayVersion"] == pinned("ray")
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for worker in cluster["workerGroupSpecs"]:
        assert worker["groupName"]
        assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]
    for pod in pods():
        (container,) = pod["containers"]
        assert {"name", "image", "resources"} <= set(container)


def test_rayjob_is_closed_and_its_head_takes_no_trials() -> None:
    cluster = manifests()["RayJob"]["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for pod in pods():
        assert pod["containers"][0]["securityContext"]["runAsNonRoot"]


def test_only_heads_reach_mlflow_on_kubernetes() -> None:
    objects = manifests()
    server = objects["Deployment"]["spec"]
    labels = server["template"]["metadata"]["labels"]
    policy = objects["NetworkPolicy"]["spec"]
    assert labels == server["selector"]["matchLabels"] == objects["Service"]["spec"]["selector"]
    assert policy["podSelector"]["matchLabels"] == labels
    head = objects["RayJob"]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]["labels"]
    ((source,),) = [rule["from"] for rule in policy["ingress"]]
    assert source == {"podSelector": {"matchLabels": head}}
    (uri,) = [v["value"] for v in pods()[0]["containers"][0]["env"] if v["name"] == "MLFLOW_TRACKING_URI"]
    port = objects["Service"]["spec"]["ports"][0]["port"]
    assert uri == f"http://{objects['Service']['metadata']['name']}:{port}"
    images = {pod["containers"][0]["image"] for pod in [*pods(), server["template"]["spec"]]}
    assert len(images) == 1
    claim = server["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == objects["PersistentVolumeClaim"]["metadata"]["name"]


def test_image_installs_pinned_versions_of_what_is_there() -> None:
    text = (ROOT / "kubernetes/Dockerfile").read_text()
    assert "-c constraints.txt" in text
    assert re.search(r"^FROM \S+:\d", text, re.MULTILINE)
    assert re.search(r"^USER (?!root)", text, re.MULTILINE)
    for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in line.split())
    allowed = (ROOT / "kubernetes/Dockerfile.dockerignore").read_text()
    assert {line[1:] for line in allowed.splitlines() if line.startswith("!")} == {
        source for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for source in line.split()
    }


def strict(schema: Any) -> Any:
    """The schema without room for unknown fields, as the API server prunes them silently."""
    if isinstance(schema, list):
        return [strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if found.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


def test_rayjob_fits_the_schema_of_kuberay() -> None:
    path = os.environ.get("PRUNETUNE_KUBERAY_CRD")
    if not path:
        pytest.skip("no PRUNETUNE_KUBERAY_CRD (KubeRay's ray.io_rayjobs.yaml)")
    crd = yaml.safe_load(Path(path).read_text())
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1"]
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    jsonschema.validate(manifests()["RayJob"], strict(schema))
