"""FUSE servers of the guest that know nothing of our modules see no change: the programs of guest-kernel/tests."""

import pathlib

import pytest

from harness.guest import GuestError

from .config import TestConfig

WRITERS = 8


def in_flight(config: TestConfig, share: pathlib.Path, *options: str) -> dict[str, int]:
    """For each way of writing, the most writes of one file that a FUSE server in the guest has had at once."""
    with config.guest(share) as (guest, _):
        words = guest.output(f"in-flight {' '.join(options)}").split()
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


def test_another_server_sees_no_parallel_extending_writes(config: TestConfig, share: pathlib.Path) -> None:
    """A server that sets FOPEN_PARALLEL_DIRECT_WRITES alone, with any modules."""
    most = in_flight(config, share)
    assert most == {"overwriting": WRITERS if config.parallel else 1, "extending": 1, "appending": 1}


def test_a_server_that_asks_sees_parallel_extending_writes(config: TestConfig, share: pathlib.Path) -> None:
    """Kernels without our modules ignore the flag."""
    most = in_flight(config, share, "--extending")
    extending = WRITERS if config.patched else 1
    assert most == {"overwriting": WRITERS if config.parallel else 1, "extending": extending, "appending": 1}


@pytest.mark.parametrize("how", ["open", "create"])
def test_a_truncating_open_keeps_the_size_of_a_write(config: TestConfig, share: pathlib.Path, how: str) -> None:
    """With the flag; without it the kernel's old rule holds: the last answer wins."""
    with config.guest(share) as (guest, _):
        kept = guest.output(f"open-truncates {how} --extending").strip()
        lost = guest.output(f"open-truncates {how}").strip()
    assert (kept, lost) == ("4096" if config.patched else "0", "0")


def test_a_mapping_shows_a_direct_write(config: TestConfig, share: pathlib.Path) -> None:
    """Linux from 6.6 on, and our modules, drop the cached page."""
    with config.guest(share) as (guest, _):
        shown = guest.output("cached-reader").strip()
    assert shown == ("b" if config.patched or config.kernel.name in ("6.12", "7.2") else "a")


@pytest.mark.patched
def test_writeback_and_parallel_writes_of_one_page_leave_the_kernel_alive(
    config: TestConfig, share: pathlib.Path
) -> None:
    with config.guest(share) as (guest, _):
        assert guest.output("writeback-crash").strip() == "alive"


@pytest.mark.full
@pytest.mark.stock
@pytest.mark.kernels("6.1")
def test_writeback_and_parallel_writes_of_one_page_crash_a_stock_kernel(
    config: TestConfig, share: pathlib.Path
) -> None:
    with pytest.raises(GuestError, match=r"kernel BUG at fs/fuse/dir\.c"), config.guest(share) as (guest, _):
        guest.output("writeback-crash")
