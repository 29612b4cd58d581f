"""The Debian package, in a Debian with systemd."""

import json
import pathlib
import shutil
from typing import Any

from harness import debian, disk
from harness.guest import Guest
from harness.host import HarnessError, require, run
from harness.paths import REPO, TARGET

from .setup import Setup, package, step
from .test_root import is_up

CONFIG = """shared-dir = "/srv/share"
xattr = true
"""
SERVICE = "lanefsd@share.service"
# It counts the processor time of a process; the daemon is none yet when the load starts.
LOAD = "/root/loadgen run --socket /run/lanefsd/{}.sock --share /srv/share --pid 1"
PROFILE = "/usr/share/apparmor/extra-profiles/usr.bin.lanefsd"
# Its storage is in memory: overlayfs takes no upper directory on every share.
PODMAN = "podman --root /run/podman"
# Sockets of lanefsd; empty without any.
SOCKETS = "ls /run/lanefsd 2>/dev/null || true"


def packages(folder: pathlib.Path) -> list[pathlib.Path]:
    """The package, and a later one with the same program."""
    first = package()
    tree = folder / "tree"
    run(["dpkg-deb", "--raw-extract", first, tree])
    control = tree / "DEBIAN/control"
    control.write_text(control.read_text().replace("Version: 0.", "Version: 1."))
    second = folder / "second.deb"
    run(["dpkg-deb", "--build", "--root-owner-group", tree, second])
    return [first, second]


def install(guest: Guest, name: str) -> None:
    # It needs nothing that has to be fetched. With --no-download, apt refuses a path.
    guest.output(f"DEBIAN_FRONTEND=noninteractive apt-get install -y -q /root/{name}", 300)


def journal(guest: Guest) -> str:
    return guest.output(f"journalctl -u {SERVICE} -o cat --no-pager")


def wait_for(guest: Guest, command: str, seconds: int) -> None:
    """Waits until a shell command succeeds."""
    guest.output(f"for _ in $(seq {seconds}); do if {command}; then exit 0; fi; sleep 1; done; exit 1", seconds * 3)


def serves(guest: Guest, more: str = "--op getattr --time 1", share: str = "share") -> None:
    """A front end inside the guest; any error of a request ends it."""
    guest.output(f"{LOAD.format(share)} {more} >/root/load.log 2>&1 || {{ cat /root/load.log; exit 1; }}", 300)


def starts_and_restarts(guest: Guest) -> None:
    step("starts a daemon by its socket")
    guest.output("systemctl start lanefsd@share.socket")
    assert guest.run(f"systemctl is-active {SERVICE}", check=False)[1].strip() == "inactive"
    serves(guest)
    # Its front end has gone; the next one has it started again.
    serves(guest)
    step("restarts it")
    guest.output(f"systemctl restart {SERVICE}", 120)
    assert guest.output(f"systemctl is-active {SERVICE}").strip() == "active"
    assert guest.output(SOCKETS).split() == ["share.ctl", "share.sock"]
    assert status(guest)["front_end"] is False
    serves(guest)
    wait_for(guest, f"! systemctl is-active {SERVICE}", 60)
    assert guest.output(SOCKETS).split() == ["share.sock"], "the control socket ends with the daemon"


def status(guest: Guest) -> dict[str, Any]:
    """The state of the only share, by its control socket in the place where lanefsctl looks."""
    found: dict[str, Any] = json.loads(guest.output("lanefsctl --json status"))["ok"]
    assert "share /srv/share" in guest.output("lanefsctl status").splitlines()
    return found


