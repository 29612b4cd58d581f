"""A Debian with systemd whose root file system is a share."""

import pathlib

from harness import debian
from harness.guest import Guest

from .setup import Setup, step

# A program of one small package that needs no other.
PACKAGE = "hello"


def is_up(guest: Guest) -> None:
    """Waits until systemd has started everything; no unit may have failed."""
    status, state = guest.run("systemctl is-system-running --wait", 300, check=False)
    if status:
        failed = guest.run(
            "systemctl --failed --no-legend --plain; journalctl -b -p err --no-pager | tail -n 30", check=False
        )[1]
        raise guest.error(f"the system is {state}:\n{failed}")
    found = guest.output("stat -f -c %T /; awk '$2 == \"/\" { print $3 }' /proc/mounts | tail -n 1").split()
    assert found[-1] == "virtiofs", found


def life(setup: Setup, root: pathlib.Path, kernel: str | None = None) -> None:
    """Boots, installs a package, reboots, loses its power, and turns itself off."""
    debian.fetch(root, PACKAGE)
    with setup.debian_guest(root, "--xattr", kernel=kernel) as (guest, daemon):
        step("boots")
        is_up(guest)
        step(f"installs {PACKAGE}")
        guest.output(f"DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-download {PACKAGE}", 300)
        assert guest.output("hello") == "Hello, world!"
        assert (root / "usr/bin/hello").exists()
        assert guest.output("dpkg --audit; dpkg --verify") == ""
        step("reboots")
        guest.reboot("systemctl reboot")
        is_up(guest)
        assert guest.output("hello") == "Hello, world!"
        step("is reset while it writes")
        guest.output("echo kept >/root/kept; sync; (while :; do date >>/root/noise; done) </dev/null >/dev/null 2>&1 &")
        guest.reset()
        is_up(guest)
        assert guest.output("cat /root/kept") == "kept"
        step("removes the package")
        guest.output(f"DEBIAN_FRONTEND=noninteractive apt-get purge -y -q {PACKAGE}", 300)
        assert not (root / "usr/bin/hello").exists()
        step("turns itself off")
        guest.power_off("systemctl poweroff", 120)
        assert daemon.wait() == 0, daemon.log()


def test_debian_root(setup: Setup) -> None:
    """Debian with systemd on a share, with its own kernel and initramfs."""
    with setup.debian_root() as root:
        life(setup, root)


def test_debian_root_without_initramfs(setup: Setup) -> None:
    """The same with Linux 7.2, which mounts the share as its root itself."""
    with setup.debian_root() as root:
        life(setup, root, "7.2")
