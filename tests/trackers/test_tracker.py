from __future__ import annotations

import threading
from pathlib import Path

import mlflow
import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from small_sweep import epoch, finish, make_sweep
from sqlalchemy.exc import OperationalError

from prunetune.config import document
from prunetune.config.reading import from_document
from prunetune.errors import UserError
from prunetune.records.trial import TrialRecord
from prunetune.search.queue import SweepSearch
from prunetune.trackers.mlflow import experiments
from prunetune.trackers.mlflow import tracker as tracking


def trials(folder: Path, count: int = 2) -> tuple:
    config, problem, ledger = make_sweep(folder)
    search = SweepSearch(config, problem, ledger)
    records = [search.next() for _ in range(count)]
    return config, [record for record in records if record is not None]


def runs(place: experiments.Place) -> tuple[list, list]:
    """(parents, trials) in MLflow."""
    client = MlflowClient(place.uri)
    experiment = client.get_experiment_by_name(place.experiment)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    return parents, [run for run in found if run not in parents]


def log(tracker: tracking.Tracker, record: TrialRecord, value: float = 0.5) -> None:
    tracker.started(record)
    finish(record, value)
    tracker.epochs(record, record.curve)
    tracker.ended(record)


def test_a_sweep_is_a_parent_and_its_trials_are_nested(tmp_path: Path) -> None:
    config, (first, second) = trials(tmp_path)
    place = experiments.place(config)
    tracker = tracking.Tracker(place, "id", "small")
    tracker.begin({"lr": {"uniform": [0.0, 1.0]}}, [])
    log(tracker, first, 0.6)
    log(tracker, second, 0.3)
    tracker.finish("finished", {"best": 0.6}, {"best/x.yaml": "a: 1"})
    assert tracker.close() == 0

    (parent,), children = runs(place)
    assert parent.info.status == "FINISHED"
    assert (
        mlflow.artifacts.load_text(f"{parent.info.artifact_uri}/sweep.yaml") == "lr:\n  uniform: [0.0, 1.0]\n"
    )
    assert parent.data.metrics == {"best": 0.6}
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    run = next(run for run in children if run.info.run_id == tracker.run_ids[first.uid])
    assert run.info.status == "FINISHED"
    tags = run.data.tags
    assert (
        tags["density"],
        tags["stage"],
        tags["status"],
        tags["trial"],
        tags["config_hash"],
        tags["branched"],
    ) == (
        "0.1",
        "post_pruning",
        "complete",
        "0",
        first.config_hash,
        "false",
    )
    assert run.data.params["pre_pruning.optimizer.lr"] == str(first.params["pre_pruning.optimizer.lr"])
    history = MlflowClient(place.uri).get_metric_history(run.info.run_id, "val_accuracy")
    assert [(m.step, m.value) for m in history] == [(e.epoch, e.score) for e in first.curve]
    assert run.data.metrics["test_accuracy"] == 0.6


def test_the_configuration_of_a_run_can_be_read_back(tmp_path: Path) -> None:
    config, (record,) = trials(tmp_path, 1)
    place = experiments.place(config)
    tracker = tracking.Tracker(place, "id", "small")
    tracker.begin(config.tree(), [])
    log(tracker, record)
    tracker.close()
    found = experiments.config_of_run(tracker.run_ids[record.uid], place.uri, "runs")
    assert found is not None
    read = from_document(document.parse(found[0], "run"))
    assert read.density == record.density
    assert read.pre_pruning is not None
    assert read.pre_pruning.optimizer.lr == record.params["pre_pruning.optimizer.lr"]
    assert experiments.config_of_run("0" * 32, place.uri, "runs") is None


