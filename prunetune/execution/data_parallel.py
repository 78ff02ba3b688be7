"""One training over several workers, with Ray Train: each runs the pipeline on its slice of every batch.

Ray Train starts the workers, joins them to a process group and notices when one is lost. Each worker calls
`pipeline.run` with the group as its replicas. Progress is kept in the store: after a loss a new group resumes
from the newest epoch there, and at the end this process reads the result from the store.
"""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
import shutil
import socket
import struct
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, final

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.torch.config import _TorchBackend
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prunetune import data as datasets
from prunetune import pipeline
from prunetune.config.schema import Config
from prunetune.data import Dataset
from prunetune.engine.epoch import Epoch
from prunetune.engine.loop import EpochWork
from prunetune.engine.precision import prepare_process
from prunetune.engine.replicas import Replicas
from prunetune.errors import UserError, WorkError
from prunetune.execution.cluster.connection import ray_connection
from prunetune.execution.interruption import interruptible
from prunetune.execution.ray_settings import ray_settings
from prunetune.pipeline import PipelineResult
from prunetune.store import Store

logger = logging.getLogger(__name__)

_TRIES = 3
"""Training fails when this many groups in a row are lost without finishing an epoch."""


def run(config: Config, workers: int, report: Callable[..., None], owner: str) -> PipelineResult:
    """Train as `run_pipeline` does, data-parallel over `workers` processes.

    `config` has absolute paths; `report(**metrics)` is called in this process. Joins the Ray cluster of
    `ray start` or RAY_ADDRESS, else starts Ray on this machine. Raises UserError where the machine lacks the
    resources that the workers ask for, WorkError where training fails, and KeyboardInterrupt on SIGINT and
    SIGTERM, after the workers have been told to end.
    """
    started = time.monotonic()
    store = pipeline.training_store(config)
    scratch = tempfile.mkdtemp(prefix="prunetune-")
    try:
        with ray_settings(), interruptible() as interrupted, ray_connection() as local:
            interrupted.listen()  # again, because Ray has replaced the handlers while starting
            scaling = _scaling(config, workers, local)
            # Decode the data once, here. Ray copies them to each node once; its workers share the memory.
            progress = _Progress(report, [ray.put(datasets.load(config.data).arrays())])
            try:
                lost, epoch = 0, 0
                while error := _fit(
                    _trainer(config, scaling, owner, progress, scratch), progress, interrupted
                ):
                    lost, epoch = (1 if progress.epoch > epoch else lost + 1), progress.epoch
                    _check(error, lost)
                    logger.warning("a worker was lost; training goes on from its newest epoch in the store")
            finally:
                progress.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    result = _stored(config, store, owner)
    if result.cut_layers:  # repeated here, because the workers' logs are not shown in this process
        layers = ", ".join(result.cut_layers)
        logger.warning("layer collapse: no weight of %s is on a path from input to output", layers)
    return dataclasses.replace(
        result,
        epochs_run=progress.epoch - progress.reused,
        epochs_reused=progress.reused,
        seconds=time.monotonic() - started,
    )


def _trainer(
    config: Config, scaling: ray.train.ScalingConfig, owner: str, progress: _Progress, scratch: str
) -> TorchTrainer:
    return TorchTrainer(
        _work,
        train_loop_config={"config": config, "owner": owner, "coordinator": progress.coordinator},
        scaling_config=scaling,
        torch_config=_OnNodeAddress(backend="nccl" if scaling.use_gpu else "gloo"),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=scratch,  # Ray's own files, which nothing reads
            failure_config=ray.train.FailureConfig(max_failures=0),  # `run` decides whether to try again
        ),
    )


def _work(task: dict[str, Any]) -> None:
    """Run the pipeline in one worker; the worker of rank 0 reports every epoch to the coordinator."""
    config: Config = task["config"]
    (shipped,) = ray.get(task["coordinator"].data.remote())
    datasets.provide(config.data, Dataset.from_arrays(ray.get(shipped)))
    prepare_process(max(1, int(config.resources.cpus)))
    replicas = Replicas.joined()
    epochs = pipeline.run(
        config,
        store=Store(config.storage).sub("store"),
        device=str(get_device()),
        owner=task["owner"],
        replicas=replicas,
    )
    for epoch in epochs:
        if replicas.rank == 0:
            ray.get(task["coordinator"].add.remote(epoch))


class _Coordinator:
    """A Ray actor on the driver's node that runs groups of workers, hands them the data and collects epochs.

    Its methods run in threads. Killing the actor also ends the group that it runs.
    """

    def __init__(self, data: list[Any]) -> None:
        self._data = data
        self._epochs: deque[Epoch] = deque()

    def fit(self, trainer: TorchTrainer) -> Exception | None:
        """Run one group of workers; return the exception that ended it early, or None."""
        try:
            trainer.fit()
        except Exception as error:
            return error
        return None

    def data(self) -> list[Any]:
        return self._data

    def add(self, epoch: Epoch) -> None:
        self._epochs.append(epoch)

    def take(self) -> list[Epoch]:
        return [self._epochs.popleft() for _ in range(len(self._epochs))]


