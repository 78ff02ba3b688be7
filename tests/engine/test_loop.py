"""The loop against a plain PyTorch loop: steps, learning rates, smoothing, divergence, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetune.config.schema import AugmentationConfig, OptimizerConfig, PrePruningConfig, ScheduleConfig
from prunetune.data import Dataset, Split, batches
from prunetune.data.dataset import split_off_validation
from prunetune.engine import loop as training
from prunetune.engine.checkpoint import EpochCheckpoint
from prunetune.engine.constraint import DivergedError, Metrics
from prunetune.engine.loop import Learner, Smoothing, evaluate, train_epoch
from prunetune.engine.optimizers import make_optimizer, make_schedule
from prunetune.engine.seeds import seed_of
from prunetune.stages.pre_pruning import make_learner
from prunetune.stages.state import state_of
from prunetune.store import Store


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy_data(n: int = 44) -> Dataset:
    """n − 4 training images of 2×2 with 3 classes; 4 to validate on."""
    images = torch.randint(0, 256, (n, 1, 2, 2), generator=generator(), dtype=torch.uint8)
    split = Split(images, torch.randint(0, 3, (n,), generator=generator(1)))
    return split_off_validation(split, split, 3, fraction=4 / n, seed=0)


def toy_model(seed: int = 0, *, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Dropout(dropout), nn.Linear(6, 3))


def optimizer_config(**keys: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"name": "sgd", "lr": 0.1, **keys})


def epochs(*arguments: Any, **keywords: Any) -> Iterator[Metrics]:
    """Each epoch's metrics, run alone."""
    for work in training.epochs(*arguments, **keywords):
        yield work.result()


def learner_for(model: nn.Module, config: OptimizerConfig, **keys: Any) -> Learner:
    return Learner(
        model,
        [make_optimizer(config, list(model.parameters()))],
        state_of(model),
        make_schedule(config.schedule),
        **keys,
    )


def one_epoch(learner: Learner, data: Dataset, epoch: int = 0, **keys: Any) -> float:
    return train_epoch(
        learner, data, epoch, **{"total": 4, "batch_size": 8, "augmentation": None, "seed": 5, **keys}
    )


def epoch_batches(
    data: Dataset, epoch: int, batch_size: int = 8, seed: int = 5
) -> list[tuple[Tensor, Tensor]]:
    order, drawn = generator(seed_of(seed, "order", epoch)), generator(seed_of(seed, "drawn", epoch))
    return list(batches(data, batch_size, None, order=order, drawn=drawn))


