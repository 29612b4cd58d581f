"""Two guests, each with a daemon of its own, on one share."""

import contextlib
import pathlib
from collections.abc import Sequence

from harness import disk
from harness.guest import Guest
from harness.host import run
from harness.tools import verify_on_host

from .setup import Setup, step


def at_once(guests: Sequence[Guest], commands: Sequence[str]) -> None:
    """Runs a command in each guest at the same time; all have to succeed."""
    for guest, command in zip(guests, commands):
        guest.output(
            f"rm -f /tmp/done; ({command}; echo $? >/tmp/status; mv /tmp/status /tmp/done) </dev/null >/tmp/out 2>&1 &"
        )
    for guest in guests:
        outcome = guest.output("while ! [ -e /tmp/done ]; do sleep 0.1; done; cat /tmp/out /tmp/done", 300)
        assert outcome.split()[-1] == "0", outcome


def work_together(guests: Sequence[Guest], share: pathlib.Path) -> None:
    step("both append")
    common = "--records 100 --record 4096"
    at_once(guests, [f"append run /mnt/log --writers 3 --first {first} {common}" for first in (0, 3)])
    verify_on_host("append", share / "log", "--writers", 6, *common.split())
    step("each writes every other stripe")
    common = "--writers 4 --size 12000001 --stripe 33333"
    # It has its size before either of them begins.
    run(["fallocate", "-l", 12000001, share / "stripes"])
    at_once(guests, [f"stripes write /mnt/stripes {common} --only {only}" for only in ("0,2", "1,3")])
    verify_on_host("stripes", share / "stripes", *common.split())
    step("they take locks in turns")
    writers, rounds = 3, 40
    at_once(guests, [f"locks count /mnt/number --writers {writers} --rounds {rounds}"] * 2)
    for kind in ("flock", "posix", "openfile"):
        number = int.from_bytes((share / f"number-{kind}").read_bytes(), "little")
        assert number == 2 * writers * rounds, f"{kind}: {number} instead of {2 * writers * rounds}"
    step("one's locks keep the other out, and end with it")
    one, other = guests
    one.output(
        "locks hold /mnt/held </dev/null >/tmp/held 2>&1 & "
        "while ! grep -q ^held /tmp/held; do kill -0 $! || { cat /tmp/held; exit 1; }; sleep 0.1; done"
    )
    other.output("locks held /mnt/held")
    one.reset()
    other.output("locks free /mnt/held")
    one.mount()
    one.output("locks free /mnt/held")
    step("names and contents of one appear to the other")
    one.output("mkdir /mnt/dir; for i in $(seq 50); do echo $i >/mnt/dir/$i; done; mv /mnt/dir /mnt/moved")
    assert other.output("cat /mnt/moved/* | sort -n | tail -n 1; ls /mnt/moved | wc -l; [ ! -e /mnt/dir ]") == "50\n50"
    other.output("rm -r /mnt/moved")
    assert one.output("ls /mnt/moved 2>/dev/null || echo gone") == "gone"


def test_two_guests(setup: Setup) -> None:
    """Two guests on one share: appends, stripes, locks of every kind, names."""
    options = ("--cache=never", "--posix-lock", "--flock")
    with disk.directory() as share, contextlib.ExitStack() as stack:
        daemons = [stack.enter_context(setup.daemon(share, *options)) for _ in range(2)]
        guests = [stack.enter_context(setup.small_guest(daemon)) for daemon in daemons]
        for guest in guests:
            guest.mount()
        work_together(guests, share)
