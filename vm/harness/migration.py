"""A running guest moves from one QEMU and daemon to another: by migration, through a file, and in vain."""

import contextlib
import dataclasses
import pathlib
import re
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from . import peer
from .daemon import Daemon
from .guest import Guest
from .host import HarnessError, log
from .kernels import Kernel
from .qmp import Qmp, QmpError

# Seconds.
MIGRATION_TIMEOUT = 300
RESUME_TIMEOUT = 30
# Bytes a second: no limit, and so few that a migration is under way for long.
UNLIMITED = 1 << 50
SLOW = 4 << 20
# Bytes a second in post-copy, in which the guest runs while its memory comes.
LAZY = 64 << 20
# Milliseconds that a guest may be stopped at the end.
DOWNTIME_LIMIT = 300
# QEMU says when it stops and starts the guest, and how long each device takes to be saved and loaded.
TRACE = ["-msg", "timestamp=on", "-trace", "vmstate_downtime_*"]
# What QEMU says that explains no failure.
NOISE = re.compile(r"vmstate_downtime|failed to initialize module|^Only modules from the same build")
# The types of `guest-hold` that virtiofsd does not keep: it finds them by path, and its names are UTF-8.
NAMELESS = ("unlinked", "replaced", "removed")
THINGS = (*NAMELESS, "listing", "renamed", "bytes", "append")


@dataclasses.dataclass(frozen=True)
class Demands:
    """What has to outlive a migration between two back ends."""

    things: tuple[str, ...]
    # Locks that the guest holds are held on the host as well.
    locks: bool = True
    # Programs may use files that have no name.
    unlinked: bool = True


def demands(names: Sequence[str], mode: str, snapshot: bool = False) -> Demands:
    """What these back ends keep in this mode (`--migration-mode`). A snapshot outlives its source, and with it goes what
    only that has."""
    handles = mode != "find-paths" and not snapshot
    if set(names) == {"lanefsd"}:
        # A file without a name is copied where it cannot be found by its handle; a directory is not.
        return Demands(tuple(thing for thing in THINGS if handles or thing != "removed"))
    # On ext4, a directory that is first read at its end, as after a migration, is empty from then on. lanefsd avoids that.
    lost = {"bytes", "listing", *(() if handles else NAMELESS)}
    return Demands(tuple(thing for thing in THINGS if thing not in lost), locks=False, unlinked=handles)


# What lanefsd says of a worker that is killed.
KILLED = "the worker process was ended by SIGKILL"
ON_ERROR = "--migration-on-error="


@dataclasses.dataclass(frozen=True)
class BackEnd:
    """A daemon to start for one end."""

    name: str
    arguments: tuple[str, ...]
    command: str | None = None

    def start(self, share: pathlib.Path) -> Daemon:
        return Daemon(share, self.arguments, self.command, name=f"migrate-{self.name}")

    def strict(self) -> "BackEnd":
        """The same that refuses a guest of which it lacks a file."""
        kept = [argument for argument in self.arguments if not argument.startswith(ON_ERROR)]
        return dataclasses.replace(self, arguments=(*kept, f"{ON_ERROR}abort"))


def back_end(name: str, others: Sequence[str], mode: str, on_error: str, more: Sequence[str] = ()) -> BackEnd:
    """`lanefsd` or `virtiofsd`, set up to exchange guests with the others."""
    common = ("--cache=auto", f"--migration-mode={mode}", f"{ON_ERROR}{on_error}")
    if name == "virtiofsd":
        command = f"{peer.program()} --socket-path {{socket}} --shared-dir {{share}}"
        return BackEnd(name, (*common, "--log-level=warn"), command)
    if "virtiofsd" in others:
        return BackEnd(name, (*common, "--migration-format=virtiofsd", *more))
    return BackEnd(name, (*common, "--posix-lock", "--flock", *more))


@dataclasses.dataclass(frozen=True)
class Machine:
    """The guest's machine, which is the same at both ends, and the share."""

    kernel: Kernel
    initramfs: pathlib.Path
    share: pathlib.Path
    queues: int
    cpus: int
    memory: str


