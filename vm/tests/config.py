"""The configuration of a test: a kernel, and how many queues and CPUs the guest has."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

from harness import debug_kernel, disk, initramfs
from harness.daemon import Daemon
from harness.guest import Guest
from harness.kernel_log import check_kernel_log
from harness.kernels import Kernel


@dataclasses.dataclass(frozen=True)
class TestConfig:
    """The guest that a test runs in."""

    # For pytest, which would take this for a class of tests.
    __test__ = False

    kernel: Kernel
    image: pathlib.Path
    queues: int
    cpus: int
    full: bool

    def __str__(self) -> str:
        kind = "patched, " if self.patched else ""
        return f"Linux {self.kernel.name}, {kind}{self.queues} queue{'s' if self.queues > 1 else ''}"

    @property
    def patched(self) -> bool:
        """Whether the guest has our FUSE modules."""
        return initramfs.kind(self.image) == "patched"

    @property
    def parallel(self) -> bool:
        """Whether the guest supports parallel direct writes at all."""
        return self.patched or self.kernel.name != "5.10"

    @contextlib.contextmanager
    def guest(
        self,
        share: pathlib.Path,
        *arguments: str,
        faults: Sequence[str] | None = None,
        queue_size: int = 1024,
        fio: bool = False,
    ) -> Iterator[tuple[Guest, Daemon]]:
        """A guest that has `share` mounted, and the program `fio` on demand; yields it and the daemon."""
        with (
            Daemon(share, arguments, name="test", faults=faults) as daemon,
            self.boot(daemon, queue_size=queue_size, fio=fio) as guest,
        ):
            guest.mount()
            yield guest, daemon

    @contextlib.contextmanager
    def mounts(self, *lines: str) -> Iterator[tuple[Guest, list[tuple[str, pathlib.Path]]]]:
        """One guest with a share for each line of options; yields it and, for each, mount point and directory."""
        with contextlib.ExitStack() as stack:
            shares = [stack.enter_context(disk.directory()) for _ in lines]
            daemons = [
                stack.enter_context(Daemon(share, line.split(), name="test"))
                for share, line in zip(shares, lines, strict=True)
            ]
            guest = stack.enter_context(self.boot(*daemons))
            points = [f"/mnt/{number}" for number in range(len(lines))]
            for number, point in enumerate(points):
                guest.mount(self.tag(number), point)
            yield guest, list(zip(points, shares, strict=True))

    @staticmethod
    def tag(number: int) -> str:
        """The tag of a guest's device."""
        return f"share{number}" if number else "share"

    @contextlib.contextmanager
    def boot(self, *daemons: Daemon, queue_size: int = 1024, fio: bool = False) -> Iterator[Guest]:
        """A guest with a device for each daemon: tags share, share1, share2 … At the end its log has to be clean."""
        devices = [(self.tag(number), daemon.socket, self.queues) for number, daemon in enumerate(daemons)]
        image = initramfs.with_fio(self.image) if fio else self.image
        debug = self.kernel.name == debug_kernel.NAME
        with Guest(
            self.kernel,
            image,
            devices,
            self.cpus,
            queue_size=queue_size,
            name="test",
            timeout_scale=debug_kernel.TIMEOUT_SCALE if debug else 1,
            append=debug_kernel.KERNEL_OPTIONS if debug else "",
        ) as guest:
            yield guest
            if not guest.broken:
                check_kernel_log(guest)

    def with_queues(self, number: int) -> "TestConfig":
        """The same with this many queues and CPUs."""
        return dataclasses.replace(self, queues=number, cpus=number)

    def seconds(self, short: int, full: int) -> int:
        """How long to torture."""
        return full if self.full else short
