"""Batch norm's statistics of a network with other weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from prunetune import data as datasets
from prunetune.config.schema import DataConfig
from prunetune.data import Dataset
from prunetune.engine.statistics import renew_statistics


@pytest.fixture(scope="module")
def data() -> Dataset:
    return datasets.load(DataConfig.model_validate({"name": "digits", "limit": 100}))


def network(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), *layers, nn.Linear(5, 10))


def test_they_are_the_means_over_the_batches_of_training_examples(data: Dataset) -> None:
    model = network(nn.BatchNorm1d(5))
    model[2].running_mean.fill_(7.0)  # of other weights
    renew_statistics(model, data, seed=1)
    # One batch: the digits are 90 training examples.
    inputs = model[1](data.normalize(data.train.inputs).flatten(1))
    torch.testing.assert_close(model[2].running_mean, inputs.mean(0))
    torch.testing.assert_close(model[2].running_var, inputs.var(0))


def test_batches_are_of_about_the_same_size() -> None:
    data = datasets.load(DataConfig.model_validate({"name": "digits", "limit": 145}))
    assert len(data.train) == 131  # 66 and 65 examples, not 128 and 3
    model = network(nn.BatchNorm1d(5))
    renew_statistics(model, data, seed=1)
    inputs = model[1](data.normalize(data.train.inputs).flatten(1))
    torch.testing.assert_close(model[2].running_mean, inputs.mean(0), rtol=0.02, atol=0.02)
    torch.testing.assert_close(model[2].running_var, inputs.var(0), rtol=0.1, atol=0.01)


def test_nothing_else_changes(data: Dataset) -> None:
    model = network(nn.BatchNorm1d(5, momentum=0.3), nn.Dropout(0.5)).train()
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    renew_statistics(model, data, seed=1)
    kept = [name for name in before if "running" not in name and "tracked" not in name]
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in kept)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model[2].momentum == 0.3
    assert all(module.training for module in model.modules())


def test_without_batch_norm_the_network_is_left_alone(data: Dataset) -> None:
    model = network(nn.LayerNorm(5))
    before = copy.deepcopy(model.state_dict())
    renew_statistics(model, data, seed=1)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_the_examples_are_drawn_from_the_seed() -> None:
    many = datasets.load(DataConfig.model_validate({"name": "digits"}))
    one, same, other = (network(nn.BatchNorm1d(5)) for _ in range(3))
    for model, seed in ((one, 1), (same, 1), (other, 2)):
        renew_statistics(model, many, seed=seed)
    assert torch.equal(one[2].running_mean, same[2].running_mean)
    assert not torch.equal(one[2].running_mean, other[2].running_mean)
