"""ToST's layer-wise rescaled initialization (LRsI), which learns one scale per weight tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunetune.sparsity.masks import prunable


@sdpa_kernel(SDPBackend.MATH)  # fused attention has no second derivative
def rescale(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    iterations: int,
    eta: float,
    gamma: float,
    lr: float,
    min_scale: float,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> dict[str, float]:
    """Scale each prunable tensor of `model` in place; return the scales by name.

    This is GradInit (Zhu et al., arXiv 2102.08098) as ToST uses it (Jaiswal et al., arXiv 2205.15322): it
    minimises L(θ − η g/‖g‖)/η subject to ‖g‖ ≤ γ over the scales of θ. A step in which ‖g‖ > γ reduces ‖g‖
    instead. The scales are learnt by Adam, with their gradient clipped to norm 1, and none falls below
    `min_scale`. Pruned weights are zero and stay zero. `batches` yields inputs and targets in the form that
    the network and `loss` take, up to two batches per iteration.
    """
    weights = {name: weight.detach() for name, weight in prunable(model).items()}
    alive = {name: (weight != 0).to(weight) for name, weight in weights.items()}
    device = next(iter(weights.values())).device
    scales = torch.ones(len(weights), device=device, requires_grad=True)
    optimizer = torch.optim.Adam([scales], lr=lr)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for _ in range(iterations):
        x, y = next(batches)
        scaled = {name: w * scales[i] for i, (name, w) in enumerate(weights.items())}
        gradients = torch.autograd.grad(
            loss(functional_call(model, scaled, x), y), list(scaled.values()), create_graph=True
        )
        masked = [g * alive[name] for g, name in zip(gradients, scaled, strict=True)]
        norm = torch.stack([(g**2).sum() for g in masked]).sum().sqrt()
        if norm.item() > gamma:
            objective = norm
        else:
            stepped = {
                name: w - eta * g / norm.clamp(min=1e-12)
                for (name, w), g in zip(scaled.items(), masked, strict=True)
            }
            x, y = next(batches)
            objective = loss(functional_call(model, stepped, x), y) / eta
        if not torch.isfinite(objective):
            break
        (gradient,) = torch.autograd.grad(objective, [scales])
        if not torch.isfinite(gradient).all():  # where layers are cut off, ‖g‖ = 0 has no derivative
            break
        scales.grad = gradient
        torch.nn.utils.clip_grad_norm_([scales], 1.0)
        optimizer.step()
        with torch.no_grad():
            scales.clamp_(min=min_scale)
    with torch.no_grad():
        for i, weight in enumerate(weights.values()):
            weight.mul_(scales[i])
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return dict(zip(weights, scales.tolist(), strict=True))
