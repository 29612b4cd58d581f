"""What a test runs in: a kernel, and how many queues and CPUs the guest has."""

import contextlib
import dataclasses
import pathlib

from harness.daemon import Daemon
from harness.guest import Guest


@dataclasses.dataclass
class Setting:
    kernel: object
    image: pathlib.Path
    queues: int
    cpus: int
    full: bool

    def __str__(self):
        return f"Linux {self.kernel.name}, {self.queues} queue{'s' if self.queues > 1 else ''}"

    @contextlib.contextmanager
    def guest(self, share, *arguments, mount=True):
        """A guest that has `share` mounted; yields it and the daemon."""
        with Daemon(share, arguments, name="test") as daemon, self.boot(daemon) as guest:
            if mount:
                guest.mount()
            yield guest, daemon

    def boot(self, *daemons):
        """A guest with a device for each daemon: tags share, share1, share2 …"""
        devices = [("share" if not number else f"share{number}", daemon.socket, self.queues)
                   for number, daemon in enumerate(daemons)]
        return Guest(self.kernel, self.image, devices, self.cpus, name="test")

    def seconds(self, short, full):
        """How long to torture."""
        return full if self.full else short


def clean(guest):
    """Nothing in the kernel's log tells of trouble."""
    log = guest.output("dmesg")
    for word in ("BUG:", "WARNING:", "Oops", "lockdep", "hung task", "blocked for more"):
        assert word not in log, f"the guest's kernel says:\n{log}"
