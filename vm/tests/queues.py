"""Requests arrive on every queue, and many of them at once."""

import re

from harness import disk


def every_queue_is_used(setting):
    with disk.directory() as share:
        with setting.guest(share) as (guest, daemon):
            for cpu in range(setting.cpus):
                guest.output(f"taskset {1 << cpu:x} sh -c 'for i in 1 2 3 4 5 6 7 8; do echo $i >/mnt/cpu{cpu}-$i; done'")
        daemon.close()
        used = {int(queue): int(count) for queue, count in re.findall(r"queue (\d+): (\d+) requests", daemon.log())}
        for queue in range(1, setting.queues + 1):
            assert used.get(queue, 0) > 0, f"queue {queue} was not used: {used}"


def writers_of_one_file_are_in_flight_together(setting):
    """The guest's lock lets them through, and the daemon takes them: seen in the null store."""
    def most(mode):
        with disk.directory() as share:
            arguments = ("--cache=never", "--store=null:20ms", f"--parallel-direct-writes={mode}")
            with setting.guest(share, *arguments) as (guest, daemon):
                guest.output("stripes write /mnt/file --writers 8 --size 2097152 --stripe 16384")
                guest.output("umount /mnt")
            daemon.close()
            seen = [int(count) for count in re.findall(r"(\d+) writes in flight at most", daemon.log())]
            assert seen, daemon.log()
            return max(seen)

    assert most("never") == 1
    parallel = most("auto")
    # Linux 5.10 as Debian has it does not know the flag.
    if setting.kernel.name == "5.10" and "stock" in setting.image.name:
        assert parallel == 1
    else:
        assert parallel >= 6, f"only {parallel} of 8 writers were in flight at once"


TESTS = (every_queue_is_used, writers_of_one_file_are_in_flight_together)
