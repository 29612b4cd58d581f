"""Guests and daemons that come, go, and fail."""

import contextlib
import pathlib

from harness.daemon import Daemon
from harness.host import HarnessError

from .config import TestConfig


def test_a_guest_is_reset_and_mounts_again(config: TestConfig, share: pathlib.Path) -> None:
    with config.guest(share) as (guest, daemon):
        guest.output("echo before >/mnt/file; sync; (while :; do echo more >>/mnt/noise; done) >/dev/null 2>&1 &")
        # The reset comes while it writes.
        guest.output("while ! [ -s /mnt/noise ]; do sleep 0.1; done")
        guest.reset()
        guest.mount()
        assert guest.output("cat /mnt/file") == "before"
        guest.output("echo after >/mnt/file; rm /mnt/noise")
        assert (share / "file").read_text() == "after\n"
        assert daemon.log().count("session begins") == 2, daemon.log()


def test_a_guest_that_ends_ends_the_daemon(config: TestConfig, share: pathlib.Path) -> None:
    with Daemon(share, name="test") as daemon:
        with config.boot(daemon) as guest:
            guest.mount()
            guest.output("echo written >/mnt/file")
        assert daemon.wait() == 0, daemon.log()
        assert (share / "file").read_text() == "written\n"
        assert not daemon.socket.exists()


def test_a_daemon_that_keeps_listening_serves_the_next_guest(config: TestConfig, share: pathlib.Path) -> None:
    with Daemon(share, ["--keep-listening"], name="test") as daemon:
        for number in range(2):
            with config.boot(daemon) as guest:
                guest.mount()
                guest.output(f"echo {number} >>/mnt/file")
        assert (share / "file").read_text() == "0\n1\n"


def test_a_killed_daemon_does_not_hang_the_test(config: TestConfig, share: pathlib.Path) -> None:
    """A Linux guest waits endlessly for a device that has gone; the host must still be able to end it."""
    with config.guest(share) as (guest, daemon):
        guest.output("echo kept >/mnt/file; sync")
        daemon.kill()
        with contextlib.suppress(HarnessError):
            guest.run("ls /mnt", timeout=5)
    assert guest.running.poll() is not None, "QEMU is still there"
    assert (share / "file").read_text() == "kept\n"


def test_a_device_can_be_unbound_and_bound_again(config: TestConfig, share: pathlib.Path) -> None:
    with config.guest(share) as (guest, _):
        driver = "/sys/bus/virtio/drivers/virtiofs"
        guest.output("echo one >/mnt/file; umount /mnt")
        device = guest.output(f"cd {driver}; ls -d virtio* | head -n 1")
        for _ in range(3):
            guest.output(f"echo {device} >{driver}/unbind; echo {device} >{driver}/bind")
        guest.mount()
        assert guest.output("cat /mnt/file") == "one"
