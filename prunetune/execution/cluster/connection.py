"""Join a Ray cluster, or start Ray on this machine; a wrong address is explained in one message."""

from __future__ import annotations

import io
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import IO, Any

import ray
from ray._private import services
from ray.exceptions import RayError

from prunetune.errors import UserError

_CONNECT_SECONDS = 5.0


@contextmanager
def ray_connection() -> Iterator[bool]:
    """Connect to Ray; the context's value says whether this process started it, on this machine alone.

    Uses the Ray that this process has initialised, which stays up; else joins the cluster of `ray start` or
    RAY_ADDRESS; else starts Ray, and ends it with the context. Raises UserError where the cluster cannot be
    joined.
    """
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if ray.is_initialized():
        _quieten()
        yield _is_own(_session()) and len(ray.nodes()) == 1
        return
    is_there = check_address(os.environ)
    # Not address="auto": that would also join a Ray that another sweep started for itself on this machine,
    # and this sweep would die when that one ends.
    with _native_errors() if is_there else nullcontext(io.StringIO()) as said:
        try:
            context = ray.init(include_dashboard=False, **options)
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            ray.shutdown()
            said.seek(0)
            raise UserError(refusal(f"{error}\n{said.read()}", _origin(os.environ))) from None
    _quieten()
    try:
        yield _is_own(context.address_info["session_dir"])
    finally:
        ray.shutdown()


def _session() -> str:
    """The folder of the Ray session that this process is connected to; "" for a connection by Ray Client."""
    node = ray._private.worker._global_node
    return "" if node is None else str(node.get_session_dir_path())


def _is_own(session: str) -> bool:
    """Whether this process started the session with this folder, whose name ends in its starter's pid."""
    return session.endswith(f"_{os.getpid()}")


def _quieten() -> None:
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the referee reports failures


@contextmanager
def _native_errors() -> Iterator[IO[str]]:
    """Capture standard error in a file: only there does Ray's C++ client say why a cluster refuses it."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        os.dup2(said.fileno(), 2)
        try:
            yield said
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)


def check_address(environment: Mapping[str, str]) -> bool:
    """Whether a cluster is running at the address where `ray.init` would look for one.

    Raises UserError where an address is given and nothing answers there; Ray itself would try for minutes.
    """
    given = environment.get("RAY_ADDRESS", "")
    if "://" in given:
        raise UserError(other_protocol(given))
    try:
        address = services.canonicalize_bootstrap_address(None)
    except (OSError, ValueError) as error:
        raise UserError(f"RAY_ADDRESS = {given!r}: is not the address of a Ray cluster: {error}") from None
    if address is None:
        return False
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"Ray at {address}, {_origin(environment)}, does not answer: {error.strerror or error}. "
            "If that cluster has ended, forget it "
            + ("(`unset RAY_ADDRESS`)" if given else "(`ray stop`)")
            + ", and the sweep runs on this machine alone; else see to it that this machine can reach it"
        ) from None
    return True


def other_protocol(address: str) -> str:
    """The message for an address of Ray Client or the job server, where a cluster's host:port is needed."""
    protocol, _, rest = address.partition("://")
    what = "is for Ray Client" if protocol == "ray" else "is where jobs are submitted"
    jobs = f"http://{rest.partition(':')[0]}:8265" if protocol == "ray" else address
    job = f"ray job submit --address {jobs} --working-dir . -- python -m prunetune.sweep …"
    return (
        f"RAY_ADDRESS = {address!r}: {what}; a sweep runs on the cluster itself. Unset RAY_ADDRESS and run "
        f"the same command on the head node, or from here `{job}`"
    )


def refusal(said: str, origin: str) -> str:
    """The message for a cluster that refused the connection; `said` is everything that Ray printed."""
    if "AuthToken" in said or "authentication token" in said.lower():
        return (
            f"Ray, {origin}, wants its token: set RAY_AUTH_MODE=token, and give the one that the cluster was "
            "started with, in RAY_AUTH_TOKEN or ~/.ray/auth_token"
        )
    return f"Ray, {origin}, cannot be joined: {said.strip()}"


def _origin(environment: Mapping[str, str]) -> str:
    if environment.get("RAY_ADDRESS"):
        return "the address in RAY_ADDRESS"
    return "the address that `ray start` has left on this machine"
