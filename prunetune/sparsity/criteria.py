"""Pruning scores: how much each weight matters. Higher is kept; turning scores into masks is `allocation`.

Each criterion takes a `Scene` and returns scores by weight name, shaped like the weights. What is pruned
already is zero in the scene's model.
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
    """What scores are computed from. Criteria leave the model's weights as they are.

    `inputs` (B, …) and `targets` (B, …), as the network and the `loss` of (outputs, targets) take them, are a
    sample of the training data. `probe` (1, …) is an input of ones, by default of their shape. `has_logits`:
    the network's outputs are logits over classes, for which a temperature means something.
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
        """The prunable weights."""
        return prunable(self.model)


def magnitude(scene: Scene) -> Scores:
    """|θ|; for single weights L1 and L2 rank alike."""
    return {name: weight.detach().abs() for name, weight in scene.weights.items()}


def random(scene: Scene) -> Scores:
    """Uniform in [0, 1)."""
    return {
        name: torch.rand(weight.shape, generator=scene.generator).to(weight.device)
        for name, weight in scene.weights.items()
    }


def snip(scene: Scene) -> Scores:
    """|g⊙θ|, over its sum, on one sample in training mode (Lee et al., arXiv 1810.02340).

    The division makes it invariant to the scale of the loss; the ranking does not change by it.
    """
    scene.model.train()
    scores = _gradient_times_weight(scene)
    total = torch.stack([score.sum() for score in scores.values()]).sum()
    return {name: score / total if total > 0 else score for name, score in scores.items()}


def taylor(scene: Scene) -> Scores:
    """|g⊙θ| of a trained network, in evaluation mode (Taylor-FO, Molchanov et al., arXiv 1906.10771)."""
    scene.model.eval()
    return _gradient_times_weight(scene)


def grasp(scene: Scene, temperature: float = 200.0) -> Scores:
    """θ⊙Hg, highest kept: removing the lowest reduces the gradient's norm the least.

    Logits are divided by `temperature` in both passes (Wang et al., arXiv 2002.07376, which removes the
    highest −θ⊙Hg: the same). Outputs that are no logits are left as they are.
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
    """|θ ∂R/∂θ| with R the sum of outputs for an all-ones input (Tanaka et al., arXiv 2006.05467).

    On a copy in evaluation mode and float64 (float32 overflows on deep nets), with every parameter and
    buffer replaced by its absolute value. No data. Meant for many rounds; one round is another method.
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
"""`criterion(scene, *, options…)`."""

synflow.scoring_rounds = 100  # type: ignore[attr-defined]


def scoring_rounds(criterion: Criterion) -> int:
    """In how many rounds a criterion prunes, scoring anew before each, unless configured.

    A criterion says so in an attribute `scoring_rounds`; without one it is 1.
    """
    return int(getattr(criterion, "scoring_rounds", 1))
