"""The Debian package, in a Debian with systemd."""

import pathlib
import shutil

from harness import disk
from harness.guest import Guest
from harness.host import build_daemon, cargo_environment, run
from harness.paths import DAEMON, REPO, TARGET

from .setup import Setup, step
from .test_root import is_up

CONFIG = """shared-dir = "/srv/share"
xattr = true
"""
SERVICE = "lanefsd@share.service"
LOAD = "/root/loadgen run --socket /run/lanefsd/share.sock --share /srv/share"


def packages(folder: pathlib.Path) -> list[pathlib.Path]:
    """The package, and a later one with the same program."""
    build_daemon()
    command = ["cargo", "xtask", "dist", "--program", str(DAEMON)]
    first = pathlib.Path(run(command, cwd=REPO, env=cargo_environment()).split()[-1])
    tree = folder / "tree"
    run(["dpkg-deb", "--raw-extract", first, tree])
    control = tree / "DEBIAN/control"
    control.write_text(control.read_text().replace("Version: 0.", "Version: 1."))
    second = folder / "second.deb"
    run(["dpkg-deb", "--build", "--root-owner-group", tree, second])
    return [first, second]


def install(guest: Guest, package: str) -> None:
    guest.output(f"DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-download /root/{package}", 300)


def journal(guest: Guest) -> str:
    return guest.output(f"journalctl -u {SERVICE} -o cat --no-pager")


def wait_for(guest: Guest, command: str, seconds: int) -> None:
    """Waits until a shell command succeeds."""
    guest.output(f"for _ in $(seq {seconds}); do if {command}; then exit 0; fi; sleep 1; done; exit 1", seconds * 3)


def serves(guest: Guest, more: str = "--op getattr --time 1") -> None:
    """A front end inside the guest; any error of a request ends it."""
    guest.output(f"{LOAD} {more} >/root/load.log 2>&1 || {{ cat /root/load.log; exit 1; }}", 300)


def life(guest: Guest) -> None:
    step("installs the package")
    install(guest, "first.deb")
    assert guest.output("lanefsd --version; readlink -f /usr/libexec/lanefsd").split()[-1] == "/usr/bin/lanefsd"
    assert "--shared-dir" in guest.output("zcat /usr/share/man/man8/lanefsd.8.gz | tr -d '\\\\'")
    assert "no control socket" in guest.output("lanefsctl status 2>&1 || true")
    assert "--batch" in guest.output("zcat /usr/share/man/man1/lanefsctl.1.gz | tr -d '\\\\'")
    guest.output(f"mkdir -p /srv/share; mount -t tmpfs share /srv/share; cat >/etc/lanefsd/share.conf <<'E'\n{CONFIG}E")
    step("starts a daemon by its socket")
    guest.output("systemctl start lanefsd@share.socket")
    assert guest.run(f"systemctl is-active {SERVICE}", check=False)[1].strip() == "inactive"
    serves(guest)
    # Its front end has gone; the next one has it started again.
    serves(guest)
    step("restarts it")
    guest.output(f"systemctl restart {SERVICE}", 120)
    assert guest.output(f"systemctl is-active {SERVICE}").strip() == "active"
    serves(guest)
    step("upgrades the package while it serves")
    guest.output(
        f"({LOAD} --op small --depth 4 --time 60 >/root/load.log 2>&1; echo $? >/root/load.status) </dev/null &"
    )
    wait_for(guest, f"systemctl is-active {SERVICE}", 60)
    install(guest, "second.deb")
    wait_for(guest, f"journalctl -u {SERVICE} -o cat --no-pager | grep -q 'upgraded from lanefsd'", 60)
    wait_for(guest, "test -e /root/load.status", 200)
    assert guest.output("cat /root/load.status").strip() == "0", guest.output("cat /root/load.log") + journal(guest)
    step("says what is wrong with a configuration")
    guest.output("echo 'shared_dir = \"/srv\"' >/etc/lanefsd/wrong.conf")
    assert guest.run("systemctl start lanefsd@wrong.socket lanefsd@wrong.service", 120, check=False)[0]
    assert "unknown key shared_dir" in guest.output("journalctl -u lanefsd@wrong.service -o cat --no-pager")
    guest.output("systemctl stop lanefsd@wrong.socket; systemctl reset-failed; rm /etc/lanefsd/*.conf")
    step("removes the package")
    guest.output("DEBIAN_FRONTEND=noninteractive apt-get purge -y -q lanefsd", 300)
    left = guest.output(
        "find / -xdev -name '*lanefsd*' ! -path '/root/*' ! -path '/proc/*' ! -path '/sys/*' ! -path '/var/log/*'; "
        "systemctl list-units --plain --no-legend 'lanefsd*'; pgrep lanefsd || true"
    )
    assert left == "", left


def test_package(setup: Setup) -> None:
    """The Debian package: socket activation, restart, upgrade while it serves, removal."""
    with setup.debian_root() as root, disk.directory() as folder:
        for name, package in zip(("first.deb", "second.deb"), packages(folder), strict=True):
            shutil.copy(package, root / "root" / name)
        shutil.copy(TARGET / "release/loadgen", root / "root/loadgen")
        with setup.debian_guest(root, "--xattr") as (guest, _):
            is_up(guest)
            life(guest)
