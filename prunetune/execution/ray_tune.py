"""One sweep as one Ray Tune experiment: all densities together, so that the cluster is never idle."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

# Read by Ray when it is imported.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # else a reporter of its own prints tables
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # MLflow has the curves
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1000000000")  # the store is what is resumed
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # failed trials have no metric
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # ours also says how to go on
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray import tune

from prunetune import data as datasets
from prunetune import pipeline
from prunetune.config.document import Document
from prunetune.config.schema import Config
from prunetune.execution.cluster import connection, node_check, preflight
from prunetune.execution.dispatcher import Dispatcher
from prunetune.execution.driver_only import DriverOnly
from prunetune.execution.packing import trials_per_worker
from prunetune.execution.referee import Listener, Recorder
from prunetune.execution.roster import Roster
from prunetune.execution.searcher import WorkerSearcher
from prunetune.execution.worker import Worker
from prunetune.records.ledger import Problem
from prunetune.search.early_stopping import EarlyStopping
from prunetune.search.queue import SweepSearch
from prunetune.stages.plan import most_epochs
from prunetune.store import Store

logger = logging.getLogger(__name__)

_NO_FILE = Document("the sweep's file", {})


def run(
    config: Config,
    problem: Problem,
    search: SweepSearch,
    listeners: list[Listener],
    steps: pipeline.Steps = pipeline.steps,
    source: Document = _NO_FILE,
) -> bool:
    """Run all trials that are missing; whether it was interrupted. `config` has absolute paths.

    `steps` is what a trial runs, `source` the sweep's file, for the places of keys in messages.

    Raises WorkError when nothing works, UserError when Ray cannot be joined, when the machine has not what a
    trial asks for, or when a node of the cluster cannot run this sweep.
    """
    with interruptible() as interrupted, connection.ray_connection() as local, ExitStack() as at_end:
        interrupted.listen()  # Ray sets handlers of its own when it starts
        resources = _resources(config, local, source)
        # Decoded once, here; Ray brings it to each node once, and the node's workers share the memory.
        shipped = None
        if not node_check.is_data_searched(problem):
            shipped = [ray.put(datasets.load(config.data).arrays())]
        expectation = None
        if not local:
            expectation = node_check.expected(config, problem)
            probe = node_check.Probe(expectation)
            probe.write()
            at_end.callback(probe.remove)
            preflight.check(expectation, probe, shipped or [], source, interrupted.is_set)
        slots = _slots(resources) if local else None
        # How many workers may be waiting for a place. On a cluster all that the sweep can use: the autoscaler
        # adds nodes for those that wait, and would else bring one after the other.
        if (name := "TUNE_MAX_PENDING_TRIALS_PG") not in os.environ:
            os.environ[name] = "16" if local else "1000"
            at_end.callback(os.environ.pop, name)
        longest = most_epochs(problem.template).post_pruning
        per_worker = trials_per_worker(config, problem, resources)
        roster = Roster.start()
        dispatcher = Dispatcher(search, roster, per_worker=per_worker, most=config.search.max_concurrent)
        recorder = Recorder(
            search,
            dispatcher,
            EarlyStopping(config, search.past, longest),
            Store(config.storage).sub("store"),
            listeners,
        )
        # Tune's own files, of no value. Workers write none, so this machine's disk does for a cluster: at its
        # end Tune would have each save a checkpoint, and start it again where it does not see this folder.
        scratch = at_end.enter_context(
            tempfile.TemporaryDirectory(prefix="prunetune-", ignore_cleanup_errors=True)
        )
        tune.Tuner(
            tune.with_resources(
                tune.with_parameters(
                    Worker,
                    sweep=config,
                    threads=max(1, int(config.resources.cpus)),
                    roster=roster,
                    steps=steps,
                    shipped=shipped,
                    expectation=expectation,
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
                storage_path=scratch,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[recorder],
                failure_config=tune.FailureConfig(max_failures=-1),  # the recorder counts
                stop=_StopAll(lambda: interrupted.is_set() or recorder.is_hopeless or dispatcher.is_over),
                verbose=0,
            ),
        ).fit()
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
def interruptible() -> Iterator[_Interruption]:
    """Within: the first SIGINT or SIGTERM is noted, not raised."""
    interruption = _Interruption()
    interruption.listen()
    try:
        yield interruption
    finally:
        interruption.stop_listening()


def _resources(config: Config, local: bool, source: Document) -> dict[str, float]:
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
                rule = f"this machine has {there:g}; a worker must fit on it"
                raise source.problem(f"resources.{name}", rule, wanted)
    elif not any(
        node["Alive"] and node["Resources"].get("CPU", 0) >= cpus and node["Resources"].get("GPU", 0) >= gpus
        for node in ray.nodes()
    ):
        logger.warning(
            "%s: no node of the Ray cluster has %g CPUs and %g GPUs for a worker yet; "
            "waiting for the autoscaler to add one",
            source.where("resources"),
            cpus,
            gpus,
        )
    return {"cpu": cpus, "gpu": gpus} if gpus else {"cpu": cpus}


def _slots(resources: dict[str, float]) -> int:
    """How many trials fit on this machine at once."""
    have = ray.cluster_resources()
    return max(1, min(int(have[name.upper()] / wanted + 1e-9) for name, wanted in resources.items()))
