"""Pruning criteria: scores that say how much each weight matters; weights with higher scores are kept.

Each criterion takes a `Scene` and returns scores by weight name, shaped like the weights. Weights that are
already pruned are zero in the scene's model. `allocation` turns scores into masks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunetune.sparsity.masks import prunable

Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Scene:
    """Everything from which a criterion computes scores; it must not change the model's weights.

    `inputs` (B, …) and `targets` (B, …) are a sample of the training data, in the form that the network and
    `loss(outputs, targets)` take. `probe` (1, …) is an input of ones, by default shaped like one of `inputs`.
    `has_logits` says that the outputs are logits over classes, for which a temperature makes sense. Random
    numbers come from `generator`, on the CPU.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    generator: torch.Generator
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    probe: Tensor | None = None
    has_logits: bool = True

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The prunable weights of the model, by name."""
        return prunable(self.model)


def magnitude(scene: Scene) -> Scores:
    """Score weights by their magnitude |θ|; for single weights, L1 and L2 norms give the same ranking."""
    return {name: weight.detach().abs() for name, weight in scene.weights.items()}


def random(scene: Scene) -> Scores:
    """Score weights at random, uniformly in [0, 1)."""
    return {
        name: torch.rand(weight.shape, generator=scene.generator).to(weight.device)
        for name, weight in scene.weights.items()
    }


def snip(scene: Scene) -> Scores:
    """Score weights by |g⊙θ| divided by its sum, on a sample in training mode (Lee et al., arXiv 1810.02340).

    The division makes scores independent of the loss's scale; it does not change the ranking.
    """
    scene.model.train()
    scores = _gradient_times_weight(scene)
    total = torch.stack([score.sum() for score in scores.values()]).sum()
    return {name: score / total if total > 0 else score for name, score in scores.items()}


def taylor(scene: Scene) -> Scores:
    """Score the weights of a trained network by |g⊙θ|, in evaluation mode.

    This is Taylor-FO (Molchanov et al., arXiv 1906.10771).
    """
    scene.model.eval()
    return _gradient_times_weight(scene)


def grasp(scene: Scene, temperature: float = 200.0) -> Scores:
    """Score weights by θ⊙Hg: the highest are kept, and removing the lowest reduces the gradient's norm least.

    Logits are divided by `temperature` in both passes. Wang et al. (arXiv 2002.07376) remove the highest
    −θ⊙Hg, which is the same. Outputs that are not logits are not divided.
    """
    scene.model.train()
    names, weights = zip(*scene.weights.items(), strict=True)
    divisor = temperature if scene.has_logits else 1.0

    def gradients(*, graph: bool) -> tuple[Tensor, ...]:
        loss = scene.loss(scene.model(scene.inputs) / divisor, scene.targets)
        return torch.autograd.grad(loss, weights, create_graph=graph)

    fixed = gradients(graph=False)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        pairs = zip(gradients(graph=True), fixed, strict=True)
        product = torch.stack([(g * f).sum() for g, f in pairs]).sum()
        hessian_gradient = torch.autograd.grad(product, weights)
    return {
        name: weight.detach() * hg for name, weight, hg in zip(names, weights, hessian_gradient, strict=True)
    }


def synflow(scene: Scene) -> Scores:
    """Score weights by |θ ∂R/∂θ|, R being the sum of outputs for an input of ones (arXiv 2006.05467).

    SynFlow (Tanaka et al.) needs no data. It works on a copy in evaluation mode and float64 (float32
    overflows on deep networks), with every parameter and buffer replaced by its absolute value. It is meant
    to prune in many rounds; a single round is a different method.
    """
    model = copy.deepcopy(scene.model).double().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.abs_()
    names, weights = zip(*prunable(model).items(), strict=True)
    probe = torch.ones_like(scene.inputs[:1]) if scene.probe is None else scene.probe.to(scene.inputs.device)
    flow = model(probe.double() if probe.is_floating_point() else probe).sum()
    gradients = torch.autograd.grad(flow, weights)
    return {
        name: (weight.detach() * gradient).abs()
        for name, weight, gradient in zip(names, weights, gradients, strict=True)
    }


def _gradient_times_weight(scene: Scene) -> Scores:
    names, weights = zip(*scene.weights.items(), strict=True)
    loss = scene.loss(scene.model(scene.inputs), scene.targets)
    gradients = torch.autograd.grad(loss, weights)
    return {
        name: (weight.detach() * gradient).abs()
        for name, weight, gradient in zip(names, weights, gradients, strict=True)
    }


Criterion = Callable[..., Scores]
"""A function `criterion(scene, *, options…)` that returns scores by weight name."""

synflow.scoring_rounds = 100  # type: ignore[attr-defined]


def scoring_rounds(criterion: Criterion) -> int:
    """Return in how many rounds a criterion prunes by default, with new scores before each round.

    A criterion declares this in an attribute `scoring_rounds`; without one it is 1.
    """
    return int(getattr(criterion, "scoring_rounds", 1))
