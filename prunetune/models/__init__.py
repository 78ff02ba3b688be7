"""Networks by the name in `model.name`, and a user's own by import path."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunetune.config.schema import ConvConfig, MlpConfig, ModelConfig, UserModelConfig, VitConfig
from prunetune.errors import UserError
from prunetune.models.mlp import Mlp
from prunetune.models.resnet import resnet18, resnet20
from prunetune.models.vgg import vgg16
from prunetune.models.vit import VitTiny
from prunetune.sparsity.initializers import INITIALIZERS
from prunetune.sparsity.masks import prunable

_CONVOLUTIONAL: dict[str, Callable[..., nn.Module]] = {
    "vgg16": vgg16,
    "resnet20": resnet20,
    "resnet18": resnet18,
}


def build(config: ModelConfig, input_shape: tuple[int, int, int], classes: int, *, seed: int) -> nn.Module:
    """A network on the CPU for images (C, H, W) and this many classes, drawn from `seed`.

    A user's own class gets the further keys of `model:` as arguments, and `input_shape` and `num_classes`
    where its constructor names them.

    Raises UserError where the model cannot be made or does not fit the data.
    """
    channels = getattr(config, "in_channels", None) or input_shape[0]
    num_classes = getattr(config, "num_classes", None) or classes
    if channels != input_shape[0]:
        raise UserError(
            f"model.in_channels = {channels}: the data's images have {input_shape[0]} channel(s); "
            "leave it out to follow the data"
        )
    if num_classes != classes:
        raise UserError(
            f"model.num_classes = {num_classes}: the data has {classes} classes; "
            "leave it out to follow the data"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _construct(config, input_shape, classes)
    _check(model, config.name, input_shape, classes)
    return model


def initialize(model: nn.Module, initializer: str, *, seed: int) -> None:
    """Draw the prunable weights anew with one of `INITIALIZERS`, biases zero; `default` changes nothing."""
    if initializer == "default":
        return
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in prunable(model).items():
            weight.copy_(INITIALIZERS[initializer](weight.shape, generator=generator))
            bias = getattr(model.get_submodule(name.rpartition(".")[0]), "bias", None)
            if isinstance(bias, nn.Parameter):
                bias.zero_()


def source_digest(config: ModelConfig) -> str | None:
    """SHA-256 of the file that defines a user's own model; None for the built-in ones.

    Part of what determines a stage's result: the same import path with other code is another network.
    """
    if not isinstance(config, UserModelConfig):
        return None
    _import(config.name)
    file = getattr(sys.modules[config.name.partition(":")[0]], "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


def _construct(config: ModelConfig, input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    if isinstance(config, MlpConfig):
        return Mlp(input_shape, config.hidden, classes)
    if isinstance(config, ConvConfig):
        try:
            return _CONVOLUTIONAL[config.name](input_shape, classes, config.width_multiplier)
        except ValueError as error:
            raise UserError(f"model.name = {config.name!r}: {error}") from None
    if isinstance(config, VitConfig):
        try:
            return VitTiny(
                input_shape,
                classes,
                patch=config.patch,
                dim=config.dim,
                depth=config.depth,
                heads=config.heads,
            )
        except ValueError as error:
            raise UserError(f"model: {error}") from None
    return _construct_users(config, input_shape, classes)


def _construct_users(config: UserModelConfig, input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    constructor = _import(config.name)
    arguments: dict[str, Any] = dict(config.model_extra or {})
    try:
        named = inspect.signature(constructor).parameters
    except (TypeError, ValueError):
        named = {}  # type: ignore[assignment]
    for name, value in (("input_shape", input_shape), ("num_classes", classes)):
        if name in named:
            arguments.setdefault(name, value)
    try:
        model = constructor(**arguments)
    except Exception as error:
        raise UserError(
            f"model.name = {config.name!r}: its constructor, called with "
            f"{arguments}, raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model.name = {config.name!r}: must make a torch.nn.Module, made {type(model).__name__}"
        )
    return model


def _import(path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it; the console script does not
    try:
        found: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
    except Exception as error:
        raise UserError(
            f"model.name = {path!r}: cannot be imported: {type(error).__name__}: {error} "
            "(searched the working folder and the installed packages)"
        ) from error
    return found


def _check(model: nn.Module, name: str, input_shape: tuple[int, int, int], classes: int) -> None:
    """One forward pass: a model that does not fit the data is a mistake to report, not to crash on."""
    if not prunable(model):
        raise UserError(f"model.name = {name!r}: has no Linear, Conv or attention weight to prune")
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            out = model(torch.zeros(2, *input_shape))
    except Exception as error:
        raise UserError(
            f"model.name = {name!r}: cannot take images of shape {input_shape} "
            f"(channels, height, width): {error}"
        ) from error
    finally:
        model.train()
    shape = tuple(out.shape) if isinstance(out, torch.Tensor) else ()
    if shape != (2, classes):
        given = f"outputs of shape {shape[1:]}" if shape else f"a {type(out).__name__}"
        raise UserError(
            f"model.name = {name!r}: gives {given}; the data has {classes} classes, so ({classes},) is needed"
        )