@final
class _Progress:
    """Reports each epoch once, even if a new group of workers had to repeat it."""

    def __init__(self, report: Callable[..., None], data: list[Any]) -> None:
        """`data` is a reference to `Dataset.arrays()`, in a list, because Ray resolves a bare reference."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here, "max_concurrency": 4}
        options |= _settings(os.environ)
        self.coordinator = ray.remote(_Coordinator).options(**options).remote(data)
        self.epoch = 0
        self.reused = 0
        self._report = report

    def show(self) -> None:
        for epoch in ray.get(self.coordinator.take.remote()):
            if epoch.epoch > self.epoch:
                self.epoch = epoch.epoch
                self.reused += epoch.reused
                self._report(**epoch.report())

    def close(self) -> None:
        """Kill the coordinator, and with it the workers that still run."""
        ray.kill(self.coordinator)


def _settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """Actor options that pass on the RAY_TRAIN_ variables: Ray Train reads them in the process of `fit`.

    >>> _settings({"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600", "HOME": "/root"})
    {'runtime_env': {'env_vars': {'RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S': '600'}}}
    >>> _settings({"HOME": "/root"})
    {}
    """
    found = {key: value for key, value in environment.items() if key.startswith("RAY_TRAIN_")}
    return {"runtime_env": {"env_vars": found}} if found else {}


def _fit(trainer: TorchTrainer, progress: _Progress, interrupted: Any) -> Exception | None:
    """Run one group of workers and report its epochs; return the exception that ended it early, or None."""
    # `fit` runs in the actor and not in this process: in a main thread, Ray Train handles Ctrl-C itself and
    # exits as if training had succeeded; in another thread, a call that still waits for Ray when this process
    # disconnects ends the whole process.
    try:
        error = progress.coordinator.fit.remote(trainer)
        while not ray.wait([error], timeout=0.2)[0]:
            if interrupted.is_set():
                raise KeyboardInterrupt
            progress.show()
        progress.show()
        ended: Exception | None = ray.get(error)
    except RayError as lost:  # the actor itself was lost
        ended = lost
    return ended


def _check(error: Exception, lost: int) -> None:
    """Raise UserError or WorkError where starting another group of workers would not help."""
    failures = list(getattr(error, "worker_failures", {}).values())
    for failure in failures:
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, UserError | WorkError):
            raise cause from None
    if not isinstance(error, ray.train.TrainingFailedError):
        raise WorkError(f"training cannot be run: {error}")
    if lost >= _TRIES:
        raise WorkError(f"training failed {lost} times without an epoch in between; the last time: {error}")


def _scaling(config: Config, workers: int, local: bool) -> ray.train.ScalingConfig:
    """The resources of each worker: where there are GPUs, a whole one, because NCCL cannot share a GPU."""
    cpus = config.resources.cpus
    have = ray.cluster_resources()
    use_gpu = have.get("GPU", 0) > 0 or (not local and config.resources.gpus > 0)
    for what, wanted, there in (
        ("CPUs (resources.cpus each)", workers * cpus, have.get("CPU", 0)),
        ("GPUs (one each)", workers if use_gpu else 0, have.get("GPU", 0)),
    ):
        if wanted > there:
            where = "this machine" if local else "the Ray cluster"
            lack = f"--workers {workers}: they need {wanted:g} {what}; {where} has {there:g}"
            if local:
                raise UserError(f"command line: {lack}")
            logger.warning("%s; waiting for the autoscaler to add nodes", lack)
    resources = {"CPU": cpus, "GPU": 1} if use_gpu else {"CPU": cpus}
    return ray.train.ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=resources)


def _stored(config: Config, store: Store, owner: str) -> PipelineResult:
    """Read the result that the workers have stored. Raises WorkError where an epoch of it is missing."""
    trial = pipeline.Outcome(pipeline.steps(config, store=store, owner=owner))
    for step in trial:
        if isinstance(step, EpochWork):
            raise WorkError(
                f"storage = {config.storage}: what the workers have stored is not there as seen from here; "
                "on a cluster it must be a folder that all nodes share, or a URI (s3://…)"
            )
    return trial.value


class _OnNodeAddress(TorchConfig):  # type: ignore[misc]
    """PyTorch's process group, connected through the IP addresses that Ray uses for its nodes."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _OnNodeAddressBackend


class _OnNodeAddressBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_use_node_address)
        super().on_start(worker_group, backend_config)


def _use_node_address() -> None:
    """Name gloo's network interface: by default gloo resolves the host's name, often to the loopback."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The name of the network interface with this IPv4 address; None where it cannot be found."""
    request_address = 0x8915  # SIOCGIFADDR of Linux
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), request_address, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an address, or a system other than Linux
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
