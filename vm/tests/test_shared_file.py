"""One file and many writers of one guest: growing it, appending to it, and others in their way."""

import pathlib
import re

import pytest

from harness import disk
from harness.tools import verify_on_host

from .config import TestConfig

WRITERS = 12


def test_extending_writers_are_whole(config: TestConfig, share: pathlib.Path) -> None:
    """Readers check meanwhile that the file never shrinks and that it has all acknowledged data."""
    crowds = ((2, 33_333), (7, 10_007), (16, 65_537), (32, 4_099)) if config.full else ((3, 10_007), (32, 4_099))
    with config.guest(share, "--cache=never") as (guest, _):
        for writers, stripe in crowds:
            common = f"--writers {writers} --size 6000001 --stripe {stripe}"
            guest.output(
                f"rm -f /mnt/file; stripes write /mnt/file {common} --extend --watchers 2 --progress /tmp/done"
            )
            verify_on_host("stripes", share / "file", *common.split())
            assert int(guest.output("stat -c %s /mnt/file")) == 6000001


def test_appended_blocks_are_whole(config: TestConfig, share: pathlib.Path) -> None:
    with config.guest(share, "--cache=never", "--allow-direct-io") as (guest, _):
        for name, record, more in (("direct", 4096, "--direct"), ("odd", 5003, "")):
            common = f"--writers {16 if config.full else 8} --records 40 --record {record}"
            guest.output(f"append run /mnt/{name} {common} {more}")
            verify_on_host("append", share / name, *common.split())
            guest.output(f"append verify /mnt/{name} {common}")


def test_writers_and_truncation_keep_apart(config: TestConfig, share: pathlib.Path) -> None:
    """Truncating, punching holes, allocating, renaming and unlinking while others write."""
    milliseconds = config.seconds(3, 20) * 1000
    with config.guest(share, "--cache=never") as (guest, _):
        guest.output(f"disturb run /mnt/file --time {milliseconds}")
        verify_on_host("disturb", share / "file")
        guest.output("disturb verify /mnt/file")
        guest.output(f"disturb run /mnt/gone --unlink --time {milliseconds // 2}")
        assert not (share / "gone").exists()


# Many writers of one file, {file}; the file is the first argument of each.
STRIPES = f"stripes write {{file}} --writers {WRITERS} --size 6291456 --stripe 16384"
WAYS = {
    "overwriting": STRIPES,
    "extending": f"{STRIPES} --extend",
    "appending": f"append run {{file}} --writers {WRITERS} --records 8",
}


def in_flight(config: TestConfig, *arguments: str, latency: str = "30ms") -> dict[str, int]:
    """For each way of writing, the most writes of one file that the daemon has had at once."""
    with disk.directory() as share:
        options = ("--cache=never", f"--store=null:{latency}", *arguments)
        with config.guest(share, *options) as (guest, daemon):
            for name, command in WAYS.items():
                guest.output(command.format(file=f"/mnt/{name}"))
            guest.output("umount /mnt")
        daemon.close()
        # Node ids are in the order in which the files were made.
        seen = {
            int(node): int(count) for node, count in re.findall(r"node (\d+): (\d+) writes in flight", daemon.log())
        }
        assert len(seen) == len(WAYS), daemon.log()
        return dict(zip(WAYS, (seen[node] for node in sorted(seen))))


def test_writers_of_one_file_are_in_flight_together(config: TestConfig) -> None:
    """The null store counts how many writes the guest's lock lets through at once."""
    together = {"overwriting": config.parallel, "extending": config.patched, "appending": False}
    for name, most in in_flight(config).items():
        if name == "extending" and config.parallel and not config.patched:
            # A writer that has fallen behind the end of the file does not extend it any more.
            assert 1 <= most < WRITERS, f"{name}: {most} writers were in flight at once"
        elif together[name]:
            assert most >= WRITERS - 1, f"{name}: only {most} of {WRITERS} writers were in flight at once"
        else:
            assert most == 1, f"{name}: {most} writers were in flight at once"


@pytest.mark.patched
@pytest.mark.full
def test_extending_writes_take_turns_if_the_daemon_says_so(config: TestConfig) -> None:
    most = in_flight(config, "--no-parallel-extending")
    assert most["extending"] < WRITERS - 1 <= most["overwriting"], most


def test_without_the_flag_writers_take_turns(config: TestConfig) -> None:
    for name, most in in_flight(config, "--parallel-direct-writes=never", latency="5ms").items():
        assert most == 1, f"{name}: {most} writers were in flight at once"
