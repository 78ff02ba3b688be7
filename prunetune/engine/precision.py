"""Floating-point formats of training: bf16 autocast or float32, TF32, denormals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn


@final
@dataclass(frozen=True)
class Precision:
    """The floating-point format in which a network computes, as `precision` of the configuration says.

    `auto` is bf16 on a GPU that supports it and fp32 elsewhere. Parameters, masks, optimizer states and the
    loss are always float32.
    """

    configured: Literal["auto", "fp32", "bf16"] = "auto"

    def is_bf16(self, device: torch.device) -> bool:
        """Whether a network on `device` runs under bf16 autocast."""
        if self.configured == "auto":
            return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return self.configured == "bf16"

    def forward(self, model: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return a function from inputs (B, …) on `device` to the model's outputs (B, …) in float32."""
        is_bf16 = self.is_bf16(device)
        # Convolutions take the memory layout of their input; on a CPU channels-last is no faster.
        channels_last = device.type == "cuda" and any(isinstance(m, nn.Conv2d) for m in model.modules())

        def outputs(inputs: Tensor) -> Tensor:
            if channels_last and inputs.dim() == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            if not is_bf16:
                out: Tensor = model(inputs)
                return out
            with torch.autocast(device.type, torch.bfloat16):
                out = model(inputs)
            return out.float()

        return outputs

    @contextmanager
    def backends(self, device: torch.device) -> Iterator[None]:
        """Within the context, set PyTorch's switches for `device`.

        On a GPU, float32 products use TF32 unless `fp32` is asked for, and cuDNN benchmarks its algorithms.
        On a CPU, denormal floats are flushed to zero: Adam's moments of closed weights decay to denormals,
        with which a CPU computes several times slower.
        """
        if device.type != "cuda":
            flushed = _flushes_denormals()
            torch.set_flush_denormal(True)
            try:
                yield
            finally:
                torch.set_flush_denormal(flushed)
            return
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
        matmul.allow_tf32 = cudnn.allow_tf32 = self.configured != "fp32"
        cudnn.benchmark = True
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


AUTO = Precision()


def prepare_process(threads: int) -> None:
    """Set the number of CPU threads and flush denormal floats; to be called before the first computation.

    Another number of threads may add floats in another order. PyTorch's threads inherit the treatment of
    denormals from the thread that starts them, so `Precision.backends` alone would come too late.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def _flushes_denormals() -> bool:
    return not torch.full((), 1e-39).mul(0.5)
