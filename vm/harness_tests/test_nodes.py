"""Nodes of `vm/cluster`: what one has is its own, and nothing of it stays."""

import pathlib

import pytest

from harness.host import HarnessError, require
from harness.nodes import Network, Node, connected, wait_until


def reaches(node: Node, address: str, port: int) -> bool:
    return node.succeeds("timeout", "2", "bash", "-c", f"exec 3<>/dev/tcp/{address}/{port}")


def test_nodes_are_connected_until_a_cable_is_pulled() -> None:
    require("ip:iproute2")
    with Network() as network, connected(["left", "right"], False, network) as (left, right):
        code = "import socket; s = socket.create_server(('0.0.0.0', 9)); [s.accept() for _ in range(100)]"
        right.start("python3", "-c", code)
        wait_until(lambda: reaches(left, right.address, 9), "a connection")
        with network.cut(left):
            assert not reaches(left, right.address, 9)
        wait_until(lambda: reaches(left, right.address, 9), "a connection after the cut")


def test_nothing_of_a_node_stays() -> None:
    require("ip:iproute2")
    with Node("alone", own_processes=True, own_folders=("/mnt",)) as node:
        sleeper = node.start("sleep", "1000")
        (node.path(pathlib.Path("/mnt")) / "file").write_text("its own")
        assert not pathlib.Path("/mnt/file").exists()
        assert node.run("hostname").strip() == "alone"
    assert node.keeper.poll() is not None
    assert sleeper.poll() is not None
    wait_until(lambda: not pathlib.Path(f"/proc/{node.pid}").exists(), "the end of the node")


def test_a_killed_program_whose_parent_is_gone_is_no_process_any_more() -> None:
    with Node("alone", own_processes=True) as node:
        node.run("sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $! >/tmp/orphan-$(hostname)-test")
        path = pathlib.Path("/tmp/orphan-alone-test")
        orphan = path.read_text().strip()
        path.unlink()
        node.run("kill", "-KILL", orphan)
        wait_until(lambda: not node.succeeds("test", "-e", f"/proc/{orphan}"), "the end of the process")


def test_a_wait_in_vain_is_an_error() -> None:
    with pytest.raises(HarnessError, match=r"nothing is waited for in vain"):
        wait_until(lambda: False, "nothing", 0.2)
