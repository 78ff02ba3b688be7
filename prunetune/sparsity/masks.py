"""Masks over a network's prunable weights: learnt before pruning, fixed after it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from prunetune.sparsity.dynamic import shift_to_count

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """List the prunable weights by parameter name: those of Linear, Conv and attention projection layers.

    Biases, norms and embeddings stay dense. A weight that two layers share is listed once.
    """
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        names: tuple[str, ...] = ()
        if isinstance(module, _LAYERS):
            names = ("weight",)
        elif isinstance(module, nn.MultiheadAttention):
            names = _ATTENTION
        for name in names:
            weight = getattr(module, name, None)
            if isinstance(weight, nn.Parameter) and id(weight) not in seen:
                seen.add(id(weight))
                found[f"{module_name}.{name}" if module_name else name] = weight
    return found


def regularizer(mask: Tensor, lambda1: float, lambda2: float) -> Tensor:
    """The penalty λ1 Σ M(1−M) + λ2 Σ M of a learnable mask (paper, section 3.1).

    >>> regularizer(torch.tensor([0.5, 1.0]), 4.0, 1.0).item()
    2.5
    """
    return lambda1 * (mask * (1 - mask)).sum() + lambda2 * mask.sum()


def mask_gradients(
    grad: Tensor,
    theta: Tensor,
    drawn: Tensor,
    mask: Tensor,
    lambda1: float,
    lambda2: float | Tensor,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of θ and M, given the gradient g (`grad`) of the drawn weights θ⊙B; all are (n,).

    With B ~ Bernoulli(M) and the straight-through rule ∂B/∂M = 1 they are ∂L/∂θ = g⊙B and
    ∂L/∂M = g⊙θ + λ1 (1 − 2M) + λ2, in closed form, without autograd through the mask. They are written to
    `out` if it is given; its first tensor may be `grad` itself.
    """
    for_theta, for_mask = out if out is not None else (torch.empty_like(theta), torch.empty_like(mask))
    if isinstance(lambda2, Tensor):
        constant = lambda2 + lambda1
    else:
        constant = torch.full((), lambda1 + lambda2, dtype=mask.dtype, device=mask.device)
    torch.sub(constant, mask, alpha=2 * lambda1, out=for_mask).addcmul_(grad, theta)
    torch.mul(grad, drawn, out=for_theta)
    return for_theta, for_mask


def fill_uniform(out: Tensor, *, generator: torch.Generator) -> Tensor:
    """Fill `out` (n,) float32 with uniform multiples of 2⁻²⁴ in [0, 1), as `torch.rand` does.

    On the CPU, where drawing random bits is the most expensive part of a mask's step, each number has 16
    independent high bits, and all numbers share the 8 low bits. So each number is exactly uniform, and two of
    them depend on each other by less than 2⁻¹⁶.
    """
    if out.device.type != "cpu":
        return out.uniform_(generator=generator)
    words = torch.empty(-(-out.numel() // 4), dtype=torch.int64)
    upper = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: out.numel()]
    lower = torch.randint(256, (), generator=generator)
    return torch.add(0.5 + lower * 2.0**-24, upper, alpha=2.0**-16, out=out)


class LearnableMask:
    """A learnable mask M over all prunable weights θ of a model, both as flat tensors (n,) over all layers.

    The model's own weights become views of one flat buffer that holds θ⊙B during training and θ⊙M during
    evaluation; the optimizers step `theta` and `mask`. A training step calls `draw`, forward and backward,
    `take_gradients`, the optimizers' steps, and `clip`, in this order.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], *, initial: float) -> None:
        flat = torch.cat([weight.detach().flatten() for weight in weights.values()])
        self.theta = nn.Parameter(flat.clone())
        self.mask = nn.Parameter(torch.full_like(flat, initial))
        self._drawn = torch.ones_like(flat)
        self._used = flat  # the weights with which the model computes
        self._grad = torch.zeros_like(flat)  # first the gradient of `_used`, then that of θ
        self._mask_grad = torch.zeros_like(flat)
        offset = 0
        for weight in weights.values():
            piece = slice(offset, offset + weight.numel())
            weight.data = self._used[piece].view(weight.shape)
            weight.grad = self._grad[piece].view(weight.shape)  # backward accumulates into it
            offset = piece.stop

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Put θ⊙B with a newly drawn B ~ Bernoulli(M) into the model, and clear the gradients."""
        torch.lt(fill_uniform(self._used, generator=generator), self.mask, out=self._drawn)
        torch.mul(self.theta, self._drawn, out=self._used)
        self._grad.zero_()

    @torch.no_grad()
    def take_gradients(self, lambda1: float, lambda2: float | Tensor) -> None:
        """Set the gradients of `theta` and `mask` after a backward pass through the drawn weights."""
        self.theta.grad, self.mask.grad = mask_gradients(
            self._grad,
            self.theta,
            self._drawn,
            self.mask,
            lambda1,
            lambda2,
            out=(self._grad, self._mask_grad),
        )

    @torch.no_grad()
    def clip(self) -> None:
        """Clip M to [0, 1], after a step."""
        self.mask.clamp_(0, 1)

    @torch.no_grad()
    def project(self, density: float) -> None:
        """Project M onto the nearest point of [0, 1]ⁿ with the mean `density`, after a step."""
        count = density * self.mask.numel()
        # The drawn mask and M's gradient are no longer needed in this step, so their memory is reused.
        shift = shift_to_count(self.mask, count, scratch=(self._drawn, self._mask_grad))
        self.mask.sub_(shift).clamp_(0, 1)

    @torch.no_grad()
    def expect(self) -> None:
        """Put θ⊙M into the model, for evaluation and at the end of the stage."""
        torch.mul(self.theta, self.mask, out=self._used)


class FixedMask:
    """Keeps pruned weights at exactly zero.

    `masks` are float copies (0 or 1) on the weights' device; methods that move a mask write into them.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        # Use the model's order of layers, because random numbers are drawn layer by layer; `masks` that come
        # from the store are sorted by name.
        self.masks = {n: masks[n].to(weight, copy=True) for n, weight in weights.items() if n in masks}
        self.weights = dict(weights)

    @torch.no_grad()
    def apply(self) -> None:
        """Set the pruned weights to zero; to be called after every optimizer step."""
        if self.masks:
            torch._foreach_mul_([self.weights[name] for name in self.masks], list(self.masks.values()))


def pack(mask: Tensor) -> Tensor:
    """Pack a boolean mask of n elements into bits (⌈n/8⌉,) uint8."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpack(bits: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Restore the boolean mask of this `shape` from the bits that `pack` returned."""
    count = int(np.prod(shape))
    flat = np.unpackbits(bits.numpy(), count=count).astype(bool)
    return torch.from_numpy(flat).view(shape)
