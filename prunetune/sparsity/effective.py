"""Effective density: the density of weights that are on some path from the input to an output."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunetune.sparsity.masks import prunable


def effective_weights(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    input_shape: tuple[int, ...],
    *,
    seed: int = 0,
    inputs: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return boolean masks of the kept weights that are on a path from input to output (arXiv 2107.02306).

    The definition is that of Vysogorets and Kempe. The network is tested in float64 with random positive
    weights where the mask keeps one, zero biases, neutral norms and embeddings of ones, on random positive
    inputs of `input_shape`, or, if it takes indices, on `inputs`. Then every signal is a sum of positive
    products over paths, so a weight has a nonzero gradient exactly if it is on a path. Each unit's weights
    are scaled to sum to 1, so that numbers stay in range in deep networks.
    """
    generator = torch.Generator().manual_seed(seed)
    probe = _with_mean_pools(copy.deepcopy(model).cpu().double().eval())
    weights = prunable(probe)
    tables = {id(module.weight) for module in probe.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for module in probe.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                module.running_mean.zero_()
                assert module.running_var is not None
                module.running_var.fill_(1)
        for name, parameter in probe.named_parameters():
            if name in weights:
                mask = masks[name].cpu().double()
                drawn = torch.empty_like(parameter).uniform_(0.5, 1.5, generator=generator) * mask
                total = drawn.flatten(1).sum(1).clamp(min=1e-300)
                parameter.copy_(drawn / total.view(-1, *[1] * (drawn.dim() - 1)))
            else:
                is_norm_scale = name.endswith("weight") and parameter.dim() == 1
                parameter.fill_(1.0 if is_norm_scale or id(parameter) in tables else 0.0)
    x = inputs
    if x is None:
        x = torch.empty(2, *input_shape, dtype=torch.float64).uniform_(0.5, 1.5, generator=generator)
    with torch.enable_grad():
        out = probe(x)
        coefficients = torch.empty_like(out).uniform_(0.5, 1.5, generator=generator)
        gradients = torch.autograd.grad((out * coefficients).sum(), list(weights.values()), allow_unused=True)
    return {
        name: masks[name].cpu().bool() & (gradient != 0)
        if gradient is not None
        else torch.zeros_like(masks[name], dtype=torch.bool, device="cpu")
        for name, gradient in zip(weights, gradients, strict=True)
    }


def _with_mean_pools(model: nn.Module) -> nn.Module:
    """Replace max pools by mean pools: a maximum passes the gradient of one position, but any may win."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # a module used twice is listed twice
            if isinstance(child, nn.MaxPool2d):
                mean = nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode)
                setattr(parent, name, mean)
            elif isinstance(child, nn.AdaptiveMaxPool2d):
                setattr(parent, name, nn.AdaptiveAvgPool2d(child.output_size))
    return model


def effective_density(
    model: nn.Module, masks: Mapping[str, Tensor], input_shape: tuple[int, ...], *, seed: int = 0
) -> float:
    """The share of prunable weights that are kept and on a path from input to output, in [0, density]."""
    effective = effective_weights(model, masks, input_shape, seed=seed)
    return sum(int(m.sum()) for m in effective.values()) / sum(m.numel() for m in effective.values())
