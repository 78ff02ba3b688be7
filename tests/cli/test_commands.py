"""What a person types wrongly: exit code 2, one message, no traceback. Nothing here starts Ray."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prunetune import __main__, report, sweep, train
from prunetune.cli import commands, process

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "sweeps" / "digits.yaml")
BUFFERED = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}


def fails(capsys, command, *arguments: str, code: int = 2) -> str:
    """The message of a command that must fail with `code`."""
    ended = commands.run(command, list(arguments))
    captured = capsys.readouterr()
    assert ended == code, captured
    assert "Traceback" not in captured.err + captured.out
    return captured.err


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("densities=[0]", "densities.0 = 0: must be greater than 0"),
        ("densities=[2]", "densities.0 = 2: must be less than or equal to 1"),
        ("densities=[0.1,0.1]", "densities = [0.1, 0.1]: the density 0.1 is written twice"),
        ("densities=[1e-9]", "densities.0 = 1e-09: keeps none of the model's 27,400 weights"),
        ("post_pruning.soft_skip.horizon=0", "post_pruning.soft_skip.horizon = 0: must be greater than 0"),
        ("pre_pruning.initializer={choice: []}", "pre_pruning.initializer = []: choice: needs at least one"),
        ("post_pruning.optimizer.lr={uniform: [2, 1]}", "the lower bound is above the upper one"),
        ("post_pruning.epoch=3", "post_pruning.epoch: unknown key; did you mean 'epochs'?"),
        ("post_pruning.epochs=many", "post_pruning.epochs = 'many': must be a valid integer"),
        ("model.name=vgg", "did you mean 'vgg16'?"),
        ("model.num_classes=7", "model.num_classes = 7: the data has 10 classes"),
        ("model.in_channels=3", "model.in_channels = 3: the data's images have 1 channel(s)"),
        ("model={name: vgg16}", "needs 32×32 or more; got 8×8"),
        ("model={name: 'no.such:Net'}", "cannot be imported: ModuleNotFoundError"),
        ("data={name: mnist, root: nowhere}", "mnist is not there, and downloading it failed"),
        ("data={name: parquet, root: nowhere}", "no such folder"),
        ("search.trials_per_density={int: [1, 9]}", "search.trials_per_density: cannot be searched"),
        (
            "keep.post_pruning=bests",
            "keep.post_pruning = 'bests': must be 'best' or 'all'; did you mean 'best'?",
        ),
        ("keep.pre_pruning={choice: [sweep, always]}", "keep.pre_pruning: cannot be searched"),
        ("name=store", "is the name of the store's own folder"),
        ("nonsense", "'nonsense': expected dotted.key=value"),
    ],
)
def test_a_wrong_value_is_one_message_that_says_where_and_which_rule(capsys, override, message) -> None:
    if "mnist" in override:
        override = override.replace("nowhere", "/proc/nowhere")  # where nothing can be downloaded to
    error = fails(capsys, sweep.main, DIGITS, override)
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_a_wrong_line_of_the_file_is_named(capsys, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(Path(DIGITS).read_text().replace("sampler: tpe", "sampler: tpee"))
    line = next(i for i, text in enumerate(file.read_text().splitlines(), 1) if "tpee" in text)
    error = fails(capsys, sweep.main, str(file))
    assert error == (
        f"prunetune: {file}:{line}: search.sampler = 'tpee': must be one of tpe, random, or an import path "
        "'package.module:object'; did you mean 'tpe'?\n"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("- 1", "a mapping"),
        ("a: [", "not valid YAML"),
        ("a: 1\na: 2", "written twice"),
    ],
)
def test_a_wrong_file_is_named(capsys, tmp_path: Path, content, message) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(content)
    assert message in fails(capsys, sweep.main, str(file))


def test_a_missing_file_is_named(capsys) -> None:
    assert "nowhere.yaml: no such file" in fails(capsys, sweep.main, "nowhere.yaml")


def test_training_needs_values_one_density_and_a_file(capsys) -> None:
    assert "is a distribution" in fails(capsys, train.main, DIGITS)
    assert "a CONFIG file or --run-id is needed" in fails(capsys, train.main)
    assert "no run of a trial with a configuration" in fails(capsys, train.main, "--run-id", "0" * 32)


def test_numbers_of_workers_that_cannot_be_are_named(capsys, tmp_path: Path) -> None:
    few = ("densities=[0.1]", "data.batch_size=2", "pre_pruning=null")
    post = "post_pruning={epochs: 1, optimizer: {name: adam, lr: 1e-3}}"
    message = fails(capsys, train.main, DIGITS, *few, post, "--workers", "3")
    assert "data.batch_size = 2: a batch has 2 examples; --workers 3 are too many for it" in message
    message = fails(capsys, train.main, DIGITS, *few, post, "--workers", "0")
    assert "--workers 0: must be at least 1" in message


def test_storage_that_cannot_be_written_is_named(capsys, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in fails(capsys, sweep.main, DIGITS, f"storage={tmp_path / 'file'}")


def test_a_model_without_relus_cannot_be_softened(capsys, tmp_path: Path) -> None:
    (tmp_path / "tanh_net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, 10), nn.Tanh())\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        error = fails(capsys, sweep.main, DIGITS, "model={name: 'tanh_net:Net'}")
    finally:
        sys.path.remove(str(tmp_path))
    assert "post_pruning.soft_activation: the model has no torch.nn.ReLU" in error


def test_a_report_of_no_sweep_says_so(capsys, tmp_path: Path) -> None:
    assert "holds no results.parquet" in fails(capsys, report.main, str(tmp_path))


def test_an_unknown_command_names_the_nearest(capsys) -> None:
    assert "did you mean 'sweep'?" in fails(capsys, __main__._dispatch, "sweeep")


@pytest.mark.parametrize("name", ["sweep", "train", "report", "schema"])
def test_the_help_of_a_command_ends_with_an_example(capsys, name: str) -> None:
    with pytest.raises(SystemExit) as ended:
        __main__._dispatch([name, "--help"])
    assert ended.value.code == 0
    (*_, last) = " ".join(capsys.readouterr().out.split()).partition("example: ")
    assert last.startswith(f"python -m prunetune.{name} ")


def test_the_help_of_the_console_script_names_all_commands_and_an_example(capsys) -> None:
    assert __main__._dispatch(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in ("sweep", "train", "report", "schema"))
    assert out.splitlines()[-1].startswith("example: prunetune sweep ")


def test_a_training_that_is_run_again_trains_nothing_and_says_so(capsys, tmp_path: Path) -> None:
    overrides = (
        "densities=[0.1]",
        "data.limit=200",
        "tracking.trackers=[]",
        "pre_pruning={epochs: 2, optimizer: {name: adam, lr: 1e-3}}",
        "post_pruning={epochs: 3, optimizer: {name: adam, lr: 1e-3}}",
    )
    said = []
    for extended in ([], [], ["post_pruning.optimizer.lr=1e-2"]):
        assert train.main([DIGITS, *overrides, *extended]) == 0
        said.append(" ".join(capsys.readouterr().out.split()))
    assert "5 epochs trained, 0 taken from the store" in said[0]
    assert "0 epochs trained, 5 taken from the store" in said[1]
    assert said[1].count("(stored)") == 5
    assert "3 epochs trained, 2 taken from the store" in said[2]
    assert "MLflow run" not in said[0]  # no tracker


def test_dry_run_prints_the_space_the_trials_and_the_epochs(capsys) -> None:
    assert sweep.main([str(ROOT / "sweeps" / "cifar.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for expected in (
        "pre_pruning.mask[on].lambda2",
        "loguniform [1e-08, 0.0001]",
        "14,715,584 prunable weights",
        "density 0.001 (sparsity 99.9 %) keeps 14,715",
        "32 trials at each of 5 densities: 160 trials, at most 12,800 epochs (40 + 40 per trial)",
    ):
        assert expected in out
    assert list(Path.cwd().iterdir()) == []  # and writes nothing


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "sweeps").glob("*.yaml")))
def test_every_sweep_file_is_valid(capsys, name: str) -> None:
    assert sweep.main([str(ROOT / "sweeps" / name), "--dry-run"]) == 0


def test_the_commands_are_modules_and_subcommands() -> None:
    for words in (["-m", "prunetune.sweep"], ["-m", "prunetune", "sweep"]):
        ended = subprocess.run(
            [sys.executable, *words, "nowhere.yaml"], capture_output=True, text=True, check=False
        )
        assert (ended.returncode, ended.stderr) == (2, "prunetune: nowhere.yaml: no such file\n")


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "sweeps" / "table").glob("*.yaml")))
def test_every_sweep_of_the_table_is_valid_and_has_a_name_of_its_own(capsys, name: str) -> None:
    assert sweep.main([str(ROOT / "sweeps" / "table" / name), "--dry-run"]) == 0
    title = capsys.readouterr().out.splitlines()[0]
    assert title.startswith("table: " if name == "base.yaml" else "table-")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pruning={structure: '2:4'}", "structure 2:4 has density 0.5"),
        ("pruning={dense_layers: both}", "keeps 822 weights, but dense_layers is both: 7,400"),
        ("pruning={structure: channel}", "keeps 822 weights, but the last layer"),
        ("pruning={rewind: 99}", "pruning.rewind = 99: must be at most the 20 epochs of pre_pruning"),
        ("pruning={rewind: maybe}", "pruning.rewind = 'maybe': must be none, init, or the number"),
        ("pruning={criterion: synfow}", "did you mean 'synflow'?"),
        ("pruning={schedule: {name: gradual, start: 0.9}}", "must be less than end = 0.75"),
        ("post_pruning.dynamic=riggl", "did you mean 'rigl'?"),
    ],
)
def test_methods_that_cannot_be_are_named(capsys, override: str, message: str) -> None:
    assert message in fails(capsys, sweep.main, DIGITS, override, "densities=[0.03]")


def test_a_comparison_of_several_sweeps_is_printed_and_written(capsys, tmp_path: Path) -> None:
    import pandas as pd

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        pd.DataFrame(
            {
                "density": [0.1],
                "seed": [0],
                "a.b": [1],
                "val_accuracy": [0.5],
                "test_accuracy": [0.25],
                "status": ["complete"],
            }
        ).to_parquet(tmp_path / name / "results.parquet")
    assert report.main(["one", "two/", "--output", "table.md"]) == 0
    expected = "| sweep | d = 0.1 |\n|---|---|\n| one | 25.0 (1) |\n| two | 25.0 (1) |\n"
    assert capsys.readouterr().out == expected == (tmp_path / "table.md").read_text()
    assert "holds no results.parquet" in fails(capsys, report.main, "one", "three")


def test_ctrl_c_while_a_command_is_imported_is_no_traceback() -> None:
    started = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "prunetune.sweep", "none.yaml"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert started.stderr is not None
    while not started.stderr.readline().endswith("argparse\n"):  # the first import of that module
        pass
    started.send_signal(signal.SIGINT)
    rest = started.stderr.read()
    assert started.wait() == 130
    assert rest.endswith("prunetune: interrupted\n")
    assert "Traceback" not in rest


def test_ctrl_c_is_an_exception_again_once_a_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    before, often = signal.signal(signal.SIGINT, signal.default_int_handler), gc.get_threshold()
    try:
        process.begin()
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler

        def command(arguments: list[str]) -> int:
            assert gc.get_threshold() == often
            signal.raise_signal(signal.SIGINT)
            return 0

        assert commands.run(command, []) == 130
    finally:
        signal.signal(signal.SIGINT, before)
        gc.set_threshold(*often)


def test_a_command_ends_with_its_code_and_nothing_of_its_output_is_lost() -> None:
    text = """
import atexit, sys
from prunetune.cli import process
atexit.register(print, "and what is registered")
print("its output")
print("its errors", end="", file=sys.stderr)
process.end(3)
"""
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=BUFFERED)
    assert (ended.returncode, ended.stdout) == (3, "its output\nand what is registered\n")
    assert ended.stderr == "its errors"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_that_could_not_be_written_is_a_failure() -> None:
    text = "from prunetune.cli import process; print('its output'); process.end(0)"
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", text], stdout=full, env=BUFFERED).returncode == 1