REFERENCES = {
    "sgd": (
        {"name": "sgd", "momentum": 0.8, "weight_decay": 0.01},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
    ),
    "plain momentum": (
        {"name": "sgd", "momentum": 0.8, "nesterov": False},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8),
    ),
    "no momentum": ({"name": "sgd", "momentum": 0}, lambda p: torch.optim.SGD(p, lr=0.1)),
    "adam": (
        {"name": "adam", "weight_decay": 0.01},
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01),
    ),
    "adamw": (
        {"name": "adamw", "weight_decay": 0.01},
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01),
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_epochs_are_those_of_a_plain_loop_with_a_cosine_schedule(name: str) -> None:
    keys, reference = REFERENCES[name]
    data, model, other = toy_data(), toy_model(), toy_model()
    learner = learner_for(model, optimizer_config(schedule="cosine", **keys))
    losses = [one_epoch(learner, data, epoch) for epoch in range(2)]

    optimizer = reference(other.parameters())
    expected = []
    for epoch in range(2):
        total = 0.0
        steps = epoch_batches(data, epoch)
        for index, (x, y) in enumerate(steps):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * (epoch + index / len(steps)) / 4))
            optimizer.zero_grad()
            loss = F.cross_entropy(other(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
        expected.append(total / len(steps))
    assert losses == pytest.approx(expected, rel=1e-5)
    for found, right in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, right)
    fresh = toy_model()
    assert not torch.equal(model[1].weight, fresh[1].weight)


def test_a_nesterov_step_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = make_optimizer(optimizer_config(momentum=0.5, lr=0.1), [weight])
    for grad in (2.0, 4.0):
        weight.grad = torch.tensor([grad])
        optimizer.step()
    # v = 2, step g + ½v = 3, w = 1 − 0.3; then v = ½·2 + 4 = 5, step 4 + 2.5 = 6.5, w = 0.7 − 0.65
    assert weight.item() == pytest.approx(0.05)


def rates(learner: Learner) -> list[list[float]]:
    """Will hold each optimizer's learning rates as they are when it steps."""
    seen: list[list[float]] = [[] for _ in learner.optimizers]
    for optimizer, found in zip(learner.optimizers, seen, strict=True):
        optimizer.register_step_pre_hook(
            lambda o, args, kwargs, found=found: found.append(o.param_groups[0]["lr"])
        )
    return seen


def test_the_factor_of_the_schedule_is_applied_at_every_step() -> None:
    schedule = {"name": "step", "milestones": [0.25, 0.5], "factor": 0.1, "warmup": 0.0}
    learner = learner_for(toy_model(), optimizer_config(schedule=schedule))
    (found,) = rates(learner)
    for epoch in range(4):
        one_epoch(learner, toy_data(), epoch)
    assert found == pytest.approx([0.1] * 5 + [0.01] * 5 + [0.001] * 10)


def test_the_factor_applies_to_the_mask_too_and_from_its_own_rate() -> None:
    config = PrePruningConfig.model_validate(
        {
            "epochs": 2,
            "optimizer": {"name": "sgd", "lr": 0.4, "schedule": {"name": "constant", "warmup": 0.5}},
            "mask": {"lambda1": 0, "lambda2": 0, "lr": 0.2},
        }
    )
    learner = make_learner(config, toy_model())
    weights, masks = rates(learner)
    one_epoch(learner, toy_data(), 0, total=2)
    assert weights == pytest.approx([0.0, 0.08, 0.16, 0.24, 0.32])
    assert masks == pytest.approx([0.0, 0.04, 0.08, 0.12, 0.16])


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ({"name": "constant"}, [1, 1, 1]),
        ({"name": "cosine"}, [1, 0.5, 0]),
        ({"name": "step", "milestones": [0.5], "factor": 0.2}, [1, 0.2, 0.2]),
        ({"name": "cosine", "warmup": 0.5}, [0, 1, 0]),
    ],
)
def test_each_named_schedule(schedule: dict[str, Any], factors: list[float]) -> None:
    factor = make_schedule(ScheduleConfig.model_validate(schedule))
    assert [factor(t) for t in (0.0, 0.5, 1.0)] == pytest.approx(factors)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_weight_decay_acts_on_weights_and_never_on_masks(name: str) -> None:
    config = PrePruningConfig.model_validate(
        {
            "epochs": 1,
            "optimizer": {"name": name, "lr": 0.01, "weight_decay": 5.0},
            "mask": {"lambda1": 0, "lambda2": 0, "initial": 0.75},
        }
    )
    model = toy_model()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    learner = make_learner(config, model)
    mask = learner.tensors["prunetune:mask"]
    # With θ = 0 the mask's gradient g⊙θ is zero in the first step, so only a decay could move it.
    one_epoch(learner, toy_data(), batch_size=40)
    assert torch.equal(mask, torch.full_like(mask, 0.75))
    decays = [[group["weight_decay"] for group in o.param_groups] for o in learner.optimizers]
    assert decays == [[5.0], [0.0]]


def test_the_optimizer_of_the_weights_has_theta_and_all_that_is_dense() -> None:
    config = PrePruningConfig.model_validate(
        {"epochs": 1, "optimizer": {"name": "sgd", "lr": 0.1}, "mask": {"lambda1": 0, "lambda2": 0}}
    )
    model = toy_model()
    learner = make_learner(config, model)
    weights, masks = learner.optimizers
    assert [p.shape for p in weights.param_groups[0]["params"]] == [(42,), (6,), (3,)]
    assert [p.shape for p in masks.param_groups[0]["params"]] == [(42,)]
    bias = model[4].bias.detach().clone()
    one_epoch(learner, toy_data())
    assert not torch.equal(model[4].bias, bias)


def test_lambda2_rises_over_its_share_of_the_stage() -> None:
    config = PrePruningConfig.model_validate(
        {
            "epochs": 2,
            "optimizer": {"name": "sgd", "lr": 1e-30},
            "mask": {"lambda1": 0, "lambda2": 4.0, "lambda2_warmup": 0.5, "initial": 1.0},
        }
    )
    model = toy_model()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)  # no gradient from the loss: λ2 alone
    learner = make_learner(config, model)
    seen: list[float] = []
    learner.optimizers[1].register_step_pre_hook(
        lambda o, args, kwargs: seen.append(float(o.param_groups[0]["params"][0].grad[0]))
    )
    for epoch in range(2):
        one_epoch(learner, toy_data(), epoch, total=2)
    assert seen == pytest.approx([0, 0.8, 1.6, 2.4, 3.2] + [4.0] * 5, abs=1e-6)


