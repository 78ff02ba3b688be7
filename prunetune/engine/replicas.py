"""Data parallelism: replicas of one training that each compute a slice of every batch.

All replicas draw the same order, augmentation and masks from the same seeds, then take their slice of the
configured batch; gradients, losses and counts are summed over the replicas. So the weights, the masks and
every decision are the same on all of them, and the result is that of one replica up to the order in which
floats are added. With one replica, the default, none of this does anything.

`DistributedDataParallel` is not used, for three reasons: it averages as if all slices were equally long, its
buckets would own the gradients that a `LearnableMask` keeps as views of one buffer, and masks and RigL need
the whole batch's gradient at one place in the loop. One explicit reduction of one flat buffer per step does
all that, at the price of not overlapping with the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunetune.errors import WorkError
from prunetune.store import Artefact, Artefacts, Kind

T = TypeVar("T")


@final
@dataclass(frozen=True)
class Replicas:
    """The rank of this process among `size` replicas; several replicas communicate by `torch.distributed`."""

    rank: int = 0
    size: int = 1

    @classmethod
    def joined(cls) -> Replicas:
        """The replicas that are the processes of `torch.distributed`'s default group."""
        return cls(dist.get_rank(), dist.get_world_size())

    def part(self, count: int) -> slice:
        """This replica's slice of `count` items; the slices differ in length by one at most.

        >>> [Replicas(rank, 3).part(8) for rank in range(3)]
        [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
        """
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def share(self, count: int) -> float:
        """The share of `count` items in this replica's slice: the weight of its mean in the whole mean."""
        part = self.part(count)
        return float(part.stop - part.start) / count

    def sum(self, *tensors: Tensor) -> None:
        """Sum each tensor over the replicas, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the parameters' gradients over the replicas in place; the gradient tensors are not replaced."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        sums = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [s.view(g.shape) for s, g in zip(sums, gradients, strict=True)])

    def once(self, compute: Callable[[], T]) -> T:
        """Compute on the first replica; all replicas return its result, or raise its exception."""
        if self.size == 1:
            return compute()
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = compute()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        return cast(T, box[0])

    def copy_first(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the tensors, in place, with those of the first replica."""
        if self.size > 1:
            for _, tensor in sorted(tensors.items()):
                dist.broadcast(tensor, 0)

    def check_same(self, what: str, value: Mapping[str, Any]) -> None:
        """Raise WorkError unless all replicas have the same plain values and bit-identical tensors.

        `what` is the subject of the message.
        """
        if self.size == 1:
            return
        mine = {name: checksum(v) if isinstance(v, Tensor) else v for name, v in value.items()}
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine)
        for rank, theirs in enumerate(everyone):
            for name, first in everyone[0].items():
                if theirs.get(name) != first:
                    raise WorkError(f"{what} differ between workers 0 and {rank}: {name}")

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        """Within the context, batch normalization uses the whole batch's statistics in training."""
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)] if self.size > 1 else []
        try:
            for norm in norms:
                setattr(norm, "forward", _synchronized(norm, self))  # noqa: B010, shadows the method
            yield
        finally:
            for norm in norms:
                del norm.forward


ALONE = Replicas()
"""A single replica: training in one process."""


@final
class SharedStore:
    """A store that only the first replica reads and writes; it sends what it read to the others.

    So the other replicas need no access to the storage, all agree on whether a stage is stored even while
    other processes write to the store, and none reads an entry before it is written.
    """

    def __init__(self, store: Artefacts, replicas: Replicas) -> None:
        self._store = store
        self._replicas = replicas

    def load(self, kind: Kind, key: str) -> Artefact | None:
        """Load on the first replica; all replicas return the result."""
        return self._replicas.once(lambda: self._store.load(kind, key))

    def save(self, kind: Kind, key: str, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        """Save on the first replica only."""
        if self._replicas.rank == 0:
            self._store.save(kind, key, tensors, meta)

    def delete(self, kind: Kind, key: str) -> None:
        """Delete on the first replica only."""
        if self._replicas.rank == 0:
            self._store.delete(kind, key)


def checksum(tensor: Tensor) -> int:
    """Σ (2i + 1) · bitsᵢ modulo 2⁶⁴ over a tensor's elements, to detect other values or another order.

    >>> checksum(torch.tensor([True, False, True])), checksum(torch.tensor([False, True, True]))
    (6, 8)
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().flatten().view(integers[tensor.element_size()]).long()
    return int((bits * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum())


class _Sum(torch.autograd.Function):
    """Sums a tensor over the replicas, and its gradient too, because the loss is a sum over the replicas."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def _synchronized(norm: _BatchNorm, replicas: Replicas) -> Callable[[Tensor], Tensor]:
    """Return the layer's forward with the whole batch's statistics; it uses the layer's own parameters."""
    # It shares the layer's parameters and buffers; its kernels run on GPUs only.
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(norm)

    def forward(images: Tensor) -> Tensor:
        out: Tensor = fused(images) if images.is_cuda else _batch_norm(images, norm, replicas)
        return out

    return forward


def _batch_norm(x: Tensor, norm: _BatchNorm, replicas: Replicas) -> Tensor:
    """Batch normalization of x (B, C, …), this replica's slice, with the whole batch's statistics.

    It combines each replica's mean and squared deviations from that mean (Chan et al., 1979) instead of sums
    of squares, which would lose precision by cancellation.
    """
    dims = [0, *range(2, x.dim())]
    shape = [1, -1] + [1] * (x.dim() - 2)
    features, values = x.shape[1], x.float()
    mean = values.mean(dims)
    squares = (values - mean.view(shape)).square().sum(dims)
    count = mean.new_full((1,), x.numel() / features)
    own = torch.cat([mean, squares, count])
    # One row per replica, zero elsewhere, so that the sum over the replicas collects all rows.
    rows = _Sum.apply(torch.stack([own if r == replicas.rank else 0 * own for r in range(replicas.size)]))
    means, squared, counts = rows.split([features, features, 1], dim=1)
    n = counts.sum()
    mean = (counts * means).sum(0) / n
    var = (squared.sum(0) + (counts * (means - mean).square()).sum(0)) / n
    if norm.running_mean is not None and norm.running_var is not None:
        with torch.no_grad():
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.add_(1)
            momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean.detach(), momentum)
            norm.running_var.lerp_(var.detach() * n / (n - 1), momentum)
    out = (values - mean.view(shape)) * torch.rsqrt(var + norm.eps).view(shape)
    if norm.affine:
        out = out * norm.weight.view(shape) + norm.bias.view(shape)
    result: Tensor = out.to(x.dtype)
    return result
