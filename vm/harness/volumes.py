"""Distributed file systems from Debian's packages, on nodes of this machine."""

import abc
import contextlib
import pathlib
import signal
import subprocess
import tempfile
import time
from typing import ClassVar

from . import disk
from .host import HarnessError, log, require, run
from .nodes import PATIENCE, Network, Node, connected, wait_until
from .paths import CACHE

# Where hosts mount the volume.
POINT = "mnt"
# The volume of GlusterFS.
NAME = "shared"


class Volume(abc.ABC):
    """A volume that several hosts mount. A context manager that takes everything down."""

    name: ClassVar[str]
    programs: ClassVar[tuple[str, ...]]
    nodes: ClassVar[int] = 3
    # What a node has for itself.
    own_folders: ClassVar[tuple[str, ...]] = ()
    # The node whose death the others survive.
    mortal: ClassVar[int] = -1
    # Whether locks of one host keep out others.
    locks: ClassVar[bool] = True
    # Whether appends of several hosts to one file are all there.
    appends: ClassVar[bool] = True
    # Seconds until the volume may count a host or node as dead.
    timeout: ClassVar[int] = 5

    def __init__(self, network: Network, delay: int) -> None:
        """`delay` is the latency of the storage, in milliseconds, where the file system can have one."""
        self.network, self.delay = network, delay
        self.stack = contextlib.ExitStack()
        self.storage: list[Node] = []
        self.clients: dict[str, subprocess.Popen[bytes]] = {}
        self.work = pathlib.Path()

    def __enter__(self) -> "Volume":
        require(*self.programs, "ip:iproute2", "unshare:util-linux")
        try:
            CACHE.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(prefix="cluster-", dir=CACHE)
            self.work = pathlib.Path(self.stack.enter_context(folder))
            (self.work / POINT).mkdir()
            log.info("%s: %d storage nodes", self.name, self.nodes)
            self.prepare()
            names = [f"store{number}" for number in range(1, self.nodes + 1)]
            nodes = connected(names, True, self.network, *self.own_folders)
            self.storage = self.stack.enter_context(nodes)
            self.start()
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    @property
    def point(self) -> pathlib.Path:
        """Where a host mounts it."""
        return self.work / POINT

    def prepare(self) -> None:  # noqa: B027
        """Makes what nodes find when they are started."""

    @abc.abstractmethod
    def start(self) -> None:
        """Starts the storage nodes' programs, and makes the volume."""

    @abc.abstractmethod
    def client(self, host: Node) -> list[str]:
        """The command that mounts the volume, and ends when it is unmounted."""

    @abc.abstractmethod
    def start_node(self, node: Node) -> None:
        """Starts the programs of one storage node."""

    @abc.abstractmethod
    def describe(self) -> str:
        """Version, options and latency, for the table."""

    def wait_until_whole(self) -> None:  # noqa: B027
        """Waits until a storage node that was started again has what the others have, where that can be asked for."""

    def is_mounted(self, host: Node) -> bool:
        return host.succeeds("mountpoint", "-q", self.point)

    def mount(self, host: Node) -> None:
        """Mounts it on a host."""
        client = self.clients[host.name] = host.start(*self.client(host))

        def is_there() -> bool:
            if client.poll() is not None:
                raise HarnessError(f"{' '.join(self.client(host))} ended with status {client.returncode}")
            return self.is_mounted(host)

        wait_until(is_there, f"the mount on {host.name}")

    def kill_client(self, host: Node) -> None:
        """Ends the program that serves the mount of a host: the mount is there, and dead."""
        client = self.clients.pop(host.name)
        client.send_signal(signal.SIGKILL)
        client.wait(20)

    def unmount(self, host: Node) -> None:
        """Unmounts what is in use, as an administrator would."""
        host.run("umount", "--lazy", self.point)

    def kill_node(self) -> Node:
        """Ends the programs of one storage node without warning; its network stays. Returns it."""
        node = self.storage[self.mortal]
        for process in node.processes:
            process.kill()
        # All but the process that keeps the namespaces, which ignores it.
        node.succeeds("sh", "-c", "kill -KILL -1")
        for process in node.processes:
            process.wait(20)
        node.processes.clear()
        return node


