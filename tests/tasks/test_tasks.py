"""Tasks by themselves: losses, scores and chance by hand; sums over parts; what suits no data is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from balanced import Balanced
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

from prunetune import tasks
from prunetune.config.schema import TaskConfig
from prunetune.data import Form
from prunetune.data.dataset import Split, split_off_validation
from prunetune.errors import UserError
from prunetune.tasks import ACCURACY, Classification, Metric, Task
from prunetune.tasks.regression import RMSE, Regression

IMAGES = Form((1, 2, 2), 3, torch.tensor([4.0]), torch.tensor([2.0]))
TABLE = Form(
    (2,),
    None,
    torch.tensor([1.0, 10.0]),
    torch.tensor([2.0, 5.0]),
    torch.tensor([100.0, -1.0]),
    torch.tensor([50.0, 0.5]),
)
TOKENS = Form((4,), 7, torch.empty(0), torch.empty(0))


def test_classification_by_hand() -> None:
    task = Classification(IMAGES)
    x, y = task.batch(torch.tensor([[[[0, 4], [8, 6]]]], dtype=torch.uint8), torch.tensor([2]))
    assert x.tolist() == [[[[-2.0, 0.0], [2.0, 1.0]]]]
    assert y.tolist() == [2]
    outputs = torch.tensor([[math.log(0.5), math.log(0.25), math.log(0.25)]] * 2)
    labels = torch.tensor([0, 1])
    plain = -(math.log(0.5) + math.log(0.25)) / 2
    assert task.loss(outputs, labels).item() == pytest.approx(plain)
    uniform = -(math.log(0.5) + 2 * math.log(0.25)) / 3
    assert task.loss(outputs, labels, 0.3).item() == pytest.approx(0.7 * plain + 0.3 * uniform)
    assert task.sums(outputs, labels).tolist() == [1, 2]
    assert task.score(torch.tensor([1.0, 2.0])) == 0.5
    assert task.chance(torch.tensor([0, 2, 2, 1])) == 0.5
    assert (task.outputs, task.output_shape) == (3, (3,))
    torch.testing.assert_close(task.after()(outputs)[0], torch.tensor([0.5, 0.25, 0.25]))


def test_the_loss_of_classes_has_the_bits_of_torchs_cross_entropy() -> None:
    task, (outputs, labels) = Classification(IMAGES), outputs_for(Classification(IMAGES), 50)
    for alpha in (0.0, 0.1, 0.7):
        expected = F.cross_entropy(outputs, labels, label_smoothing=alpha)
        assert torch.equal(task.loss(outputs, labels, alpha), expected)


def test_regression_by_hand() -> None:
    task = Regression(TABLE)
    x, y = task.batch(torch.tensor([[5.0, 0.0]]), torch.tensor([[200.0, -2.0]]))
    assert (x.tolist(), y.tolist()) == ([[2.0, -2.0]], [[2.0, -2.0]])
    outputs, targets = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    assert task.loss(outputs, targets).item() == 5 / 4
    # Of 50 in the first column, of 2 · 0.5 in the second.
    assert task.sums(outputs, targets).tolist() == [2500, 1, 2]
    assert task.score(torch.tensor([2500.0, 1, 2])) == pytest.approx(math.sqrt(2501 / 4))
    assert task.chance(torch.tensor([[1.0, 2.0], [3.0, 6.0]])) == pytest.approx(math.sqrt((1 + 4) / 2))
    assert task.outputs == 2
    assert task.after()(torch.tensor([[2.0, -2.0]])).tolist() == [[200.0, -2.0]]
    assert task.before()(torch.tensor([[5.0, 0.0]])).tolist() == [[2.0, -2.0]]


def test_the_mean_of_the_validation_targets_gives_the_rmse_at_chance() -> None:
    targets = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([30.0, 1.0])
    task = Regression(TABLE)
    _, standardised = task.batch(torch.zeros(40, 2), targets)
    constant = standardised.mean(0).expand(40, -1)
    assert task.score(task.sums(constant, standardised)) == pytest.approx(task.chance(targets), rel=1e-5)


def outputs_for(task: Task, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    outputs = torch.randn(n, *task.output_shape, generator=generator)
    if task.targets == "numbers":
        return outputs, torch.randn(n, task.outputs, generator=generator)
    places = task.output_shape[:-1]
    return outputs, torch.randint(0, task.outputs, (n, *places), generator=generator)


class Places(Classification):
    """A class at each of the places of a sequence, as a language model has it."""

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (*self.form.shape, self.outputs)


ALL = [Classification(IMAGES), Regression(TABLE), Balanced(IMAGES, temper=2.0), Places(TOKENS)]
each = pytest.mark.parametrize("task", ALL, ids=lambda task: type(task).__name__)


@each
@given(n=st.integers(0, 30), cut=st.integers(0, 30))
def test_the_sums_of_parts_are_those_of_the_whole(task: Task, n: int, cut: int) -> None:
    outputs, targets = outputs_for(task, n)
    parts = task.sums(outputs[:cut], targets[:cut]) + task.sums(outputs[cut:], targets[cut:])
    torch.testing.assert_close(parts, task.sums(outputs, targets))
    assert parts.dtype == torch.float64


@each
def test_losses_and_sums_of_several_trials_at_once_are_those_of_each(task: Task) -> None:
    pairs = [outputs_for(task, 8)[0] + k for k in range(3)]
    outputs, targets = torch.stack(pairs) * torch.arange(1, 4).view(3, *[1] * pairs[0].dim()), None
    targets = outputs_for(task, 8)[1]
    alphas = [0.0, 0.1, 0.4] if task.gives_logits else [0.0] * 3
    losses = vmap(task.loss, in_dims=(0, None, 0))(outputs, targets, torch.tensor(alphas))
    plain = vmap(task.loss, in_dims=(0, None, None))(outputs, targets, 0.0)
    sums = vmap(task.sums, in_dims=(0, None))(outputs, targets)
    for k, alpha in enumerate(alphas):
        torch.testing.assert_close(losses[k], task.loss(outputs[k], targets, alpha))
        torch.testing.assert_close(plain[k], task.loss(outputs[k], targets))
        torch.testing.assert_close(sums[k], task.sums(outputs[k], targets))


def test_the_loss_and_score_of_sequences_are_over_all_places() -> None:
    task = Places(TOKENS)
    outputs, targets = outputs_for(task, 5)
    expected = F.cross_entropy(outputs.view(20, 7), targets.view(20))
    assert task.loss(outputs, targets).item() == pytest.approx(expected.item())
    assert task.sums(outputs, targets)[1] == 20
    inputs = torch.randint(0, 7, (5, 4))
    assert task.batch(inputs, targets)[0] is inputs  # indices are not normalized
    assert task.probe(2).tolist() == [[1] * 4] * 2
    assert task.probe(2).dtype == torch.int64
    assert len(task.sample(targets, torch.arange(5), 1)) == 5


def test_samples_are_balanced_over_classes_and_random_for_numbers() -> None:
    labels, order = torch.tensor([0, 1, 2, 0, 1, 0]), torch.tensor([5, 0, 1, 2, 3, 4])
    assert Classification(IMAGES).sample(labels, order, 2).tolist() == [5, 0, 1, 4, 2]
    assert Regression(TABLE).sample(torch.zeros(50, 2), torch.arange(50).flip(0), 2).tolist() == list(
        range(49, 29, -1)
    )


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("classification", TABLE, "task = 'classification': the data's targets are numbers"),
        ("regression", IMAGES, "task = 'regression': the data's targets are classes"),
    ],
)
def test_data_without_the_targets_that_a_task_needs(name: str, form: Form, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tasks.make(TaskConfig.model_validate(name), form)


def test_options_of_a_task_of_ones_own() -> None:
    config = TaskConfig.model_validate({"name": "balanced:Balanced", "temper": 3.0})
    made: Any = tasks.make(config, IMAGES)
    assert made.temper == 3.0
    assert made.metric.val == "val_balanced_accuracy"
    assert made.score(torch.tensor([1.0, 0.0, 0.0, 2.0, 1.0, 0.0])) == 0.25  # the absent class is left out


def test_statistics_of_tables() -> None:
    inputs = torch.tensor([[1.0, 7.1], [3.0, 7.1], [5.0, 7.1], [7.0, 7.1]])
    targets = torch.tensor([[0.0], [10.0], [20.0], [30.0]])
    data = split_off_validation(Split(inputs, targets), Split(inputs, targets), None, fraction=0.25, seed=0)
    rest = data.train.inputs[:, 0].double()
    assert data.mean.tolist() == pytest.approx([rest.mean().item(), 7.1])
    assert data.std.tolist() == pytest.approx([rest.std(correction=0).item(), 1.0])  # constant
    assert data.target_mean is not None
    assert data.target_mean.item() == pytest.approx(data.train.targets.mean().item())
    other = split_off_validation(Split(inputs, targets), Split(inputs, -targets), None, fraction=0.25, seed=0)
    assert other.digest != data.digest
    arrays = type(data).from_arrays(data.arrays())
    assert (arrays.digest, arrays.classes, arrays.shape) == (data.digest, None, (2,))
    assert torch.equal(arrays.target_std, data.target_std)  # type: ignore[arg-type]
    before = data.train.inputs.clone()
    data.normalize(data.train.inputs)
    assert torch.equal(data.train.inputs, before)  # shared data stay as they are
    again = Form.read(data.form.plain())
    assert (again.shape, again.classes) == ((2,), None)
    assert torch.equal(again.target_mean, data.target_mean)  # type: ignore[arg-type]


def test_the_name_of_the_loss_is_taken() -> None:
    with pytest.raises(ValueError, match="cannot be named 'loss'"):
        Metric("loss", "loss", maximize=False)


def test_a_metric_says_what_is_better_and_how_it_is_read() -> None:
    assert ACCURACY.score(0.9) > ACCURACY.score(0.8)
    assert RMSE.score(50.0) > RMSE.score(60.0) > RMSE.score(RMSE.worst)
    assert RMSE.score(math.nan) == -math.inf
    assert RMSE.value(RMSE.score(53.2)) == 53.2
    assert (ACCURACY.text(0.975), RMSE.text(53.21), RMSE.text(None), RMSE.text(1234.5)) == (
        "97.50 %",
        "53.2",
        "",
        "1,234",
    )
    assert (ACCURACY.axis, RMSE.axis, RMSE.noun, ACCURACY.noun) == (
        "top-1 accuracy, %",
        "RMSE",
        "RMSE",
        "accuracy",
    )
    priced = Metric("mae", "mean absolute error", maximize=False, unit="€")
    assert priced.worst == math.inf
    assert Metric("r2", "R²").worst == -math.inf
    assert priced.axis == "mean absolute error, €"
    for metric in (ACCURACY, RMSE, priced):
        assert Metric.read(metric.plain()) == metric
