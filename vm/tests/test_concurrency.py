"""Many writers of one file: nothing is lost, mixed, or misplaced."""

import pathlib

from harness import disk
from harness.host import run
from harness.tools import verify_on_host

from .config import TestConfig


def test_stripes_are_whole(config: TestConfig, share: pathlib.Path) -> None:
    with config.guest(share, "--cache=never") as (guest, _):
        for writers, stripe, more in (
            (16, 128 << 10, ""),
            (7, 10007, ""),
            (5, 33333, "--extend"),
            (16, 4096, "--extend"),
        ):
            common = f"--writers {writers} --size {6_000_001} --stripe {stripe}"
            guest.output(f"rm -f /mnt/file; stripes write /mnt/file {common} {more}")
            verify_on_host("stripes", share / "file", *common.split())
            guest.output(f"stripes verify /mnt/file {common}")


def test_appended_records_are_whole(config: TestConfig, share: pathlib.Path) -> None:
    """Two guests append to one file: every record is there, once, and in one piece."""
    writers, records = 4, 60
    append = f'for i in $(seq {records}); do echo "$1 $i $(printf %0200d $i)"; done >>/mnt/log'
    with config.guest(share, "--cache=never") as (one, _), config.guest(share, "--cache=never") as (two, _):
        for name, guest in (("one", one), ("two", two)):
            guest.output(f"cat >/tmp/append <<'END'\n{append}\nEND")
            starts = "".join(f"sh /tmp/append {name}-{writer} & " for writer in range(writers))
            # Does not wait, so that both guests write at once.
            guest.output(f"({starts} wait; echo done >/tmp/done) >/dev/null 2>&1 &")
        for guest in (one, two):
            guest.output("while ! [ -e /tmp/done ]; do sleep 0.1; done")
        lines = (share / "log").read_text().splitlines()
        expected = {
            f"{name}-{writer} {i} {i:0200d}"
            for name in ("one", "two")
            for writer in range(writers)
            for i in range(1, records + 1)
        }
        assert len(lines) == len(expected) and set(lines) == expected, f"{len(lines)} lines, {len(expected)} expected"


def test_overlapping_writes_do_not_mix(config: TestConfig) -> None:
    """O_DIRECT on the host, where ext4 and XFS let overlapping writes run side by side."""
    milliseconds = config.seconds(4, 30) * 1000
    for kind in ("ext4", "xfs"):
        with disk.mounted(kind) as share, config.guest(share, "--cache=never", "--allow-direct-io") as (guest, _):
            for unit, more in ((64 << 10, "--direct"), (512 << 10, "--direct"), (64 << 10, "")):
                arguments = f"--unit {unit} --units 4"
                guest.output(f"overlap run /mnt/file-{unit} {arguments} {more} --time {milliseconds}", 120)
                verify_on_host("overlap", share / f"file-{unit}", *arguments.split())


def test_two_guests_do_not_mix_blocks(config: TestConfig) -> None:
    """Each guest has a daemon of its own. They meet in the host's file system, which keeps blocks whole."""
    arguments = f"--unit 4096 --units 8 --direct --readers 1 --writers 4 --time {config.seconds(5, 30) * 1000}"
    with disk.mounted("ext4") as share:
        run(["fallocate", "-l", 8 * 4096, share / "file"])
        run(["dd", "if=/dev/zero", f"of={share}/file", "bs=4096", "count=8", "conv=notrunc,fsync"])
        options = ("--cache=never", "--allow-direct-io")
        with config.guest(share, *options) as (one, _), config.guest(share, *options) as (two, _):
            one.output(
                f"(overlap run /mnt/file {arguments} --guest 1 >/tmp/out 2>&1; echo $? >/tmp/done) >/dev/null 2>&1 &"
            )
            two.output(f"overlap run /mnt/file {arguments} --guest 2", 120)
            outcome = one.output("while ! [ -e /tmp/done ]; do sleep 0.1; done; cat /tmp/out /tmp/done", 60)
            assert outcome.split()[-1] == "0", outcome
        verify_on_host("overlap", share / "file", "--unit", 4096, "--units", 8)
