from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from small_sweep import finish, make_sweep

from prunetune.config import space
from prunetune.config.canonical import canonical, is_active
from prunetune.errors import UserError
from prunetune.records.ledger import Ledger
from prunetune.records.lock import exclusive
from prunetune.records.trial import trial_config
from prunetune.search.queue import SweepSearch
from prunetune.store import Store


def one_record(folder: Path, *overrides: str):
    config, problem, ledger = make_sweep(folder, *overrides)
    record = SweepSearch(config, problem, ledger).next()
    assert record is not None
    return config, problem, ledger, record


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    _, _, ledger, record = one_record(tmp_path)
    ledger.publish(finish(record, 0.5, "stopped"))
    assert Ledger(ledger._store).records() == [record]


def test_a_damaged_record_is_set_aside_and_its_number_used_again(tmp_path: Path) -> None:
    _, _, ledger, _ = one_record(tmp_path)
    path = tmp_path / "small" / "trials" / "density-0.1" / "00000.json"
    path.write_text(path.read_text().replace("running", "comp1ete"))
    again = Ledger(ledger._store)
    assert again.records() == []
    assert again.next_number(0.1) == 0
    assert list((tmp_path / "small" / "damaged").iterdir())


def test_moving_the_data_or_the_budget_of_the_search_is_not_another_problem(tmp_path: Path) -> None:
    _, problem, _ = make_sweep(tmp_path)
    _, moved, _ = make_sweep(
        tmp_path,
        "data.root=/elsewhere",
        "search.trials_per_density=99",
        "resources.cpus=2",
        "keep={post_pruning: all, pre_pruning: always}",
        "densities=[0.5]",
    )
    assert moved.hash == problem.hash
    assert moved.changes(problem.described) == []


def test_a_change_of_the_space_is_named_with_what_it_was(tmp_path: Path) -> None:
    _, problem, _ = make_sweep(tmp_path)
    _, changed, _ = make_sweep(
        tmp_path,
        "pre_pruning.optimizer.lr=0.01",
        "post_pruning.epochs=5",
        "pre_pruning.mask={choice: [null, {lambda1: 0.0, lambda2: 1e-3}]}",
    )
    assert changed.hash != problem.hash
    assert changed.changes(problem.described) == [
        "post_pruning.epochs: was 9, is now 5",
        "pre_pruning.mask[on].lambda2: was loguniform [1e-05, 0.01], is now 0.001",
        "pre_pruning.optimizer.lr: was loguniform [0.0001, 0.1], is now 0.01",
    ]


@pytest.mark.parametrize(
    ("override", "fits"),
    [
        ("pre_pruning.optimizer.lr={loguniform: [1e-5, 1.0]}", True),  # wider
        ("pre_pruning.optimizer.lr={loguniform: [0.5, 1.0]}", False),  # elsewhere
        ("post_pruning.epochs=5", False),  # another computation
        ("post_pruning.label_smoothing.horizon={uniform: [0.5, 1.0]}", True),  # the default was 1.0
        ("post_pruning.label_smoothing.horizon={uniform: [0.1, 0.5]}", False),
        ("seed=8", False),
        ("data.root=/elsewhere", True),
    ],
)
def test_a_record_fits_a_space_exactly_when_the_space_contains_it(tmp_path: Path, override, fits) -> None:
    _, _, _, record = one_record(tmp_path)
    _, changed, _ = make_sweep(tmp_path, override)
    params = changed.fit(record)
    assert (params is not None) == fits
    if params is not None:
        assert params["pre_pruning.optimizer.lr"] == record.params["pre_pruning.optimizer.lr"]


@pytest.mark.parametrize(
    ("override", "params"),
    [
        ("pre_pruning.initializer={choice: [kaiming, zero]}", {"pre_pruning.initializer": "zero"}),
        (
            "pre_pruning.initializer={choice: [{name: kaiming}, {name: zero}]}",
            {"pre_pruning.initializer": "zero"},
        ),
        (
            "pre_pruning.initializer={name: {choice: [kaiming, zero]}}",
            {"pre_pruning.initializer.name": "zero"},
        ),
        ("pre_pruning.mask={choice: [target, null]}", {"pre_pruning.mask": "target"}),
        ("pre_pruning.mask={choice: [null, {method: target}]}", {"pre_pruning.mask": "on"}),
        ("pruning.criterion={choice: [magnitude, grasp]}", {"pruning.criterion": "grasp"}),
        ("pruning.schedule={choice: [one_shot, iterative]}", {"pruning.schedule": "iterative"}),
    ],
)
def test_a_point_of_a_space_fits_it_in_whichever_form_components_are_written(
    tmp_path: Path, override, params
) -> None:
    _, problem, _, record = one_record(tmp_path, override)
    record.params = {**record.params, **params}
    record.tree = space.at(problem.template, record.params, is_active)
    found = problem.fit(record)
    assert found is not None
    assert found.items() >= params.items()


def test_a_trial_runs_what_was_proposed_with_todays_paths(tmp_path: Path) -> None:
    _, _, _, record = one_record(tmp_path, "data.root=/old")
    computed = ("compact_layers=false", "cuda_graphs=true")
    today, _, _ = make_sweep(tmp_path, "data.root=/new", "resources.cpus=2", *computed)
    config = trial_config(record, today)
    assert (config.compact_layers, config.cuda_graphs) == (False, True)
    assert (config.data.root, config.resources.cpus, config.density) == ("/new", 2, record.density)
    assert config.pre_pruning is not None
    assert canonical(config.pre_pruning)["optimizer"]["lr"] == record.params["pre_pruning.optimizer.lr"]


def test_a_trial_of_data_by_their_name_alone_gets_todays_paths(tmp_path: Path) -> None:
    _, _, _, record = one_record(tmp_path, "data=digits")
    today, _, _ = make_sweep(tmp_path, "data.root=/new")
    assert record.tree["data"] == "digits"
    assert (trial_config(record, today).data.name, trial_config(record, today).data.root) == (
        "digits",
        "/new",
    )


def test_a_second_driver_of_the_same_sweep_is_refused(tmp_path: Path) -> None:
    code = textwrap.dedent(
        f"""
        import sys
        from prunetune.store import Store
        from prunetune.records.lock import exclusive
        with exclusive(Store({str(tmp_path)!r})):
            print("held", flush=True)
            sys.stdin.readline()
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=rf"another process \(pid {other.pid}\) runs this sweep"),
            exclusive(Store(str(tmp_path))),
        ):
            pass
        other.communicate("\n")
    with exclusive(Store(str(tmp_path))):  # and free again
        pass


def test_a_second_driver_on_this_machine_is_refused_where_the_storage_is_elsewhere(
    remote: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    with (
        exclusive(remote.sub("a")),
        exclusive(remote.sub("b")),
        pytest.raises(UserError, match="another process"),
        exclusive(remote.sub("a")),
    ):
        pass
    with exclusive(remote.sub("a")):
        pass
