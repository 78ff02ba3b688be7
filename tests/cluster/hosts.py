"""Hosts of a network on this machine: a network, PID and mount namespace each, with an sshd. Linux, as root.

A host has an address, a home, /tmp, /run and /dev/shm of its own, and shares the rest of the disk. Its
processes end with it, and nothing of it is seen outside: the switch between the hosts is a bridge in a
namespace of its own, without a way to other networks.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

NEEDED = ("ip", "unshare", "nsenter", "setpriv", "sshd", "ssh", "ssh-keygen", "rsync")

_BOOT = """
set -e
mount --make-rprivate /
hostname {name}
{mounts}
mount -t tmpfs tmpfs /run && mkdir /run/sshd
mount -t tmpfs tmpfs /dev/shm
exec $(command -v sshd) -D -e -f {folder}/sshd_config
"""

_SSHD = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
Subsystem sftp internal-sftp
SetEnv {environment}
"""


def unavailable() -> str | None:
    """Why hosts cannot be made here, or None."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "namespaces need root"
    if missing := [program for program in NEEDED if shutil.which(program) is None]:
        return f"needs {', '.join(missing)} (Debian: openssh-server openssh-client iproute2 rsync util-linux)"
    probe = ["unshare", "--net", "--pid", "--fork", "--mount", "ip", "link", "add", "probe", "type", "bridge"]
    ran = subprocess.run(probe, capture_output=True, text=True, check=False)
    return None if ran.returncode == 0 else f"namespaces cannot be made here: {ran.stderr.strip()}"


_PREFIX = "prunetune-test-"


def _forget_the_dead() -> None:
    """Delete the names of networks whose process was killed; the hosts have ended with it."""
    names = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    for name in re.findall(rf"^{_PREFIX}\d+-\w+", names, re.MULTILINE):
        if not Path("/proc", name.removeprefix(_PREFIX).partition("-")[0]).exists():
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


class Network:
    """A switch and the hosts on it, which see the folders in `shared`, and those in `fixed` read-only."""

    def __init__(
        self, folder: Path, *, shared: list[Path], fixed: list[Path], environment: dict[str, str]
    ) -> None:
        self.folder = folder
        self.shared = shared
        self.fixed = fixed
        self.environment = environment
        self.prefix = f"{_PREFIX}{os.getpid()}"
        self.hosts: dict[str, Host] = {}
        _forget_the_dead()
        self._ip("netns", "add", self._switch)
        self._ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        self._ip("-n", self._switch, "link", "set", "br0", "up")

    @property
    def _switch(self) -> str:
        return f"{self.prefix}-switch"

    def add(self, name: str, number: int, authorized_keys: str = "") -> Host:
        """Boot a host with the address 10.77.0.<number>."""
        space = f"{self.prefix}-{name}"
        self._ip("netns", "add", space)
        cable = ("link", "add", "eth0", "netns", space, "type", "veth", "peer", "name", name)
        self._ip(*cable, "netns", self._switch)
        self._ip("-n", self._switch, "link", "set", name, "master", "br0", "up")
        self._ip("-n", space, "link", "set", "lo", "up")
        self._ip("-n", space, "link", "set", "eth0", "up")
        self._ip("-n", space, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
        # Ray finds a node's address by asking for the way to the outside.
        self._ip("-n", space, "route", "add", "default", "dev", "eth0")
        self.hosts[name] = Host(self, name, space, f"10.77.0.{number}")
        self.hosts[name].boot(authorized_keys)
        return self.hosts[name]

    def remove(self, host: Host) -> None:
        """Cut a host off, then end it: as when the power goes."""
        self._ip("-n", self._switch, "link", "set", host.name, "down")
        host.kill()
        self._ip("netns", "delete", host.space)
        del self.hosts[host.name]

    def close(self) -> None:
        """End all hosts."""
        for host in list(self.hosts.values()):
            self.remove(host)
        self._ip("netns", "delete", self._switch)

    @staticmethod
    def _ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Host:
    """One of a network's hosts."""

    def __init__(self, network: Network, name: str, space: str, address: str) -> None:
        self.network, self.name, self.space, self.address = network, name, space, address
        self.folder = network.folder / name
        self.home = self.folder / "home"
        self._process: subprocess.Popen[bytes] | None = None

    def boot(self, authorized_keys: str) -> None:
        """Start its sshd, which lets the given public keys in."""
        self.home.mkdir(parents=True)
        (self.folder / "tmp").mkdir()
        (self.folder / "tmp").chmod(0o1777)
        (self.folder / "authorized_keys").write_text(authorized_keys)
        key = self.folder / "host_key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        (self.folder / "sshd_config").write_text(
            _SSHD.format(
                address=self.address,
                folder=self.folder,
                environment=" ".join(f"{key}={value}" for key, value in self.network.environment.items()),
            )
        )
        boot = _BOOT.format(name=self.name, folder=self.folder, mounts="\n".join(self._mounts()))
        new = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--mount-proc"]
        with (self.folder / "console.log").open("w") as log:
            self._process = subprocess.Popen(
                # With this process the host ends, too, however it ends.
                [
                    "setpriv",
                    "--pdeathsig",
                    "KILL",
                    "ip",
                    "netns",
                    "exec",
                    self.space,
                    *new,
                    "bash",
                    "-c",
                    boot,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait_for_sshd()

    def run(
        self, command: str, *, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """A command in a shell on the host's console."""
        ran = subprocess.run(
            self.command(command, **environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert not check or ran.returncode == 0, f"{self.name}: {command}\n{ran.stdout}"
        return ran

    def command(self, command: str, **environment: str) -> list[str]:
        """The words that run a command in a shell on the host."""
        given = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(Path.home()),
            "TERM": "dumb",
            **self.network.environment,
            **environment,
        }
        words = ["env", "-i", *(f"{key}={value}" for key, value in given.items())]
        enter = ["nsenter", "--target", str(self._init()), "--net", "--pid", "--mount", "--uts", "--ipc"]
        return [*enter, *words, "bash", "-c", f"cd ~; {command}"]

    def kill(self) -> None:
        """End all of its processes at once."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, StopIteration):
                os.kill(self._init(), signal.SIGKILL)  # PID 1 of the namespace: the kernel ends the rest
            self._process.wait()

    def _mounts(self) -> Iterator[str]:
        """Commands that give the host its own /tmp and home, with what must be seen on all hosts in them."""
        own = {Path("/tmp"): self.folder / "tmp", Path.home(): self.home}
        for path in [
            *self.network.fixed,
            *self.network.shared,
            self.folder,
        ]:  # last: the second of `own` is in it
            seen = [
                mine / path.relative_to(place) for place, mine in own.items() if path.is_relative_to(place)
            ]
            for inside in seen or [path]:
                yield f"mkdir -p {shlex.quote(str(inside))}"
                yield f"mount --rbind {shlex.quote(str(path))} {shlex.quote(str(inside))}"
                if path in self.network.fixed:
                    yield f"mount -o remount,bind,ro {shlex.quote(str(inside))}"
        for place, mine in own.items():
            yield f"mount --rbind {shlex.quote(str(mine))} {place}"

    def _init(self) -> int:
        """The PID, as this process sees it, of the host's PID 1."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return next(int(child) for child in children)

    def _wait_for_sshd(self) -> None:
        log = self.folder / "console.log"
        assert self._process is not None
        while "Server listening" not in log.read_text():
            assert self._process.poll() is None, f"sshd has not started: {log.read_text()}"
            time.sleep(0.1)
