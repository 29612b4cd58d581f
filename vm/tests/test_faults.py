"""Errors and signals in the middle of parallel writes: each writer gets its own, the others' data is there."""

import errno
import os
import pathlib
import re
import signal
import time

from harness import disk
from harness.guest import Guest
from harness.tools import verify_on_host

from .config import TestConfig

WRITERS = 8
STRIPE = 40_961
SIZE = 6_000_001
STRIPES = f"--writers {WRITERS} --stripe {STRIPE}"
WRITE = f"stripes write /mnt/file {STRIPES} --extend --tolerate --progress /tmp/done"


def errors(output: str) -> dict[int, int]:
    """Writer to the error that it got."""
    return {int(writer): int(error) for writer, error in re.findall(r"writer (\d+) error (\d+)", output)}


def check_what_was_written(guest: Guest, share: pathlib.Path, size: int = SIZE) -> list[int]:
    """Checks that every acknowledged stripe is in the file, and that both sides agree on the size."""
    done = guest.output(f"cd /tmp/done; for i in $(seq 0 {WRITERS - 1}); do stat -c %s $i; done").split()
    verify_on_host("stripes", share / "file", *STRIPES.split(), "--size", size, "--done", ",".join(done))
    assert int(guest.output("stat -c %s /mnt/file")) == (share / "file").stat().st_size
    return [int(count) for count in done]


def test_a_full_file_system_is_every_writers_error(config: TestConfig) -> None:
    size = 64 << 20
    with disk.mounted("ext4", 32) as share, config.guest(share, "--cache=never") as (guest, _):
        output = guest.output(f"{WRITE} --size {size}")
        assert errors(output) == dict.fromkeys(range(WRITERS), errno.ENOSPC), output
        assert sum(check_what_was_written(guest, share, size)) * STRIPE > 8 << 20
        guest.output("rm /mnt/file; echo room >/mnt/file; sync")


def test_a_file_size_limit_is_one_writers_error(config: TestConfig, share: pathlib.Path) -> None:
    with config.guest(share, "--cache=never") as (guest, _):
        output = guest.output(f"{WRITE} --size {SIZE} --limit-first {SIZE // 2}")
        assert errors(output) == {0: errno.EFBIG}, output
        check_what_was_written(guest, share)


def test_a_failing_store_is_one_writers_error(config: TestConfig, share: pathlib.Path) -> None:
    bad = STRIPE * (WRITERS * 5 + 3) + 1
    faults = ["--fail-from", str(bad), "--fail-to", str(bad + 1)]
    with config.guest(share, "--cache=never", faults=faults) as (guest, _):
        output = guest.output(f"{WRITE} --size {SIZE}")
        assert errors(output) == {3: errno.EIO}, output
        check_what_was_written(guest, share)
        assert os.stat(share / "file").st_size == SIZE


def test_killed_writers_leave_the_others_alone(config: TestConfig, share: pathlib.Path) -> None:
    with config.guest(share, "--cache=never", faults=["--delay", "150"]) as (guest, daemon):
        guest.output(f"({WRITE} --size {SIZE} >/tmp/out 2>&1; echo end >>/tmp/out) >/dev/null 2>&1 & sleep 1")
        guest.output("ps | grep -- '--one [25]$' | awk '{print $1}' | xargs kill -9")
        # And the daemon takes a rest.
        daemon.signal(signal.SIGSTOP)
        time.sleep(1)
        daemon.signal(signal.SIGCONT)
        output = guest.output("while ! grep -q end /tmp/out; do sleep 0.2; done; cat /tmp/out", 60)
        assert "2 processes failed" in output, output
        done = check_what_was_written(guest, share)
        total = -(-SIZE // STRIPE)
        for writer, count in enumerate(done):
            whole = len(range(writer, total, WRITERS))
            assert count < whole if writer in (2, 5) else count == whole, done
