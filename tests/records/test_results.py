from __future__ import annotations

import io
import math
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from small_sweep import epoch, finish, make_sweep

from prunetune.config import document
from prunetune.config.reading import from_document
from prunetune.records import report as reporting
from prunetune.records import results
from prunetune.records.trial import TrialRecord
from prunetune.search.queue import SweepSearch
from prunetune.store import Store
from prunetune.trackers import live as progress


def records(folder: Path, outcomes: list[tuple]) -> tuple:
    config, problem, ledger = make_sweep(folder, "search.trials_per_density=20")
    search = SweepSearch(config, problem, ledger)
    done = []
    for status, val, test in outcomes:
        for _ in config.densities:
            record = search.next()
            assert record is not None
            finish(record, val, status)
            record.test = test
            search.tell(record)
            done.append(record)
    return config, search, done


def test_the_best_is_chosen_by_validation_and_never_by_test_accuracy(tmp_path: Path) -> None:
    _, _, done = records(
        tmp_path, [("complete", 0.7, 0.99), ("complete", 0.8, 0.01), ("stopped", 0.95, None)]
    )
    best = results.best_records(done)
    assert {d: r.val_accuracy for d, r in best.items()} == {0.1: 0.8, 0.01: 0.8}


def test_of_equals_the_first_wins_and_a_collapsed_one_only_alone(tmp_path: Path) -> None:
    _, _, done = records(tmp_path, [("collapsed", 0.9, 0.9), ("complete", 0.5, 0.5), ("complete", 0.5, 0.6)])
    assert results.best_records(done)[0.1].number == 1
    assert results.best_records([r for r in done if r.number == 0])[0.1].status == "collapsed"


def test_densities_are_not_compared_with_each_other(tmp_path: Path) -> None:
    _, _, done = records(tmp_path, [("complete", 0.5, 0.5)])
    finish(done[0], 0.9)
    best = results.best_records(done)
    assert (best[0.1].val_accuracy, best[0.01].val_accuracy) == (0.9, 0.5)


def test_results_have_a_row_per_trial_and_the_promised_columns(tmp_path: Path) -> None:
    config, _, done = records(
        tmp_path,
        [("complete", 0.7, 0.6), ("diverged", None, None), ("failed", None, None), ("stopped", 0.2, None)],
    )
    store = Store(str(tmp_path / "small"))
    results.write(store, done, {done[0].uid: "run"}, config)
    frame = pd.read_parquet(tmp_path / "small" / "results.parquet")
    assert len(frame) == len(done)
    for column in ("density", "pre_pruning.optimizer.lr", "post_pruning.epochs", *results.RESULT_COLUMNS):
        assert column in frame.columns
    first = frame.iloc[0]
    assert (first["density"], first["status"], first["mlflow_run_id"]) == (0.1, "complete", "run")
    assert first["pre_pruning.optimizer.lr"] == done[0].params["pre_pruning.optimizer.lr"]
    masked = frame["pre_pruning.mask.lambda2"].notna()
    assert masked.tolist() == [r.params["pre_pruning.mask"] == "on" for r in done]


def test_a_component_has_one_column_for_its_name_with_options_or_without(tmp_path: Path) -> None:
    config, problem, ledger = make_sweep(tmp_path, "pruning.criterion={choice: [magnitude, grasp]}")
    search = SweepSearch(config, problem, ledger)
    done = [finish(record, 0.5) for _ in range(12) if (record := search.next()) is not None]
    frame = results.trials_frame(done, {}, config)
    assert frame["pruning.criterion"].tolist() == [r.params["pruning.criterion"] for r in done]
    assert set(frame["pruning.criterion"]) == {"magnitude", "grasp"}
    assert frame["pruning.criterion.temperature"].isna().tolist() == [
        r.params["pruning.criterion"] == "magnitude" for r in done
    ]
    assert "pruning.criterion.name" not in frame.columns
    # Where a name never stands alone its column is the key that a file writes it under.
    assert set(frame["pre_pruning.mask.method"].dropna()) == {"penalty"}
    assert "pre_pruning.mask" not in frame.columns
    assert "pre_pruning.optimizer.name" in frame.columns


