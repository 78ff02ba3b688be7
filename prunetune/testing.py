"""Contract tests for your own components: they check the promises that every component of a kind must keep.

Each function takes a name or an import path `package.module:object`, and options as in a sweep's file. It
raises AssertionError with a sentence that says which promise is broken. The tests need no data files and no
Ray, and take seconds. In a test suite:

    from prunetune import testing

    def test_my_criterion() -> None:
        testing.check_criterion("my_package.criteria:weighted", power=2.0)
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from prunetune import data as datasets
from prunetune import pipeline, tasks, vectorized
from prunetune.config.canonical import kept
from prunetune.config.document import Document
from prunetune.config.reading import from_document
from prunetune.config.schema import (
    Config,
    CriterionConfig,
    DataConfig,
    EarlyStoppingConfig,
    InitializerConfig,
    SamplerConfig,
    TaskConfig,
)
from prunetune.engine.epoch import Epoch
from prunetune.engine.loop import EpochWork
from prunetune.pipeline import PipelineResult
from prunetune.sparsity.criteria import Scene
from prunetune.sparsity.masks import prunable
from prunetune.stages.stage import Step
from prunetune.store import Store

if TYPE_CHECKING:
    from prunetune.records.trial import TrialRecord

Tree = dict[str, Any]

_BASE: Tree = {
    "name": "contract",
    "seed": 3,
    "data": {"name": "digits", "limit": 120, "batch_size": 16, "validation_fraction": 0.25},
    "model": {"name": "mlp", "hidden": [12, 8]},
    "densities": [0.3],
    "pre_pruning": {"epochs": 2, "optimizer": {"name": "adam", "lr": 0.01}, "initializer": "kaiming"},
    "post_pruning": {"epochs": 2, "optimizer": {"name": "adam", "lr": 0.01}},
}


def check_criterion(name: str, **options: Any) -> None:
    """Check that a criterion gives every prunable weight a finite score and does not change the network.

    The same generator must give the same scores, also for a network in which some weights are pruned.
    """
    config = CriterionConfig.model_validate({"name": name, **options})
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )
    inputs, targets = torch.randn(10, 1, 4, 4), torch.arange(10) % 5

    def scores() -> dict[str, Tensor]:
        scene = Scene(model, inputs, targets, torch.Generator().manual_seed(1))
        found: dict[str, Tensor] = config.component(scene, **config.options)
        return {key: score.detach().clone() for key, score in found.items()}

    for is_pruned in (False, True):
        if is_pruned:
            with torch.no_grad():
                for weight in prunable(model).values():
                    weight[0].zero_()
        before = copy.deepcopy(model.state_dict())
        first, second = scores(), scores()
        weights = prunable(model)
        _require(
            set(first) == set(weights),
            f"it scores {sorted(first)}; the prunable weights are {sorted(weights)}",
        )
        for key, score in first.items():
            _require(
                score.shape == weights[key].shape,
                f"the scores of {key} have shape {tuple(score.shape)}, it has {tuple(weights[key].shape)}",
            )
            _require(bool(torch.isfinite(score).all()), f"the scores of {key} are not all finite")
            _require(torch.equal(score, second[key]), f"the scores of {key} are other ones at a second look")
        changed = [key for key in weights if not torch.equal(model.state_dict()[key], before[key])]
        _require(not changed, f"it has changed {', '.join(changed)}")
    _check_pipeline({**_BASE, "pruning": {"criterion": {"name": name, **options}}})


def check_initializer(name: str, **options: Any) -> None:
    """Check that an initializer returns finite float32 weights of a given shape, drawn from the generator."""
    config = InitializerConfig.model_validate({"name": name, **options})
    for shape in (torch.Size((6, 4)), torch.Size((4, 6)), torch.Size((5, 3, 3, 3))):

        def draw(seed: int, shape: torch.Size = shape) -> Tensor:
            torch.manual_seed(torch.seed() % 2**31)  # the global generator must not matter
            generator = torch.Generator().manual_seed(seed)
            weight: Tensor = config.component(shape, generator=generator, **config.options)
            return weight

        weight = draw(0)
        _require(weight.shape == shape, f"asked for {tuple(shape)}, it gives {tuple(weight.shape)}")
        _require(weight.dtype == torch.float32, f"it gives {weight.dtype}; float32 is needed")
        _require(bool(torch.isfinite(weight).all()), "its weights are not all finite")
        _require(torch.equal(weight, draw(0)), "from the same generator it gives another weight")
    _check_pipeline(_changed("pre_pruning", initializer={"name": name, **options}))


def check_mask(name: str, **options: Any) -> None:
    """Check that a mask method trains in pre-pruning, also batched if it has a batched form.

    Like every run, it must give the same bits when it is repeated, or interrupted and resumed.
    """
    tree = _changed("pre_pruning", mask={"method": name, **options})
    _check_pipeline(tree)
    _check_batched(tree)


def check_dynamic(name: str, **options: Any) -> None:
    """Check that a dynamic method keeps the number of weights constant and pruned weights at zero.

    Like every run, it must give the same bits when it is repeated, or interrupted and resumed.
    """
    tree = _changed("post_pruning", dynamic={"name": name, **options})
    _check_pipeline({**tree, "pre_pruning": None, "pruning": {"criterion": "random"}})


def check_optimizer(name: str, **options: Any) -> None:
    """Check that an optimizer trains both stages, and that its `state_dict` holds its whole state.

    Like every run, it must give the same bits when it is repeated, or interrupted and resumed.
    """
    tree = copy.deepcopy(_BASE)
    for stage in ("pre_pruning", "post_pruning"):
        tree[stage]["optimizer"] = {"name": name, **options}
    tree["pre_pruning"]["mask"] = {"initial": 0.9}
    _check_pipeline(tree)
    _check_batched(tree)


def check_model(name: str, *, data: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Check that a network is drawn from the seed alone, and is trained, stored and resumed bit for bit.

    `data` is the section `data` of a configuration that fits the network; by default scikit-learn's digits,
    1×8×8.
    """
    tree = copy.deepcopy(_BASE)
    _check_pipeline({**tree, "model": {"name": name, **options}, **({"data": dict(data)} if data else {})})


