"""Requests arrive on every queue, however small or full the ring is."""

import re

from harness import disk

from .concurrency import verify_on_host


def requests(daemon):
    """Queue to the number of requests on it; the daemon has ended."""
    return {int(queue): int(count) for queue, count in re.findall(r"queue (\d+): (\d+) requests", daemon.log())}


def every_queue_is_used(setting):
    with disk.directory() as share:
        with setting.guest(share) as (guest, daemon):
            for cpu in range(setting.cpus):
                guest.output(f"taskset {1 << cpu:x} sh -c 'for i in 1 2 3 4 5 6 7 8; do echo $i >/mnt/cpu{cpu}-$i; done'")
        daemon.close()
        used = requests(daemon)
        for queue in range(1, setting.queues + 1):
            assert used.get(queue, 0) > 0, f"queue {queue} was not used: {used}"


def each_cpu_has_a_queue_of_its_own(setting):
    if not setting.patched and setting.kernel.name in ("5.10", "6.1"):
        return
    setting = setting.with_queues(4)
    with disk.directory() as share:
        (share / "file").touch()
        with setting.guest(share, "--cache=never") as (guest, daemon):
            if setting.patched:
                shown = guest.output("cd /sys/bus/virtio/drivers/virtiofs/virtio*/; cat request_queues queue_cpus").split()
                assert shown[0] == "4" and sorted(shown[2::2]) == ["0", "1", "2", "3"], shown
            for cpu in range(4):
                guest.output(f"taskset {1 << cpu:x} sh -c 'for i in $(seq {50 * (cpu + 1)}); do [ -e /mnt/file ]; done'")
        daemon.close()
        # The mount and the shell's start come on top.
        counts = sorted(count for queue, count in requests(daemon).items() if queue > 0)
        total = sum(counts)
        shares = [round(10 * count / total, 1) for count in counts]
        assert len(shares) == 4 and all(abs(share - wanted) < 0.5 for share, wanted in zip(shares, (1, 2, 3, 4))), shares


def a_full_ring_is_waited_for(setting):
    """64 writers and a ring of 16 descriptors, in which a request has 12 pages."""
    common = "--writers 64 --size 12000001 --stripe 100003"
    with disk.directory() as share, setting.guest(share, "--cache=never", queue_size=16) as (guest, _):
        guest.output(f"stripes write /mnt/file {common}", 300)
        verify_on_host("stripes", share / "file", *common.split())


def requests_go_beyond_a_mebibyte(setting):
    if not setting.patched:
        return
    # 1020 pages are what a ring of 1024 descriptors has room for.
    write = "dd if=/dev/zero of=/mnt/data bs=4080k count=16 2>/dev/null"
    with disk.directory() as share:
        with setting.guest(share, "--cache=never") as (guest, daemon):
            guest.output(write)
        daemon.close()
        assert (share / "data").stat().st_size == 16 * 4080 << 10
        sent = sum(requests(daemon).values())
        assert 16 <= sent < 40, f"16 writes of 4080 KiB took {sent} requests"


TESTS = (every_queue_is_used, each_cpu_has_a_queue_of_its_own, a_full_ring_is_waited_for, requests_go_beyond_a_mebibyte)
