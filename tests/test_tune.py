"""The trainable for a Tuner of one's own: by itself, then under Tune's searchers, schedulers and restore."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from ray.tune.search.optuna import OptunaSearch

from prunetune import data as datasets
from prunetune import pipeline, run_pipeline
from prunetune.config import document
from prunetune.config.reading import from_document
from prunetune.config.schema import Config
from prunetune.errors import ConfigError, UserError, WorkError
from prunetune.records.retention import References
from prunetune.stages.plan import plan
from prunetune.store import Artefact, Store
from prunetune.tune import PipelineTrainable

PRE, POST = 3, 4
EPOCHS = PRE + POST

Make = Callable[..., PipelineTrainable]


@pytest.fixture
def make(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes trials without Tune: parameters over `tiny`."""
    monkeypatch.setattr("prunetune.tune.trainable.ray.get_gpu_ids", lambda: [])
    bound = PipelineTrainable.on(tiny, storage=tmp_path / "runs")
    count = 0

    def make(parameters: dict[str, Any] | None = None) -> PipelineTrainable:
        nonlocal count
        count += 1
        trial = bound.__new__(bound)  # `__init__` makes folders in the user's home
        trial._trial_info = SimpleNamespace(trial_id=f"trial{count}", trial_resources=None)
        trial.setup(parameters or {})
        return trial

    return make


def config_of(tiny: dict[str, Any], **parameters: Any) -> Config:
    """The configuration with dotted keys (`__` for the dots) replaced."""
    texts = [f"{key.replace('__', '.')}={value}" for key, value in parameters.items()]
    return from_document(document.override(document.Document("tiny", copy.deepcopy(tiny)), texts))


def replaced(tiny: dict[str, Any], parameters: dict[str, Any]) -> Config:
    return config_of(tiny, **{key.replace(".", "__"): value for key, value in parameters.items()})


def keys_of(config: Config) -> dict[str, str]:
    return plan(config, datasets.load(config.data).digest).keys


def steps(trial: PipelineTrainable, count: int) -> list[dict[str, Any]]:
    return [trial.step() for _ in range(count)]


def finish(trial: PipelineTrainable) -> list[dict[str, Any]]:
    """Its results to the end."""
    results = [trial.step()]
    while not results[-1].get("done"):
        assert len(results) < 50
        results.append(trial.step())
    return results


def checkpoint(trial: PipelineTrainable, folder: Path) -> str:
    folder.mkdir()
    trial.save_checkpoint(str(folder))
    return str(folder)


def final(store: Store, key: str) -> Artefact:
    found = store.load("stages", key)
    assert found is not None
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def stored(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "runs")).sub("store")


def stored_as(trial: PipelineTrainable, name: str) -> str:
    return trial._inheritance.stored_as(trial._keys[name])


def test_a_step_is_an_epoch_and_the_last_one_has_the_result(
    make: Make, tiny: dict[str, Any], tmp_path: Path
) -> None:
    curve: list[dict[str, Any]] = []
    config = config_of(tiny, storage=tmp_path / "alone")
    expected = run_pipeline(config, report=lambda **metrics: curve.append(metrics))
    results = finish(make())
    assert len(results) == EPOCHS
    shared = ("epoch", "stage", "stage_epoch", "train_loss", "val_loss", "val_accuracy", "reused")
    assert [[r[name] for name in shared] for r in results] == [[r[name] for name in shared] for r in curve]
    assert [r.get("post_epoch") for r in results] == [None] * PRE + [1, 2, 3, 4]
    assert all(r["density"] == 0.2 for r in results)
    assert ["done" in r for r in results] == [False] * (EPOCHS - 1) + [True]
    names = ("status", "val_accuracy", "test_accuracy", "nonzero", "effective_density", "epochs_run")
    assert {name: results[-1][name] for name in names} == {name: expected.metrics()[name] for name in names}
    assert "test_accuracy" not in results[-2]


def test_what_another_trial_has_trained_is_reported_and_not_trained_again(make: Make) -> None:
    first = finish(make())
    second = finish(make({"post_pruning.optimizer.lr": 1e-2}))
    assert [r["reused"] for r in second] == [True] * PRE + [False] * POST
    assert [r["val_loss"] for r in second[:PRE]] == [r["val_loss"] for r in first[:PRE]]
    assert second[-1]["epochs_reused"] == PRE


