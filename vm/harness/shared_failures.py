"""What fails while VMs on several hosts write to one volume, and how they go on."""

import re
import signal
import time
from collections.abc import Callable, Sequence

from .host import HarnessError, log, run
from .nodes import Network, Node, wait_until
from .paths import DAEMON
from .shared_work import PATIENCE, Checks, Machine, Vm, check_log, running, wait_until_it_works
from .volumes import Volume

# Of each VM.
WRITERS = 4
BLOCK = 64 << 10
# Seconds of work before and after a failure.
BEFORE, AFTER = 2.0, 1.0
# Longer than file systems wait for a host.
CUT = 8
# What fails, as it is named on the command line.
NAMES = ("worker", "node", "cut", "server", "unmount", "daemon")


class Writing:
    """Writers in each VM that make each block durable, until told to end."""

    def __init__(self, vms: Sequence[Vm], checks: Checks) -> None:
        self.vms, self.checks = vms, checks
        self.writers = WRITERS * len(vms)
        self.common = f"--writers {self.writers} --block {BLOCK}"
        checks.checker.run("rm", "-f", checks.volume.point / "durable")
        for vm in vms:
            first = vm.number * WRITERS
            vm.guest.output(
                f"rm -f /tmp/stop /tmp/written /tmp/durable; (durable write /mnt/durable {self.common} "
                f"--first {first} --here {WRITERS} >/tmp/report 2>&1; echo $? >/tmp/written) </dev/null >/dev/null 2>&1 &"
            )
        # Each has begun.
        self.wait_for_progress([0] * self.writers)

    def counts(self, vms: Sequence[Vm] | None = None) -> list[int]:
        """The durable blocks of each writer, those of other VMs as none."""
        found = [0] * self.writers
        for vm in self.vms if vms is None else vms:
            words = vm.guest.output(f"durable counts /mnt/durable --here {WRITERS}")
            first = vm.number * WRITERS
            found[first : first + WRITERS] = [int(word) for word in words.split(",")]
        return found

    def wait_for_progress(self, since: Sequence[int], vms: Sequence[Vm] | None = None) -> float:
        """Waits until every writer of these VMs has made two more blocks durable; returns the seconds that took."""
        begin = time.monotonic()
        who = self.vms if vms is None else vms
        mine = [vm.number * WRITERS + number for vm in who for number in range(WRITERS)]

        def goes_on() -> bool:
            now = self.counts(who)
            return all(now[writer] >= since[writer] + 2 for writer in mine)

        wait_until(goes_on, "progress of every writer", PATIENCE)
        return time.monotonic() - begin

    def end(self, vms: Sequence[Vm] | None = None, also: Sequence[int] = ()) -> str:
        """Ends the writers, and checks every byte on the third mount. `also` is what else is durable."""
        durable = list(also) or [0] * self.writers
        longest, errors, last = 0, 0, set()
        for vm in self.vms if vms is None else vms:
            vm.guest.output("touch /tmp/stop")
        for vm in self.vms if vms is None else vms:
            report = vm.guest.output(
                "while ! [ -e /tmp/written ]; do sleep 0.1; done; cat /tmp/report /tmp/written", PATIENCE
            )
            lines = re.findall(r"writer (\d+) durable (\d+) longest (\d+) errors (\d+) last (-?\d+)", report)
            if len(lines) != WRITERS or not report.endswith("\n0"):
                raise HarnessError(f"the writers on {vm.host.name} failed:\n{report}")
            for writer, count, pause, failed, errno in lines:
                durable[int(writer)] = int(count)
                longest, errors = max(longest, int(pause)), errors + int(failed)
                last |= {errno} if errno != "0" else set()
        counts = ",".join(map(str, durable))
        self.checks.verify("durable", "durable", *self.common.split(), "--durable", counts)
        met = (
            f", {errors} errors (errno {', '.join(sorted(last))}), after which programs opened the file anew"
            if errors
            else ""
        )
        return f"longest pause {longest / 1000:.1f} s{met}; {sum(durable)} durable blocks are whole"


