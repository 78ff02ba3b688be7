"""`run_sweep` as a program calls it: from files and mappings, again and again, with and without Ray."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import prunetune
from prunetune import ConfigError, UserError, WorkError, run_pipeline, run_sweep
from prunetune.config import document
from prunetune.execution.seam import Trials
from prunetune.records.trial import TrialRecord
from prunetune.store import Store

ROOT = Path(__file__).parents[1]

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "digits", "batch_size": 64, "limit": 400, "validation_fraction": 0.2},
    "model": {"name": "mlp", "hidden": [16]},
    "densities": [0.3, 0.1],
    "pre_pruning": {
        "epochs": 1,
        "optimizer": {"name": "adam", "lr": {"choice": [3e-3, 1e-2]}},
        "mask": {"choice": [None, {"lambda1": 1e-6, "lambda2": {"loguniform": [1e-5, 1e-3]}}]},
    },
    "post_pruning": {"epochs": 3, "optimizer": {"name": "adam", "lr": {"loguniform": [1e-3, 3e-2]}}},
    "search": {"trials_per_density": 4, "max_concurrent": 1},
    "tracking": {"trackers": []},
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def in_process(config: Any = TINY, *overrides: str, **more: Any) -> prunetune.SweepResult:
    return run_sweep(config, overrides, executor="in_process", **more)


def outcome(records: list[TrialRecord]) -> list[tuple[Any, ...]]:
    return [(r.density, r.number, r.params, r.status, r.val_accuracy, r.test_accuracy) for r in records]


# --- what it gives


def test_the_result_has_the_trials_the_best_and_the_studies(tmp_path: Path) -> None:
    result = in_process()
    folder = tmp_path / "runs" / "tiny"
    assert (Path(result.folder).absolute(), result.interrupted) == (folder, False)
    pd.testing.assert_frame_equal(result.trials, pd.read_parquet(folder / "results.parquet"))
    assert len(result.trials) == 8
    assert list(result.best) == [0.3, 0.1]
    for density, best in result.best.items():
        here = result.trials[result.trials["density"] == density]
        assert best.val == here[here["status"] == "complete"]["val_accuracy"].max()
        assert best.config.density == density
        assert Path(best.path).read_text().startswith("# The best of sweep 'tiny'")
        assert len(result.studies[density].trials) == 4
        assert result.studies[density].best_value == best.val


def test_the_best_configuration_is_trained_as_it_is_and_its_network_loaded(tmp_path: Path) -> None:
    from prunetune import train

    best = in_process().best[0.1]
    trained = run_pipeline(best.config)
    assert (trained.val_accuracy, trained.epochs_run) == (best.val, 0)
    assert train.main([best.path, "--output", "network"]) == 0
    model = prunetune.load_model("network")
    assert sum(int(w.count_nonzero()) for w in model.network.parameters() if w.dim() == 2) == trained.nonzero


def test_a_file_a_mapping_and_a_document_give_the_same(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(document.dump(TINY))
    few = "search.trials_per_density=1"
    found = [
        outcome(in_process(given, few, f"storage=run{number}").records)
        for number, given in enumerate(
            ["tiny.yaml", Path("tiny.yaml"), TINY, document.read("tiny.yaml")], start=1
        )
    ]
    assert found[1:] == found[:1] * 3


def test_overrides_are_assignments_or_values_by_key() -> None:
    as_text = in_process(TINY, "search.trials_per_density=1", "densities=[0.2]", "pre_pruning=null")
    values = {"search.trials_per_density": 1, "densities": [0.2], "pre_pruning": None}
    as_values = run_sweep(TINY, {**values, "storage": "other"}, executor="in_process")
    assert outcome(as_text.records) == outcome(as_values.records)
    assert len(as_text.records) == 1
    assert TINY["densities"] == [0.3, 0.1]


# --- again and again


def test_called_again_it_goes_on_extends_and_runs_other_sweeps() -> None:
    first = in_process()
    again = in_process()
    assert outcome(again.records) == outcome(first.records)
    assert again.trials["seconds"].tolist() == first.trials["seconds"].tolist()  # nothing was run
    more = in_process(TINY, "search.trials_per_density=5")
    assert len(more.records) == 10
    assert [r for r in outcome(more.records) if r[1] < 4] == outcome(first.records)
    other = in_process(TINY, "name=other", "densities=[0.5]", "search.trials_per_density=1")
    assert [record.density for record in other.records] == [0.5]


def test_one_network_serves_all_densities_from_the_epoch_that_is_best_for_each() -> None:
    pre = {"epochs": 4, "optimizer": {"name": "adam", "lr": 3e-3}, "mask": {"method": "path", "start": 0.6}}
    one_network = {**TINY, "pre_pruning": pre, "pruning": {"from_epoch": "best"}}
    found = in_process(one_network, "search.early_stopping=null")
    # The network is trained once, and every branch point is found on the way.
    trained = [(record.epochs_run, record.epochs_reused) for record in found.records]
    assert sorted(trained, reverse=True) == [(4 + 3, 0)] + [(3, 4)] * 7
    assert {record.status for record in found.records} == {"complete"}
    # Afterwards the store has what the best trials consist of, and nothing else: training them is reading.
    kept = {key for best in found.best.values() for key in best.record.keys.values()}
    assert set(Store("runs/store").keys("stages")) == kept
    assert [run_pipeline(best.config).epochs_run for best in found.best.values()] == [0, 0]
    assert "Pre-trained networks" in (Path(found.folder) / "report" / "summary.md").read_text()
    assert (Path(found.folder) / "report" / "networks.png").stat().st_size > 10_000


def test_an_infinite_option_of_a_network_is_written_and_read_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, ceiling=0.0):
        assert ceiling == float("inf")
        super().__init__(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))
"""
    (tmp_path / "ceilings.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = in_process({**TINY, "model": {"name": "ceilings:Net", "ceiling": float("inf")}})
    assert "ceiling: .inf" in Path(found.best[0.1].path).read_text()
    assert set(found.trials["model.ceiling"]) == {float("inf")}
    again = prunetune.run_pipeline(found.best[0.1].config)
    assert again.test_accuracy == found.best[0.1].record.test_accuracy


def test_data_that_were_edited_since_are_read_again() -> None:
    def write(slope: int) -> None:
        Path("table.csv").write_text("a,y\n" + "\n".join(f"{i},{slope * i}" for i in range(60)))

    data = {"name": "tabular", "target": "y", "root": "table.csv"}
    config = {**TINY, "task": "regression", "data": data, "pre_pruning": None, "densities": [0.5]}
    few = "search.trials_per_density=1"
    write(1)
    (first,) = in_process(config, few).records
    write(-7)
    (second,) = in_process(config, few).records
    assert first.code != second.code
    assert first.val != second.val


def test_interrupted_it_says_so_and_goes_on_to_the_same_results() -> None:
    calm = in_process(TINY, "storage=calm")

    class Stops:
        """Leaves after two trials."""

        def run(self, trials: Trials) -> bool:
            from prunetune.execution.in_process import InProcess

            class Enough(Exception):
                pass

            class Listener:
                ended_trials = 0

                def started(self, record: Any) -> None:
                    if self.ended_trials == 2:
                        raise Enough

                def epochs(self, record: Any, epochs: Any) -> None: ...

                def ended(self, record: Any) -> None:
                    self.ended_trials += 1

            try:
                listeners = [*trials.listeners, Listener()]
                InProcess().run(Trials(trials.config, trials.problem, trials.search, listeners))
            except Enough:
                return True
            return False

    cut = run_sweep(TINY, executor=Stops())
    assert (cut.interrupted, len(cut.records)) == (True, 2)
    whole = in_process()
    assert whole.interrupted is False
    assert outcome(whole.records) == outcome(calm.records)


# --- what goes wrong


def test_what_is_wrong_is_an_error_that_names_it() -> None:
    with pytest.raises(
        ConfigError, match=r"overrides: post_pruning.epoch: unknown key; did you mean 'epochs'"
    ):
        in_process(TINY, "post_pruning.epoch=3")
    with pytest.raises(ConfigError, match=r"configuration: densities.0 = 2: must be less than or equal to 1"):
        in_process({**TINY, "densities": [2]})
    with pytest.raises(UserError, match=r"nowhere.yaml: no such file"):
        in_process("nowhere.yaml")
    with pytest.raises(UserError, match=r"executor = 'rai': must be one of ray, in_process, or an import"):
        run_sweep(TINY, executor="rai")
    assert not Path("runs").exists()


WRONG = """
def broken_source(root):
    raise FileNotFoundError("no such table")

def pair(root):
    return 1, 2

class NotATask:
    def __init__(self, form):
        pass

def broken_sampler(*, seed):
    raise ImportError("install cmaes")

def broken_rule(*, longest):
    raise ValueError("not yet")
"""


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("data=wrong_parts:broken_source", r"data source 'wrong_parts:broken_source': FileNotFoundError: no"),
        ("data=wrong_parts:pair", r"data.name = 'wrong_parts:pair': must return a prunetune.data.Source"),
        ("task=wrong_parts:NotATask", r"task = .*no subclass of prunetune.tasks.Task"),
        (
            "search.sampler=wrong_parts:broken_sampler",
            r"sampler 'wrong_parts:broken_sampler': ImportError: in",
        ),
        ("search.early_stopping=wrong_parts:broken_rule", r"'wrong_parts:broken_rule': ValueError: not yet"),
    ],
)
def test_what_a_component_of_ones_own_raises_is_an_error_that_names_it(
    override: str, rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wrong_parts.py").write_text(WRONG)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wrong_parts", raising=False)
    with pytest.raises(UserError, match=rule):
        in_process(TINY, override)