def test_an_epoch_that_an_interrupted_training_left_is_not_trained_again(
    make: Make, tiny: dict[str, Any], tmp_path: Path
) -> None:
    run = pipeline.run(config_of(tiny), store=stored(tmp_path), checkpoint_interval=0.0)
    for _ in range(2):
        next(run)
    run.close()
    trial = make()
    results = steps(trial, 1)
    again = make()  # its checkpoint is further in the curve than what was reported
    again.load_checkpoint(checkpoint(trial, tmp_path / "checkpoint"))
    results += finish(again)
    assert [r["reused"] for r in results] == [True, True] + [False] * (EPOCHS - 2)
    assert [r["epoch"] for r in results] == list(range(1, EPOCHS + 1))
    assert stored(tmp_path).keys("checkpoints") == []


@pytest.mark.parametrize("at", range(EPOCHS + 1))
def test_a_trial_goes_on_from_any_of_its_checkpoints_as_if_it_had_not_been_interrupted(
    make: Make, tiny: dict[str, Any], tmp_path: Path, at: int
) -> None:
    config = config_of(tiny, storage=tmp_path / "alone")
    expected = run_pipeline(config)
    first = make()
    before = steps(first, at)
    saved = checkpoint(first, tmp_path / "checkpoint")
    # It may go on: what it leaves under its keys later is no later checkpoint's business.
    after = steps(first, 1) if at < EPOCHS else []
    again = make()
    again.load_checkpoint(saved)
    rest = finish(again)
    if at == EPOCHS:
        assert len(rest) == 1
        assert rest[0]["epoch"] == EPOCHS
    else:
        assert [r["epoch"] for r in rest] == list(range(at + 1, EPOCHS + 1))
        assert rest[0]["val_loss"] == after[0]["val_loss"]
    assert before == [] or "done" not in before[-1] or at == EPOCHS
    key = keys_of(config)["post_pruning"]
    assert same(
        final(stored(tmp_path), key).tensors, final(Store(str(tmp_path / "alone/store")), key).tensors
    )
    assert rest[-1]["test_accuracy"] == expected.test_accuracy


def test_a_checkpoint_between_stages_refers_to_them_and_holds_no_tensors(make: Make, tmp_path: Path) -> None:
    trial = make()
    steps(trial, PRE - 1)
    assert len(list(Path(checkpoint(trial, tmp_path / "within")).rglob("*"))) == 4
    steps(trial, 1)
    assert [p.name for p in Path(checkpoint(trial, tmp_path / "between")).rglob("*")] == ["trial.json"]


def trained_under(
    tmp_path: Path, donor: Config, config: Config, stage: str, epoch: int, *, moments: bool = True
) -> dict[str, torch.Tensor]:
    """By the pipeline alone, in a store of its own: `config` from `donor`'s epoch of a stage on."""
    store = Store(str(tmp_path / "private"))
    run = pipeline.run(donor, store=store, checkpoint_interval=0.0)
    for _ in range(epoch):
        next(run)
    run.close()
    found = store.load("checkpoints", keys_of(donor)[stage])
    assert found is not None
    kept = {name: t for name, t in found.tensors.items() if moments or not name.startswith("optimizer0.")}
    for name in ("pre_pruning", "pruning"):
        artefact = store.load("stages", keys_of(donor)[name])
        if artefact is not None:
            store.save("stages", keys_of(config)[name], artefact.tensors, artefact.meta)
    store.save("checkpoints", keys_of(config)[stage], kept, found.meta)
    outcome = pipeline.Outcome(pipeline.run(config, store=store))
    list(outcome)
    return outcome.value.state


ADAMW = {"post_pruning.optimizer.name": "adamw", "post_pruning.optimizer.weight_decay": 0.1}