def check_data_source(name: str, *, root: str = "data", task: str = "classification", **options: Any) -> None:
    """Check that a data source returns the same examples each time, at least two, of the types of `Split`."""
    section = {"name": name, "root": root, "batch_size": 16, **options}
    data = DataConfig.model_validate(section)
    first = data.component(data.root, **data.options)
    second = data.component(data.root, **data.options)
    for part in ("train", "test"):
        split, again = getattr(first, part), getattr(second, part)
        _require(len(split) >= 2, f"{part}: {len(split)} examples; two are needed")
        _require(
            len(split.inputs) == len(split.targets),
            f"{part}: {len(split.inputs)} inputs and {len(split.targets)} targets",
        )
        types = (torch.uint8, torch.float32, torch.int64)
        _require(
            split.inputs.dtype in types,
            f"{part}: inputs are {split.inputs.dtype}; uint8 (images), float32 or int64 is needed",
        )
        _require(
            split.targets.dtype == (torch.float32 if first.classes is None else torch.int64),
            f"{part}: targets are {split.targets.dtype}; int64 is needed for classes, float32 for numbers",
        )
        _require(
            torch.equal(split.inputs, again.inputs) and torch.equal(split.targets, again.targets),
            f"{part}: the examples are others when it is read a second time",
        )
    if first.classes is not None:
        high = max(int(first.train.targets.max()), int(first.test.targets.max()))
        _require(high < first.classes, f"a target is {high}, but classes = {first.classes}")
    _check_pipeline({**_BASE, "data": section, "task": task})


