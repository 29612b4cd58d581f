"""CephFS by ceph-fuse, from Debian's packages: a monitor, a manager, a metadata server, and three OSDs."""

import json
import uuid
from typing import Any

from .host import run
from .nodes import NETWORK, Node, wait_until
from .volumes import Volume

# The file system, of two pools.
NAME = "shared"
HOME = "/var/lib/ceph"
# Seconds until others may go on without a client that is gone: the least that the metadata server takes.
SESSION_TIMEOUT = 30
# Everything of a node is in memory, and is there until the node ends: also a killed OSD finds its objects again.
CONFIGURATION = """[global]
fsid = {fsid}
mon_initial_members = a
mon_host = {monitor}
public_network = {network}.0/24
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
mon_data = {home}/mon
mgr_data = {home}/mgr
mds_data = {home}/mds
osd_data = {home}/osd
log_file =
log_to_stderr = true
mon_cluster_log_file =
admin_socket =
osd_pool_default_size = 3
osd_pool_default_min_size = 2
osd_pool_default_pg_autoscale_mode = off
osd_objectstore = bluestore
bluestore_block_size = 1073741824
bluestore_cache_autotune = false
bluestore_cache_size = 67108864
osd_memory_target = 939524096
osd_heartbeat_interval = 1
osd_heartbeat_grace = {timeout}
mon_osd_adjust_heartbeat_grace = false
mon_osd_min_down_reporters = 1
mgr_initial_modules =
mds_cache_memory_limit = 268435456
[client]
fuse_disable_pagecache = true
"""


class Ceph(Volume):
    """CephFS, a replica on each of three nodes; the first one also has what is there once."""

    name = "ceph"
    programs = (
        "ceph:ceph-common",
        "ceph-mon",
        "ceph-mgr",
        "ceph-osd",
        "ceph-mds",
        "ceph-fuse",
    )
    own_folders = (HOME, "/run")
    # Two clients that append without guests in between lose records.
    appends = False

    def prepare(self) -> None:
        self.fsid = str(uuid.uuid4())
        self.configuration = self.work / "ceph.conf"

    def start(self) -> None:
        first = self.storage[0]
        self.configuration.write_text(
            CONFIGURATION.format(
                fsid=self.fsid, monitor=first.address, network=NETWORK, home=HOME, timeout=self.timeout
            )
        )
        first.run("mkdir", *(f"{HOME}/{part}" for part in ("mon", "mgr", "mds")))
        first.run("monmaptool", "--create", "--addv", "a", self.addresses(first), "--fsid", self.fsid, f"{HOME}/map")
        first.run(*self.program("ceph-mon"), "-i", "a", "--mkfs", "--monmap", f"{HOME}/map")
        first.start(*self.program("ceph-mon"), "-i", "a", "-f")
        wait_until(lambda: first.succeeds("timeout", "10", *self.program("ceph"), "mon", "stat"), "the monitor")
        first.start(*self.program("ceph-mgr"), "-i", "a", "-f")
        for node in self.storage:
            self.start_node(node)
        self.wait_until_whole()
        self.cli("osd", "pool", "create", "metadata", "8")
        self.cli("osd", "pool", "create", "data", "16")
        self.cli("fs", "new", NAME, "metadata", "data")
        self.cli("fs", "set", NAME, "session_timeout", str(SESSION_TIMEOUT))
        first.start(*self.program("ceph-mds"), "-i", "a", "-f")
        wait_until(lambda: "up:active" in self.cli("mds", "stat"), "the metadata server", 120)

    def start_node(self, node: Node) -> None:
        number = str(self.storage.index(node))
        osd = (*self.program("ceph-osd"), "-i", number)
        if not node.succeeds("test", "-e", f"{HOME}/osd/whoami"):
            identity = str(uuid.uuid4())
            self.cli("osd", "new", identity, number)
            node.run("mkdir", f"{HOME}/osd")
            node.run(*osd, "--mkfs", "--osd-uuid", identity)
        node.start(*osd, "-f")

    def wait_until_whole(self) -> None:
        wait_until(lambda: self.status("osd", "stat")["num_up_osds"] == self.nodes, "the OSDs")

    def addresses(self, node: Node) -> str:
        return f"[v2:{node.address}:3300,v1:{node.address}:6789]"

    def program(self, name: str) -> tuple[str, ...]:
        return (name, "-c", str(self.configuration))

    def cli(self, *words: str) -> str:
        return self.storage[0].run("timeout", "60", *self.program("ceph"), *words)

    def status(self, *words: str) -> Any:
        """The answer to a question. Warnings may stand before it."""
        found = self.cli(*words, "--format", "json")
        return json.loads(found[found.index("{") :])

    def client(self, host: Node) -> list[str]:
        return [*self.program("ceph-fuse"), "-f", "--id", "admin", str(self.point)]

    def describe(self) -> str:
        version = run(["dpkg-query", "-W", "-f", "${Version}", "ceph-fuse"]).partition("+")[0]
        return f"CephFS {version} by ceph-fuse, replica 3, no delay, session_timeout {SESSION_TIMEOUT} s, no page cache"
