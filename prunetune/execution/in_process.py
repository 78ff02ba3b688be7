"""Run trials one after another in this process, without Ray: for small sweeps, notebooks and debuggers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch

from prunetune.engine.precision import prepare_process
from prunetune.execution.assignment import Assignment
from prunetune.execution.crew import Crew
from prunetune.execution.dispatcher import Dispatcher
from prunetune.execution.interruption import interruptible
from prunetune.execution.referee import Referee
from prunetune.execution.seam import Trials
from prunetune.search.early_stopping import EarlyStopping
from prunetune.stages.plan import most_epochs
from prunetune.store import Store

_WORKER = "this process"


@final
class InProcess:
    """Runs the trials in this process; the results equal those of Ray with `search.max_concurrent: 1`.

    A trial that kills the process (out of memory) ends the sweep; running the same command again resumes it.
    Uses `resources.cpus` threads, and the first GPU if there is one and `resources.gpus` asks for it.
    """

    def run(self, trials: Trials) -> bool:
        """Run the trials, as described at `Executor.run`."""
        config, search = trials.config, trials.search
        board = _Board()
        longest = most_epochs(trials.problem.template).post_pruning
        referee = Referee(
            search,
            Dispatcher(search, board, per_worker=1, most=1),
            EarlyStopping(config, search.past, longest),
            Store(config.storage).sub("store"),
            trials.listeners,
        )
        device = "cuda" if config.resources.gpus and torch.cuda.is_available() else "cpu"
        crew = Crew(config, trials.steps, device)
        with interruptible() as interrupted, _prepared(max(1, int(config.resources.cpus))):
            referee.arrived(_WORKER)
            try:
                while board.wanted is not None and not (interrupted.is_set() or referee.is_hopeless):
                    crew.take(board.wanted)
                    referee.heard(_WORKER, crew.step())
            finally:
                crew.take([])
        referee.check()
        return interrupted.is_set()


@final
class _Board:
    """Holds the assignments of the only worker; None means that no work is left."""

    def __init__(self) -> None:
        self.wanted: list[Assignment] | None = []

    def write(self, worker: str, assignments: list[Assignment] | None) -> None:
        self.wanted = assignments


@contextmanager
def _prepared(threads: int) -> Iterator[None]:
    """Within the context, compute as a worker with this many threads does; restore the settings after it."""
    before = torch.get_num_threads()
    prepare_process(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(False)