def test_the_best_configuration_trains_as_it_is(tmp_path: Path) -> None:
    config, _, done = records(tmp_path, [("complete", 0.7, 0.6)])
    results.write(Store(str(tmp_path / "small")), done, {}, config)
    read = from_document(document.read(tmp_path / "small" / "best" / "density-0.01.yaml"))
    assert read.density == 0.01
    assert read.data.root == config.data.root
    assert read.pre_pruning is not None
    assert read.pre_pruning.optimizer.lr == done[1].params["pre_pruning.optimizer.lr"]


@pytest.mark.parametrize("outcomes", [[("diverged", None, None)], [("failed", None, None)]])
def test_a_density_without_any_result_has_a_row_that_says_so(tmp_path: Path, outcomes) -> None:
    config, _, done = records(tmp_path, outcomes)
    results.write(Store(str(tmp_path / "small")), done, {}, config)
    assert not (tmp_path / "small" / "best").exists()
    cells = results.rows(done)[0].cells()
    assert "no result" in cells
    assert f"1 {outcomes[0][0]}" in cells[-1]
    assert reporting.write_report(Store(str(tmp_path / "small")), "small")


def test_the_report_names_the_winners_and_counts_everything(tmp_path: Path) -> None:
    config, _, done = records(
        tmp_path,
        [("complete", 0.7, 0.6), ("complete", 0.8, 0.5), ("stopped", 0.2, None), ("collapsed", 0.1, 0.1)],
    )
    results.write(Store(str(tmp_path / "small")), done, {}, config)
    written = reporting.write_report(Store(str(tmp_path / "small")), "small")
    assert [Path(path).name for path in written] == ["summary.md", "accuracy.png"]
    text = Path(written[0]).read_text()
    assert "| 0.1 | 90 % | 80.00 % | 50.00 % | 10 | 0.1 | complete | 1 |" in text
    assert "| density | collapsed | complete | stopped | epochs run | epochs reused |" in text
    assert "| 0.01 | 1 | 2 | 1 | 12 | 0 |" in text
    assert "`pre_pruning.optimizer.lr`" in text
    assert Path(written[1]).read_bytes().startswith(b"\x89PNG")


def test_the_live_view_counts_and_names_what_runs(tmp_path: Path) -> None:
    config, search, done = records(tmp_path, [("complete", 0.7, 0.6)])
    out = io.StringIO()
    view = progress.Progress(Console(file=out, width=140), search, config.densities, "small")
    for record in done:
        record.epochs_reused = 3
        view.ended(record)
    running = search.next()
    assert running is not None
    view.started(running)
    view.epochs(running, [epoch(2)])
    Console(file=out, width=140).print(view._view())
    text = out.getvalue()
    assert "[1/40] d=0.1 #0 complete val 70.00 % (best 70.00 %), 3 epochs, 3 reused" in text
    row = next(line for line in text.splitlines() if "99 %" not in line and "90 %" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["0.1", "90 %", "1", "1", "20", "0", "0", "70.00 %", "#1 pre epoch 2"]
    assert "6 epochs trained, 6 saved by reuse (50 %)" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3900, "1 h 05 min")]
)
def test_durations_read_well(seconds, text) -> None:
    assert progress.duration(seconds) == text


def seeds(test: dict[tuple[float, str], list[float]], val: dict[str, float]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "density": density,
                "trial": number,
                "seed": number,
                "pre_pruning.optimizer.lr": lr,
                "model.hidden": [8, 8],
                "pre_pruning.mask.lambda2": None,
                "pruning.scoring_rounds": float("nan"),
                "val_accuracy": val[lr],
                "test_accuracy": value,
                "status": "complete",
            }
            for (density, lr), values in test.items()
            for number, value in enumerate(values)
        ]
    )


