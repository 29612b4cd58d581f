"""Common parts of the benchmarks: guests that stay up, fio in them, medians, and progress."""

import contextlib
import json
import pathlib
import shlex
import statistics
import time
from collections.abc import Sequence

from . import initramfs
from .daemon import Daemon
from .guest import Guest, GuestError
from .host import HarnessError, log
from .kernels import Kernel

MIB = 1 << 20


# Mount point, shared directory, arguments, and the command of another back end.
Share = tuple[str, pathlib.Path, Sequence[str], str | None]


class BenchVm:
    """A guest with some shares, each with a daemon of its own, that waits for its turn to be measured."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        name: str,
        kernel: Kernel,
        image: pathlib.Path,
        daemons: Sequence[Share],
        queues: int = 1,
        cpus: int = 2,
    ) -> None:
        """`daemons` are (mount point, share, arguments, command or None)."""
        self.name = name
        self.daemons = daemons
        self.kernel = kernel
        self.image = initramfs.with_fio(image)
        self.cpus = cpus
        self.queues = queues
        self.running = stack.enter_context(contextlib.ExitStack())
        self.start()

    def start(self) -> None:
        devices = []
        for point, share, arguments, command in self.daemons:
            daemon = self.running.enter_context(Daemon(share, arguments, command, name="bench"))
            devices.append((point, daemon.socket, self.queues))
        self.guest = self.running.enter_context(Guest(self.kernel, self.image, devices, self.cpus, name="bench"))
        for point, *_ in self.daemons:
            self.guest.mount(point, f"/{point}")

    def output(self, command: str, timeout: float) -> str:
        """The output of a command in the guest. A guest that hangs gets one more chance, so that one of them does
        not cost a run of an hour."""
        try:
            return self.guest.output(command, timeout)
        except GuestError as error:
            log.info(f"{self.name}: {error}\n{self.name} is booted again")
            self.running.close()
            self.start()
            return self.guest.output(command, timeout)

    def fio(self, point: str, arguments: Sequence[str], runtime: int) -> float:
        """Runs fio in a mount; returns MiB/s of writing."""
        words = " ".join(shlex.quote(word) for word in arguments)
        limit = runtime * 10 + 120
        text = self.output(
            f"fio --directory=/{point} --output=/tmp/fio.json --output-format=json {words} && cat /tmp/fio.json", limit
        )
        # fio may warn before the JSON begins.
        jobs = json.loads(text[text.index("{") :])["jobs"]
        failed = [job["error"] for job in jobs if job["error"]]
        if failed:
            raise HarnessError(f"{self.name}: fio ended with errors {failed}")
        return (
            sum(job["write"]["io_bytes"] for job in jobs) / MIB / (max(job["write"]["runtime"] for job in jobs) / 1000)
        )


def shared_file(jobs: int, runtime: int, more: Sequence[str] = ()) -> list[str]:
    """The original's job for one file that all jobs write."""
    return [
        "--name=ssf",
        "--filename=ssf",
        "--size=100g",
        "--blocksize=1m",
        "--ioengine=sync",
        f"--numjobs={jobs}",
        "--group_reporting=1",
        "--fallocate=none",
        f"--runtime={runtime}",
        "--rw=randwrite:256",
        "--rw_sequencer=sequential",
        "--fsync_on_close=1",
        *more,
    ]


def file_per_job(jobs: int, runtime: int, more: Sequence[str] = ()) -> list[str]:
    """The original's job for a file of each job's own."""
    return [
        "--name=fpj",
        "--rw=write",
        "--size=100G",
        "--bs=1M",
        f"--runtime={runtime}",
        f"--numjobs={jobs}",
        "--group_reporting=1",
        "--fallocate=none",
        "--ioengine=sync",
        *more,
    ]


class Progress:
    """Prints the progress of a long run, and an estimate of its remaining time."""

    def __init__(self, points: int) -> None:
        self.points = points
        self.done = 0
        self.begun = time.monotonic()

    def step(self, what: str) -> None:
        self.done += 1
        left = (time.monotonic() - self.begun) / self.done * (self.points - self.done)
        log.info(f"[{self.done}/{self.points}, {left / 60:.0f} min left] {what}")


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> float:
    """How far the extremes are apart, as a part of the median."""
    middle = statistics.median(values)
    return (max(values) - min(values)) / middle if middle else 0.0
