"""Machines that share this kernel: each has network, mounts and name of its own, and those for storage also processes.

They are anonymous namespaces, which a process each keeps alive. When that process ends, also because this program was
killed, the kernel removes what is inside: interfaces, mounts, and the processes of storage nodes.
"""

import contextlib
import os
import pathlib
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import Self

from .host import HarnessError, Word, run
from .paths import LOGS

NETWORK = "10.99.7"
# Seconds.
PATIENCE = 60


class Node:
    """One machine."""

    def __init__(self, name: str, own_processes: bool, own_folders: Sequence[str] = ()) -> None:
        """With its own processes, all of them end with the node. Each of its own folders is an empty one."""
        self.name = name
        self.address = ""
        kinds = ["--net", "--mount", "--uts", "--propagation", "private"]
        if own_processes:
            kinds += ["--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        # As on a host with systemd, mounts propagate to namespaces that are made later.
        script = f"hostname {name} && mount --make-rshared / && ip link set lo up"
        for folder in own_folders:
            os.makedirs(folder, exist_ok=True)
            script += f" && mount -t tmpfs tmpfs {folder}"
        # Like init(8), a shell takes leave of processes whose parents have gone; by a pid that stays, a program that was
        # killed seems to run.
        rest = "while :; do sleep 1000 & wait; done" if own_processes else "exec sleep infinity"
        script += f" && echo ready && {rest}"
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *kinds, "sh", "-c", script]
        self.keeper = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self.keeper.stdout is not None
        if self.keeper.stdout.readline() != b"ready\n":
            self.close()
            raise HarnessError(f"there is no node {name}: {' '.join(command)} failed")
        self.pid = self.keeper.pid
        if own_processes:
            children = pathlib.Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            self.pid = int(children[0])
        self.own_processes = own_processes
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def inside(self, *command: Word, network: bool = True) -> list[str]:
        """The words that run a command there."""
        kinds = ["-m", "-u", *(["-n"] if network else []), *(["-p"] if self.own_processes else [])]
        return ["nsenter", "-t", str(self.pid), *kinds, "--", *(str(word) for word in command)]

    def run(self, *command: Word) -> str:
        """Runs a command there that has to succeed; returns its output."""
        return run(self.inside(*command))

    def succeeds(self, *command: Word) -> bool:
        """Whether a command succeeds there."""
        quiet = subprocess.DEVNULL
        return subprocess.run(self.inside(*command), stdin=quiet, stdout=quiet, stderr=quiet).returncode == 0

    def outcome(self, *command: Word) -> str:
        """Runs a command there that may fail; returns its output."""
        done = subprocess.run(
            self.inside(*command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        return done.stdout

    def start(self, *command: Word) -> subprocess.Popen[bytes]:
        """Starts a program there, which ends with the node at the latest. What it says is in a log."""
        LOGS.mkdir(parents=True, exist_ok=True)
        words = ["setpriv", "--pdeathsig", "KILL", *self.inside(*command)]
        with open(LOGS / f"cluster-{os.getpid()}-{self.name}.log", "ab") as log:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def path(self, path: pathlib.Path) -> pathlib.Path:
        """The way from here to a path there."""
        return pathlib.Path(f"/proc/{self.pid}/root{path}")

    def close(self) -> None:
        """Ends everything."""
        for process in [*getattr(self, "processes", []), self.keeper]:
            process.kill()
        for process in [*getattr(self, "processes", []), self.keeper]:
            # A process that waits for storage that is gone ends when the other ends of its connections have.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)


class Network:
    """A bridge, and the nodes that are connected by it."""

    def __init__(self) -> None:
        self.switch = Node("switch", own_processes=False)
        self.switch.run("ip", "link", "add", "bridge", "type", "bridge")
        self.switch.run("ip", "link", "set", "bridge", "up")
        self.count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.switch.close()

    def connect(self, node: Node) -> None:
        """Gives a node an address, which the others reach."""
        self.count += 1
        node.address = f"{NETWORK}.{self.count}"
        switch = self.switch
        switch.run("ip", "link", "add", node.name, "type", "veth", "peer", "name", "eth0", "netns", node.pid)
        switch.run("ip", "link", "set", node.name, "master", "bridge", "up")
        node.run("ip", "address", "add", f"{node.address}/24", "dev", "eth0")
        node.run("ip", "link", "set", "eth0", "up")

    @contextlib.contextmanager
    def cut(self, node: Node) -> Iterator[None]:
        """Pulls a node's cable for as long as the block runs."""
        self.switch.run("ip", "link", "set", node.name, "down")
        try:
            yield
        finally:
            self.switch.run("ip", "link", "set", node.name, "up")


@contextlib.contextmanager
def connected(names: Sequence[str], own_processes: bool, network: Network, *own_folders: str) -> Iterator[list[Node]]:
    """Nodes with these names in a network."""
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(Node(name, own_processes, own_folders)) for name in names]
        for node in nodes:
            network.connect(node)
        yield nodes


def wait_until(done: object, what: str, patience: float = PATIENCE) -> None:
    """Waits until a function returns something true."""
    assert callable(done)
    deadline = time.monotonic() + patience
    while not done():
        if time.monotonic() > deadline:
            raise HarnessError(f"{what} is waited for in vain, for {patience:g} s")
        time.sleep(0.1)