def test_a_comparison_tells_configurations_apart_by_what_has_no_section_too() -> None:
    frame = seeds({(0.1, "low"): [0.50, 0.52], (0.1, "high"): [0.7, 0.7]}, {"low": 0.8, "high": 0.7})
    frame["pre_pruning.optimizer.lr"] = "one"
    frame["precision"] = ["fp32", "fp32", "bf16", "bf16"]
    assert "| one | 51.0 ± 1.4 (2) |" in reporting.comparison({"one": frame}).splitlines()
    assert reporting.searched_columns(frame) == ["seed", "precision"]


def test_a_comparison_takes_the_best_configuration_by_validation_over_its_seeds() -> None:
    one = seeds(
        {(0.1, "low"): [0.50, 0.52, 0.54], (0.1, "high"): [0.9, 0.9, 0.9], (0.01, "low"): [0.3]},
        {"low": 0.8, "high": 0.7},  # so `low` is taken, although `high` tests better
    )
    other = seeds({(0.1, "low"): [0.11, 0.13]}, {"low": 0.1})
    other.loc[1, "status"] = "diverged"
    assert reporting.comparison({"one": one, "other": other}).splitlines() == [
        "| sweep | d = 0.1 | d = 0.01 |",
        "|---|---|---|",
        "| one | 52.0 ± 2.0 (3) | 30.0 (1) |",
        "| other | 11.0 (1) |  |",
    ]


def of_networks(folder: Path) -> pd.DataFrame:
    """Three trials of each of two networks, with one-shot scores at both densities."""
    config, _, done = records(
        folder, [("complete", 0.5, 0.5), ("complete", 0.7, 0.7), ("complete", 0.6, 0.6)]
    )
    scores = {"a" * 64: (0.4, 0.1), "b" * 64: (0.3, 0.2)}
    for record, network in zip(done, [*scores, *scores, *scores], strict=True):
        high, low = scores[network]
        record.network = network
        measured = {"oneshot_accuracy_density_0.1": high, "oneshot_accuracy_density_0.01": low}
        record.curve.insert(0, epoch(1, metrics=measured))
    return results.trials_frame(done, {}, config)


def test_the_value_right_after_pruning_has_a_column_per_density(tmp_path: Path) -> None:
    frame = of_networks(tmp_path)
    assert frame["oneshot_accuracy_density_0.1"].tolist() == [0.4, 0.3] * 3
    assert frame["oneshot_accuracy_density_0.01"].tolist() == [0.1, 0.2] * 3
    assert "oneshot_accuracy_density_0.1" not in reporting.hyperparameters(frame)


def test_of_an_error_the_lowest_value_right_after_pruning_counts() -> None:
    made = TrialRecord("u", 0.1, 0, "", {}, {}, metric="rmse", maximize=False)
    made.curve = [epoch(i, metrics={"oneshot_rmse_density_0.1": value}) for i, value in ((1, 5.0), (2, 3.0))]
    made.curve.append(epoch(3, metrics={"oneshot_rmse_density_0.1": math.nan}))
    assert made.one_shot(0.1) == -3.0
    assert made.one_shot(0.01) is None
    made.selection = "0f3a9c21"  # another criterion: measured under another name
    assert made.one_shot(0.1) is None


def test_the_report_lists_each_network_before_and_after_post_pruning(tmp_path: Path) -> None:
    page = reporting.markdown(of_networks(tmp_path), "small").splitlines()
    # Each trial at 0.1 is of `a`, each at 0.01 of `b`; the best has 70 %.
    assert "| `aaaaaaaa` | 3 | 40.00 % → 70.00 % | 10.00 % → – |" in page
    assert "| `bbbbbbbb` | 3 | 30.00 % → – | 20.00 % → 70.00 % |" in page


def test_a_table_without_such_values_has_no_section_and_no_figure_of_networks(tmp_path: Path) -> None:
    config, _, done = records(tmp_path, [("complete", 0.5, 0.5)])
    store = Store(str(tmp_path / "small"))
    results.write(store, done, {}, config)
    written = reporting.write_report(store, "small")
    assert not any("networks" in path for path in written)
    assert "networks" not in (tmp_path / "small" / "report" / "summary.md").read_text()
