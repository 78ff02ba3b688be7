"""The seconds of a training step: dense, with a learnable mask, and after pruning.

Claim: a step of this project takes a small multiple of the time that the hardware needs for it, and less than
a plain loop: a torchvision data set with its transforms on PIL images, a DataLoader with worker processes,
the same network, and an optimizer of `torch.optim`, in fp32.

Setting: on a CPU, one thread (the plain loop has two worker processes in addition); on a GPU machine, the GPU
(the plain loop has 8 worker processes). Two networks with batches of 128: the paper's MLP on 28×28 images
like MNIST's, and VGG-16 (on the CPU a quarter as wide) on images like CIFAR-10's with crops and flips. The
images are made up of patterns with noise. On a GPU each of the project's steps is measured twice, without and
with `cuda_graphs: true`.

Goals: on the CPU a masked step of the MLP takes at most 1.6 dense ones. On an H200-class GPU a masked step
of VGG-16 takes at most 1.3 dense ones, the dense one is at least 15 times as fast as the plain loop and
reaches at least 40 % of the rate measured for large bf16 matrix products.

How to read it: the times are those of whole epochs, without evaluation, divided by the number of steps: the
median over repeats in which all kinds take turns, the fastest and the slowest. `bound` is the share of a
step's time that the hardware needs at least: the larger one of the times for 6·MACs·batch floating-point
operations at the rate of a large matrix product, and for one pass of the optimizer over weights, gradients
and its state at the rate of a large copy. (The MLP's weights stay in a CPU's caches and a GPU's L2, so for it
the latter is not a strict bound.)
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import common
from benchmarks.bounds import bound_seconds, macs, measured_rates, optimizer_bytes, step_flops
from benchmarks.plain_loop import plain_epochs, plain_source, write_images
from prunetune import models, pipeline
from prunetune.config import reading as configuration
from prunetune.config.document import Document, override
from prunetune.config.schema import Config
from prunetune.sparsity.masks import prunable
from prunetune.store import Store

BATCH = 128

STEPS = {
    "dense": "dense",
    "mask": "mask, penalty",
    "target": "mask, target",
    "post_pruning": "after pruning",
    "plain": "the plain loop",
}
"""The kinds of step, with their names in the table."""

GRAPH = "+graph"
"""The suffix of a kind whose steps are CUDA graphs; on a GPU each kind but the plain loop has one."""

_PENALTY = {"lambda1": 1e-6, "lambda2": 1e-4, "lambda2_warmup": 0.5}
_MASKS: dict[str, Any] = {"dense": None, "mask": _PENALTY, "target": {"method": "target", "lambda1": 1e-6}}


@dataclass(frozen=True)
class Workload:
    """A network, its data and optimizer, with `steps` per epoch; `repeats` epochs of each kind are timed."""

    title: str
    model: dict[str, Any]
    data: dict[str, Any]
    optimizer: dict[str, Any]
    image: tuple[int, int, int]
    steps: int
    repeats: int


def workloads(device: str, *, quick: bool) -> dict[str, Workload]:
    """Return the workloads that are measured on a device."""
    gpu = device == "cuda"
    width = 1.0 if gpu else 0.25
    found = {
        "mlp": Workload(
            "MLP 784-100×5-10, MNIST",
            {"name": "mlp", "hidden": [100] * 5},
            {"name": "mnist"},
            {"name": "adam", "lr": 1e-3},
            (1, 28, 28),
            steps=421 if gpu else 200,
            repeats=7,
        ),
        "vgg16": Workload(
            "VGG-16, CIFAR-10" if gpu else "VGG-16 a quarter as wide, CIFAR-10",
            {"name": "vgg16", "width_multiplier": width},
            {"name": "parquet", "augmentation": {"crop_padding": 4, "flip": True}},
            {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
            (3, 32, 32),
            steps=100 if gpu else 5,
            repeats=5,
        ),
    }
    if quick:
        found["vgg16"] = replace(
            found["vgg16"], model={"name": "vgg16", "width_multiplier": 0.125}, title="VGG-16, an eighth"
        )
        return {name: replace(workload, steps=2, repeats=1) for name, workload in found.items()}
    return found


def tree(workload: Workload, kind: str, root: str, epochs: int) -> dict[str, Any]:
    """Return the configuration tree that trains steps of a kind; its validation split is one image."""
    optimizer = workload.optimizer
    pre = {
        "epochs": epochs,
        "optimizer": optimizer,
        "initializer": "kaiming",
        "mask": _MASKS.get(kind),
        "chance_patience": None,  # one image says little about chance
    }
    return {
        "name": "step-time",
        "data": {**workload.data, "root": root, "batch_size": BATCH, "validation_fraction": 1e-9},
        "model": workload.model,
        "densities": [0.1],
        "pre_pruning": pre if kind in _MASKS else None,
        "post_pruning": {"epochs": epochs, "optimizer": optimizer},
    }


def epochs(config: Config, folder: str, device: str) -> Iterator[None]:
    """Train with the project's pipeline; each item of the iterator is one epoch."""
    for _ in pipeline.run(config, store=Store(folder), device=device, checkpoint_interval=math.inf):
        yield


def kinds(device: str) -> list[str]:
    """Return the kinds of step that are measured on a device."""
    return [*STEPS, *(kind + GRAPH for kind in STEPS if kind != "plain" and device == "cuda")]


def _title(kind: str) -> str:
    return STEPS[kind.removesuffix(GRAPH)] + (", as a graph" if kind.endswith(GRAPH) else "")


def _model(workload: Workload) -> nn.Module:
    section = configuration.from_document(Document("", tree(workload, "dense", "", 1))).model
    return models.build(section, workload.image, 10, seed=0)


