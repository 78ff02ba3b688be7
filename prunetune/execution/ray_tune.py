"""Runs a sweep as one Ray Tune experiment over all densities, so that the cluster is never idle."""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import ExitStack
from typing import Any, final

import ray
from ray import tune

from prunetune import data as datasets
from prunetune.config.document import Document
from prunetune.config.schema import Config
from prunetune.execution.cluster import connection, node_check, preflight
from prunetune.execution.dispatcher import Dispatcher
from prunetune.execution.driver_only import DriverOnly
from prunetune.execution.interruption import Interruption, interruptible
from prunetune.execution.packing import trials_per_worker
from prunetune.execution.ray_settings import ray_settings
from prunetune.execution.recorder import Recorder
from prunetune.execution.referee import Referee
from prunetune.execution.roster import Roster
from prunetune.execution.seam import Trials
from prunetune.execution.searcher import WorkerSearcher
from prunetune.execution.worker import Worker
from prunetune.search.early_stopping import EarlyStopping
from prunetune.stages.plan import most_epochs
from prunetune.store import Store

logger = logging.getLogger(__name__)


@final
class RayTune:
    """Runs trials on the workers of an existing Ray cluster, or of a Ray that this process starts."""

    def run(self, trials: Trials) -> bool:
        """Run the trials, as described at `Executor.run`.

        Uses the Ray that this process has initialised, else joins the cluster of `ray start` or RAY_ADDRESS,
        else starts Ray and ends it afterwards. Raises UserError also where Ray cannot be joined, and where a
        node of the cluster cannot run this sweep.
        """
        with (
            ray_settings(),
            interruptible() as interrupted,
            connection.ray_connection() as local,
            ExitStack() as at_end,
        ):
            interrupted.listen()  # again, because Ray has replaced the handlers while starting
            return _run(trials, interrupted, local, at_end)


def _run(trials: Trials, interrupted: Interruption, local: bool, at_end: ExitStack) -> bool:
    config, search = trials.config, trials.search
    resources = _resources(config, local, trials.source)
    shipped, expectation = _prepare_nodes(trials, interrupted, local, at_end)
    slots = _slots(resources) if local else None
    # How many workers may wait for resources. On a cluster all workers that the sweep can use may wait: the
    # autoscaler adds nodes for waiting workers, and would otherwise add them one after the other.
    if (name := "TUNE_MAX_PENDING_TRIALS_PG") not in os.environ:
        os.environ[name] = "16" if local else "1000"
        at_end.callback(os.environ.pop, name)
    per_worker = trials_per_worker(config, trials.problem, resources)
    roster = Roster.start()
    dispatcher = Dispatcher(search, roster, per_worker=per_worker, most=config.search.max_concurrent)
    longest = most_epochs(trials.problem.template).post_pruning
    referee = Referee(
        search,
        dispatcher,
        EarlyStopping(config, search.past, longest),
        Store(config.storage).sub("store"),
        trials.listeners,
    )
    # A folder for Tune's own files, which nothing reads. It may be on this machine's disk even for a cluster,
    # because workers write no files there: `checkpoint_at_end=False` below is for that. Otherwise Tune would
    # let each worker save a checkpoint at its end, and restart a worker that cannot see this folder.
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
                steps=trials.steps,
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
            callbacks=[Recorder(referee)],
            failure_config=tune.FailureConfig(max_failures=-1),  # the referee counts failures
            stop=_StopAll(lambda: interrupted.is_set() or referee.is_hopeless or dispatcher.is_over),
            verbose=0,
        ),
    ).fit()
    referee.check()
    return interrupted.is_set()


def _prepare_nodes(
    trials: Trials, interrupted: Interruption, local: bool, at_end: ExitStack
) -> tuple[list[Any] | None, dict[str, Any] | None]:
    """Share the data with the nodes, and check that every node can run the sweep.

    Returns ([a reference to the data], or None where the data set is searched; what a node must have, or
    None on a single machine). Raises UserError where a node of the cluster lacks something.
    """
    config, problem = trials.config, trials.problem
    # The data are decoded once, here. Ray copies them to each node once; its workers share the memory.
    shipped = None
    if not node_check.is_data_searched(problem):
        shipped = [ray.put(datasets.load(config.data).arrays())]
    if local:
        return shipped, None
    expectation = node_check.expected(config, problem)
    probe = node_check.Probe(expectation)
    probe.write()
    at_end.callback(probe.remove)
    preflight.check(expectation, probe, shipped or [], trials.source, interrupted.is_set)
    return shipped, expectation


class _StopAll(DriverOnly, tune.Stopper):  # type: ignore[misc]
    """Ends the Ray Tune experiment as soon as `condition()` is true."""

    def __init__(self, condition: Any) -> None:
        self._condition = condition

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self._condition())


def _worker_name(trial: Any) -> str:
    return f"worker-{trial.trial_id}"


def _resources(config: Config, local: bool, source: Document) -> dict[str, float]:
    """The resources to ask of Ray per worker; a single machine without a GPU runs trials on its CPU."""
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
    """How many workers fit on this machine at once."""
    have = ray.cluster_resources()
    return max(1, min(int(have[name.upper()] / wanted + 1e-9) for name, wanted in resources.items()))
