"""What VMs on several hosts do with one volume, and how it is checked from a third mount."""

import contextlib
import dataclasses
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Sequence

from . import nodes, peer
from .daemon import Daemon
from .guest import Guest
from .host import HarnessError, log, run
from .kernels import Kernel
from .nodes import Node
from .paths import DAEMON
from .tools import tool, verify_on_host
from .trees import digest
from .volumes import Volume

KIB, MIB = 1 << 10, 1 << 20
# Of each VM.
WRITERS = 8
# What two VMs need in order to see each other's changes at once, and to lock each other out.
SHARED = ("--cache=never", "--posix-lock", "--flock")
# Never longer than that without progress, in seconds, whatever has failed.
PATIENCE = 240
# For how long, in seconds, one VM looks for what another has done.
SEEN = 10
# What one VM does, and how another sees it.
CHANGES = {
    "data": ("echo new >/mnt/seen/data", "grep -q new /mnt/seen/data"),
    "a size": ("echo more >>/mnt/seen/size", "[ $(stat -c %s /mnt/seen/size) = 9 ]"),
    "a mode": ("chmod 600 /mnt/seen/mode", "[ $(stat -c %a /mnt/seen/mode) = 600 ]"),
    "a new name": ("touch /mnt/seen/new", "[ -e /mnt/seen/new ]"),
    "a removed name": ("rm /mnt/seen/old", "! [ -e /mnt/seen/old ]"),
    "a renamed file": ("mv /mnt/seen/from /mnt/seen/to", "[ -e /mnt/seen/to ] && ! [ -e /mnt/seen/from ]"),
}
# Of these, what docs/shared-storage.md promises for each --cache.
PROMISED = {
    "never": tuple(CHANGES),
    "auto": tuple(CHANGES),
    "metadata": ("data", "a new name"),
    "always": ("a new name",),
}


@dataclasses.dataclass
class Machine:
    """How guests are made."""

    kernel: Kernel
    image: pathlib.Path
    memory: str = "512M"


@dataclasses.dataclass
class Vm:
    """A guest, its daemon, and the host that both are on."""

    host: Node
    daemon: Daemon
    guest: Guest
    # Its place among the VMs.
    number: int


@dataclasses.dataclass
class Table:
    """What was found."""

    rows: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def add(self, what: str, found: str) -> None:
        log.info("%s: %s", what, found)
        self.rows.append((what, found))

    def text(self) -> str:
        width = max(len(what) for what, _ in self.rows)
        return "\n".join(f"{what:{width}}  {found}" for what, found in self.rows)


def daemon_command(host: Node, back_end: str) -> str:
    """The command line of a back end that serves the host's mount."""
    program = peer.program() if back_end == "virtiofsd" else DAEMON
    words = host.inside(program, "--socket-path", "{socket}", "--shared-dir", "{share}", network=False)
    return " ".join(words)


@contextlib.contextmanager
def running(
    volume: Volume, host: Node, number: int, machine: Machine, options: Sequence[str], back_end: str = "lanefsd"
) -> Iterator[Vm]:
    """A VM on a host."""
    options = [option for option in options if back_end == "lanefsd" or not option.endswith("lock")]
    command = daemon_command(host, back_end)
    with Daemon(volume.point, options, command=command, name=f"cluster-{host.name}") as daemon:
        devices = [("share", daemon.socket, 1)]
        guest = Guest(machine.kernel, machine.image, devices, 1, machine.memory, name=f"cluster-{host.name}")
        with guest:
            guest.mount()
            yield Vm(host, daemon, guest, number)
            if back_end == "lanefsd" and daemon.process.poll() is None:
                check_log(daemon)