def _optimizer(workload: Workload, model: nn.Module) -> torch.optim.Optimizer:
    arguments = dict(workload.optimizer)
    kinds: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    return kinds[arguments.pop("name")](model.parameters(), **arguments)


def measure(workload: Workload, device: str, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Measure the seconds per step of each kind, in turns, and count the operations and bytes of a step."""
    root = str(folder / "data")
    # All images but one, which is for validation, make whole batches.
    count = workload.steps * BATCH + 1
    images, labels = write_images(workload.data["name"], Path(root), workload.image, count)
    warmup = 2
    total = warmup + workload.repeats + 1  # one more, so that no stage ends: that would store and test it
    running: dict[str, Iterator[None]] = {}
    for kind in kinds(device):
        if kind == "plain":
            model = _model(workload).to(device)
            running[kind] = plain_epochs(
                plain_source(workload.data["name"], root, images, labels),
                model,
                _optimizer(workload, model),
                batch_size=BATCH,
                device=device,
            )
        else:
            written = tree(workload, kind.removesuffix(GRAPH), root, total)
            graphs = f"cuda_graphs={str(kind.endswith(GRAPH)).lower()}"
            source = override(Document("step_time", written), [graphs, *overrides])
            config = configuration.from_document(source)
            running[kind] = epochs(config, str(folder / kind), device)
    seconds = common.interleaved(
        {kind: partial(next, steps) for kind, steps in running.items()},
        repeats=workload.repeats,
        warmup=warmup,
    )
    running.clear()
    model = _model(workload)
    parameters = sum(p.numel() for p in model.parameters())
    weights = sum(p.numel() for p in prunable(model).values())
    states = 2 if workload.optimizer["name"] == "adam" else 1
    return {
        "title": workload.title,
        "batch": BATCH,
        "steps": workload.steps,
        "macs": macs(model, workload.image),
        "parameters": parameters,
        "bytes": {
            kind: optimizer_bytes(
                parameters, weights if kind.removesuffix(GRAPH) in ("mask", "target") else 0, states
            )
            for kind in seconds
        },
        "seconds_per_step": {
            kind: [round(s / workload.steps, 9) for s in values] for kind, values in seconds.items()
        },
    }


def render(document: Mapping[str, Any]) -> str:
    """Format a result as Markdown."""
    body = document["results"]
    gpu = document["device"] == "gpu"
    rates = body["rates"]
    lines = [f"## A training step on the {'GPU' if gpu else 'CPU'}", ""]
    for name, found in body["workloads"].items():
        medians = {kind: common.median(values) for kind, values in found["seconds_per_step"].items()}
        flops = step_flops(found["macs"], found["batch"])
        rows = []
        for kind, seconds in found["seconds_per_step"].items():
            bound = bound_seconds(flops, found["bytes"][kind], rates)
            rows.append(
                [
                    _title(kind),
                    common.significant(1e3 * medians[kind]),
                    f"{common.significant(1e3 * min(seconds))} – {common.significant(1e3 * max(seconds))}",
                    f"{medians[kind] / medians['dense']:.2f}",
                    f"{common.significant(medians['plain'] / medians[kind])} ×",
                    f"{100 * bound / medians[kind]:.0f} %",
                ]
            )
        header = [found["title"], "ms per step", "min – max", "/ dense", "against plain", "bound"]
        lines += [common.table(header, rows), ""]
        goals = _goals(name, gpu, medians, flops / rates["matmul_flops_per_second"])
        if goals:
            lines += [f"Goals: {'; '.join(goals)}.", ""]
    lines += [
        f"Batches of {BATCH}; {'bf16' if gpu else 'fp32'} matrix products at "
        f"{common.significant(rates['matmul_flops_per_second'] / 1e12)} TFLOP/s, copies at "
        f"{common.significant(rates['copy_bytes_per_second'] / 1e9)} GB/s"
        f"{'' if gpu else '; one thread'}. {common.where(document)}"
    ]
    return "\n".join(lines)


def _goals(name: str, gpu: bool, medians: Mapping[str, float], matrix_seconds: float) -> list[str]:
    if name == "mlp" and not gpu:
        return [common.judged("mask / dense", medians["mask"] / medians["dense"], at_most=1.6)]
    if name != "vgg16" or not gpu:
        return []
    goals = []
    for end, graphs in (("", ""), (GRAPH, ", as graphs")):
        dense = medians["dense" + end]
        goals += [
            common.judged(f"mask / dense{graphs}", medians["mask" + end] / dense, at_most=1.3),
            common.judged(f"plain / dense{graphs}", medians["plain"] / dense, at_least=15),
            common.judged(f"share of the matrix rate{graphs}", matrix_seconds / dense, at_least=0.4),
        ]
    return goals


def main() -> None:
    """Run the benchmark."""
    parser = common.parser("step_time", __doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--only", metavar="WORKLOAD", help="mlp or vgg16")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="change the configuration")
    arguments = parser.parse_args()
    machine = common.hardware()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        torch.set_num_threads(1)
    before = measured_rates(device, quick=arguments.quick)
    body: dict[str, Any] = {"workloads": {}}
    for name, workload in workloads(device, quick=arguments.quick).items():
        if arguments.only in (None, name):
            with tempfile.TemporaryDirectory(prefix="prunetune-") as folder:
                body["workloads"][name] = measure(workload, device, arguments.overrides, Path(folder))
    after = measured_rates(device, quick=arguments.quick)  # again, in case the machine was busy before
    body["rates"] = {name: max(before[name], after[name]) for name in before}
    document = common.result("step_time", "gpu" if device == "cuda" else "cpu", machine, body)
    common.show(render(document), common.write(document, arguments))


if __name__ == "__main__":
    main()