def test_a_driver_that_died_leaves_no_second_run_and_none_running(tmp_path: Path) -> None:
    config, (going_on, gone) = trials(tmp_path)
    place = experiments.place(config)
    died = tracking.Tracker(place, "id", "small")
    died.begin(config.tree(), [])
    for record in (going_on, gone):
        died.started(record)
        died.epochs(record, [epoch(1, 0.1)])
    died.close()  # writes, but ends no run: as if killed just after

    tracker = tracking.Tracker(place, "id", "small")
    tracker.begin(config.tree(), [])
    tracker.started(going_on)
    tracker.epochs(going_on, [epoch(e, e / 10) for e in (1, 2)])
    finish(going_on, 0.5)
    tracker.ended(going_on)
    tracker.finish("finished", {}, {})
    tracker.close()
    parents, children = runs(place)
    assert len(parents) == 1
    assert {run.info.run_id: run.info.status for run in children} == {
        tracker.run_ids[going_on.uid]: "FINISHED",
        tracker.run_ids[gone.uid]: "KILLED",
    }
    history = MlflowClient(place.uri).get_metric_history(tracker.run_ids[going_on.uid], "val_accuracy")
    assert [m.step for m in history] == [1, 2]  # epoch 1 was there already


def test_a_lost_database_is_rebuilt_from_the_records(tmp_path: Path) -> None:
    config, records = trials(tmp_path)
    for record in records:
        finish(record, 0.5)
    place = experiments.place(config)
    for _ in range(2):  # and a second time changes nothing
        tracker = tracking.Tracker(place, "id", "small")
        tracker.begin(config.tree(), records)
        tracker.finish("finished", {}, {})
        assert tracker.close() == 0
        parents, children = runs(place)
        assert len(parents) == 1
        assert sorted(run.data.metrics["final_val_accuracy"] for run in children) == [0.5, 0.5]
        for run in children:
            history = MlflowClient(place.uri).get_metric_history(run.info.run_id, "val_accuracy")
            assert [m.step for m in history] == [1, 2, 3]


def test_what_is_whole_is_not_asked_for_again(tmp_path: Path, monkeypatch) -> None:
    config, (whole, part) = trials(tmp_path)
    place = experiments.place(config)
    tracker = tracking.Tracker(place, "id", "small")
    tracker.begin(config.tree(), [])
    for record in (whole, part):
        log(tracker, record)
    tracker.close()
    finish(part, 0.5, epochs=5)  # MLflow has three of its epochs
    asked: list[str] = []
    for name in ("get_run", "get_metric_history", "update_run", "log_text"):
        real = getattr(tracking.MlflowClient, name)

        def call(self, run_id, *args, name=name, real=real, **kwargs):
            asked.append(run_id)
            return real(self, run_id, *args, **kwargs)

        monkeypatch.setattr(tracking.MlflowClient, name, call)
    again = tracking.Tracker(place, "id", "small")
    again.begin(config.tree(), [whole, part])
    assert again.close() == 0
    assert again.run_ids == tracker.run_ids
    assert again.run_ids[part.uid] in asked
    assert again.run_ids[whole.uid] not in asked
    history = MlflowClient(place.uri).get_metric_history(again.run_ids[part.uid], "val_accuracy")
    assert [metric.step for metric in history] == [1, 2, 3, 4, 5]


def test_trials_open_at_an_interruption_are_closed(tmp_path: Path) -> None:
    config, (record,) = trials(tmp_path, 1)
    place = experiments.place(config)
    tracker = tracking.Tracker(place, "id", "small")
    tracker.begin(config.tree(), [])
    tracker.started(record)
    tracker.finish("interrupted", {}, {})
    tracker.close()
    (parent,), (child,) = runs(place)
    assert child.data.tags["status"] == "running"  # where the trial is; the run has ended with its driver
    assert (parent.info.status, child.info.status) == ("KILLED", "KILLED")


