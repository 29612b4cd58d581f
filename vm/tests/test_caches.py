"""Direct writers, cached readers and mappings of one file in one guest. Needs our modules."""

import pathlib

import pytest

from harness import disk
from harness.guest import GuestError

from .config import TestConfig


@pytest.mark.patched
def test_cached_readers_see_direct_writes(config: TestConfig) -> None:
    """Private mappings can be stale even if the daemon keeps one mode for each file."""
    milliseconds = config.seconds(2, 15) * 1000
    with config.mounts("--cache=never", "--cache=metadata", "--cache=auto") as (guest, mounts):
        for point, _ in mounts:
            guest.output(f"agree {point}/file --time {milliseconds}")


@pytest.mark.patched
def test_mixed_openers_agree(config: TestConfig, share: pathlib.Path) -> None:
    """A daemon that lets some openers of a file use the cache and others write past it."""
    milliseconds = config.seconds(3, 20) * 1000
    with config.guest(share, "--cache=auto", faults=["--mixed-modes"], fio=True) as (guest, _):
        guest.output(f"agree /mnt/file --time {milliseconds}")
        guest.output(f"agree /mnt/shared --shared --time {milliseconds}")
        # Asynchronous writes, while the file is kept in the cache.
        guest.output("dd if=/dev/zero of=/mnt/async bs=1M count=4 2>/dev/null")
        guest.output("(while ! [ -e /tmp/stop ]; do cat /mnt/async >/dev/null; done) >/dev/null 2>&1 &")
        for byte in (0xA1, 0xB2, 0xC3):
            guest.output(
                "fio --name=x --filename=/mnt/async --rw=write --bs=64k --size=4m --direct=1 --ioengine=libaio "
                f"--iodepth=16 --buffer_pattern={byte:#x} --output=/tmp/fio"
            )
            # Bytes of the file, and those of them that are something else.
            seen = guest.output(f"cat /mnt/async | wc -c; cat /mnt/async | tr -d '\\{byte:o}' | wc -c").split()
            assert seen == [str(4 << 20), "0"], seen
        guest.output("touch /tmp/stop")


def collide(config: TestConfig) -> None:
    """Lets the guest write pages back while direct writes to the same file run."""
    milliseconds = config.seconds(3, 20) * 1000
    faults = ["--mixed-modes", "--delay", "10"]
    with disk.directory() as share, config.guest(share, "--cache=auto", faults=faults) as (guest, _):
        guest.output(f"agree /mnt/file --collide --writers 2 --readers 0 --time {milliseconds}", 60)


@pytest.mark.patched
def test_writeback_meets_parallel_writes(config: TestConfig) -> None:
    collide(config)


@pytest.mark.full
@pytest.mark.stock
@pytest.mark.kernels("6.1")
def test_writeback_crashes_the_stock_module(config: TestConfig) -> None:
    """On a kernel below 6.9 without our modules (BUG_ON in fuse_set_nowrite)."""
    with pytest.raises(GuestError, match=r"kernel BUG at fs/fuse/dir\.c"):
        collide(config)