def test_label_smoothing_is_the_cross_entropy_with_softened_labels() -> None:
    data, model, alpha, classes = toy_data(), toy_model(), 0.3, 3
    learner = learner_for(model, optimizer_config(), smoothing=lambda epoch: Smoothing(alpha))
    ((x, y),) = epoch_batches(data, 0, batch_size=40)
    softened = (1 - alpha) * F.one_hot(y, classes) + alpha / classes
    expected = -(softened * F.log_softmax(model(x), 1)).sum(1).mean().item()
    plain = F.cross_entropy(model(x), y).item()
    assert one_epoch(learner, data, batch_size=40) == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(plain, rel=1e-3)


def test_validation_is_without_label_smoothing_and_at_the_time_after_the_epoch() -> None:
    asked: list[int] = []

    def smoothing(epoch: int) -> Smoothing:
        asked.append(epoch)
        return Smoothing(0.9, beta=1.0 if epoch < 2 else None)

    data, model = toy_data(), toy_model()
    learner = learner_for(model, optimizer_config(), smoothing=smoothing)
    found = list(epochs(learner, data, total=2, batch_size=8, augmentation=None, seed=5))
    assert asked == [0, 1, 1, 2]
    with torch.no_grad():
        logits = model.eval()(data.normalize(data.validation.inputs))
    assert found[-1]["val_loss"] == pytest.approx(F.cross_entropy(logits, data.validation.targets).item())
    assert found[-1]["val_accuracy"] == float((logits.argmax(1) == data.validation.targets).float().mean())


@pytest.mark.parametrize(("batch_size", "steps"), [(8, 5), (9, 4), (39, 1), (40, 1), (41, 1), (1000, 1)])
def test_the_last_smaller_batch_is_left_out_unless_it_is_the_only_one(batch_size: int, steps: int) -> None:
    learner = learner_for(toy_model(), optimizer_config())
    seen: list[int] = []
    learner.model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    one_epoch(learner, toy_data(), batch_size=batch_size)
    assert seen == [min(batch_size, 40)] * steps


def test_the_loss_of_an_epoch_is_the_mean_over_its_steps() -> None:
    data, model = toy_data(), toy_model()
    learner = learner_for(model, optimizer_config(lr=1e-30))
    expected = [F.cross_entropy(model(x), y).item() for x, y in epoch_batches(data, 0)]
    assert one_epoch(learner, data) == pytest.approx(sum(expected) / 5)


def test_evaluation_is_exact_in_evaluation_mode_and_restores_the_mode() -> None:
    data, model = toy_data(2500), toy_model(dropout=0.5)  # more than one batch of evaluation
    model.train()
    accuracy, loss = evaluate(model, data, data.train)
    assert model.training
    with torch.no_grad():
        logits = model.eval()(data.normalize(data.train.inputs))
    assert accuracy == pytest.approx(float((logits.argmax(1) == data.train.targets).double().mean()))
    assert loss == pytest.approx(float(F.cross_entropy(logits, data.train.targets)), rel=1e-5)
    assert evaluate(model, data, data.train)[0] == accuracy
    assert not model.training


@pytest.mark.parametrize("first", [0, 1, 2])
def test_an_epochs_randomness_follows_from_the_seed_and_its_number_alone(first: int) -> None:
    def trained(start: int, disturb: int) -> list[Tensor]:
        model = toy_model(dropout=0.5)
        learner = learner_for(model, optimizer_config(momentum=0))
        torch.manual_seed(disturb)
        run = epochs(
            learner,
            toy_data(),
            total=3,
            batch_size=8,
            augmentation=AugmentationConfig(crop_padding=1),
            seed=5,
            first=start,
        )
        for _ in run:
            torch.rand(disturb)
        return [p.detach().clone() for p in model.parameters()]

    one, other = trained(first, 1), trained(first, 2)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    different = trained(first + 1 if first < 2 else 0, 1)
    assert not all(torch.equal(a, b) for a, b in zip(one, different, strict=True))