def upgrades(guest: Guest, apparmor: bool) -> None:
    step("upgrades the daemon while it serves, by lanefsctl and by systemctl")
    # The load ends at the first request with an error. It lasts for as long as the slowest guest needs.
    guest.output(
        f"(nice {LOAD.format('share')} --op small --depth 2 --time 1800 >/root/load.log 2>&1; touch /root/load.ended) </dev/null &"
    )
    wait_for(guest, "lanefsctl status 2>/dev/null | grep -q 'front end  *connected'", 60)
    before = status(guest)
    assert "was upgraded from lanefsd" in guest.output("lanefsctl upgrade")
    guest.output(f"systemctl reload {SERVICE}")
    wait_for_upgrades(guest, 2)
    step("upgrades the package while it serves")
    install(guest, "second.deb")
    wait_for_upgrades(guest, 3)
    after = status(guest)
    assert after["pid"] == before["pid"], "the process stays"
    assert after["upgrades"] == 3, after
    if apparmor:
        is_confined(guest)
    assert "active (running)" in guest.output(f"systemctl status --no-pager {SERVICE}")
    assert answered(status(guest)) > answered(after), "requests go on"
    assert guest.run("test -e /root/load.ended", check=False)[0], guest.output("cat /root/load.log") + journal(guest)
    guest.output("pkill -x loadgen")
    wait_for(guest, f"! systemctl is-active {SERVICE}", 60)


def refuses_an_upgrade(guest: Guest) -> None:
    step("leaves a share that cannot be upgraded as it is")
    service = "lanefsd@mortal.service"
    more = "no-survive = true\nkeep-listening = true\n"
    guest.output(f"cat >/etc/lanefsd/mortal.conf <<'E'\n{CONFIG}{more}E")
    guest.output(f"systemctl start lanefsd@mortal.socket {service}", 120)
    before = guest.output(f"systemctl show --property=MainPID {service}")
    assert guest.run(f"systemctl reload {service}", 120, check=False)[0]
    assert "--no-survive" in guest.output(f"journalctl -u {service} -o cat --no-pager")
    assert guest.output(f"systemctl is-active {service}").strip() == "active"
    assert guest.output(f"systemctl show --property=MainPID {service}") == before
    serves(guest, share="mortal")
    guest.output(f"systemctl stop lanefsd@mortal.socket {service}; rm /etc/lanefsd/mortal.conf", 120)


def answered(share: dict[str, Any]) -> int:
    """The number of requests that a share has answered."""
    return sum(queue["requests"] for queue in share["queues"])


def confines(guest: Guest) -> None:
    step("loads the AppArmor profile")
    assert guest.output("cat /sys/module/apparmor/parameters/enabled").strip() == "Y"
    guest.output(f"apparmor_parser --replace --skip-cache {PROFILE}")


def is_confined(guest: Guest) -> None:
    """Whether all processes of a daemon that runs are confined; none may have been denied anything."""
    found = guest.output("for pid in $(pgrep -x 'lanefsd.*'); do cat /proc/$pid/attr/current; done").splitlines()
    assert len(found) >= 3 and set(found) == {"lanefsd (enforce)"}, found
    denied = guest.output("journalctl -k -o cat --no-pager | grep 'apparmor=\"DENIED\"' || true")
    assert denied == "", denied


def wait_for_upgrades(guest: Guest, number: int) -> None:
    """Waits for the log message of an upgrade."""
    found = f"journalctl -u {SERVICE} -o cat --no-pager | grep -c 'upgraded from lanefsd'"
    wait_for(guest, f'[ "$({found})" -ge {number} ]', 60)


def runs_in_a_container(guest: Guest) -> None:
    """The image of the package, with the capabilities that podman gives a container."""
    step("runs its container image")
    image = guest.output(f"{PODMAN} load -q -i /root/image.tar", 600).split()[-1]
    guest.output("mkdir -p /run/lanefsd")
    guest.output(
        f"{PODMAN} run -d --name box --network none -v /srv/share:/share -v /run/lanefsd:/run/lanefsd "
        f"{image} --shared-dir /share --socket-path /run/lanefsd/box.sock --control-socket /run/lanefsd/box.ctl "
        "--sandbox chroot --keep-listening",
        300,
    )
    wait_for(guest, f"{PODMAN} exec box lanefsctl status", 60)
    serves(guest, share="box")
    log = guest.output(f"{PODMAN} exec box lanefsctl status; {PODMAN} stop box >/dev/null; {PODMAN} logs box 2>&1", 300)
    assert "share /share" in log.splitlines() and "front end connected" in log, log
    guest.output(f"{PODMAN} rm -f box; {PODMAN} rmi -f {image}", 300)


