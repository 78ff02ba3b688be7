"""What the commands have in common: arguments, exit codes, and messages for people."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from prunetune import data as datasets
from prunetune import tasks
from prunetune.cli import process
from prunetune.config.canonical import kept
from prunetune.config.document import Document
from prunetune.config.schema import Config
from prunetune.errors import UserError, WorkError
from prunetune.sparsity.allocation import dense_layer_names
from prunetune.sparsity.masks import prunable
from prunetune.sparsity.smoothing import relus, skip_blocks

EXIT_OK, EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


def run(command: Callable[[list[str]], int], arguments: list[str] | None = None) -> int:
    """Run a command; its exit code. Errors of the user's are one message, without a traceback."""
    argv = sys.argv[1:] if arguments is None else arguments
    process.begun()
    try:
        code = command(argv)
    except UserError as error:
        print(f"prunetune: {error}", file=sys.stderr)
        code = EXIT_WRONG_INPUT
    except WorkError as error:
        print(f"prunetune: {error}", file=sys.stderr)
        code = EXIT_FAILED
    except KeyboardInterrupt:
        print("prunetune: interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_OK
    return code


def console() -> Console:
    """Standard output; wide enough for the tables where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 140)


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """CONFIG and the overrides."""
    parser.add_argument("config", nargs=None if required else "?", metavar="CONFIG", help="a YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="dotted.key=value",
        help="replace a value of the file, parsed as YAML: densities=[0.1,0.01] pre_pruning.mask=null",
    )


def absolute(config: Config) -> Config:
    """The configuration with absolute local paths: workers have other working folders."""
    data = config.data.model_copy(update={"root": str(Path(config.data.root).expanduser().absolute())})
    storage = config.storage
    if "://" not in storage:
        storage = str(Path(storage).expanduser().absolute())
    return config.model_copy(update={"data": data, "storage": storage})


def check_model(config: Config, source: Document, form: datasets.Form) -> int:
    """The number of prunable weights of a model that fits the task and the data.

    Raises UserError where it does not, where a density would keep nothing, or where post-pruning is told
    to soften what the model does not have.
    """
    try:
        task = tasks.make(config.task, form)
    except UserError as error:
        raise UserError(f"{source.where('task')}: {error}") from None
    try:
        model = tasks.network(config.model, task, seed=0)
    except UserError as error:
        raise UserError(f"{source.where('model.name')}: {error}") from None
    weights = sum(weight.numel() for weight in prunable(model).values())
    for index, density in enumerate(config.densities):
        if kept(density, weights) == 0:
            raise source.problem(
                f"densities.{index}", f"keeps none of the model's {weights:,} weights", density
            )
    _check_layers(config, source, [weight.numel() for weight in prunable(model).values()])
    if config.post_pruning.soft_activation is not None and not relus(model):
        raise source.problem(
            "post_pruning.soft_activation", "the model has no torch.nn.ReLU module that could be softened"
        )
    if config.post_pruning.soft_skip is not None and not skip_blocks(model):
        raise source.problem(
            "post_pruning.soft_skip", "the model has no blocks to skip; give it a method `blocks()`"
        )
    return weights


def _check_layers(config: Config, source: Document, sizes: list[int]) -> None:
    """Raise ConfigError where the layers that stay dense hold more than a density keeps."""
    if config.pruning.structure == "channel":
        dense, why = sizes[-1], "the last layer, whose units are the classes, stays whole"
    elif config.pruning.structure == "unstructured":
        chosen = dense_layer_names([str(i) for i in range(len(sizes))], config.pruning.dense_layers)
        dense, why = sum(sizes[int(i)] for i in chosen), f"dense_layers is {config.pruning.dense_layers}"
    else:
        return
    for index, density in enumerate(config.densities):
        count = kept(density, sum(sizes))
        if count < dense:
            rule = f"keeps {count:,} weights, but {why}: {dense:,}"
            raise source.problem(f"densities.{index}", rule, density)


def located(source: Document, load: Callable[[], datasets.Dataset]) -> datasets.Dataset:
    """The data, with the place of `data:` in the message where they cannot be loaded."""
    try:
        return load()
    except UserError as error:
        raise UserError(f"{source.where('data.root')}: {error}") from None


def command_line(module: str, arguments: list[str]) -> str:
    """A command as it can be typed again."""
    return shlex.join(["python", "-m", f"prunetune.{module}", *arguments])