class End:
    """A QEMU with its daemon: it runs the guest, or waits for one. A context manager."""

    def __init__(self, machine: Machine, back_end: BackEnd, wait: bool, share: pathlib.Path | None = None) -> None:
        self.name = back_end.name
        # How often the daemon's worker was killed here.
        self.kills = 0
        with contextlib.ExitStack() as stack:
            self.daemon = stack.enter_context(back_end.start(share or machine.share))
            self.guest = stack.enter_context(
                Guest(
                    machine.kernel,
                    machine.initramfs,
                    [("share", self.daemon.socket, machine.queues)],
                    machine.cpus,
                    machine.memory,
                    name="migrate",
                    qemu_options=[*TRACE, *(["-incoming", "defer"] if wait else [])],
                )
            )
            self.qmp = stack.enter_context(self.guest.open_qmp())
            self.stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends QEMU and the daemon."""
        self.stack.close()

    def leave(self) -> None:
        """Ends QEMU, as one does whose guest has gone; the daemon has to end by itself, and well."""
        self.qmp.close()
        self.guest.close()
        status = self.daemon.wait()
        lines = self.daemon.log().splitlines()
        if status:
            raise HarnessError(f"{self.name} ended with status {status}: {tail(lines)}")
        # virtiofsd reports as errors what it does as told.
        errors = [line for line in lines if " ERROR: " in line]
        killed = [line for line in errors if line.endswith(KILLED)]
        if len(killed) == self.kills:
            errors = [line for line in errors if line not in killed]
        if errors and self.name == "lanefsd":
            raise HarnessError(f"{self.name} reports errors: {tail(errors)}")
        self.close()

    @property
    def status(self) -> str:
        """QEMU's run state."""
        return self.qmp.run("query-status")["status"]

    def wait_until_running(self) -> None:
        """Waits until the guest's CPUs run here."""
        deadline = time.monotonic() + RESUME_TIMEOUT
        while (status := self.status) != "running":
            if time.monotonic() > deadline:
                raise self.error(f"the guest is {status}")
            time.sleep(0.01)

    def trace(self) -> str:
        """QEMU's messages."""
        return self.guest.console.with_suffix(".qemu").read_text(errors="replace")

    def error(self, what: str) -> HarnessError:
        """What QEMU and the daemon of this end said."""
        qemu = [line for line in self.trace().splitlines() if not NOISE.search(line)]
        return HarnessError(
            f"{what}\n{self.name} says: {tail(self.daemon.log().splitlines())}\nQEMU says: {tail(qemu)}"
        )


def tail(lines: Sequence[str]) -> str:
    """The last lines, and of those the beginning."""
    return "\n    ".join(["", *(line[:300] for line in lines[-10:])])


@dataclasses.dataclass(frozen=True)
class Times:
    """Times of one migration in milliseconds. All but the total are parts of the downtime, by QEMU's account."""

    source: str
    destination: str
    # From the first byte to the end.
    total: float
    downtime: float
    # QEMU stops the guest: the daemon finishes its requests.
    stop: float
    # QEMU saves the share's device, and loads it, which includes waiting for the source.
    save: float
    load: float
    # From the beginning of the one to the end of the other.
    share: float
    # QEMU starts the guest.
    start: float


CHECKPOINT = re.compile(r"@(\d+\.\d+):vmstate_downtime_checkpoint (\S+)")
DEVICE = re.compile(
    r"@(\d+\.\d+):vmstate_downtime_(save|load) type=\S+ idstr=\S*vhost-user-fs instance_id=\d+ downtime=(\d+)"
)


def checkpoints(trace: str) -> dict[str, float]:
    """When QEMU passed each checkpoint for the last time, in milliseconds."""
    return {name: float(seconds) * 1000 for seconds, name in CHECKPOINT.findall(trace)}


def device_time(trace: str, what: str) -> tuple[float, float]:
    """When QEMU began to save (`save`) or load (`load`) the share's device, the last time, and when it had done it."""
    found = [(float(end) * 1000, int(took) / 1000) for end, kind, took in DEVICE.findall(trace) if kind == what]
    if not found:
        raise HarnessError(f"QEMU does not say how long the {what} of the share's device took")
    end, took = found[-1]
    return end - took, end


def times(source: End, destination: End, answer: dict[str, Any]) -> Times:
    """The times of a migration that has ended."""
    there, here = source.trace(), destination.trace()
    left, arrived = checkpoints(there), checkpoints(here)
    save, load = device_time(there, "save"), device_time(here, "load")
    return Times(
        source.name,
        destination.name,
        total=answer["total-time"],
        downtime=answer["downtime"],
        stop=left["src-vm-stopped"] - left["src-downtime-start"],
        save=save[1] - save[0],
        load=load[1] - load[0],
        share=load[1] - save[0],
        start=start_time(arrived),
    )


