"""Requests arrive on every queue, however small or full the ring is."""

import pathlib
import re

import pytest

from harness.daemon import Daemon
from harness.tools import verify_on_host

from .config import TestConfig


def requests(daemon: Daemon) -> dict[int, int]:
    """Queue to the number of requests on it; the daemon has ended."""
    return {int(queue): int(count) for queue, count in re.findall(r"queue (\d+): (\d+) requests", daemon.log())}


def test_every_queue_is_used(config: TestConfig, share: pathlib.Path) -> None:
    with config.guest(share) as (guest, daemon):
        for cpu in range(config.cpus):
            guest.output(f"taskset {1 << cpu:x} sh -c 'for i in 1 2 3 4 5 6 7 8; do echo $i >/mnt/cpu{cpu}-$i; done'")
    daemon.close()
    used = requests(daemon)
    for queue in range(1, config.queues + 1):
        assert used.get(queue, 0) > 0, f"queue {queue} was not used: {used}"


def test_each_cpu_has_a_queue_of_its_own(config: TestConfig, share: pathlib.Path) -> None:
    if not config.patched and config.kernel.name in ("5.10", "6.1"):
        pytest.skip(f"the stock module of Linux {config.kernel.name} uses one queue")
    config = config.with_queues(4)
    (share / "file").touch()
    with config.guest(share, "--cache=never") as (guest, daemon):
        if config.patched and config.kernel.name in ("5.10", "6.1"):
            assert guest.output("cat /sys/bus/virtio/drivers/virtiofs/virtio*/request_queues").strip() == "4"
        for cpu in range(4):
            guest.output(f"taskset {1 << cpu:x} sh -c 'for i in $(seq {50 * (cpu + 1)}); do [ -e /mnt/file ]; done'")
    daemon.close()
    # The mount and the shell's start come on top.
    counts = sorted(count for queue, count in requests(daemon).items() if queue > 0)
    total = sum(counts)
    tenths = [round(10 * count / total, 1) for count in counts]
    assert len(tenths) == 4 and all(
        abs(part - expected) < 0.5 for part, expected in zip(tenths, (1, 2, 3, 4), strict=True)
    ), tenths


def test_a_full_ring_is_waited_for(config: TestConfig, share: pathlib.Path) -> None:
    """64 writers and a ring of 16 descriptors, in which a request has 12 pages."""
    common = "--writers 64 --size 12000001 --stripe 100003"
    with config.guest(share, "--cache=never", queue_size=16) as (guest, _):
        guest.output(f"stripes write /mnt/file {common}", 300)
        verify_on_host("stripes", share / "file", *common.split())


@pytest.mark.patched
def test_an_unaligned_buffer_takes_no_second_request(config: TestConfig, share: pathlib.Path) -> None:
    """A MiB from a buffer that begins within a page has 257 pages; stock kernels send 256 at most."""
    with config.guest(share, "--cache=never") as (guest, daemon):
        guest.output("unaligned-write /mnt/data 64")
    daemon.close()
    sent = sum(requests(daemon).values())
    assert 64 <= sent < 100, f"64 writes of 1 MiB took {sent} requests"


def test_requests_go_beyond_a_mebibyte(config: TestConfig, share: pathlib.Path) -> None:
    """By our modules, and from Linux 6.13 on by a sysctl, which counts at the mount."""
    by_sysctl = config.kernel.name == "7.2"
    if not config.patched and not by_sysctl:
        pytest.skip(f"Linux {config.kernel.name} needs our FUSE modules")
    # A ring of 1024 descriptors has room for 1020 pages.
    write = "dd if=/dev/zero of=/mnt/data bs=4080k count=16 2>/dev/null"
    with config.guest(share, "--cache=never") as (guest, daemon):
        if by_sysctl:
            guest.output("umount /mnt; echo 1024 >/proc/sys/fs/fuse/max_pages_limit")
            guest.mount()
        guest.output(write)
    daemon.close()
    assert (share / "data").stat().st_size == 16 * 4080 << 10
    sent = sum(requests(daemon).values())
    assert 16 <= sent < 40, f"16 writes of 4080 KiB took {sent} requests"
