"""Tasks through the pipeline, batched programs, replicas, the search, the records and the export."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import optuna
import pytest
import torch
import torch.distributed as dist
from balanced import Balanced
from mlflow import MlflowClient
from optuna.trial import TrialState

from prunetune import data as datasets
from prunetune import models, pipeline, run_pipeline, tasks, train
from prunetune import sweep as sweep_command
from prunetune.config import document
from prunetune.config.document import Document
from prunetune.config.reading import sweep_from_document, validate
from prunetune.config.schema import Config, ModelConfig
from prunetune.engine.epoch import Epoch
from prunetune.engine.loop import evaluate
from prunetune.engine.replicas import ALONE, Replicas
from prunetune.errors import ConfigError, UserError
from prunetune.export import load_model, save_model
from prunetune.pipeline import PipelineResult
from prunetune.records import report, results
from prunetune.records.ledger import Ledger
from prunetune.records.problem import Problem
from prunetune.records.trial import TrialRecord
from prunetune.search.early_stopping import EarlyStopping
from prunetune.search.exploration import Experience
from prunetune.search.study import DensitySearch
from prunetune.store import Store
from prunetune.tasks.regression import RMSE

Tree = dict[str, Any]

REGRESSION: Tree = {
    "name": "small",
    "seed": 0,
    "task": "regression",
    "data": {"name": "diabetes", "batch_size": 32, "validation_fraction": 0.2},
    "model": {"name": "mlp", "hidden": [16, 16]},
    "densities": [0.3],
    "pre_pruning": {"epochs": 4, "optimizer": {"name": "adam", "lr": 1e-2}, "initializer": "kaiming"},
    "post_pruning": {
        "epochs": 4,
        "optimizer": {"name": "adam", "lr": 1e-2},
        "soft_activation": {"beta0": 1.0, "beta_max": 20.0, "horizon": 0.5},
        "soft_skip": {"gamma0": 0.3, "horizon": 0.5},
    },
}


def changed(**changes: Any) -> Tree:
    """REGRESSION with `section__key=value` set."""
    tree = copy.deepcopy(REGRESSION)
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        node = tree
        for key in path:
            node = node[key]
        node[last] = value
    return tree


def run(tree: Tree, folder: Path, **how: Any) -> tuple[PipelineResult, list[Tree]]:
    reports: list[Tree] = []
    result = run_pipeline(
        tree, store=Store(str(folder)), device="cpu", report=lambda **given: reports.append(given), **how
    )
    return result, reports


def same(one: PipelineResult, other: PipelineResult) -> bool:
    assert one.metrics().keys() == other.metrics().keys()
    assert (one.val, one.test, one.status) == (other.val, other.test, other.status)
    return all(torch.equal(tensor, other.state[name]) for name, tensor in one.state.items())


def chance(tree: Tree) -> float:
    config = Config.model_validate(tree)
    data = datasets.load(config.data)
    return tasks.make(config.task, data.form).chance(data.validation.targets)


def test_a_regression_beats_chance_and_says_so_in_the_targets_unit(tmp_path: Path) -> None:
    result, reports = run(REGRESSION, tmp_path)
    assert result.status == "complete"
    assert result.val is not None
    assert result.val < 0.95 * chance(REGRESSION)
    assert (result.metric, result.metrics()["val_rmse"]) == (RMSE, result.val)
    assert reports[-1]["val_rmse"] == result.val
    assert "val_accuracy" not in reports[-1]
    with pytest.raises(AttributeError, match="rmse, not accuracy"):
        _ = result.val_accuracy
    config = Config.model_validate(REGRESSION)
    data = datasets.load(config.data)
    model = tasks.network(config.model, tasks.make(config.task, data.form), seed=1)
    model.load_state_dict(result.state)
    with torch.no_grad():
        answers = model(data.normalize(data.test.inputs)) * data.target_std + data.target_mean
    assert result.test == pytest.approx(float((answers - data.test.targets).square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize("criterion", ["snip", "grasp", "synflow", "taylor", "random"])
def test_every_criterion_prunes_a_regression(criterion: str, tmp_path: Path) -> None:
    tree = changed(pruning={"criterion": criterion, "scoring_rounds": 3}, pre_pruning=None)
    result, _ = run(tree, tmp_path)
    assert result.nonzero == math.floor(0.3 * (10 * 16 + 16 * 16 + 16))


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_pruning__mask": {"lambda1": 1e-6, "lambda2": 1e-4, "initial": 0.9}},
        {"post_pruning__rescaled_init": {"iterations": 5}},
        {"post_pruning__dynamic": "rigl"},
        {"pruning": {"schedule": {"name": "iterative", "rounds": 2, "epochs": 1}}},
        {"precision": "bf16"},
    ],
)
def test_every_part_of_the_pipeline_takes_a_table(changes: Tree, tmp_path: Path) -> None:
    result, _ = run(changed(**changes), tmp_path)
    assert result.status == "complete"
    assert 0 < result.effective_density <= 0.3


def test_a_regression_is_the_same_bits_again_and_resumed(tmp_path: Path) -> None:
    one, _ = run(REGRESSION, tmp_path / "one")
    assert same(one, run(REGRESSION, tmp_path / "two")[0])
    for stop in (2, 6):  # within each stage
        steps = pipeline.run(
            Config.model_validate(REGRESSION), store=Store(str(tmp_path / "three")), checkpoint_interval=0
        )
        for _ in range(stop):
            next(steps)
        steps.close()
    resumed, reports = run(REGRESSION, tmp_path / "three")
    assert same(one, resumed)
    assert sum(epoch["reused"] for epoch in reports) == 6


def test_a_network_that_answers_with_a_constant_has_collapsed(tmp_path: Path) -> None:
    result, _ = run(changed(pre_pruning=None, post_pruning__optimizer__lr=1e-12), tmp_path)
    assert result.status == "collapsed"
    assert result.val is not None
    assert result.val >= chance(REGRESSION)


def test_chance_ends_pre_pruning_whichever_way_is_up(tmp_path: Path) -> None:
    tree = changed(pre_pruning__epochs=8)
    tree["pre_pruning"]["optimizer"]["lr"] = 1e-12
    result, reports = run(tree, tmp_path)
    assert (result.status, len(reports)) == ("collapsed", 3)
    assert result.val == reports[-1]["val_rmse"]


def test_a_diverged_regression_has_no_value(tmp_path: Path) -> None:
    tree = changed(pre_pruning=None)
    tree["post_pruning"]["optimizer"] = {"name": "sgd", "lr": 1e30}
    result, _ = run(tree, tmp_path)
    assert (result.status, result.val) == ("diverged", None)


def test_regressions_give_together_what_they_give_alone(tmp_path: Path) -> None:
    from test_vectorized import alone, assert_close, together

    mask = {"lambda1": 1e-5, "lambda2": 1e-4, "initial": 0.7}
    for number, configs in enumerate(
        [
            [Config.model_validate(changed(post_pruning__optimizer__lr=lr)) for lr in (1e-3, 1e-2)],
            [Config.model_validate(changed(pre_pruning__mask=mask, seed=seed)) for seed in (0, 1)],
        ]
    ):
        folder = tmp_path / str(number)
        pairs = zip(together(configs, folder), alone(configs, folder), strict=True)
        for (reports, result), (expected_reports, expected) in pairs:
            assert result.status == expected.status
            for mine, theirs in zip(reports, expected_reports, strict=True):
                assert mine["val_rmse"] == pytest.approx(theirs["val_rmse"], rel=2e-3)
                assert mine["val_loss"] == pytest.approx(theirs["val_loss"], rel=2e-3)
            for name, tensor in result.state.items():
                assert_close(tensor, expected.state[name], name)


def _replica(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    outcome = _trained(folder / f"store{rank}", Replicas.joined())
    torch.save(outcome, folder / f"seen{rank}")
    dist.destroy_process_group()


def _trained(folder: Path, replicas: Replicas) -> Tree:
    steps = pipeline.run(Config.model_validate(REGRESSION), store=Store(str(folder)), replicas=replicas)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return {"state": end.value.state, "val": end.value.val, "test": end.value.test}


def test_two_replicas_train_and_measure_a_regression_as_one_process_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_replica, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    one, seen = _trained(tmp_path / "alone", ALONE), [torch.load(tmp_path / f"seen{rank}") for rank in (0, 1)]
    assert (seen[0]["val"], seen[0]["test"]) == (seen[1]["val"], seen[1]["test"])
    assert seen[0]["val"] == pytest.approx(one["val"], rel=1e-3)
    for name, tensor in one["state"].items():
        torch.testing.assert_close(seen[0]["state"][name], tensor, rtol=1e-3, atol=1e-4)


def test_a_small_split_may_leave_a_replica_without_examples() -> None:
    config = Config.model_validate(REGRESSION)
    data = datasets.load(config.data)
    task = tasks.make(config.task, data.form)
    model = tasks.network(config.model, task, seed=0)
    few = data.validation.take(torch.arange(1))

    class Last(Replicas):  # type: ignore[misc]
        def sum(self, *tensors: torch.Tensor) -> None:
            assert [tensor.tolist() for tensor in tensors] == [[0.0, 0.0], 0.0]
            tensors[0].copy_(torch.tensor([4.0, 1.0]))

    object.__setattr__(empty := Last(), "part", lambda count: slice(0, 0))
    assert evaluate(model, data, few, replicas=empty, task=task)[0] == 2.0


def test_labels_cannot_be_smoothed_where_there_are_none() -> None:
    tree = changed(post_pruning__label_smoothing={"alpha0": 0.1})
    with pytest.raises(ConfigError, match=r"post_pruning\.label_smoothing = 0\.1: does not apply"):
        validate(tree, Document("file.yaml", tree))
    validate(changed(post_pruning__label_smoothing={"alpha0": 0.0}), Document("file.yaml", {}))


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ConfigError, match="must be one of classification, regression, or an import path"):
        validate(changed(task="regresion"), Document("file.yaml", {}))


def test_trials_of_two_tasks_cannot_be_compared() -> None:
    for task in ({"choice": ["classification", "regression"]}, {"name": {"choice": ["regression"]}}):
        source = Document("file.yaml", changed(task=task))
        with pytest.raises(ConfigError, match="trials of two tasks cannot be compared"):
            sweep_from_document(source)


@pytest.mark.parametrize("name", ["vgg16", "resnet20", "vit_tiny"])
def test_networks_for_images_say_so(name: str) -> None:
    with pytest.raises(UserError, match=r"is for images .* shape \(10,\); mlp takes them"):
        models.build(ModelConfig.model_validate(name), (10,), 1, seed=0)


def test_the_number_of_channels_is_for_images() -> None:
    config = ModelConfig.model_validate({"name": "mlp", "in_channels": 10})
    with pytest.raises(UserError, match=r"model\.in_channels = 10: is for images"):
        models.build(config, (10,), 1, seed=0)


def test_a_task_of_ones_own_runs_from_its_import_path(tiny: Tree, tmp_path: Path) -> None:
    tiny["pre_pruning"]["mask"] = None
    plain, _ = run(tiny, tmp_path / "plain")
    own, reports = run({**tiny, "task": "balanced:Balanced"}, tmp_path / "own")
    assert own.metric == Balanced.metric
    assert all(
        torch.equal(tensor, own.state[name]) for name, tensor in plain.state.items()
    )  # other score only
    assert own.keys["post_pruning"] != plain.keys["post_pruning"]
    assert "val_balanced_accuracy" in reports[0]
    tempered, _ = run({**tiny, "task": {"name": "balanced:Balanced", "temper": 4.0}}, tmp_path / "own")
    assert tempered.epochs_reused == 0
    assert not all(torch.equal(tensor, own.state[name]) for name, tensor in tempered.state.items())


SWEEP = """
name: small
task: regression
data: {name: diabetes}
model: {name: mlp, hidden: [8]}
densities: [0.5]
pre_pruning: {epochs: 2, optimizer: {name: adam, lr: {loguniform: [1e-4, 1e-1]}}}
post_pruning: {epochs: 9, optimizer: {name: adam, lr: 1e-3}}
search: {trials_per_density: 6}
"""


@pytest.fixture
def sweep(tmp_path: Path) -> tuple[Config, Problem, Ledger]:
    source = document.override(document.parse(SWEEP, "small.yaml"), [f"storage={tmp_path}"])
    template, config = sweep_from_document(source)
    return config, Problem.of(template), Ledger(Store(str(tmp_path)).sub(config.name))


def finished(
    sweep: tuple[Config, Problem, Ledger], value: float | None, status: str = "complete"
) -> TrialRecord:
    config, problem, ledger = sweep
    search = DensitySearch(problem, 0.5, sampler=config.search.sampler, seed=0)
    params, tree = search.propose(ledger.next_number(0.5)) or ({}, {})
    record = ledger.propose(problem, 0.5, params, tree)
    record.take(
        {"status": status, "val_rmse": value, "test_rmse": value, "nonzero": 10, "effective_density": 0.5}
    )
    if value is not None:
        record.curve = [
            Epoch("post_pruning", e, -value * 9 / e, {"val_rmse": value * 9 / e}, epoch=e)
            for e in range(1, 10)
        ]
    ledger.publish(record)
    return record


def test_the_best_of_a_regression_has_the_smallest_error(sweep: tuple[Config, Problem, Ledger]) -> None:
    records = [finished(sweep, value) for value in (60.0, 50.0, 70.0)]
    records.append(finished(sweep, None, "diverged"))
    records.append(finished(sweep, 40.0, "collapsed"))
    best = results.best_records(records)[0.5]
    assert (best.val, best.score, best.metric) == (50.0, -50.0, "rmse")
    with pytest.raises(AttributeError):
        _ = best.val_accuracy
    again = TrialRecord.read(best.plain())
    assert again == best
    (row,) = results.rows(records, RMSE)
    assert row.cells()[2:4] == ["50.0", "50.0"]
    assert "validation 50.0, test 50.0." in results.best_yaml(best, sweep[0], {})


def test_a_record_of_an_earlier_version_has_an_accuracy() -> None:
    old = {"uid": "u", "density": 0.1, "number": 0, "space": "s", "params": {}, "tree": {}}
    record = TrialRecord.read({**old, "val_accuracy": 0.9, "test_accuracy": 0.8, "status": "complete"})
    assert (record.metric, record.val_accuracy, record.test_accuracy, record.score) == (
        "accuracy",
        0.9,
        0.8,
        0.9,
    )


def test_the_study_of_a_regression_minimizes_the_error_itself(sweep: tuple[Config, Problem, Ledger]) -> None:
    config, problem, _ = sweep
    search = DensitySearch(problem, 0.5, sampler=config.search.sampler, seed=0)
    stopped = finished(sweep, 80.0, "stopped")
    for record in (finished(sweep, 60.0), finished(sweep, 50.0), finished(sweep, None, "diverged"), stopped):
        search.remember(record, record.params)
    study = search.study
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    assert [trial.value for trial in study.trials] == [60.0, 50.0, math.inf, 80.0]
    assert study.best_value == 50.0
    assert study.trials[0].intermediate_values[9] == 60.0
    assert study.trials[3].state is TrialState.PRUNED
    for number in range(10, 40):  # the sampler takes what diverged for the worst
        assert search.propose(number) is not None


def test_early_stopping_ends_the_larger_errors(sweep: tuple[Config, Problem, Ledger]) -> None:
    config = sweep[0]
    stopping = EarlyStopping(config, [], 9)
    good, bad = finished(sweep, 50.0), finished(sweep, 500.0)
    assert not any(stopping.stops(good, epoch) for epoch in good.curve)
    assert any(stopping.stops(bad, epoch) for epoch in bad.curve)


def test_exploration_takes_the_smaller_error_for_the_better(sweep: tuple[Config, Problem, Ledger]) -> None:
    from prunetune.config import space
    from prunetune.config.canonical import is_active

    distributions = space.parameters(sweep[1].template, is_active)
    experience = Experience(distributions, [0.5])
    (name,) = distributions
    for number, (rate, value) in enumerate([(1e-4, 90.0), (1e-3, 50.0), (2e-3, 51.0), (1e-1, 80.0)] * 2):
        record = finished(sweep, value if number != 7 else None, "complete" if number != 7 else "diverged")
        experience.ended(record, {name: rate})
    networks = [{name: 1e-4}, {name: 1.5e-3}, {name: 1e-1}]
    assert experience.most_promising(networks, 0.5) == 1


def test_tables_and_figures_follow_the_metric(sweep: tuple[Config, Problem, Ledger]) -> None:
    config, _, ledger = sweep
    records = [finished(sweep, value) for value in (60.0, 50.0)]
    results.write(ledger.store, records, {}, config)
    frame = report.read_results(ledger.store)
    assert frame is not None
    assert frame["val_rmse"].tolist() == [60.0, 50.0]
    assert "val_accuracy" not in frame
    assert report.metric_in(frame) == RMSE
    assert report.best_rows(frame)["trial"].tolist() == [1]
    written = report.write_report(ledger.store, "small")
    assert [Path(path).name for path in written] == ["summary.md", "rmse.png"]
    summary = (ledger.store.read_file("report/summary.md") or b"").decode()
    assert "| 0.5 | 50 % | 50.0 | 50.0 | 10 |" in summary
    assert "Chosen by validation RMSE; test RMSE played no part." in summary
    assert "| 50 (1) |" in report.comparison({"small": frame})


def test_train_saves_a_regression_that_answers_in_the_targets_unit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {**changed(), "storage": str(tmp_path / "runs")}
    (tmp_path / "c.yaml").write_text(document.dump(tree))
    assert train.main([str(tmp_path / "c.yaml"), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    data = datasets.load(Config.model_validate(tree).data)
    model = load_model(tmp_path / "out")
    with torch.no_grad():
        answers = model(data.test.inputs)
    error = float((answers - data.test.targets).square().mean().sqrt())
    assert f"test {RMSE.text(error)}," in printed
    assert "%," not in printed
    served = mlflow.pyfunc.load_model(str(tmp_path / "out" / "mlflow_model"))
    assert served.metadata.signature.inputs.inputs[0].type == np.dtype("float32")
    np.testing.assert_allclose(served.predict(data.test.inputs.numpy()), answers.numpy(), rtol=1e-6)
    # Under the loader's name that earlier versions saved, too.
    saved = tmp_path / "out" / "mlflow_model" / "MLmodel"
    saved.write_text(saved.read_text().replace("prunetune.export.pyfunc", "prunetune.deploy.pyfunc"))
    assert "prunetune.deploy.pyfunc" in saved.read_text()
    served = mlflow.pyfunc.load_model(str(tmp_path / "out" / "mlflow_model"))
    np.testing.assert_allclose(served.predict(data.test.inputs.numpy()), answers.numpy(), rtol=1e-6)
    with pytest.raises(ValueError, match=r"inputs: shape \(2, 3\); \(N, 10\) is needed"):
        model(torch.zeros(2, 3))


@pytest.mark.slow
def test_a_sweep_of_a_regression_is_one_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(__file__).parents[2] / "sweeps" / "diabetes.yaml"
    few = ["densities=[0.3]", "search.trials_per_density=2", "pre_pruning.epochs=2", "post_pruning.epochs=3"]
    assert sweep_command.main([str(file), f"storage={tmp_path}", *few]) == 0
    printed = capsys.readouterr().out
    assert "Best per density (chosen by validation RMSE)" in printed
    frame = report.read_results(Store(str(tmp_path / "diabetes")))
    assert frame is not None
    best = report.best_rows(frame).iloc[0]
    assert best["val_rmse"] == frame.loc[frame["status"].isin(["complete", "collapsed"]), "val_rmse"].min()
    comment = (tmp_path / "diabetes" / "best" / "density-0.3.yaml").read_text().splitlines()[0]
    assert f"validation {RMSE.text(best['val_rmse'])}, test {RMSE.text(best['test_rmse'])}." in comment
    client = MlflowClient(f"sqlite:///{tmp_path / 'diabetes' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("diabetes")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "trial" not in run.data.tags]
    assert parent.data.metrics["best_val_rmse_density_0.3"] == best["val_rmse"]
    (child,) = [run for run in runs if run.info.run_id == best["mlflow_run_id"]]
    assert child.data.metrics["final_val_rmse"] == child.data.metrics["val_rmse"] == best["val_rmse"]
    assert child.data.metrics["test_rmse"] == best["test_rmse"]
    assert not any("accuracy" in name for run in runs for name in run.data.metrics)


LANGUAGE: Tree = {
    "name": "language",
    "task": "language:NextToken",
    "data": {"name": "language:counting", "batch_size": 20},
    "model": {"name": "language:Network", "width": 24},
    "densities": [0.4],
    "pre_pruning": {"epochs": 3, "optimizer": {"name": "adam", "lr": 1e-2}},
    "post_pruning": {
        "epochs": 3,
        "optimizer": {"name": "adam", "lr": 1e-2},
        "label_smoothing": {"alpha0": 0.1},
    },
}


@pytest.mark.parametrize("criterion", ["magnitude", "snip", "synflow"])
def test_a_language_model_is_a_source_a_task_and_a_network(criterion: str, tmp_path: Path) -> None:
    result, reports = run({**LANGUAGE, "pruning": {"criterion": criterion}}, tmp_path)
    assert result.status == "complete"
    assert 1 <= (result.val or 0) < 4  # of five
    assert reports[-1]["val_perplexity"] == pytest.approx(math.exp(reports[-1]["val_loss"]), rel=1e-4)
    assert 0 < result.effective_density <= 0.4


def test_language_models_give_together_what_they_give_alone(tmp_path: Path) -> None:
    from test_vectorized import alone, assert_close, together

    configs = [Config.model_validate({**LANGUAGE, "seed": seed}) for seed in (0, 1)]
    for (_, one), (_, other) in zip(together(configs, tmp_path), alone(configs, tmp_path), strict=True):
        assert one.val == pytest.approx(other.val, rel=1e-3)
        for name, tensor in one.state.items():
            assert_close(tensor, other.state[name], name)


def test_a_language_model_is_saved_and_answers_with_probabilities(tmp_path: Path) -> None:
    config = Config.model_validate(LANGUAGE)
    result, _ = run(LANGUAGE, tmp_path)
    data = datasets.load(config.data)
    save_model(tmp_path / "saved", config, result.state, data)
    with torch.no_grad():
        answers = load_model(tmp_path / "saved")(data.test.inputs)
    assert answers.shape == (40, 6, 5)
    right = (answers.argmax(-1) == data.test.targets).double().mean()
    assert right > 0.5