@pytest.mark.parametrize(
    ("at", "stage", "before", "changes"),
    [
        (2, "pre_pruning", {}, {"pre_pruning.optimizer.lr": 1e-2}),
        (2, "pre_pruning", {}, {"pre_pruning.optimizer.name": "sgd"}),  # the mask's moments are kept
        (5, "post_pruning", {}, {"post_pruning.optimizer.lr": 1e-2}),
        (5, "post_pruning", {}, {"post_pruning.optimizer.lr": 1e-2, "pre_pruning.optimizer.lr": 1e-2}),
        (5, "post_pruning", {}, ADAMW),
        (5, "post_pruning", {"post_pruning.optimizer.name": "sgd"}, {"seed": 1}),
        (5, "post_pruning", {"post_pruning.optimizer.name": "sgd"}, {}),
        (5, "post_pruning", {}, {"data.batch_size": 32}),
    ],
)
def test_another_configuration_goes_on_from_the_checkpoints_weights_and_stores_it_under_keys_of_its_own(
    make: Make,
    tiny: dict[str, Any],
    tmp_path: Path,
    at: int,
    stage: str,
    before: dict[str, Any],
    changes: dict[str, Any],
) -> None:
    donor = make(before)
    steps(donor, at)
    saved = checkpoint(donor, tmp_path / "checkpoint")
    finish(donor)
    trial = make(changes)
    trial.load_checkpoint(saved)
    results = finish(trial)
    assert [r["epoch"] for r in results] == list(range(at + 1, EPOCHS + 1))
    config, donors = replaced(tiny, changes), replaced(tiny, before)
    kinds = {getattr(c, stage).optimizer.name.removesuffix("w") for c in (config, donors)}
    expected = trained_under(tmp_path, donors, config, stage, at, moments=len(kinds) == 1)
    got = final(stored(tmp_path), stored_as(trial, "post_pruning")).tensors
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    # The configuration's own keys of what was changed are free, and what they get is its own result.
    store = stored(tmp_path)
    own = keys_of(config)
    changed = [name for name, key in own.items() if key != keys_of(donors)[name]]
    assert stage in changed
    assert not any(store.has("stages", own[name]) for name in changed)
    finish(make(changes))
    alone = run_pipeline(config.model_copy(update={"storage": str(tmp_path / "alone")}))
    plain = final(store, own["post_pruning"]).tensors
    assert all(torch.equal(plain[name], tensor) for name, tensor in alone.state.items())
    assert not all(torch.equal(plain[name], got[name]) for name in alone.state)


def test_what_is_not_changed_up_to_the_checkpoint_stays_the_configurations_own(
    make: Make, tiny: dict[str, Any], tmp_path: Path
) -> None:
    donor = make()
    steps(donor, 2)
    saved = checkpoint(donor, tmp_path / "checkpoint")
    trial = make({"post_pruning.optimizer.lr": 1e-2})
    trial.load_checkpoint(saved)
    finish(trial)
    config = config_of(tiny, post_pruning__optimizer__lr=1e-2)
    alone = run_pipeline(config.model_copy(update={"storage": str(tmp_path / "alone")}))
    got = final(stored(tmp_path), keys_of(config)["post_pruning"]).tensors
    assert all(torch.equal(got[name], tensor) for name, tensor in alone.state.items())


def test_a_chain_of_exploits_goes_on_and_shares_no_key(make: Make, tmp_path: Path) -> None:
    """First within pre-pruning, then, unchanged, into post-pruning, and there to a third configuration."""
    one = make()
    steps(one, 2)
    two = make({"pre_pruning.optimizer.lr": 1e-2})
    two.load_checkpoint(checkpoint(one, tmp_path / "one"))
    steps(two, 1)
    again = make({"pre_pruning.optimizer.lr": 1e-2})
    again.load_checkpoint(checkpoint(two, tmp_path / "two"))
    assert again._inheritance == two._inheritance
    steps(again, 2)
    three = make({"pre_pruning.optimizer.lr": 1e-2, "post_pruning.optimizer.lr": 1e-2})
    three.load_checkpoint(checkpoint(again, tmp_path / "again"))
    assert three._inheritance.mark not in (None, two._inheritance.mark)
    assert stored_as(three, "pre_pruning") == stored_as(two, "pre_pruning")
    results = finish(three)
    assert [r["epoch"] for r in results] == [6, 7]
    finish(again)
    names = [(trial, stored_as(trial, "post_pruning")) for trial in (one, again, three)]
    assert len({key for _, key in names}) == 3