def test_a_sweep_in_which_nothing_works_raises_and_keeps_what_was_recorded(tmp_path: Path) -> None:
    (tmp_path / "broken_net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, 10))\n"
        "    def forward(self, x):\n"
        "        if self.training and len(x) > 2:\n"
        "            raise RuntimeError('no')\n"
        "        return super().forward(x)\n"
    )
    with pytest.raises(WorkError, match="the first 3 trials failed"):
        in_process(TINY, "model={name: 'broken_net:Net'}")
    assert set(pd.read_parquet("runs/tiny/results.parquet")["status"]) == {"failed"}


# --- where it is called


def test_it_says_nothing_and_configures_no_logging(capfd: pytest.CaptureFixture[str]) -> None:
    handlers, level = list(logging.root.handlers), logging.root.level
    in_process(TINY, "search.trials_per_density=1")
    assert capfd.readouterr() == ("", "")
    assert (logging.root.handlers, logging.root.level) == (handlers, level)


def test_progress_is_shown_if_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    in_process(TINY, "search.trials_per_density=1", progress=True)
    out = capfd.readouterr().out
    assert "tiny: 2 trials to run; results in" in out
    assert "[2/2] d=0.1 #0" in out


def test_importing_it_imports_no_framework_and_touches_no_log_level() -> None:
    text = (
        "import logging, sys, prunetune\n"
        "prunetune.run_sweep, prunetune.run_pipeline, prunetune.load_model\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'ray', 'mlflow'}))\n"
        "import optuna\n"
        "print(optuna.logging.get_verbosity() == optuna.logging.INFO, logging.root.handlers)"
    )
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout == "[]\nTrue []\n"


