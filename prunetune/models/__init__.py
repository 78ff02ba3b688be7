"""Builds and initializes networks: built-in ones by name, a user's own by import path."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from prunetune.config.schema import InitializerConfig, ModelConfig
from prunetune.errors import UserError
from prunetune.kind import UnknownComponentError
from prunetune.sparsity.masks import prunable


def build(
    config: ModelConfig,
    input_shape: tuple[int, ...],
    outputs: int,
    *,
    seed: int,
    example: torch.Tensor | None = None,
    output_shape: tuple[int, ...] | None = None,
    what: str = "classes",
) -> nn.Module:
    """Build a network on the CPU for inputs of a shape and this many outputs, drawn from `seed`.

    A user's own class gets the further keys of `model:` as arguments, and `input_shape` and `num_classes`
    (the number of outputs) if its constructor has parameters of these names. The network is tested with two
    inputs `example` (2, …), by default zeros; for each it must return a tensor of `output_shape`, by default
    (outputs,). `what` says in messages what the outputs stand for.

    Raises UserError where the model cannot be made or does not fit the data.
    """
    channels = config.in_channels or input_shape[0]
    num_classes = config.num_classes or outputs
    if config.in_channels is not None and len(input_shape) != 3:
        raise UserError(
            f"model.in_channels = {channels}: is for images; the data's inputs have shape {input_shape}"
        )
    if channels != input_shape[0]:
        raise UserError(
            f"model.in_channels = {channels}: the data's images have {input_shape[0]} channel(s); "
            "leave it out to follow the data"
        )
    if num_classes != outputs:
        raise UserError(
            f"model.num_classes = {num_classes}: the data has {outputs} {what}; "
            "leave it out to follow the data"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _construct(config, input_shape, outputs)
    given = torch.zeros(2, *input_shape) if example is None else example
    _check(model, config.name, given, output_shape or (outputs,), f"{outputs} {what}")
    return model


def initialize(model: nn.Module, initializer: InitializerConfig, *, seed: int) -> None:
    """Draw the prunable weights anew and set their biases to zero; `default` leaves the model unchanged."""
    if initializer.name == "default":
        return
    draw = initializer.component
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in prunable(model).items():
            weight.copy_(draw(weight.shape, generator=generator, **initializer.options))
            bias = getattr(model.get_submodule(name.rpartition(".")[0]), "bias", None)
            if isinstance(bias, nn.Parameter):
                bias.zero_()


def _construct(config: ModelConfig, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    try:
        constructor = config.component
    except UnknownComponentError as error:
        raise UserError(f"model.name = {config.name!r}: {error}") from error
    if getattr(constructor, "is_for_images", False) and len(input_shape) != 3:
        raise UserError(
            f"model.name = {config.name!r}: is for images (channels, height, width); "
            f"the data's inputs have shape {input_shape}; mlp takes them"
        )
    arguments = config.options
    try:
        named = inspect.signature(constructor).parameters
    except (TypeError, ValueError):
        named = {}  # type: ignore[assignment]
    from_data = {"input_shape": input_shape, "num_classes": outputs}
    if config.in_channels is not None:
        from_data["in_channels"] = config.in_channels
    arguments.update({name: value for name, value in from_data.items() if name in named})
    try:
        model = constructor(**arguments)
    except Exception as error:
        if config.kind.is_built_in(config.name) and isinstance(error, ValueError):
            raise UserError(f"model.name = {config.name!r}: {error}") from None
        raise UserError(
            f"model.name = {config.name!r}: its constructor, called with "
            f"{arguments}, raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model.name = {config.name!r}: must make a torch.nn.Module, made {type(model).__name__}"
        )
    return model


def _check(
    model: nn.Module, name: str, example: torch.Tensor, output_shape: tuple[int, ...], outputs: str
) -> None:
    """Raise UserError unless the model has prunable weights and one forward pass gives `output_shape`."""
    if not prunable(model):
        raise UserError(f"model.name = {name!r}: has no Linear, Conv or attention weight to prune")
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            out = model(example)
    except Exception as error:
        taken = tuple(example.shape[1:])
        kind = "images" if len(taken) == 3 else "inputs"
        dimensions = " (channels, height, width)" if len(taken) == 3 else ""
        raise UserError(
            f"model.name = {name!r}: cannot take {kind} of shape {taken}{dimensions}: {error}"
        ) from error
    finally:
        model.train()
    shape = tuple(out.shape) if isinstance(out, torch.Tensor) else ()
    if shape != (2, *output_shape):
        given = f"outputs of shape {shape[1:]}" if shape else f"a {type(out).__name__}"
        raise UserError(
            f"model.name = {name!r}: gives {given}; the data has {outputs}, so {output_shape} is needed"
        )
