"""How fast many writers on several hosts write one file of a volume, beside what users would do or run otherwise.

Each host has a guest with a share of each back end, all of the same directory. So figures that are compared come from
the same guests, one right after the other; the median of several rounds counts, as the machine is busy with storage,
hosts and guests alike.
"""

import contextlib
import dataclasses
import statistics
from collections.abc import Iterator, Sequence

from .daemon import Daemon
from .guest import Guest
from .host import HarnessError, log
from .nodes import Node
from .shared_work import KIB, MIB, Checks, Machine, Vm, at_once, daemon_command

# Of each VM.
WRITERS = 8
ROUNDS = 3
AUTO, THREADS, PEER = "io_uring", "threads", "virtiofsd"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is written."""

    stripe: int
    growing: bool
    # Of each VM.
    writers: int = WRITERS
    # A file per writer, in place of one file.
    files: bool = False

    def __str__(self) -> str:
        what = "growing" if self.growing else "overwriting"
        return f"{self.writers} writers, {'a file each' if self.files else 'one file'}, {self.stripe >> 10} KiB, {what}"


class Bandwidth:
    """The measurement. `options` are lanefsd's."""

    def __init__(self, checks: Checks, hosts: Sequence[Node], machine: Machine, options: Sequence[str]) -> None:
        self.checks, self.hosts, self.machine, self.options = checks, hosts, machine, options
        self.rates: dict[tuple[str, Case], list[float]] = {}

    def run(self, peer: bool) -> None:
        """The table's rows, with virtiofsd if there is to be a peer."""
        small = self.checks.small
        cases = [Case(stripe, growing) for stripe in (64 * KIB, MIB)[: 1 if small else 2] for growing in (False, True)]
        back_ends = [AUTO, THREADS, *([PEER] if peer else [])]
        with self.guests(back_ends) as guests:
            for number in range(1 if small else ROUNDS):
                log.info("round %d", number + 1)
                for case in cases:
                    for back_end in back_ends:
                        self.measure(guests, back_end, case)
                    self.measure(guests, AUTO, dataclasses.replace(case, files=True))
            for case in cases:
                self.checks.table.add(f"{len(self.hosts)} VMs, {case}", self.row(case, back_ends))

    def row(self, case: Case, back_ends: Sequence[str]) -> str:
        """The median rate, and the medians of the ratios within a round."""
        mine = self.rates[AUTO, case]
        others = {"a file per writer": self.rates[AUTO, dataclasses.replace(case, files=True)]}
        others |= {back_end: self.rates[back_end, case] for back_end in back_ends if back_end != AUTO}
        found = [f"{statistics.median(mine):.1f} MiB/s"]
        for name, rates in others.items():
            ratio = statistics.median(one / other for one, other in zip(mine, rates))
            found.append(f"{ratio:.2f} of {name} ({statistics.median(rates):.1f})")
        return ", ".join(found)

    def measure(self, guests: list[Vm], back_end: str, case: Case) -> None:
        rate = stripes(self.checks, guests, f"/{back_end}", case)
        log.info("    %-9s %s: %.1f MiB/s", back_end, case, rate)
        self.rates.setdefault((back_end, case), []).append(rate)

    @contextlib.contextmanager
    def guests(self, back_ends: Sequence[str]) -> Iterator[list[Vm]]:
        """A guest on each host, with a share of each back end at the directory of its name."""
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(self.guest(host, number, back_ends)) for number, host in enumerate(self.hosts)]

    @contextlib.contextmanager
    def guest(self, host: Node, number: int, back_ends: Sequence[str]) -> Iterator[Vm]:
        engines = {AUTO: [*self.options, "--io-engine=auto"], THREADS: [*self.options, "--io-engine=threads"]}
        with contextlib.ExitStack() as stack:
            daemons = []
            for name in back_ends:
                command = daemon_command(host, name if name == PEER else "lanefsd")
                options = engines.get(name, ["--cache=never"])
                daemon = Daemon(self.checks.volume.point, options, command=command, name=f"cluster-{host.name}-{name}")
                daemons.append(stack.enter_context(daemon))
            devices = [(name, daemon.socket, 1) for name, daemon in zip(back_ends, daemons)]
            kernel, image, memory = self.machine.kernel, self.machine.image, self.machine.memory
            guest = stack.enter_context(Guest(kernel, image, devices, 1, memory, name=f"cluster-{host.name}"))
            for name in back_ends:
                guest.mount(name, f"/{name}")
            yield Vm(host, daemons[0], guest, number)


def stripes(checks: Checks, vms: Sequence[Vm], at: str, case: Case) -> float:
    """All VMs write one file, or a file per writer; every byte of the one file is checked. Returns MiB/s."""
    checker, stripe = checks.checker, case.stripe
    each = (6 if checks.small else 24) if stripe < MIB else (2 if checks.small else 6)
    writers = case.writers * len(vms)
    size = writers * each * stripe
    common = f"--writers {writers} --size {size} --stripe {stripe}"
    path = str(checks.volume.point / "stripes")
    names = [f"{path}.{number}" for number in range(writers)] if case.files else [path]
    length = 0 if case.growing else size // len(names) // (64 * KIB)
    for name in names:
        checker.run("rm", "-f", name)
        checker.run("dd", "if=/dev/zero", f"of={name}", "bs=65536", f"count={length}", "conv=fsync", "status=none")

    def command(vm: Vm) -> str:
        only = ",".join(str(number) for number in range(vm.number, writers, len(vms)))
        return f"stripes write {at}/stripes {common} --only {only} --as-is {'--files' if case.files else ''}"

    outputs = at_once(vms, command)
    seconds = max(float(output.split()[-1]) for output in outputs)
    if not case.files:
        checks.verify("stripes", "stripes", *common.split())
    checker.run("rm", "-f", *names)
    if seconds <= 0:
        raise HarnessError(f"the writers took {seconds} s")
    return size / seconds / MIB
