"""Checks that a configuration's model fits its task and data, and that its densities fit the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from prunetune import data as datasets
from prunetune import tasks
from prunetune.config.canonical import kept
from prunetune.config.document import Document
from prunetune.config.schema import Config
from prunetune.data import Dataset, Form
from prunetune.errors import UserError
from prunetune.sparsity.allocation import dense_layer_names
from prunetune.sparsity.masks import prunable
from prunetune.sparsity.smoothing import relus, skip_blocks


@dataclass(frozen=True)
class _Facts:
    """The properties of a network that the checks need: its layers' prunable weights, ReLUs and blocks."""

    sizes: tuple[int, ...]
    has_relus: bool
    has_blocks: bool


@final
class Checks:
    """Checks the configurations of one file; each distinct network is built only once."""

    def __init__(self, source: Document) -> None:
        """`source` is the file, whose lines messages name."""
        self._source = source
        self._built: dict[tuple[Any, ...], _Facts] = {}

    def model(self, config: Config, form: Form) -> int:
        """Check the configuration's model; return its number of prunable weights.

        Raises UserError where the model does not fit the task or the data, where a density would keep no
        weight or fewer than the layers that stay dense, and where post-pruning softens ReLUs or blocks that
        the model does not have.
        """
        facts = self._facts(config, form)
        weights, post = sum(facts.sizes), config.post_pruning
        self._check_densities(config, facts.sizes)
        if post.soft_activation is not None and not facts.has_relus:
            raise self._source.problem(
                "post_pruning.soft_activation",
                "the model has no torch.nn.ReLU module that could be softened",
            )
        if post.soft_skip is not None and not facts.has_blocks:
            raise self._source.problem(
                "post_pruning.soft_skip", "the model has no blocks to skip; give it a method `blocks()`"
            )
        return weights

    def task(self, config: Config, form: Form) -> tasks.Task:
        """Make a configuration's task. Raises UserError where the data lack the targets that it needs."""
        try:
            return tasks.make(config.task, form)
        except UserError as error:
            raise UserError(f"{self._source.where('task')}: {error}") from None

    def _facts(self, config: Config, form: Form) -> _Facts:
        key = repr(config.model), repr(config.task), form.shape, form.classes
        if key not in self._built:
            task = self.task(config, form)
            try:
                model = tasks.network(config.model, task, seed=0)
            except UserError as error:
                raise UserError(f"{self._source.where('model.name')}: {error}") from None
            sizes = tuple(weight.numel() for weight in prunable(model).values())
            self._built[key] = _Facts(sizes, bool(relus(model)), bool(skip_blocks(model)))
        return self._built[key]

    def _check_densities(self, config: Config, sizes: tuple[int, ...]) -> None:
        for index, density in enumerate(config.densities):
            if kept(density, sum(sizes)) == 0:
                rule = f"keeps none of the model's {sum(sizes):,} weights"
                raise self._source.problem(f"densities.{index}", rule, density)
        dense, why = _dense(config, sizes)
        for index, density in enumerate(config.densities):
            count = kept(density, sum(sizes))
            if count < dense:
                rule = f"keeps {count:,} weights, but {why}: {dense:,}"
                raise self._source.problem(f"densities.{index}", rule, density)


def _dense(config: Config, sizes: tuple[int, ...]) -> tuple[int, str]:
    """Return (the number of weights in layers that stay dense, the reason why they do)."""
    if config.pruning.structure == "channel":
        return sizes[-1], "the last layer, whose units are the classes, stays whole"
    if config.pruning.structure != "unstructured":
        return 0, ""
    chosen = dense_layer_names([str(i) for i in range(len(sizes))], config.pruning.dense_layers)
    return sum(sizes[int(i)] for i in chosen), f"dense_layers is {config.pruning.dense_layers}"


def load_data(config: Config, source: Document) -> Dataset:
    """Load a configuration's data. Raises UserError, with the place in the file, where that is impossible."""
    try:
        return datasets.load(config.data)
    except UserError as error:
        raise UserError(f"{source.where('data.root')}: {error}") from None


def form_of_data(config: Config, source: Document) -> Form:
    """Return the form of the data, without loading a built-in source of known form; errors as `load_data`."""
    try:
        return datasets.form_of(config.data)
    except UserError as error:
        raise UserError(f"{source.where('data.root')}: {error}") from None