def start_time(arrived: dict[str, float]) -> float:
    """How long QEMU took to start the guest, which the last migration brought by pre-copy or by post-copy."""
    spans = [
        (arrived[f"dst-{how}-bh-enter"], arrived[f"dst-{how}-bh-vm-started"])
        for how in ("precopy", "postcopy")
        if f"dst-{how}-bh-vm-started" in arrived
    ]
    if not spans:
        raise HarnessError("QEMU does not say when the guest was started")
    begin, end = max(spans)
    return end - begin


COLUMNS = ("downtime", "stop", "save", "load", "share", "start", "total")


def table(found: Sequence[Times]) -> str:
    """Times of migrations by their ends: median and maximum in milliseconds."""
    head = "| from | to | migrations | " + " | ".join(COLUMNS) + " |"
    lines = [head, "|" + "---|" * (len(COLUMNS) + 3)]
    for pair in dict.fromkeys((one.source, one.destination) for one in found):
        rows = [one for one in found if (one.source, one.destination) == pair]
        values = [[float(getattr(row, column)) for row in rows] for column in COLUMNS]
        cells = [f"{statistics.median(column):.1f} ({max(column):.1f})" for column in values]
        lines.append(f"| {pair[0]} | {pair[1]} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


class MovingGuest:
    """A guest that runs at one end at a time; a context manager that ends all that it has started."""

    def __init__(self, machine: Machine, back_ends: Sequence[BackEnd]) -> None:
        """It boots with the first of the back ends, and moves to each in turn."""
        self.machine, self.back_ends = machine, back_ends
        self.place = 0
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="lanefsd-migrate-"))
        self.found: list[Times] = []
        try:
            self.end = End(machine, back_ends[0], wait=False)
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def guest(self) -> Guest:
        return self.end.guest

    @property
    def socket(self) -> str:
        """Where a destination listens."""
        return f"unix:{self.folder}/migration"

    def next_back_end(self) -> BackEnd:
        return self.back_ends[(self.place + 1) % len(self.back_ends)]

    def move(self) -> Times:
        """Migrates the guest to the next back end."""

        def bring(destination: End) -> dict[str, Any]:
            connect(self.end.qmp, destination.qmp, self.socket)
            answer = wait_for_end(self.end.qmp)
            if answer["status"] != "completed":
                raise self.refused(destination, answer)
            destination.wait_until_running()
            return answer

        return self.go_to_next(bring)

    def move_by_postcopy(self, kills: int = 0) -> Times:
        """Migrates the guest to the next back end, where it runs before most of its memory is there. Meanwhile the daemon's
        worker is killed so many times."""

        def bring(destination: End) -> dict[str, Any]:
            connect(self.end.qmp, destination.qmp, self.socket, SLOW, postcopy=True)
            wait_until_active(self.end.qmp)
            self.end.qmp.run("migrate-start-postcopy")
            destination.wait_until_running()
            for _ in range(kills):
                destination.daemon.replace_worker(signal.SIGKILL)
                destination.kills += 1
            is_late = destination.qmp.run("query-migrate").get("status") == "completed"
            answer = wait_for_end(self.end.qmp)
            # Its memory is there a little later than the source has sent it.
            arrived = wait_for_end(destination.qmp)
            if {answer["status"], arrived["status"]} != {"completed"}:
                raise self.refused(destination, answer)
            if is_late:
                raise destination.error("all memory had come before the guest ran")
            return answer

        return self.go_to_next(bring)

    def go_to_next(self, bring: Callable[[End], dict[str, Any]]) -> Times:
        """Goes on at the next back end, to which `bring` migrates the guest, with QEMU's answer."""
        destination = End(self.machine, self.next_back_end(), wait=True)
        try:
            found = times(self.end, destination, bring(destination))
        except BaseException as error:
            destination.close()
            raise error
        self.arrive(destination)
        self.found.append(found)
        return found

    def refused(self, destination: End, answer: dict[str, Any]) -> HarnessError:
        text = f"the migration {answer['status']}: {answer.get('error-desc', 'no reason given')}"
        return destination.error(f"{self.end.error(text)}\nthe destination:")

    def arrive(self, destination: End) -> None:
        """Goes on at the other end, where the guest is, and ends the one where it was."""
        source, self.end = self.end, destination
        self.place += 1
        try:
            source.leave()
        finally:
            source.close()

    def snapshot(self) -> None:
        """Saves the guest into a file, ends it, and loads it with the next back end."""
        path = self.folder / "snapshot"
        self.end.qmp.run("stop")
        self.end.qmp.run("migrate", uri=f"file:{path}")
        answer = wait_for_end(self.end.qmp)
        if answer["status"] != "completed":
            raise self.end.error(f"saving {answer['status']}: {answer.get('error-desc', '')}")
        self.end.leave()
        self.place += 1
        self.end = End(self.machine, self.back_ends[self.place % len(self.back_ends)], wait=True)
        self.end.qmp.run("migrate-incoming", uri=f"file:{path}")
        deadline = time.monotonic() + MIGRATION_TIMEOUT
        while (status := self.end.status) == "inmigrate":
            if time.monotonic() > deadline:
                raise self.end.error("the snapshot is not loaded")
            time.sleep(0.01)
        if status != "running":
            self.end.qmp.run("cont")
        self.end.wait_until_running()
        path.unlink()

    def fail(self, how: str, empty: pathlib.Path) -> None:
        """A migration that comes to nothing; the guest has to go on where it is. `empty` is another share."""
        breaking, share = FAILURES[how]
        back_end = self.next_back_end().strict() if share else self.next_back_end()
        with End(self.machine, back_end, wait=True, share=empty if share else None) as destination:
            speed = SLOW if breaking else UNLIMITED
            connect(self.end.qmp, destination.qmp, self.socket, speed)
            if breaking:
                wait_until_active(self.end.qmp)
                breaking(self.end, destination)
            answer = wait_for_end(self.end.qmp)
            if answer["status"] == "completed":
                raise destination.error(f"the migration that had to fail ({how}) has completed")
            log.info("  %s: %s (%s)", how, answer["status"], answer.get("error-desc", "no reason given"))
        self.end.wait_until_running()