def test_what_was_taken_over_is_in_the_keys(make: Make, tmp_path: Path) -> None:
    """One configuration goes on from two trials, each at two of its epochs."""
    keys = set()
    for number, changes in enumerate(({}, {"post_pruning.optimizer.weight_decay": 0.1})):
        donor = make(changes)
        for at in (4, 5):
            steps(donor, 4 if at == 4 else 1)
            trial = make({"post_pruning.optimizer.lr": 1e-2})
            trial.load_checkpoint(checkpoint(donor, tmp_path / f"{number} {at}"))
            keys.add(stored_as(trial, "post_pruning"))
    assert len(keys) == 4


def test_what_was_taken_over_is_another_thing_without_its_epoch(make: Make, tmp_path: Path) -> None:
    """Pruned anew and then as before: its post-pruning begins with no epoch, that of the first with two."""
    one = make()
    steps(one, 5)
    two = make({"pre_pruning.optimizer.lr": 1e-2})
    two.load_checkpoint(checkpoint(one, tmp_path / "one"))
    three = make({"pre_pruning.optimizer.lr": 1e-2, "density": 0.1})
    three.load_checkpoint(checkpoint(two, tmp_path / "two"))
    steps(three, 1)
    again = make({"pre_pruning.optimizer.lr": 1e-2})
    again.load_checkpoint(checkpoint(three, tmp_path / "three"))
    finish(again)
    finish(two)
    assert stored_as(again, "pre_pruning") == stored_as(two, "pre_pruning") == one._keys["pre_pruning"]
    assert stored_as(again, "post_pruning") != stored_as(two, "post_pruning")


def test_another_density_prunes_the_pre_pruned_network_anew(
    make: Make, tiny: dict[str, Any], tmp_path: Path
) -> None:
    donor = make()
    steps(donor, 5)
    trial = make({"density": 0.1})
    trial.load_checkpoint(checkpoint(donor, tmp_path / "checkpoint"))
    results = finish(trial)
    assert [r["post_epoch"] for r in results] == [1, 2, 3, 4]
    weights = 64 * 16 + 16 * 16 + 16 * 10
    assert results[-1]["nonzero"] == int(weights * 0.1)
    alone = run_pipeline(config_of(tiny, densities="[0.1]", storage=tmp_path / "alone"))
    assert results[-1]["test_accuracy"] == alone.test_accuracy


ROUNDS = {"pruning.schedule": {"name": "iterative", "rounds": 2, "epochs": 2}, "pruning.rewind": 2}
"""Two epochs to rewind to, three of pre-pruning, two of the first round, four of post-pruning."""


@pytest.mark.parametrize(("at", "stage"), [(1, "pre_pruning to epoch 2"), (6, "pruning round 1")])
def test_the_stages_within_pruning_are_gone_on_from_too(
    make: Make, tiny: dict[str, Any], tmp_path: Path, at: int, stage: str
) -> None:
    first = make(ROUNDS)
    steps(first, at)
    saved = checkpoint(first, tmp_path / "checkpoint")
    assert Store(saved).read_record("trial")["under_way"] == stage  # type: ignore[index]
    again = make(ROUNDS)
    again.load_checkpoint(saved)
    results = finish(again)
    assert [r["epoch"] for r in results] == list(range(at + 1, 12))
    tiny["pruning"] = {"schedule": ROUNDS["pruning.schedule"], "rewind": 2}
    assert results[-1]["test_accuracy"] == alone(tiny, tmp_path, {}).test_accuracy


def test_what_is_rewound_to_is_taken_over_with_the_pre_pruned_network(make: Make, tmp_path: Path) -> None:
    donor = make(ROUNDS)
    steps(donor, 6)
    trial = make({**ROUNDS, "pre_pruning.optimizer.lr": 1e-2, "density": 0.1})
    trial.load_checkpoint(checkpoint(donor, tmp_path / "checkpoint"))
    for name in ("pre_pruning", "pre_pruning to epoch 2"):
        assert trial._keys[name] != donor._keys[name] == stored_as(trial, name)
    assert [r["stage"] for r in finish(trial)] == ["pruning round 1"] * 2 + ["post_pruning"] * POST


