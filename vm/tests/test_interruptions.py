"""Guests that are stopped, suspended, reset, rebooted and killed in the middle of their work."""

import os
import pathlib
import signal
import time

from harness.daemon import Daemon
from harness.guest import Guest
from harness.host import HarnessError

from .config import TestConfig

WORKERS = 4
# Each writes its progress into a file of its own, some small requests a round.
LOAD = """i=0; while :; do
    i=$((i + 1)); echo $i >/mnt/progress-$1; echo $i >/mnt/new-$1; mv /mnt/new-$1 /mnt/old-$1; cat /mnt/old-$1 >/dev/null
    echo $i >/tmp/progress-$1
done"""


def start_load(guest: Guest) -> None:
    guest.output(
        f"cat >/tmp/load <<'END'\n{LOAD}\nEND\n"
        f"for w in $(seq {WORKERS}); do echo 0 >/tmp/progress-$w; sh /tmp/load $w </dev/null >/dev/null 2>&1 & done"
    )


def progress(guest: Guest) -> list[int]:
    """How far each worker has come."""
    shown = guest.output(f"for w in $(seq {WORKERS}); do read -r i </tmp/progress-$w; echo ${{i:-0}}; done 2>/dev/null")
    return [int(word) for word in shown.split()]


def all_go_on(guest: Guest) -> None:
    """Waits until every worker has made progress; a lost notification would block one of them."""
    before = progress(guest)
    deadline = time.monotonic() + 60
    while True:
        after = progress(guest)
        if all(now > then for now, then in zip(after, before)):
            return
        if time.monotonic() > deadline:
            raise guest.error(f"a worker does not go on: {before}, then {after}")


def test_pauses_lose_no_request(config: TestConfig, share: pathlib.Path) -> None:
    """Stopped by QMP, where QEMU stops the rings and starts them again; QEMU and the daemon stopped by signals."""
    rounds = config.seconds(4, 60)
    with config.guest(share) as (guest, daemon):
        start_load(guest)
        all_go_on(guest)
        for number in range(rounds):
            # At different places of the load.
            guest.qmp("stop", "cont", "stop", "cont")
            time.sleep(0.01 * (number % 7))
            guest.qmp("stop")
            time.sleep(0.05)
            guest.qmp("cont")
            all_go_on(guest)
        for number in range(rounds // 2):
            for stop in (guest.running.send_signal, daemon.signal):
                stop(signal.SIGSTOP)
                time.sleep(0.1 + 0.03 * (number % 3))
                stop(signal.SIGCONT)
                all_go_on(guest)
        assert daemon.log().count("session begins") == 1, daemon.log()


def descriptors(daemon: Daemon) -> int:
    """The open descriptors of the process that serves."""
    children = pathlib.Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children").read_text().split()
    folder = pathlib.Path(f"/proc/{children[0] if children else daemon.process.pid}/fd")
    return len(os.listdir(folder))


def held_open(guest: Guest, files: int) -> None:
    """Makes the guest hold open files, a directory, and every kind of lock."""
    guest.output(
        f"""mkdir /mnt/open; cd /mnt/open; seq {files} | xargs touch
        for group in $(seq 0 10 {files - 10}); do
            (for i in 1 2 3 4 5 6 7 8 9 10; do redirections="$redirections $((i + 10))<>/mnt/open/$((group + i))"; done
             eval "exec $redirections"; exec sleep 10000) </dev/null >/dev/null 2>&1 &
        done
        (exec 3</mnt/open; exec sleep 10000) </dev/null >/dev/null 2>&1 &
        locks hold /mnt/locked </dev/null >/tmp/held 2>&1 &
        while ! grep -q ^held /tmp/held; do kill -0 $! || {{ cat /tmp/held; exit 1; }}; sleep 0.1; done""",
        120,
    )


def test_a_reset_leaves_no_lock_and_no_descriptor(config: TestConfig, share: pathlib.Path) -> None:
    files = 200
    with config.guest(share, "--posix-lock", "--flock") as (guest, daemon):
        # The first access opens the descriptors that each session has.
        guest.output("ls /mnt")
        idle = descriptors(daemon)
        for way in (guest.reset, guest.reboot):
            held_open(guest, files)
            guest.output("locks held /mnt/locked")
            assert descriptors(daemon) >= idle + files, (descriptors(daemon), idle)
            way()
            guest.mount()
            guest.output("locks free /mnt/locked; rm -r /mnt/open; ls /mnt")
            deadline = time.monotonic() + 10
            # A file that was removed may be held until the guest has forgotten it.
            while descriptors(daemon) > idle + 10:
                assert time.monotonic() < deadline, (descriptors(daemon), idle, daemon.log())
                time.sleep(0.1)
        assert daemon.log().count("session begins") == 3, daemon.log()


def test_a_guest_reboots_again_and_again(config: TestConfig, share: pathlib.Path) -> None:
    times = 20 if config.full else 2
    with config.guest(share) as (guest, daemon):
        guest.output("ls /mnt")
        idle = descriptors(daemon)
        for number in range(times):
            # Not unmounted, and writing.
            start_load(guest)
            guest.output(f"echo {number} >>/mnt/boots; sync")
            guest.reboot()
            guest.mount()
        # The reply to mount(2) does not wait for INIT; the first access does.
        guest.output("ls /mnt")
        assert (share / "boots").read_text().split() == [str(number) for number in range(times)]
        assert descriptors(daemon) <= idle + 20, (descriptors(daemon), idle)
        assert daemon.log().count("session begins") == times + 1, daemon.log()


def test_a_killed_guest_leaves_nothing_to_the_next(config: TestConfig, share: pathlib.Path) -> None:
    options = ("--posix-lock", "--flock", "--keep-listening")
    with Daemon(share, options, name="test") as daemon:
        for number in range(2):
            with config.boot(daemon) as guest:
                guest.mount()
                guest.output("locks free /mnt/locked")
                if number:
                    break
                held_open(guest, 50)
                start_load(guest)
                all_go_on(guest)
                guest.broken = True
                guest.running.kill()
                guest.running.wait()
        assert daemon.process.poll() is None, daemon.log()
        if "panicked" in daemon.log():
            raise HarnessError(daemon.log())
