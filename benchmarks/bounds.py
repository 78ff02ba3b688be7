"""Lower bounds of a training step's time, from its arithmetic and its optimizer's memory traffic."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common


def macs(model: nn.Module, image: tuple[int, int, int]) -> int:
    """Count the multiply-accumulates of one image's forward pass as PyTorch does (matrix products only)."""
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *image))
    return int(counter.get_total_flops()) // 2


def step_flops(macs_per_image: int, batch: int) -> int:
    """Return 6·MACs·batch: a MAC is two operations, and a backward pass costs two forward passes."""
    return 6 * macs_per_image * batch


def optimizer_bytes(parameters: int, masked: int, states: int) -> int:
    """Return the bytes that an fp32 optimizer step must read and write at least.

    Each parameter and each of its `states` is read and written, and its gradient is read. `masked` of the
    parameters also have a mask M, which Adam (two states) steps, and a drawn weight θ⊙B, which is written.
    """

    def moved(states: int) -> int:
        return 2 + 1 + 2 * states

    return 4 * (parameters * moved(states) + masked * (moved(2) + 1))


def bound_seconds(flops: float, moved: float, rates: Mapping[str, float]) -> float:
    """Return a step's lower bound: the larger one of its arithmetic's and its optimizer traffic's times."""
    return max(flops / rates["matmul_flops_per_second"], moved / rates["copy_bytes_per_second"])


def measured_rates(device: str, *, quick: bool) -> dict[str, float]:
    """Measure the best rates of large matrix products (fp32 on a CPU, bf16 on a GPU) and large copies."""
    gpu = device == "cuda"
    size = (8192 if gpu else 1024) // (8 if quick else 1)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if gpu else torch.float32)
    out = torch.empty_like(a)
    source = torch.zeros((2**30 if gpu else 2**26) // (64 if quick else 1), device=device)
    target = torch.empty_like(source)

    def best(task: Callable[[], object], times: int) -> float:
        def run() -> None:
            for _ in range(times):
                task()
            if gpu:
                torch.cuda.synchronize()

        return min(common.interleaved({"": run}, repeats=10)[""]) / times

    product = best(lambda: torch.mm(a, a, out=out), 10 if gpu else 1)
    copy = best(lambda: target.copy_(source), 10 if gpu else 1)
    return {
        "matmul_flops_per_second": 2 * size**3 / product,
        "copy_bytes_per_second": 2 * source.numel() * source.element_size() / copy,
    }