@pytest.mark.parametrize("changes", [{"pre_pruning.mask": None}, {"pre_pruning.mask.method": "target"}])
def test_another_mask_or_none_begins_its_stage_again(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    donor = make()
    steps(donor, 2)
    saved = checkpoint(donor, tmp_path / "checkpoint")
    trial = make(changes)
    trial.load_checkpoint(saved)
    assert "the trial begins at its first epoch" in caplog.text
    assert [r["epoch"] for r in finish(trial)] == list(range(1, EPOCHS + 1))
    assert stored_as(trial, "post_pruning") == trial._keys["post_pruning"]


@pytest.mark.parametrize(
    ("changes", "key", "rule"),
    [
        ({"model.hidden": [8, 8]}, r"param_space: model.hidden = \[8, 8\]", r"\[16, 16\]"),
        ({"data.split_seed": 1}, "param_space: data.split_seed = 1", "one with 0"),
    ],
)
def test_another_network_or_other_data_cannot_go_on_from_a_checkpoint(
    make: Make, tmp_path: Path, changes: dict[str, Any], key: str, rule: str
) -> None:
    donor = make()
    steps(donor, 1)
    saved = checkpoint(donor, tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match=f"{key}: a trial cannot go on from a checkpoint of .*{rule}"):
        make(changes).load_checkpoint(saved)


def test_what_was_taken_over_and_is_gone_is_not_computed_under_the_others_key(
    make: Make, tmp_path: Path
) -> None:
    donor = make()
    steps(donor, 5)
    trial = make({"pre_pruning.optimizer.lr": 1e-2})
    trial.load_checkpoint(checkpoint(donor, tmp_path / "checkpoint"))
    stored(tmp_path).delete("stages", donor._keys["pre_pruning"])
    with pytest.raises(WorkError, match=f"{donor._keys['pre_pruning']}.*took it over.*not in the store"):
        trial.step()
    assert not stored(tmp_path).has("stages", donor._keys["pre_pruning"])


def test_a_damaged_checkpoint_is_named(make: Make, tmp_path: Path) -> None:
    trial = make()
    steps(trial, 1)
    saved = Path(checkpoint(trial, tmp_path / "checkpoint"))
    blob = next(p for p in saved.rglob("epoch.*") if p.suffix != ".json")
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(WorkError, match=r"checkpoint: its epoch is missing or damaged"):
        make().load_checkpoint(str(saved))
    (saved / "trial.json").unlink()
    with pytest.raises(WorkError, match=r"is damaged, or no checkpoint of this version"):
        make().load_checkpoint(str(saved))


def test_a_process_runs_one_trial_after_another(make: Make) -> None:
    trial = make()
    steps(trial, 4)
    assert trial.reset_config({"pre_pruning.optimizer.lr": 1e-2})
    reused = finish(trial)
    fresh = finish(make({"pre_pruning.optimizer.lr": 1e-2, "seed": 0}))
    assert len(reused) == EPOCHS
    assert [r["val_loss"] for r in reused] == [r["val_loss"] for r in fresh]
    assert not any(r["reused"] for r in reused)


def test_a_diverged_trial_ends_with_what_a_searcher_can_be_told(make: Make) -> None:
    last = finish(make({"pre_pruning.optimizer": {"name": "sgd", "lr": 1e30}, "pre_pruning.mask": None}))[-1]
    assert (last["status"], last["val_accuracy"], last["val_loss"]) == ("diverged", 0.0, math.inf)
    assert "test_accuracy" not in last


def test_whoever_clears_the_store_finds_what_a_trial_uses(make: Make, tmp_path: Path) -> None:
    donor = make()
    steps(donor, 5)
    trial = make({"pre_pruning.optimizer.lr": 1e-2, "post_pruning.optimizer.lr": 1e-2})
    trial.load_checkpoint(checkpoint(donor, tmp_path / "checkpoint"))
    finish(trial)
    referred = References(Store(str(tmp_path / "runs")), "another").keys()
    assert set(stored(tmp_path).keys("stages")) <= referred


BASE = """
name: base
data: {name: digits, batch_size: 64, limit: 300}
model: {name: mlp, hidden: [16]}
densities: [0.5, 0.1]
pre_pruning:
  epochs: 1
  optimizer: {name: adam, lr: {loguniform: [1e-4, 1e-2]}}
  mask: {choice: [null, {lambda1: 1e-6, lambda2: {loguniform: [1e-5, 1e-3]}}]}
post_pruning: {epochs: 1, optimizer: {name: adam, lr: 1e-3}}
resources: {cpus: 2, gpus: 0.5}
"""


@pytest.fixture
def base(tmp_path: Path) -> type[PipelineTrainable]:
    (tmp_path / "base.yaml").write_text(BASE)
    return PipelineTrainable.on(tmp_path / "base.yaml", storage=tmp_path)


REPLACED = {"density": 0.1, "pre_pruning.optimizer.lr": 1e-3, "pre_pruning.mask": None}


def configured(base: type[PipelineTrainable], parameters: dict[str, Any]) -> Config:
    return from_document(base._document(parameters))


def test_parameters_are_dotted_nested_or_both_over_the_base(base: type[PipelineTrainable]) -> None:
    nested = {"densities": [0.1], "pre_pruning": {"optimizer": {"lr": 1e-3}, "mask": None}}
    mixed = {"density": np.float64(0.1), "pre_pruning": {"optimizer.lr": 1e-3}, "pre_pruning.mask": None}
    assert configured(base, REPLACED) == configured(base, nested) == configured(base, mixed)
    config = configured(base, {**REPLACED, "model.hidden": (8, 8), "post_pruning.epochs": np.int64(3)})
    assert (config.densities, config.pre_pruning.optimizer.lr) == ([0.1], 1e-3)  # type: ignore[union-attr]
    assert (config.model.hidden, config.post_pruning.epochs) == ([8, 8], 3)  # type: ignore[union-attr]
    assert config.post_pruning.optimizer.name == "adam"


def test_parameters_below_a_section_that_is_off_do_not_count(base: type[PipelineTrainable]) -> None:
    below = {**REPLACED, "pre_pruning.mask.lambda2": 1e-4, "pre_pruning.mask.initial": 0.9}
    assert configured(base, below) == configured(base, REPLACED)
    on = configured(base, {**below, "pre_pruning.mask": {}})
    assert on.pre_pruning is not None
    assert on.pre_pruning.mask is not None
    assert (on.pre_pruning.mask.lambda2, on.pre_pruning.mask.initial) == (1e-4, 0.9)


def test_a_parameter_may_be_an_option_of_what_the_base_only_names(base: type[PipelineTrainable]) -> None:
    schedule = "post_pruning.optimizer.schedule"
    config = configured(base, {**REPLACED, schedule: "cosine", f"{schedule}.warmup": 0.1})
    named = configured(base, {**REPLACED, schedule: {"name": "cosine", "warmup": 0.1}})
    assert config == named
    assert config.post_pruning.optimizer.schedule.warmup == 0.1


def test_what_a_trial_asks_for_is_in_its_configuration(base: type[PipelineTrainable]) -> None:
    assert base.default_resource_request(REPLACED).required_resources == {"CPU": 2, "GPU": 0.5}
    fewer = {**REPLACED, "resources.cpus": 1, "resources.gpus": 0}
    assert base.default_resource_request(fewer).required_resources == {"CPU": 1}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"pre_pruning.optimizer.rl": 1e-3}, r"param_space: pre_pruning.optimizer.rl: unknown key.*'lr'"),
        (
            {"post_pruning": {"optimizer": {"lr": -1.0}}},
            r"param_space: post_pruning.optimizer.lr = -1.0: must be",
        ),
        ({"density": 2.0}, r"param_space: densities.0 = 2.0: must be"),
        (
            {"density": 0.1, "densities": [0.1]},
            r"param_space: densities = \[0.1\]: this key is written twice",
        ),
        ({"name.part": 1}, r"base.yaml:2: name = 'base': is not a mapping, so name.part cannot be set"),
        ({"model..hidden": [1]}, r"param_space: 'model..hidden': expected a dotted key"),
    ],
)
def test_a_wrong_parameter_is_said_before_a_trial_starts(
    base: type[PipelineTrainable], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        base.default_resource_request(parameters)


def test_a_distribution_of_the_base_that_no_parameter_replaces_is_named(
    base: type[PipelineTrainable],
) -> None:
    base.default_resource_request({"density": 0.1})  # population based training sets parameters later
    trial = base.__new__(base)
    trial._trial_info = None
    with pytest.raises(ConfigError, match=r"base.yaml:8: pre_pruning.optimizer.lr.*is a distribution"):
        trial._begin({"density": 0.1, "pre_pruning.mask": None})


def test_the_class_itself_has_no_configuration() -> None:
    with pytest.raises(UserError, match=r"PipelineTrainable.on\(configuration\)"):
        PipelineTrainable.default_resource_request({})


def test_relative_paths_are_those_of_the_process_that_binds_the_class(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prunetune.tune.trainable.ray.get_gpu_ids", lambda: [])
    monkeypatch.setenv("PRUNETUNE_STORAGE", "mine")
    bound = PipelineTrainable.on(config_of(tiny))
    monkeypatch.setenv("PRUNETUNE_STORAGE", "the workers'")
    monkeypatch.chdir("/")
    trial = bound.__new__(bound)
    trial._trial_info = None
    trial.setup({})
    assert trial._config.storage == str(tmp_path / "mine")
    assert trial._config.data.root == str(tmp_path / "data")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False)
    yield
    ray.shutdown()


LRS = {
    "pre_pruning.optimizer.lr": tune.loguniform(1e-3, 1e-2),
    "post_pruning.optimizer.lr": tune.loguniform(1e-3, 1e-2),
}


def run_config(tmp_path: Path, **more: Any) -> tune.RunConfig:
    return tune.RunConfig(name="tuned", storage_path=str(tmp_path / "ray"), verbose=0, **more)


def checkpoints(frequency: int, *, at_end: bool = False) -> tune.CheckpointConfig:
    return tune.CheckpointConfig(checkpoint_frequency=frequency, checkpoint_at_end=at_end)


def alone(tiny: dict[str, Any], tmp_path: Path, config: dict[str, Any]) -> pipeline.PipelineResult:
    """What a trial's parameters give in a store that nobody else uses."""
    own = replaced(tiny, config)
    return run_pipeline(own.model_copy(update={"storage": str(tmp_path / "alone")}))


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_optuna_searches_over_it(tiny: dict[str, Any], tmp_path: Path) -> None:
    search = OptunaSearch(seed=0, points_to_evaluate=[dict.fromkeys(LRS, 3e-3)])
    found = tune.Tuner(
        PipelineTrainable.on(tiny, storage=tmp_path / "runs"),
        param_space=LRS,
        tune_config=tune.TuneConfig(
            metric="val_accuracy",
            mode="max",
            num_samples=4,
            max_concurrent_trials=1,
            search_alg=search,
            reuse_actors=True,
        ),
        run_config=run_config(tmp_path),
    ).fit()
    assert not found.errors
    assert [len(r.metrics_dataframe) for r in found] == [EPOCHS] * 4
    assert len({r.metrics["pid"] for r in found}) == 1
    assert len({r.config["post_pruning.optimizer.lr"] for r in found}) == 4
    for result in list(found)[:2]:
        expected = alone(tiny, tmp_path, result.config)
        assert result.metrics["test_accuracy"] == expected.test_accuracy
        assert result.metrics["nonzero"] == expected.nonzero
    told = [trial.value for trial in search._ot_study.trials]
    assert sorted(told) == sorted(r.metrics["val_accuracy"] for r in found)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_successive_halving_stops_its_trials(tiny: dict[str, Any], tmp_path: Path) -> None:
    """One at a time, the good one first: the ones that learn nothing end at the first rung."""
    found = tune.Tuner(
        PipelineTrainable.on(tiny, storage=tmp_path / "runs"),
        param_space={"post_pruning": {"optimizer": {"lr": tune.grid_search([1e-2, 1e-7, 1e-8])}}},
        tune_config=tune.TuneConfig(
            metric="val_accuracy",
            mode="max",
            max_concurrent_trials=1,
            scheduler=ASHAScheduler(time_attr="post_epoch", grace_period=1, max_t=POST, reduction_factor=2),
        ),
        run_config=run_config(tmp_path),
    ).fit()
    assert not found.errors
    good, *bad = found
    assert (good.metrics["post_epoch"], good.metrics["status"]) == (POST, "complete")
    assert [(r.metrics["post_epoch"], "status" in r.metrics) for r in bad] == [(1, False)] * 2
    # The second trial took the first one's pre-pruned network from the store.
    assert list(bad[0].metrics_dataframe["reused"]) == [True] * PRE + [False]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_population_based_training_exploits(tiny: dict[str, Any], tmp_path: Path) -> None:
    """The trial that cannot learn goes on from the other's weights, with a rate of its own."""

    def explore(config: dict[str, Any]) -> dict[str, Any]:
        return {**config, "post_pruning.optimizer.lr": 5e-3}

    tiny["post_pruning"]["epochs"] = 6
    found = tune.Tuner(
        PipelineTrainable.on(tiny, storage=tmp_path / "runs"),
        param_space={"post_pruning.optimizer.lr": tune.grid_search([1e-2, 1e-8])},
        tune_config=tune.TuneConfig(
            metric="val_accuracy",
            mode="max",
            reuse_actors=True,
            scheduler=PopulationBasedTraining(
                time_attr="training_iteration",
                perturbation_interval=PRE + 2,
                quantile_fraction=0.5,
                custom_explore_fn=explore,
                synch=True,
            ),
        ),
        run_config=run_config(tmp_path),
    ).fit()
    assert not found.errors
    good, exploited = found
    assert good.config["post_pruning.optimizer.lr"] == 1e-2
    assert exploited.config["post_pruning.optimizer.lr"] == 5e-3
    frame = exploited.metrics_dataframe
    assert list(frame["epoch"]) == list(range(1, PRE + 6 + 1))
    assert exploited.metrics["val_accuracy"] > frame["val_accuracy"][PRE + 1]
    # The epochs before post-pruning's third were the other's.
    assert exploited.metrics["epochs_reused"] == PRE + 2
    own = config_of(tiny, post_pruning__optimizer__lr=5e-3)
    store = stored(tmp_path)
    assert not store.has("stages", keys_of(own)["post_pruning"])
    for lr in (1e-2, 5e-3):
        given = {"post_pruning.optimizer.lr": lr}
        clean = alone(tiny, tmp_path, given)
        config = config_of(tiny, post_pruning__optimizer__lr=lr, storage=tmp_path / "runs")
        assert same(run_pipeline(config).state, clean.state)
    assert good.metrics["test_accuracy"] == alone(tiny, tmp_path, good.config).test_accuracy


class Interrupts(tune.Callback):
    """Ends the driver's loop at a result, as an error in it does; once."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        if result["epoch"] == 6 and not self.flag.exists():
            self.flag.touch()
            raise RuntimeError("the driver dies")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_tuner_is_restored(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0")
    bound = PipelineTrainable.on(tiny, storage=tmp_path / "runs")
    tuner = tune.Tuner(
        bound,
        param_space={"post_pruning.optimizer.lr": tune.grid_search([1e-3, 1e-2])},
        tune_config=tune.TuneConfig(metric="val_accuracy", mode="max", max_concurrent_trials=1),
        run_config=run_config(
            tmp_path, checkpoint_config=checkpoints(1), callbacks=[Interrupts(tmp_path / "died")]
        ),
    )
    with pytest.raises(Exception, match="the driver dies"):
        tuner.fit()
    restored = tune.Tuner.restore(
        str(tmp_path / "ray" / "tuned"),
        trainable=PipelineTrainable.on(tiny, storage=tmp_path / "runs"),
    )
    found = restored.fit()
    assert not found.errors
    assert len(found) == 2
    for result in found:
        assert result.metrics["training_iteration"] == EPOCHS
        assert result.metrics["test_accuracy"] == alone(tiny, tmp_path, result.config).test_accuracy
    # The first went on from a checkpoint late in its post-pruning.
    assert found[0].metrics["iterations_since_restore"] <= 2


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_wrong_key_of_the_space_ends_fit_at_once(tiny: dict[str, Any], tmp_path: Path) -> None:
    tuner = tune.Tuner(
        PipelineTrainable.on(tiny, storage=tmp_path / "runs"),
        param_space={"post_pruning.optimizer.rate": tune.loguniform(1e-3, 1e-2)},
        run_config=run_config(tmp_path),
    )
    with pytest.raises(Exception, match=r"param_space: post_pruning.optimizer.rate: unknown key"):
        tuner.fit()
    assert not (tmp_path / "runs").exists()