class Failures:
    """All failures, one after the other."""

    def __init__(self, checks: Checks, network: Network, machine: Machine, options: Sequence[str]) -> None:
        self.checks, self.network, self.machine, self.options = checks, network, machine, options
        self.volume: Volume = checks.volume

    def run(self, vms: list[Vm], names: Sequence[str]) -> None:
        """Those of these names that VMs live through."""
        failures: dict[str, tuple[str, Callable[[list[Vm]], object]]] = {
            "worker": ("a worker of each lanefsd killed", self.kill_worker),
            "node": ("a storage node killed, and started again", self.kill_node),
            "cut": (f"a VM host cut off for {CUT} s", self.cut_off),
            "server": ("the mount's server killed, mounted again, reopen", self.replace_server),
            "unmount": ("unmounted in use, mounted again, reopen", self.remount),
        }
        for name, (what, fail) in failures.items():
            if name in names:
                self.meet(vms, what, fail)

    def meet(self, vms: list[Vm], what: str, fail: Callable[[list[Vm]], object]) -> None:
        log.info("%s, while %d writers work", what, WRITERS * len(vms))
        writing = Writing(vms, self.checks)
        time.sleep(BEFORE)
        before = writing.counts()
        fail(vms)
        writing.wait_for_progress(before)
        # From here on nothing may stand still any more.
        writing.wait_for_progress(writing.counts())
        time.sleep(AFTER)
        self.checks.table.add(what, writing.end())
        self.mend()
        for vm in vms:
            check_log(vm.daemon)

    def mend(self) -> None:
        for host in (self.checks.checker,):
            wait_until_it_works(host, self.volume)

    def kill_worker(self, vms: list[Vm]) -> None:
        for vm in vms:
            vm.daemon.replace_worker(signal.SIGKILL)

    def kill_node(self, vms: list[Vm]) -> None:
        node = self.volume.kill_node()
        # Long enough for the others to notice.
        time.sleep(self.volume.timeout + 2)
        self.volume.start_node(node)
        self.volume.wait_until_whole()

    def cut_off(self, vms: list[Vm]) -> None:
        with self.network.cut(vms[0].host):
            time.sleep(CUT)

    def replace_server(self, vms: list[Vm]) -> None:
        """The program behind the mount of one host dies; an administrator mounts again, and says so to the daemon."""
        self.volume.kill_client(vms[0].host)
        self.remount(vms)

    def remount(self, vms: list[Vm]) -> None:
        """An administrator unmounts what is in use on one host, mounts again, and says so to the daemon."""
        vm = vms[0]
        before = self.volume.clients.get(vm.host.name)
        self.volume.unmount(vm.host)
        self.volume.mount(vm.host)
        reopen(vm)
        if before is not None:
            # It serves until nobody has anything open there.
            wait_until(lambda: before.poll() is not None, "the end of the old mount")

    def kill_daemon(self, hosts: Sequence[Node]) -> None:
        """The whole daemon of one VM is killed, which ends the VM; it boots again with another daemon."""
        what = "a whole daemon killed, and its VM with it"
        log.info("%s", what)
        with running(self.volume, hosts[1], 1, self.machine, self.options) as other:
            with running(self.volume, hosts[0], 0, self.machine, self.options) as vm:
                writing = Writing([vm, other], self.checks)
                time.sleep(BEFORE)
                vm.daemon.kill()
                durable = writing.counts()
                seconds = writing.wait_for_progress(durable, [other])
            begin = time.monotonic()
            with running(self.volume, hosts[0], 0, self.machine, self.options) as vm:
                vm.guest.output("echo again >/mnt/again; sync")
                back = time.monotonic() - begin
                found = writing.end([other], durable)
        went_on = f"the other VM went on after {seconds:.1f} s"
        self.checks.table.add(what, f"{went_on}, this one was back {back:.0f} s after its restart; {found}")


def reopen(vm: Vm) -> None:
    """Tells a daemon that its directory is mounted anew."""
    log.info("    %s", run([DAEMON, "reopen", "--pid", vm.daemon.process.pid]).strip())