@contextlib.contextmanager
def both(
    volume: Volume, hosts: Sequence[Node], machine: Machine, options: Sequence[str], back_end: str = "lanefsd"
) -> Iterator[list[Vm]]:
    """A VM on each host."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(running(volume, host, number, machine, options, back_end))
            for number, host in enumerate(hosts)
        ]


def check_log(daemon: Daemon) -> None:
    """The daemon has neither panicked nor used a forbidden system call."""
    found = [line for line in daemon.log().splitlines() if re.search(r"panicked|seccomp|SIGSYS", line)]
    if found:
        raise HarnessError(f"the daemon has failed: {found}")


def at_once(vms: Sequence[Vm], command: Callable[[Vm], str], timeout: float = 600) -> list[str]:
    """Runs a command in each VM at the same time; all have to succeed. Returns their outputs."""
    for vm in vms:
        vm.guest.output(
            f"rm -f /tmp/done; ({command(vm)}; echo $? >/tmp/status; mv /tmp/status /tmp/done) </dev/null >/tmp/out 2>&1 &"
        )
    outputs = []
    for vm in vms:
        found = vm.guest.output("while ! [ -e /tmp/done ]; do sleep 0.05; done; cat /tmp/out /tmp/done", timeout)
        text, _, status = found.rpartition("\n")
        if status != "0":
            raise HarnessError(f"{command(vm)!r} failed on {vm.host.name}:\n{found}")
        outputs.append(text)
    return outputs


class Checks:
    """All checks of a volume."""

    def __init__(self, volume: Volume, checker: Node, table: Table, small: bool) -> None:
        """`checker` is a host with the third mount."""
        self.volume, self.checker, self.table, self.small = volume, checker, table, small
        self.seen = checker.path(volume.point)

    def on_checker(self, name: str, *words: object) -> str:
        """Runs a program of the guests on the third mount."""
        return self.checker.run(tool(name), *(str(word) for word in words))

    def verify(self, name: str, *words: object) -> None:
        """Lets a program check what was written, on the third mount."""
        first, *rest = words
        verify_on_host(name, self.seen / str(first), *(str(word) for word in rest))

    def appends(self, vms: list[Vm]) -> None:
        """Both append to one log."""
        records, writers = (20 if self.small else 100), 3
        common = f"--records {records} --record 4096"
        self.checker.run("rm", "-f", self.volume.point / "log")
        self.checker.run("touch", self.volume.point / "log")
        at_once(vms, lambda vm: f"append run /mnt/log --writers {writers} --first {vm.number * writers} {common}")
        total = writers * len(vms)
        self.judge(
            f"appends from {len(vms)} VMs",
            f"all {total * records} records whole, once",
            lambda: self.verify("append", "log", "--writers", total, *common.split()),
            self.volume.appends,
        )
        self.checker.run("rm", "-f", self.volume.point / "log")
        self.checker.run("touch", self.volume.point / "log")
        # Without guests they are so fast that few would do it after each other.
        records *= 20
        common = f"--records {records} --record 4096"
        first = f"--writers {writers} --first"
        words = [[*first.split(), str(vm.number * writers), *common.split()] for vm in vms]
        path = str(self.volume.point / "log")
        started = [vm.host.start(tool("append"), "run", path, *more) for vm, more in zip(vms, words)]
        for process in started:
            process.wait()
        self.judge(
            f"the same natively on {len(vms)} hosts",
            f"all {total * records} records whole, once",
            lambda: self.verify("append", "log", "--writers", total, *common.split()),
            self.volume.appends,
        )

    def locks(self, vms: list[Vm]) -> None:
        """fcntl(2) and flock(2) locks of one VM keep the other out."""
        writers, rounds = 2, 5 if self.small else 20
        for kind in ("flock", "posix", "openfile"):
            self.checker.run("rm", "-f", self.volume.point / f"number-{kind}")
        at_once(vms, lambda _vm: f"locks count /mnt/number --writers {writers} --rounds {rounds}")
        wanted = writers * len(vms) * rounds
        for kind in ("flock", "posix", "openfile"):
            number = int.from_bytes((self.seen / f"number-{kind}").read_bytes(), "little")
            # Without a lock some are lost, and with luck none.
            found = "exclude" if number == wanted else f"do not exclude: {number} of {wanted}"
            self.table.add(f"{kind} locks of {len(vms)} VMs", found)
            if number != wanted and self.volume.locks:
                raise HarnessError(f"{kind} locks do not exclude: {number} of {wanted}")

    def churn(self, vms: list[Vm]) -> None:
        """File operations at random in each VM, beside the same natively: the same results, or the same first error."""
        steps = 200 if self.small else 1000
        point = self.volume.point
        self.checker.run("rm", "-rf", *(point / f"churn{vm.number}" for vm in vms), point / "native")
        self.checker.run("mkdir", *(point / f"churn{vm.number}" for vm in vms), point / "native")
        options = f"--writers 1 --steps {steps}"
        natively = self.checker.outcome(tool("churn"), point / "native", *options.split())
        inside = at_once(vms, lambda vm: f"{{ churn /mnt/churn{vm.number} {options} 2>&1; true; }}")
        for vm, outcome in zip(vms, inside):
            found, wanted = errors_of(outcome), errors_of(natively)
            if found != wanted:
                raise HarnessError(f"churn on {vm.host.name}: {found or 'no error'}, and natively {wanted or 'none'}")
            one, other = digest(self.seen / f"churn{vm.number}"), digest(self.seen / "native")
            if one != other:
                raise HarnessError(
                    f"churn leaves another tree than natively: {sorted(set(one.items()) ^ set(other.items()))[:5]}"
                )
        what = (
            f"both end as natively with: {errors_of(natively)}"
            if errors_of(natively)
            else "the trees are those of the same natively"
        )
        self.table.add(f"{steps} file operations at random in each VM", what)

    def visibility(self, vms: list[Vm], mode: str) -> None:
        """How long until one VM sees what the other has done; what the mode promises has to be seen at all."""
        one, other = (vm.guest for vm in vms)
        one.output(
            "rm -rf /mnt/seen; mkdir /mnt/seen; cd /mnt/seen; for f in data size mode old from; do echo old >$f; done"
        )
        found = []
        for what, (change, question) in CHANGES.items():
            # A name that is gone may still be there for this VM.
            other.output("ls -l /mnt/seen; cat /mnt/seen/* >/dev/null 2>&1 || true")
            one.output(change)
            since = time.monotonic()
            seen = other.output(
                f"for i in $(seq {SEEN * 20}); do ! {{ {question}; }} || {{ echo seen; break; }}; sleep 0.05; done"
            )
            if seen:
                found.append(f"{what} {1000 * (time.monotonic() - since):.0f} ms")
            elif what in PROMISED[mode]:
                raise HarnessError(f"{what}, written by one VM, is not seen by the other with --cache={mode}")
            else:
                found.append(f"{what} not within {SEEN} s")
        one.output("rm -r /mnt/seen")
        self.table.add(f"seen by the other VM, --cache={mode}", "at most " + ", ".join(found))

    def judge(self, what: str, good: str, check: Callable[[], object], is_promised: bool) -> None:
        """Notes a check, which may fail where the volume itself does not promise it; see docs/shared-storage.md."""
        try:
            check()
        except HarnessError as error:
            reasons = re.findall(r"^Error: (.*)", str(error), re.MULTILINE)
            reason = reasons[0] if reasons else str(error).splitlines()[0]
            if is_promised:
                self.table.add(what, f"FAILED: {reason}")
                raise
            self.table.add(what, f"not promised by the volume: {reason}")
            return
        self.table.add(what, good)


def errors_of(output: str) -> str:
    """The first error that a program of vm/guest-tools reports, with its causes."""
    # Directories differ, and mean nothing.
    lines = re.sub(r"/\S*/churn-", "churn-", output).splitlines()
    begin = next((number for number, line in enumerate(lines) if line.startswith("Error:")), len(lines))
    # The parent of the process says that it has failed, too.
    end = next((number for number, line in enumerate(lines) if number > begin and line.startswith("Error:")), None)
    lines = lines[begin:end]
    causes = [re.sub(r"^(Error:|\d+:)", "", line.strip()).strip() for line in lines]
    end = causes.index("Stack backtrace:") if "Stack backtrace:" in causes else len(causes)
    return ": ".join(cause for cause in causes[:end] if cause and cause != "Caused by:")


def clean(volume: Volume, host: Node) -> None:
    """Removes all files."""
    host.run("find", volume.point, "-mindepth", "1", "-delete")


def wait_until_it_works(host: Node, volume: Volume) -> None:
    """Waits until a host can use its mount."""
    nodes.wait_until(lambda: host.succeeds("timeout", "5", "ls", volume.point), f"the volume on {host.name}", PATIENCE)


def host_kernel() -> str:
    return run(["uname", "-r"]).strip()