def test_it_runs_within_an_event_loop_and_in_another_thread() -> None:
    few = "search.trials_per_density=1"

    async def cell() -> prunetune.SweepResult:
        return in_process(TINY, few)

    within = asyncio.run(cell())
    found: list[prunetune.SweepResult] = []
    thread = threading.Thread(target=lambda: found.append(in_process(TINY, few, "storage=thread")))
    thread.start()
    thread.join()
    assert outcome(found[0].records) == outcome(within.records)


def test_two_at_once_do_not_write_each_others_records() -> None:
    class Second:
        def run(self, trials: Trials) -> bool:
            with pytest.raises(UserError, match=r"another process .* runs this sweep"):
                in_process()
            return True

    assert run_sweep(TINY, executor=Second()).interrupted


# --- through Ray


@pytest.fixture
def users_ray() -> Iterator[Any]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_ray_finds_what_this_process_finds(tmp_path: Path) -> None:
    import ray

    alone = in_process(TINY, "storage=alone")
    through_ray = run_sweep(TINY)
    assert not ray.is_initialized()  # it was ours
    assert outcome(through_ray.records) == outcome(alone.records)
    keys = [f"{tmp_path}/{storage}/tiny/trials" for storage in ("alone", "runs")]
    bodies = [
        [json.loads(path.read_text())["body"]["keys"] for path in sorted(Path(key).rglob("*.json"))]
        for key in keys
    ]
    assert bodies[0] == bodies[1]
    assert run_sweep(TINY, ["search.trials_per_density=5"]).trials.shape[0] == 10  # again, in this process


@pytest.mark.slow
def test_a_ray_that_the_user_has_initialised_is_used_and_left_up(tmp_path: Path, users_ray: Any) -> None:
    (tmp_path / "my_net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))\n"
    )
    session = users_ray._private.worker._global_node.get_session_dir_path()
    few = ["search.trials_per_density=2", "search.max_concurrent=null", "model={name: 'my_net:Net'}"]

    async def cell() -> prunetune.SweepResult:
        return run_sweep(TINY, few)

    first = asyncio.run(cell())
    assert {record.status for record in first.records} <= {"complete", "stopped", "collapsed"}
    assert len(first.records) == 4
    assert len(run_sweep(TINY, [*few, "name=other", "densities=[0.5]"]).records) == 2
    with pytest.raises(ConfigError, match=r"resources.cpus = 64.0: this machine has 2"):
        run_sweep(TINY, ["name=large", "resources.cpus=64"])
    assert users_ray.is_initialized()
    assert users_ray._private.worker._global_node.get_session_dir_path() == session


@pytest.mark.slow
def test_through_ray_and_mlflow_in_a_thread_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    found: list[prunetune.SweepResult] = []
    config = {key: value for key, value in TINY.items() if key != "tracking"}
    thread = threading.Thread(
        target=lambda: found.append(run_sweep(config, {"search.trials_per_density": 1, "densities": [0.3]}))
    )
    thread.start()
    thread.join()
    (result,) = found
    assert result.trials["mlflow_run_id"].notna().all()
    assert result.trackers[0].look.startswith("mlflow ui --backend-store-uri sqlite:///")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