def test_a_server_that_is_away_for_a_while_gets_everything_later(tmp_path: Path, monkeypatch) -> None:
    config, (record,) = trials(tmp_path, 1)
    place = experiments.place(config)
    tracker = tracking.Tracker(place, "id", "small")
    refused, back = threading.Semaphore(0), threading.Event()
    real = tracking.MlflowClient.log_batch

    def log_batch(self, *args, **kwargs):
        if not back.is_set():
            refused.release()
            raise requests.ConnectionError("away")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(tracking.MlflowClient, "log_batch", log_batch)
    tracker.begin(config.tree(), [])
    log(tracker, record)  # does not wait: the server is back only after it
    for _ in range(2):
        refused.acquire()
    back.set()
    tracker.finish("finished", {}, {})
    assert tracker.close() == 0
    _, (child,) = runs(place)
    assert child.data.metrics["val_accuracy"] == 0.5


def test_a_server_that_stays_away_is_given_up_at_the_end_and_counted(tmp_path: Path, monkeypatch) -> None:
    config, (record,) = trials(tmp_path, 1)

    def refuse(*args, **kwargs):
        raise requests.ConnectionError("away")

    monkeypatch.setattr(tracking.MlflowClient, "get_experiment_by_name", refuse)
    tracker = tracking.Tracker(experiments.place(config), "id", "small", attempts_at_end=0.2)
    tracker.begin(config.tree(), [])
    log(tracker, record)
    assert tracker.close() == 4


def test_an_entry_that_mlflow_refuses_does_not_hold_up_the_others(tmp_path: Path, monkeypatch) -> None:
    config, (record,) = trials(tmp_path, 1)
    place = experiments.place(config)
    tracker = tracking.Tracker(place, "id", "small")
    tracker.begin(config.tree(), [])
    tracker.started(record)
    tracker.epochs(record, [epoch(1, metrics={"no such/\x00name": 1.0})])
    finish(record, 0.5)
    tracker.ended(record)
    assert tracker.close() == 1
    _, (child,) = runs(place)
    assert child.info.status == "FINISHED"


def test_a_sweep_that_mlflow_refuses_is_told_once(tmp_path: Path, monkeypatch, caplog) -> None:
    config, (record,) = trials(tmp_path, 1)

    def refuse(*args, **kwargs):
        raise MlflowException("no such kind of store", error_code=INVALID_PARAMETER_VALUE)

    monkeypatch.setattr(tracking.MlflowClient, "get_experiment_by_name", refuse)
    tracker = tracking.Tracker(experiments.place(config), "id", "small")
    tracker.begin(config.tree(), [])
    log(tracker, record)
    assert tracker.close() == 4
    (message,) = caplog.messages
    assert "refuses this sweep: no such kind of store" in message


def test_an_experiment_that_was_deleted_is_restored(tmp_path: Path) -> None:
    config, (record,) = trials(tmp_path, 1)
    place = experiments.place(config)
    client = MlflowClient(place.uri)
    client.delete_experiment(client.create_experiment(place.experiment, place.artifacts))
    tracker = tracking.Tracker(place, "id", "small")
    tracker.begin(config.tree(), [])
    log(tracker, record)
    assert tracker.close() == 0
    assert len(runs(place)[1]) == 1


