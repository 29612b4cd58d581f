"""Writes through mappings of the host: one file in every way, files at random, and many writers, on each file system."""

import contextlib
import pathlib
import re
import socket
import tempfile
from collections.abc import Iterator

import pytest

from harness import disk
from harness.guest import Guest
from harness.host import run
from harness.tools import tool, verify_on_host
from harness.trees import digest

from .config import TestConfig

ALWAYS = ("--cache=never", "--mapped-writes=always", "--allow-mmap")


def mapped_writes(path: pathlib.Path) -> int:
    """WRITEs that were copied into a mapping, by the counters behind this socket."""
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(str(path))
        stream.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        text = b"".join(iter(lambda: stream.recv(1 << 16), b"")).decode()
    found = re.search(r'^lanefs_mapped_writes_total\{[^}]*how="copied"[^}]*\} (\d+)', text, re.MULTILINE)
    assert found, text
    return int(found[1])


@pytest.fixture(params=["tmpfs", "ext4", "xfs"])
def mapped(request: pytest.FixtureRequest, config: TestConfig) -> Iterator[tuple[Guest, pathlib.Path]]:
    """A guest whose share is on such a file system, and its directory. Some of its writes have to be mapped."""
    mounted = disk.in_memory() if request.param == "tmpfs" else disk.mounted(request.param)
    with contextlib.ExitStack() as stack:
        share = stack.enter_context(mounted)
        metrics = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) / "metrics"
        guest, _ = stack.enter_context(config.guest(share, *ALWAYS, f"--metrics-socket={metrics}"))
        yield guest, share
        assert mapped_writes(metrics) > 0


def test_one_file_in_every_way(config: TestConfig, mapped: tuple[Guest, pathlib.Path]) -> None:
    """fsx: what is read is always what was written, truncated and punched before."""
    guest, _ = mapped
    steps = config.seconds(10_000, 100_000)
    # Guests before 6.9 cannot map such files.
    mmap = "--mmap" if config.kernel.name not in ("5.10", "6.1", "6.1-debug") else ""
    for seed, more in ((1, f"--fsync=0 {mmap}"), (2, f"--fsync=300 {mmap}"), (3, "--length=65536 --piece=4096")):
        guest.output(f"fsx /mnt/file --seed={seed} --steps={steps} {more}", 600)


def test_files_at_random(config: TestConfig, mapped: tuple[Guest, pathlib.Path], share: pathlib.Path) -> None:
    """The tree is that of the same work on the host. Two programs change one file each meanwhile."""
    guest, mount = mapped
    work = f"--seed 7 --writers 4 --steps {config.seconds(1000, 5000)}"
    steps = config.seconds(5000, 50_000)
    fsx = "".join(f"fsx /mnt/file{i} --seed={i} --steps={steps} --fsync=0 || touch /tmp/failed & " for i in (8, 9))
    guest.output(f"mkdir /mnt/churn; {fsx} churn /mnt/churn {work} && wait && ! [ -e /tmp/failed ]", 600)
    run([tool("churn"), share, *work.split()])
    one, two = digest(mount / "churn"), digest(share)
    assert one == two, sorted(set(one.items()) ^ set(two.items()))[:10]


def test_writers_overlap_and_are_disturbed(config: TestConfig, mapped: tuple[Guest, pathlib.Path]) -> None:
    guest, mount = mapped
    milliseconds = config.seconds(3, 20) * 1000
    guest.output(f"overlap run /mnt/overlap --unit 8192 --units 4 --time {milliseconds}", 120)
    verify_on_host("overlap", mount / "overlap", "--unit", 8192, "--units", 4)
    guest.output(f"disturb run /mnt/disturb --time {milliseconds}", 120)
    verify_on_host("disturb", mount / "disturb")