def connect(source: Qmp, destination: Qmp, uri: str, speed: int = UNLIMITED, postcopy: bool = False) -> None:
    """Starts a migration."""
    # With a return path the source hears whether the guest has arrived, and goes on if not.
    capabilities = [{"capability": "return-path", "state": True}, {"capability": "postcopy-ram", "state": postcopy}]
    for one in (source, destination):
        one.run("migrate-set-capabilities", capabilities=capabilities)
    source.run(
        "migrate-set-parameters", max_bandwidth=speed, max_postcopy_bandwidth=LAZY, downtime_limit=DOWNTIME_LIMIT
    )
    destination.run("migrate-incoming", uri=uri)
    source.run("migrate", uri=uri)


def wait_for_end(source: Qmp) -> dict[str, Any]:
    """Waits until a migration has ended, however; returns QEMU's account of it."""
    deadline = time.monotonic() + MIGRATION_TIMEOUT
    while True:
        answer = source.run("query-migrate")
        if answer.get("status") in ("completed", "failed", "cancelled"):
            return answer
        if time.monotonic() > deadline:
            raise HarnessError(f"the migration does not end: {answer}")
        time.sleep(0.02)


def wait_until_active(source: Qmp) -> None:
    """Waits until memory is on its way."""
    deadline = time.monotonic() + MIGRATION_TIMEOUT
    while True:
        answer = source.run("query-migrate")
        if answer.get("status") == "active" and answer.get("ram", {}).get("transferred", 0) > 0:
            return
        if answer.get("status") in ("completed", "failed") or time.monotonic() > deadline:
            raise HarnessError(f"the migration is not under way: {answer}")
        time.sleep(0.01)


def cancel(source: End, _destination: End) -> None:
    source.qmp.run("migrate_cancel")


def kill_qemu(_source: End, destination: End) -> None:
    destination.guest.running.send_signal(signal.SIGKILL)


def kill_daemon(source: End, destination: End) -> None:
    """The destination has memory without limit from here on, and no daemon at the end."""
    destination.daemon.kill()
    with contextlib.suppress(QmpError):
        source.qmp.run("migrate-set-parameters", max_bandwidth=UNLIMITED)


# What is done in the middle of a migration that has to fail, and whether its destination has another share.
FAILURES: dict[str, tuple[Callable[[End, End], None] | None, bool]] = {
    "cancel": (cancel, False),
    "kill-qemu": (kill_qemu, False),
    "kill-daemon": (kill_daemon, False),
    "missing-path": (None, True),
}