def test_metrics_do_not_wait_for_a_storage_of_artifacts_and_the_next_sweep_writes_the_files(
    tmp_path: Path, monkeypatch
) -> None:
    config, (record, other) = trials(tmp_path)
    place = experiments.place(config)
    real, written = tracking.MlflowClient.log_text, []

    def away(self, run_id, text, name):
        raise requests.HTTPError("500: no credentials")

    monkeypatch.setattr(tracking.MlflowClient, "log_text", away)
    tracker = tracking.Tracker(place, "id", "small", attempts_at_end=0.2)
    tracker.begin(config.tree(), [])
    log(tracker, record)
    log(tracker, other)
    tracker.finish("finished", {}, {"best/x.yaml": "a: 1"})
    assert tracker.close() == 4
    (parent,), children = runs(place)
    assert [run.data.metrics["val_accuracy"] for run in children] == [0.5, 0.5]
    assert all(run.data.tags["prunetune.files"] == "missing" for run in (parent, *children))
    ends = {run.info.run_id: run.info.end_time for run in children}

    def back(self, run_id, text, name):
        written.append((run_id, name))
        return real(self, run_id, text, name)

    def command(*fitting: TrialRecord) -> set[str]:
        """The same command; the runs that are marked after it."""
        again = tracking.Tracker(place, "id", "small")
        again.begin(config.tree(), list(fitting))
        again.finish("finished", {}, {"best/x.yaml": "a: 1"})
        assert again.close() == 0
        parents, children = runs(place)
        assert {run.info.run_id: run.info.end_time for run in children} == ends  # not opened again
        return {run.info.run_id for run in (*parents, *children) if "prunetune.files" in run.data.tags}

    monkeypatch.setattr(tracking.MlflowClient, "log_text", back)
    ids = tracker.run_ids
    assert command(record) == {ids[other.uid]}  # the other does not fit a changed space
    assert command(record, other) == set()
    assert command(record, other) == set()
    own = [(parent.info.run_id, "sweep.yaml"), (parent.info.run_id, "best/x.yaml")]
    config_files = {(ids[uid], "config.yaml") for uid in (record.uid, other.uid)}
    assert sorted(written) == sorted([*config_files, *3 * own])


def test_a_database_that_is_away_refuses_nothing() -> None:
    assert not experiments.is_refusal(OperationalError("SELECT 1", {}, Exception("connection refused")))
    assert not experiments.is_refusal(requests.ConnectionError("away"))
    assert experiments.is_refusal(MlflowException("no", error_code=INVALID_PARAMETER_VALUE))
    assert experiments.is_refusal(ValueError("not a number"))


def test_a_training_whose_files_cannot_be_logged_does_not_stay_running(tmp_path: Path, monkeypatch) -> None:
    config = make_sweep(tmp_path)[0].at(0.1)

    def away(self, run_id, folder):
        raise requests.HTTPError("500: no credentials")

    monkeypatch.setattr(experiments.MlflowClient, "log_artifacts", away)
    with pytest.raises(requests.HTTPError):
        experiments.log_training(config, {"status": "complete", "val_accuracy": 0.5}, tmp_path)
    ((run,), _) = runs(experiments.place(config))
    assert (run.info.status, run.data.metrics) == ("FAILED", {"val_accuracy": 0.5})


def test_a_place_that_mlflow_does_not_know_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^tracking.uri \(or MLFLOW_TRACKING_URI\) = 'htp://x': "):
        experiments.check(experiments.Place("htp://x", "small", None))
    experiments.check(experiments.Place(f"sqlite:///{tmp_path}/mlflow.db", "small", None))
    experiments.check(experiments.Place("http://127.0.0.1:9", "small", None))  # away, perhaps for now


def test_the_default_database_has_an_absolute_path(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, _, _ = make_sweep(Path("relative"))
    place = experiments.place(config)
    assert place.uri == f"sqlite:///{tmp_path}/relative/small/mlflow.db"
    assert place.artifacts == (tmp_path / "relative/small/mlartifacts").as_uri()


@pytest.mark.parametrize("uri", ["http://server:5000", "sqlite:////srv/mlflow.db"])
def test_a_configured_server_is_used_as_it_is(tmp_path: Path, uri: str) -> None:
    config, _, _ = make_sweep(tmp_path, f"tracking={{uri: '{uri}', experiment: team}}")
    assert experiments.place(config) == experiments.Place(uri, "team", None)


def test_the_server_is_the_environments_where_the_file_names_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _, _ = make_sweep(tmp_path)
    assert experiments.place(config).uri.startswith("sqlite:///")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    # Its artifacts are the server's affair: this machine's folders mean nothing there.
    assert experiments.place(config) == experiments.Place("http://127.0.0.1:5000", config.name, None)
    named, _, _ = make_sweep(tmp_path, "tracking.uri=sqlite:////elsewhere/mlflow.db")
    assert experiments.place(named).uri == "sqlite:////elsewhere/mlflow.db"