def life(guest: Guest, apparmor: bool) -> None:
    step("installs the package")
    install(guest, "first.deb")
    assert guest.output("lanefsd --version; readlink -f /usr/libexec/lanefsd").split()[-1] == "/usr/bin/lanefsd"
    assert "--shared-dir" in guest.output("zcat /usr/share/man/man8/lanefsd.8.gz | tr -d '\\\\'")
    assert "no control socket" in guest.output("lanefsctl status 2>&1 || true")
    assert "--batch" in guest.output("zcat /usr/share/man/man1/lanefsctl.1.gz | tr -d '\\\\'")
    guest.output(f"mkdir -p /srv/share; mount -t tmpfs share /srv/share; cat >/etc/lanefsd/share.conf <<'E'\n{CONFIG}E")
    if apparmor:
        confines(guest)
    starts_and_restarts(guest)
    upgrades(guest, apparmor)
    refuses_an_upgrade(guest)
    step("says what is wrong with a configuration")
    guest.output("echo 'shared_dir = \"/srv\"' >/etc/lanefsd/wrong.conf")
    assert guest.run("systemctl start lanefsd@wrong.socket lanefsd@wrong.service", 120, check=False)[0]
    assert "unknown key shared_dir" in guest.output("journalctl -u lanefsd@wrong.service -o cat --no-pager")
    guest.output("systemctl stop lanefsd@wrong.socket; systemctl reset-failed; rm /etc/lanefsd/*.conf")
    if not apparmor:
        runs_in_a_container(guest)
    step("removes the package")
    if apparmor:
        guest.output(f"apparmor_parser --remove {PROFILE}")
    guest.output("DEBIAN_FRONTEND=noninteractive apt-get purge -y -q lanefsd", 300)
    left = guest.output(
        "find / -xdev -name '*lanefsd*' ! -path '/root/*' ! -path '/proc/*' ! -path '/sys/*' ! -path '/var/log/*'; "
        "find /run /tmp /dev/shm -name '*lanefsd*' ! -path '/run/systemd/*'; "
        "systemctl list-units --plain --no-legend 'lanefsd*'; pgrep lanefsd || true"
    )
    assert left == "", left


def lifetime(setup: Setup, made: debian.Root, apparmor: bool = False) -> None:
    """Makes the packages on the host, and runs them in a guest with this system."""
    with setup.debian_root(made) as root, disk.directory() as folder:
        first, second = packages(folder)
        for name, made_package in (("first.deb", first), ("second.deb", second)):
            shutil.copy(made_package, root / "root" / name)
        if not apparmor:
            require("umoci")
            run([REPO / "dist/oci/build", first, root / "root/image.tar"])
        shutil.copy(TARGET / "release/loadgen", root / "root/loadgen")
        with setup.debian_guest(root, "--xattr") as (guest, _):
            is_up(guest)
            try:
                life(guest, apparmor)
            except HarnessError as error:
                more = guest.run(f"systemctl status --no-pager {SERVICE}; tail -n 5 /root/load.log", check=False)[1]
                raise HarnessError(f"{error}\n{more}\n{journal(guest)}") from None


def test_package(setup: Setup) -> None:
    """The Debian package: socket activation, lanefsctl, restart, upgrade while it serves, removal."""
    lifetime(setup, debian.SYSTEMD)


def test_package_in_trixie(setup: Setup) -> None:
    """The same package in Debian 13, with the AppArmor profile."""
    lifetime(setup, debian.TRIXIE, apparmor=True)
