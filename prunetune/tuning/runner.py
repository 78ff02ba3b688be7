"""One sweep as one Ray Tune experiment: all densities together, so that the cluster is never idle."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Read by Ray when it is imported.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # else a reporter of its own prints tables
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # MLflow has the curves
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1000000000")  # the store is what is resumed
os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "16")  # so many workers start at once
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # failed trials have no metric
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # ours also says how to go on
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray import tune

from prunetune import pipeline
from prunetune.config import most_epochs
from prunetune.errors import UserError
from prunetune.schema import Config
from prunetune.store import Store
from prunetune.tuning.driver_only import DriverOnly
from prunetune.tuning.early_stopping import PerDensityAsha
from prunetune.tuning.ledger import Problem
from prunetune.tuning.packing import trials_per_worker
from prunetune.tuning.recorder import Listener, Recorder
from prunetune.tuning.roster import Dispatcher, Roster
from prunetune.tuning.search import SweepSearch, WorkerSearcher
from prunetune.tuning.trainable import Worker

logger = logging.getLogger(__name__)


def run(
    config: Config,
    problem: Problem,
    search: SweepSearch,
    listeners: list[Listener],
    steps: pipeline.Steps = pipeline.steps,
) -> bool:
    """Run all trials that are missing; whether it was interrupted. `config` has absolute paths.

    `steps` is what a trial runs.

    Raises WorkError when nothing works, UserError when the machine has not what a trial asks for.
    """
    with _interruptible() as interrupted, _ray() as local:
        interrupted.listen()  # Ray sets handlers of its own when it starts
        resources = _resources(config, local)
        slots = _slots(resources) if local else None
        longest = most_epochs(problem.template, "post_pruning")
        per_worker = trials_per_worker(config, problem, resources)
        roster = Roster.start()
        dispatcher = Dispatcher(search, roster, per_worker=per_worker, most=config.search.max_concurrent)
        recorder = Recorder(
            search,
            dispatcher,
            PerDensityAsha(config, search.past, longest),
            Store(config.storage).sub("store"),
            listeners,
        )
        scratch = tempfile.mkdtemp(prefix="prunetune-") if local else None
        try:
            tune.Tuner(
                tune.with_resources(
                    tune.with_parameters(
                        Worker,
                        sweep=config,
                        threads=max(1, int(config.resources.cpus)),
                        roster=roster,
                        steps=steps,
                    ),
                    resources,
                ),
                tune_config=tune.TuneConfig(
                    search_alg=WorkerSearcher(search, dispatcher.useful_workers),
                    num_samples=-1,
                    max_concurrent_trials=slots,
                    reuse_actors=True,
                    trial_dirname_creator=_worker_name,
                    trial_name_creator=_worker_name,
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    # Nothing of value is there; on a cluster every node must reach it.
                    storage_path=scratch or Store(config.storage).sub(config.name).path(""),
                    callbacks=[recorder],
                    failure_config=tune.FailureConfig(max_failures=-1),  # the recorder counts
                    stop=_StopAll(lambda: interrupted.is_set() or recorder.is_hopeless),
                    verbose=0,
                ),
            ).fit()
        finally:
            if scratch:
                shutil.rmtree(scratch, ignore_errors=True)
        recorder.check()
        return interrupted.is_set()


class _StopAll(DriverOnly, tune.Stopper):  # type: ignore[misc]
    """Ends the experiment when `condition` holds."""

    def __init__(self, condition: Any) -> None:
        self._condition = condition

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self._condition())


def _worker_name(trial: Any) -> str:
    return f"worker-{trial.trial_id}"


@contextmanager
def _ray() -> Iterator[bool]:
    """A connection to the cluster of `ray start` or RAY_ADDRESS, else our own Ray; whether it is our own."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if ray.is_initialized():
        yield False
        return
    # Not address="auto": that also joins another sweep's own Ray on this machine, and dies with it.
    try:
        context = ray.init(include_dashboard=False, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        address = os.environ.get("RAY_ADDRESS", "the address that `ray start` left")
        raise UserError(f"Ray at {address} cannot be reached: {error}") from None
    # A session is named after the process that started it.
    local = str(context.address_info["session_dir"]).endswith(f"_{os.getpid()}")
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are told by the recorder
    try:
        yield local
    finally:
        ray.shutdown()


class _Interruption:
    """Set by the first SIGINT or SIGTERM; a second one acts as it did before."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    def is_set(self) -> bool:
        """Whether somebody wants to stop."""
        return self._event.is_set()

    def listen(self) -> None:
        """Handle the signals from now on (again)."""
        if threading.current_thread() is threading.main_thread() and not self.is_set():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before.setdefault(number, signal.getsignal(number))
                signal.signal(number, self._handle)

    def stop_listening(self) -> None:
        """Put the handlers of before back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._event.set()
        self.stop_listening()


@contextmanager
def _interruptible() -> Iterator[_Interruption]:
    interruption = _Interruption()
    interruption.listen()
    try:
        yield interruption
    finally:
        interruption.stop_listening()


def _resources(config: Config, local: bool) -> dict[str, float]:
    """What to ask of Ray per trial. A machine of one's own without a GPU runs trials on its CPU."""
    cpus, gpus = config.resources.cpus, config.resources.gpus
    if local:
        have = ray.cluster_resources()
        if gpus > 0 and have.get("GPU", 0) == 0:
            gpus = 0
        for name, wanted, there in (
            ("cpus", cpus, have.get("CPU", 0)),
            ("gpus", gpus, have.get("GPU", 0)),
        ):
            if wanted > there:
                raise UserError(
                    f"resources.{name} = {wanted:g}: this machine has {there:g}; a trial must fit on it"
                )
    elif not any(
        node["Alive"] and node["Resources"].get("CPU", 0) >= cpus and node["Resources"].get("GPU", 0) >= gpus
        for node in ray.nodes()
    ):
        logger.warning(
            "no node of the Ray cluster has %g CPUs and %g GPUs for a trial yet (resources: in the sweep's "
            "file); waiting for the autoscaler to add one",
            cpus,
            gpus,
        )
    return {"cpu": cpus, "gpu": gpus} if gpus else {"cpu": cpus}


def _slots(resources: dict[str, float]) -> int:
    """How many trials fit on this machine at once."""
    have = ray.cluster_resources()
    return max(1, min(int(have[name.upper()] / wanted + 1e-9) for name, wanted in resources.items()))
