"""Trials in this process, without Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_sweep import make_sweep

from prunetune.config.document import parse
from prunetune.config.reading import sweep_from_document
from prunetune.engine.epoch import Epoch
from prunetune.errors import WorkError
from prunetune.execution.in_process import InProcess
from prunetune.execution.seam import Trials
from prunetune.records.ledger import Ledger
from prunetune.records.problem import Problem
from prunetune.records.trial import TrialRecord
from prunetune.search.queue import SweepSearch
from prunetune.store import Store

TEXT = """
name: tiny
data: {name: digits, batch_size: 64, limit: 200, validation_fraction: 0.2}
model: {name: mlp, hidden: [8]}
densities: [0.3, 0.1]
pre_pruning: {epochs: 1, optimizer: {name: adam, lr: {choice: [1e-3, 1e-2]}}}
post_pruning: {epochs: 3, optimizer: {name: adam, lr: {loguniform: [1e-4, 3e-2]}}}
search: {trials_per_density: 3}
"""


class Told:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, int]] = []

    def started(self, record: TrialRecord) -> None:
        self.events.append(("started", record.uid, 0))

    def epochs(self, record: TrialRecord, epochs: list[Epoch]) -> None:
        self.events.extend(("epoch", record.uid, epoch.epoch) for epoch in epochs)

    def ended(self, record: TrialRecord) -> None:
        self.events.append((record.status, record.uid, 0))


def trials(folder: Path, listener: Any, **more: Any) -> tuple[Trials, Ledger]:
    template, config = sweep_from_document(
        parse(TEXT.replace("name: tiny", f"name: tiny\nstorage: {folder}"), "x")
    )
    problem, ledger = Problem.of(template), Ledger(Store(str(folder)).sub("tiny"))
    return Trials(config, problem, SweepSearch(config, problem, ledger), [listener], **more), ledger


def test_trials_run_one_after_another_and_listeners_hear_all_of_it(tmp_path: Path) -> None:
    told, threads = Told(), torch.get_num_threads()
    given, ledger = trials(tmp_path, told)
    assert InProcess().run(given) is False
    records = ledger.records()
    assert len(records) == 6
    assert all(record.finished and record.seconds > 0 for record in records)
    running: str | None = None
    for event, uid, _ in told.events:
        assert (running is None) == (event == "started")
        running = uid if event in ("started", "epoch") else None
    for record in records:
        heard = [number for event, uid, number in told.events if (event, uid) == ("epoch", record.uid)]
        assert heard == [epoch.epoch for epoch in record.curve] == list(range(1, len(heard) + 1))
    assert len(given.search) == 0
    assert torch.get_num_threads() == threads


def test_what_raises_is_recorded_and_ends_the_sweep_where_nothing_works(tmp_path: Path) -> None:
    def steps(config: Any, **given: Any) -> Any:
        raise ValueError("no such thing")
        yield

    given, ledger = trials(tmp_path, Told(), steps=steps)
    with pytest.raises(WorkError, match=r"the first 3 trials failed, the last one with:\n[^$]*no such thing"):
        InProcess().run(given)
    assert [record.status for record in ledger.records()].count("failed") == 3


def test_ctrl_c_ends_it_in_order_and_the_next_run_goes_on(tmp_path: Path) -> None:
    import signal

    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    class Stops(Told):
        def epochs(self, record: TrialRecord, epochs: list[Epoch]) -> None:
            super().epochs(record, epochs)
            if record.number == 1 and epochs[-1].post_epoch == 2:
                signal.raise_signal(signal.SIGINT)

    try:
        given, ledger = trials(tmp_path / "cut", Stops())
        assert InProcess().run(given) is True
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert "running" in [record.status for record in ledger.records()]
    given, ledger = trials(tmp_path / "cut", Told())
    assert InProcess().run(given) is False
    calm, undisturbed = trials(tmp_path / "calm", Told())
    InProcess().run(calm)

    def outcomes(ledger: Ledger) -> list[tuple]:
        return [(r.density, r.number, r.params, r.status, r.val_accuracy) for r in ledger.records()]

    assert outcomes(ledger) == outcomes(undisturbed)


def test_nothing_of_ray_is_imported(tmp_path: Path) -> None:
    text = (
        "import sys\n"
        "import prunetune.execution.in_process\n"
        "print(sorted(name for name in sys.modules if name.partition('.')[0] in ('ray', 'mlflow')))"
    )
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


def test_a_sweep_without_trials_left_ends_at_once(tmp_path: Path) -> None:
    config, problem, ledger = make_sweep(tmp_path, "pre_pruning=null", "search.trials_per_density=1")
    given = Trials(config, problem, SweepSearch(config, problem, ledger), [])
    InProcess().run(given)
    again = Trials(config, problem, SweepSearch(config, problem, Ledger(ledger.store)), [])
    assert InProcess().run(again) is False