class Gluster(Volume):
    """GlusterFS, a replica on each of three nodes."""

    name = "gluster"
    programs = (
        "glusterd:glusterfs-server",
        "glusterfs:glusterfs-client",
        "gluster:glusterfs-cli",
        "mkfs.ext4:e2fsprogs",
    )
    own_folders = ("/var/lib/glusterd", "/run", "/var/log/glusterfs")
    # Cached data and attributes of one host are not seen to be old by another; write-behind answers before storage has.
    options: ClassVar[dict[str, str]] = {
        "network.ping-timeout": str(Volume.timeout),
        "performance.open-behind": "off",
        "performance.quick-read": "off",
        "performance.stat-prefetch": "off",
        "performance.io-cache": "off",
        "performance.read-ahead": "off",
        "performance.readdir-ahead": "off",
        "performance.write-behind": "off",
        "network.remote-dio": "disable",
        "performance.strict-o-direct": "on",
    }

    def prepare(self) -> None:
        self.bricks = [self.stack.enter_context(disk.mounted("ext4", 1024)) for _ in range(self.nodes)]

    def start(self) -> None:
        for node in self.storage:
            self.start_node(node)
        others = self.storage[1:]
        for node in self.storage:
            wait_until(lambda node=node: node.succeeds("gluster", "--mode=script", "pool", "list"), "glusterd")
        for node in others:
            self.cli("peer", "probe", node.address)
        in_pool = lambda: self.cli("pool", "list").count("Connected") == self.nodes  # noqa: E731
        wait_until(in_pool, "the pool of glusterd")
        bricks = [f"{node.address}:{brick}/brick" for node, brick in zip(self.storage, self.bricks)]
        # A peer may be connected and not be ready.
        self.insist("volume", "create", NAME, "replica", str(self.nodes), *bricks, "force")
        for option, value in self.options.items():
            self.cli("volume", "set", NAME, option, value)
        if self.delay:
            # Between the brick's threads and its file system; in microseconds, for all of these calls.
            self.cli("volume", "set", NAME, "delay-gen", "posix")
            self.cli("volume", "set", NAME, "delay-gen.delay-percentage", "100")
            self.cli("volume", "set", NAME, "delay-gen.delay-duration", str(self.delay * 1000))
            self.cli("volume", "set", NAME, "delay-gen.enable", "write,read,fsync")
        try:
            self.cli("volume", "start", NAME)
        except HarnessError as error:
            logs = self.storage[0].run("sh", "-c", "tail -n 8 /var/log/glusterfs/*.log /var/log/glusterfs/bricks/*.log")
            raise HarnessError(f"{error}\n{logs}") from None

    def start_node(self, node: Node) -> None:
        node.start("glusterd", "--no-daemon", "--log-level", "WARNING")

    def wait_until_whole(self) -> None:
        # While others write there is always something to heal; that the brick is there is enough.
        wait_until(lambda: self.cli("volume", "status").count(" Y ") >= 2 * self.nodes, "the brick that was killed")

    def insist(self, *words: str) -> None:
        """Runs a command until it succeeds: for a while peers say that they are not ready."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.cli(*words)
                return
            except HarnessError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(1)

    def cli(self, *words: str) -> str:
        return self.storage[0].run("gluster", "--mode=script", *words)

    def client(self, host: Node) -> list[str]:
        servers = [f"--volfile-server={node.address}" for node in self.storage]
        # By default a host's page cache keeps what another host has overwritten, also after the file was opened anew.
        timeouts = ["--attribute-timeout=0", "--entry-timeout=0", "--direct-io-mode=enable"]
        return ["glusterfs", "--no-daemon", *servers, f"--volfile-id={NAME}", *timeouts, str(self.point)]

    def describe(self) -> str:
        version = run(["glusterfs", "--version"]).split()[1]
        delay = f"delay-gen {self.delay} ms per write, read and fsync" if self.delay else "no delay"
        return f"GlusterFS {version}, replica 3, {delay}, ping-timeout {self.timeout} s, caches of the client off"


class Moose(Volume):
    """MooseFS: a master, and two chunk servers with a copy each."""

    name = "moosefs"
    programs = ("mfsmaster:moosefs-master", "mfschunkserver:moosefs-chunkserver", "mfsmount:moosefs-client")
    own_folders = ("/var/lib/mfs",)
    # Its client writes where it believes the end to be.
    appends = False

    def start(self) -> None:
        for node in self.storage:
            self.start_node(node)

    def start_node(self, node: Node) -> None:
        home = self.work / node.name
        home.mkdir(exist_ok=True)
        if node is self.storage[0]:
            (home / "exports").write_text("* / rw,alldirs,maproot=0\n* . rw\n")
            self.configure(home, f"EXPORTS_FILENAME = {home}/exports")
            if not (home / "metadata.mfs").exists():
                (home / "metadata.mfs").write_bytes(b"MFSM NEW")
            node.start("mfsmaster", "-f", "-a", "-c", home / "cfg", "start")
            return
        (home / "chunks").mkdir(exist_ok=True)
        (home / "disks").write_text(f"{home}/chunks\n")
        self.configure(
            home,
            f"HDD_CONF_FILENAME = {home}/disks",
            "HDD_LEAVE_SPACE_DEFAULT = 64MiB",
            f"MASTER_HOST = {self.storage[0].address}",
            "MASTER_RECONNECTION_DELAY = 1",
        )
        node.start("mfschunkserver", "-f", "-c", home / "cfg", "start")

    def configure(self, home: pathlib.Path, *lines: str) -> None:
        common = ["WORKING_USER = root", "WORKING_GROUP = root", f"DATA_PATH = {home}"]
        (home / "cfg").write_text("".join(f"{line}\n" for line in [*common, *lines]))

    def client(self, host: Node) -> list[str]:
        caches = "mfsattrcacheto=0,mfsentrycacheto=0,mfsdirentrycacheto=0,mfsnegentrycacheto=0,mfscachemode=DIRECT"
        return ["mfsmount", "-f", "-H", self.storage[0].address, str(self.point), "-o", caches]

    def describe(self) -> str:
        version = run(["dpkg-query", "-W", "-f", "${Version}", "moosefs-client"]).strip()
        return f"MooseFS {version}, goal 2, no delay, caches of the client off"
