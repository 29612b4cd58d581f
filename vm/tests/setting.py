"""What a test runs in: a kernel, and how many queues and CPUs the guest has."""

import contextlib
import dataclasses
import pathlib

from harness import debug_kernel, disk, initramfs
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
        kind = "patched, " if self.patched else ""
        return f"Linux {self.kernel.name}, {kind}{self.queues} queue{'s' if self.queues > 1 else ''}"

    @property
    def patched(self):
        """Whether the guest has our FUSE modules."""
        return initramfs.kind(self.image) == "patched"

    @property
    def parallel(self):
        """Whether the guest knows parallel direct writes at all."""
        return self.patched or self.kernel.name != "5.10"

    @contextlib.contextmanager
    def guest(self, share, *arguments, faults=None, queue_size=1024, fio=False):
        """A guest that has `share` mounted, and `fio` if wanted; yields it and the daemon."""
        with Daemon(share, arguments, name="test", faults=faults) as daemon, \
                self.boot(daemon, queue_size=queue_size, fio=fio) as guest:
            guest.mount()
            yield guest, daemon

    @contextlib.contextmanager
    def mounts(self, *lines):
        """One guest with a share for each line of options; yields it and, for each, mount point and directory."""
        with contextlib.ExitStack() as stack:
            shares = [stack.enter_context(disk.directory()) for _ in lines]
            daemons = [stack.enter_context(Daemon(share, line.split(), name="test"))
                       for share, line in zip(shares, lines)]
            guest = stack.enter_context(self.boot(*daemons))
            points = [f"/mnt/{number}" for number in range(len(lines))]
            for number, point in enumerate(points):
                guest.mount(self.tag(number), point)
            yield guest, list(zip(points, shares))

    @staticmethod
    def tag(number):
        """The tag of a guest's device."""
        return f"share{number}" if number else "share"

    @contextlib.contextmanager
    def boot(self, *daemons, queue_size=1024, fio=False):
        """A guest with a device for each daemon: tags share, share1, share2 … At the end its log has to be clean."""
        devices = [(self.tag(number), daemon.socket, self.queues) for number, daemon in enumerate(daemons)]
        image = initramfs.with_fio(self.image) if fio else self.image
        more = debug_kernel.GUEST if self.kernel.name == debug_kernel.NAME else {}
        with Guest(self.kernel, image, devices, self.cpus, queue_size=queue_size, name="test", **more) as guest:
            yield guest
            if not guest.broken:
                clean(guest)

    def with_queues(self, number):
        """The same with this many queues and CPUs."""
        return dataclasses.replace(self, queues=number, cpus=number)

    def seconds(self, short, full):
        """How long to torture."""
        return full if self.full else short


# What a kernel says when something is wrong.
TROUBLE = ("BUG:", "WARNING:", "Oops", "possible recursive locking", "circular locking", "hung task",
           "blocked for more", "KASAN", "stale page cache", "suspicious RCU", "sleeping function")


def clean(guest):
    """Nothing in the kernel's log tells of trouble."""
    lines = guest.output("dmesg").splitlines()
    for number, line in enumerate(lines):
        if any(word in line for word in TROUBLE):
            raise AssertionError("the guest's kernel says:\n" + "\n".join(lines[number:number + 30]))
