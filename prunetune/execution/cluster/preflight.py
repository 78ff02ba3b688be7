"""Ask every node, before the first trial, whether it can run the sweep; one message names all problems."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prunetune.config.document import Document
from prunetune.errors import UserError
from prunetune.execution.cluster.node_check import Finding, Probe

_SECONDS = 180.0
"""How long a node may take to answer: it starts a process and imports PyTorch."""
_SHOWN = 6
"""How many nodes a message names for each problem."""


def check(
    expectation: dict[str, Any],
    probe: Probe,
    shipped: list[Any],
    source: Document,
    interrupted: Callable[[], bool] = lambda: False,
) -> None:
    """Ask every node of the cluster whether it can run the sweep; raise one UserError with all problems.

    `probe` has been written, and stays for nodes that join later. `shipped` are references to objects that
    the nodes should fetch. `source` is the sweep's file, whose lines the message names.
    """
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    findings = _ask(nodes, expectation, shipped, interrupted)
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    try:
        for node, found in findings.items():
            if not found and not probe.answered(node):
                found.append(
                    (
                        "storage",
                        f"storage = {expectation['storage']!r}: what the node has written is not here",
                    )
                )
    finally:
        probe.remove_answers(nodes)
    wrong = {name_of(nodes[node]): found for node, found in findings.items() if found and node in alive}
    if wrong and not interrupted():
        raise UserError(message(wrong, len(alive), source))


def name_of(node: Mapping[str, Any]) -> str:
    """A node's address, followed by its host name in brackets where that differs from the address."""
    address, name = node["NodeManagerAddress"], node.get("NodeManagerHostname", "")
    return address if name in ("", address) else f"{address} ({name})"


def message(wrong: Mapping[str, list[Finding]], nodes: int, source: Document) -> str:
    """Format the problems of all nodes as one message: each problem once, with the nodes that have it.

    >>> print(message({"10.0.0.2": [("", "ray is 2.59 there")], "10.0.0.3": [("", "ray is 2.59 there")]}, 3,
    ...     Document("s.yaml", {})))
    2 of the 3 nodes of the Ray cluster cannot run this sweep:
      ray is 2.59 there
        on 10.0.0.2, 10.0.0.3
    """
    places: dict[Finding, list[str]] = {}
    for node, findings in wrong.items():
        for finding in findings:
            places.setdefault(finding, []).append(node)
    lines = [f"{len(wrong)} of the {nodes} nodes of the Ray cluster cannot run this sweep:"]
    for (key, text), where in places.items():
        more = f" and {len(where) - _SHOWN} more" if len(where) > _SHOWN else ""
        lines.append("  " + (f"{source.where(key)}: " if key else "") + text)
        lines.append(f"    on {', '.join(where[:_SHOWN])}{more}")
    return "\n".join(lines)


def _ask(
    nodes: Mapping[str, Mapping[str, Any]],
    expectation: dict[str, Any],
    shipped: list[Any],
    interrupted: Callable[[], bool],
) -> dict[str, list[Finding]]:
    remote = ray.remote(num_cpus=0, max_retries=0)(_task())
    asked = {
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            # Where there is no GPU, it does not matter what PyTorch was built for.
            {**expectation, "gpus": expectation["gpus"] if info["Resources"].get("GPU") else 0},
            node,
            shipped,
        ): node
        for node, info in nodes.items()
    }
    findings: dict[str, list[Finding]] = {}
    waiting, end = list(asked), time.monotonic() + _SECONDS
    while waiting and not interrupted() and time.monotonic() < end:
        ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0.5)
        for reference in ready:
            try:
                findings[asked[reference]] = ray.get(reference)
            except RayError as error:
                findings[asked[reference]] = [
                    ("", f"it cannot run a task of this sweep: {reason(str(error))}")
                ]
    for reference in waiting:
        ray.cancel(reference, force=True)
        findings[asked[reference]] = [("", f"it has not answered within {_SECONDS:g} seconds")]
    return findings


def _task() -> Callable[[dict[str, Any], str, list[Any]], list[Finding]]:
    # Ray sends a nested function as code, not by its module's name. So it also runs on a node where this
    # project is not installed, or is an older version, and can report that.
    def examine_node(expectation: dict[str, Any], node: str, shipped: list[Any]) -> list[Finding]:
        import importlib

        import ray

        try:
            module = importlib.import_module("prunetune.execution.cluster.node_check")
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            return [("", f"prunetune cannot be imported there ({what}): install the version that is here")]
        for reference in shipped:
            try:
                ray.get(reference, timeout=120)
            except Exception as error:
                return [("", f"the data cannot be sent there: {type(error).__name__}: {error}")]
        found: list[Finding] = module.examine(expectation, node)
        return found

    return examine_node


def reason(text: str) -> str:
    """The last line of one of Ray's messages, which names the error, without the traceback above it.

    >>> reason("RaySystemError: x\\n  File ...\\nModuleNotFoundError: No module named 'y'\\n")
    "ModuleNotFoundError: No module named 'y'"
    """
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "it gave no reason"