def check_task(name: str, *, data: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Check a task: its loss can be differentiated, its sums add up over parts, its chance is a number.

    `data` is the section `data` of a configuration that fits the task; by default scikit-learn's digits.
    """
    config = TaskConfig.model_validate({"name": name, **options})
    section = dict(data) if data else dict(_BASE["data"])
    loaded = datasets.load(DataConfig.model_validate(section))
    task = tasks.make(config, loaded.form)
    _, targets = task.batch(loaded.validation.inputs, loaded.validation.targets)
    torch.manual_seed(0)
    outputs = torch.randn(len(targets), *task.output_shape, requires_grad=True)
    loss = task.loss(outputs, targets)
    _require(loss.shape == (), f"the loss has shape {tuple(loss.shape)}; one number is needed")
    (gradient,) = torch.autograd.grad(loss, outputs)
    _require(bool(torch.isfinite(gradient).all()), "the gradient of the loss is not finite")
    given = outputs.detach()
    half = len(targets) // 2
    whole = task.sums(given, targets)
    parts = task.sums(given[:half], targets[:half]) + task.sums(given[half:], targets[half:])
    _require(whole.dtype == torch.float64, f"the sums are {whole.dtype}; float64 is needed")
    _require(bool(torch.allclose(whole, parts)), "the sums over two halves are not the sums over the whole")
    score, chance = task.score(whole), task.chance(loaded.validation.targets)
    _require(isinstance(score, float) and isinstance(chance, float), "score and chance are not plain floats")
    stacked = vmap(task.sums)(torch.stack([given, given]), torch.stack([targets, targets]))
    _require(bool(torch.allclose(stacked[0], whole)), "under torch.func.vmap the sums are others")
    _require(task.probe(2).shape[0] == 2, "probe(2) gives not two inputs")
    _check_pipeline({**_BASE, "data": section, "task": {"name": name, **options}})


def check_sampler(name: str, **options: Any) -> None:
    """Check that a sampler proposes values within their distributions.

    The same seed and the same past results must give the same values.
    """
    import optuna

    config = SamplerConfig.model_validate({"name": name, **options})

    def proposed(seed: int) -> list[dict[str, Any]]:
        values: list[dict[str, Any]] = []
        study = optuna.create_study(direction="maximize")
        for number in range(12):
            # Make a new sampler for every trial, as a sweep does.
            study.sampler = config.component(seed=seed + number, **config.options)
            trial = study.ask()
            lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
            kind = trial.suggest_categorical("kind", ["a", "b"])
            width = trial.suggest_int("width", 2, 5)
            _require(1e-4 <= lr <= 1e-1 and 2 <= width <= 5, f"{trial.params}: outside its distribution")
            study.tell(trial, lr * width)
            values.append({"lr": lr, "kind": kind, "width": width})
        return values

    first = proposed(7)
    _require(first == proposed(7), "from the same seed and past it proposes other values")
    _require(
        len({tuple(values.items()) for values in first}) > 1, "it proposes the same point again and again"
    )


def check_early_stopping(name: str, **options: Any) -> None:
    """Check that a stopping rule returns bools, depends only on the scores it was told, and stops not all.

    Told the same scores twice, it must decide the same, and at least one trial must train to its end.
    """
    config = EarlyStoppingConfig.model_validate({"name": name, **options})

    def decisions() -> list[bool]:
        generator = torch.Generator().manual_seed(0)
        rule = config.component(longest=9, **config.options)
        found: list[bool] = []
        for trial in range(20):
            scores: list[float] = []
            for epoch in range(1, 10):
                scores.append(float(torch.rand((), generator=generator)) + trial % 3)
                stops = rule.stops(str(trial), epoch, scores[-1], 9)
                _require(isinstance(stops, bool), f"stops gives {type(stops).__name__}; a bool is needed")
                found.append(stops)
                if stops:
                    break
            else:
                rule.completed(scores, 9)
        return found

    first = decisions()
    _require(first == decisions(), "told the same, it decides otherwise the second time")
    _require(len(first) > 9, "it stops every trial at once")


def check_tracker(make: Callable[[], Any], records: Sequence[TrialRecord]) -> None:
    """Check that a tracker accepts all calls of two runs of a sweep, and changes no record.

    `make` makes the tracker of a run; `records` are trials that have ended, best with various statuses.
    """
    before = [record.plain() for record in records]
    for run in range(2):
        tracker = make()
        tracker.begin({"name": "contract", "densities": [0.1]}, list(records) if run else [])
        for record in records:
            tracker.started(record)
            for epoch in record.curve:
                tracker.epochs(record, [epoch])
            tracker.ended(record)
        tracker.finish(
            ("interrupted", "finished")[run], {"best": 0.5}, {"best/density-0.1.yaml": "name: x\n"}
        )
        unwritten = tracker.close()
        _require(isinstance(unwritten, int), f"close gives {type(unwritten).__name__}; a number is needed")
        _require(unwritten == 0, f"{unwritten} entries could not be written")
    _require([record.plain() for record in records] == before, "it has changed a record")


def _check_pipeline(tree: Tree) -> None:
    """Check the promises that every run must keep, whatever its components.

    The same configuration gives the same bits, also if it is interrupted after any epoch and run again,
    because the store holds everything that is needed to resume. Exactly floor(d·n) weights are kept, and the
    others are exactly zero.
    """
    config = from_document(Document("contract", tree))
    with tempfile.TemporaryDirectory() as folder:
        whole = _run(config, Path(folder, "whole"))
        _require(whole.status != "diverged", "training diverges; try another learning rate")
        again = _run(config, Path(folder, "again"))
        _require(_same(whole, again), "the same configuration gives other weights the second time")
        for stop in range(1, whole.epochs_run):
            _interrupt(config, Path(folder, f"stopped-{stop}"), stop)
            resumed = _run(config, Path(folder, f"stopped-{stop}"))
            _require(
                _same(whole, resumed),
                f"interrupted after epoch {stop} and run again it gives other weights: something that "
                "changes is not among the tensors, or the optimizers' state, of a checkpoint",
            )
    if whole.masks:
        total = sum(mask.numel() for mask in whole.masks.values())
        count = sum(int(mask.sum()) for mask in whole.masks.values())
        wanted = kept(config.density, total)
        _require(
            count == wanted,
            f"{count} of {total} weights are kept; density {config.density:g} are {wanted}",
        )
        for key, mask in whole.masks.items():
            _require(not bool(whole.state[key][~mask].any()), f"pruned weights of {key} are not zero")


def _check_batched(tree: Tree) -> None:
    """Check that trials in a batched program give what each gives alone, except for the order of sums."""
    configs = [from_document(Document("contract", {**tree, "seed": seed})) for seed in (0, 1)]
    with tempfile.TemporaryDirectory() as folder:
        alone = [_run(config, Path(folder, f"alone-{i}")) for i, config in enumerate(configs)]
        together = _together(configs, Path(folder))
    for one, other in zip(alone, together, strict=True):
        for key, tensor in one.state.items():
            _require(
                bool(torch.allclose(tensor, other.state[key], rtol=1e-2, atol=1e-3)),
                f"batched with another trial, {key} ends with other values than alone",
            )


def side_by_side(
    trials: Sequence[Generator[Step, None, PipelineResult]],
) -> list[tuple[list[Epoch], PipelineResult]]:
    """Run pipelines (`pipeline.steps`) so that their epochs are computed together, as on a worker.

    Whenever each of them wants an epoch, these epochs run as one batched program. Returns (the epochs that it
    reported, its result) of each.
    """
    reports: list[list[Epoch]] = [[] for _ in trials]
    results: dict[int, PipelineResult] = {}
    while len(results) < len(trials):
        wanted: list[EpochWork] = []
        for i, trial in enumerate(trials):
            while i not in results:
                try:
                    step = next(trial)
                except StopIteration as end:
                    results[i] = end.value
                    break
                if isinstance(step, EpochWork):
                    wanted.append(step)
                    break
                reports[i].append(step)
        vectorized.run_together(wanted)
    return [(reports[i], results[i]) for i in range(len(trials))]


def _together(configs: Sequence[Config], folder: Path) -> list[PipelineResult]:
    stores = [Store(str(folder / f"together-{i}")) for i in range(len(configs))]
    found = side_by_side(
        [pipeline.steps(config, store=store) for config, store in zip(configs, stores, strict=True)]
    )
    return [result for _, result in found]


def _run(config: Config, folder: Path) -> PipelineResult:
    running: pipeline.Outcome[Epoch, PipelineResult] = pipeline.Outcome(_epochs(config, folder))
    for _ in running:
        pass
    return running.value


def _interrupt(config: Config, folder: Path, stop: int) -> None:
    steps = _epochs(config, folder)
    for _ in range(stop):
        next(steps)
    steps.close()


def _epochs(config: Config, folder: Path) -> Generator[Epoch, None, PipelineResult]:
    return pipeline.run(config, store=Store(str(folder)), checkpoint_interval=0.0)


def _same(one: PipelineResult, other: PipelineResult) -> bool:
    return one.state.keys() == other.state.keys() and all(
        torch.equal(tensor, other.state[key]) for key, tensor in one.state.items()
    )


def _changed(section: str, **values: Any) -> Tree:
    tree = copy.deepcopy(_BASE)
    tree[section].update(values)
    return tree


def _require(holds: bool, otherwise: str) -> None:
    """Raise AssertionError unless `holds`; `python -O` would leave out an assert statement."""
    if not holds:
        raise AssertionError(otherwise)