def test_training_leaves_the_callers_random_state_alone() -> None:
    learner = learner_for(toy_model(dropout=0.5), optimizer_config())
    before = torch.random.get_rng_state()
    list(epochs(learner, toy_data(), total=2, batch_size=8, augmentation=None, seed=5))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_seeds_are_the_same_on_every_machine_and_differ_by_every_part() -> None:
    assert seed_of(0, "order", 3) == 2723741169552378311
    seeds = {seed_of(s, name, e) for s in (0, 1) for name in ("order", "drawn") for e in range(5)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_loss_that_is_not_finite_is_a_divergence() -> None:
    learner = learner_for(toy_model(), optimizer_config(lr=1e30, momentum=0))
    run = epochs(learner, toy_data(), total=5, batch_size=8, augmentation=None, seed=5)
    with pytest.raises(DivergedError):
        list(run)


def test_an_infinite_loss_is_a_divergence_even_if_validation_does_not_see_it() -> None:
    model, data = toy_model(), toy_data()
    with torch.no_grad():
        model[4].bias.copy_(torch.tensor([3e38, -3e38, 0.0]))  # sure of class 0
    data = replace(
        data,
        train=Split(data.train.inputs, torch.ones_like(data.train.targets)),
        validation=Split(data.validation.inputs, torch.zeros_like(data.validation.targets)),
    )
    assert evaluate(model, data, data.validation) == (1.0, 0.0)
    learner = learner_for(model, optimizer_config(lr=1e-30))
    with pytest.raises(DivergedError):
        next(epochs(learner, data, total=2, batch_size=8, augmentation=None, seed=5))


def test_weights_that_are_not_finite_after_the_last_step_are_a_divergence() -> None:
    model = toy_model()
    learner = learner_for(model, optimizer_config(lr=1e-30))

    def poison(o: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            model[4].bias.fill_(math.nan)

    learner.optimizers[0].register_step_post_hook(poison)
    run = epochs(learner, toy_data(), total=5, batch_size=40, augmentation=None, seed=5)
    with pytest.raises(DivergedError):  # one step an epoch: its loss was still finite
        next(run)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("mask", [None, {"lambda1": 1e-3, "lambda2": 1e-3, "initial": 0.7}])
def test_a_checkpoint_holds_all_that_the_next_epoch_depends_on(
    tmp_path: Path, name: str, mask: dict[str, float] | None
) -> None:
    config = PrePruningConfig.model_validate(
        {"epochs": 2, "optimizer": {"name": name, "lr": 0.05, "schedule": "cosine"}, "mask": mask}
    )
    data = toy_data()
    straight = make_learner(config, toy_model())
    one_epoch(straight, data, 0, total=2)
    checkpoint = EpochCheckpoint(Store(str(tmp_path)), "k", interval=0)
    assert checkpoint.save(straight, [{"val_loss": 0.5}])
    one_epoch(straight, data, 1, total=2)

    resumed = make_learner(config, toy_model(seed=1))
    assert checkpoint.load(resumed) == ([{"val_loss": 0.5}], [])
    one_epoch(resumed, data, 1, total=2)
    assert set(resumed.tensors) == set(straight.tensors)
    for key, tensor in straight.tensors.items():
        assert torch.equal(resumed.tensors[key], tensor), key


def test_a_checkpoint_is_written_only_when_it_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("prunetune.engine.checkpoint.time.monotonic", lambda: now[0])
    store = Store(str(tmp_path))
    checkpoint = EpochCheckpoint(store, "k", interval=10)
    learner = learner_for(toy_model(), optimizer_config())

    def after(seconds: float) -> bool:
        now[0] += seconds
        return checkpoint.save(learner, [])

    assert [after(0.5) for _ in range(19)] == [False] * 19
    assert not store.has("checkpoints", "k")
    assert after(0.5)  # ten seconds of short epochs
    assert store.has("checkpoints", "k")
    assert not after(0.5)
    assert after(1.5)  # a long epoch
    assert not after(0.5)

    def slow_save(*what: Any) -> None:
        now[0] += 2.0

    monkeypatch.setattr(store, "save", slow_save)
    assert after(1.5)
    assert [after(5.0) for _ in range(4)] == [False, False, False, True]  # a tenth of the time
    checkpoint.delete()
    assert checkpoint.load(learner) == ([], [])
