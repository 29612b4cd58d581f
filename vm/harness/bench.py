"""What the benchmarks share: guests that stay up, fio in them, medians, and progress."""

import json
import shlex
import statistics
import time

from .daemon import Daemon
from .guest import Guest
from .paths import HarnessError, say

MIB = 1 << 20


class Station:
    """A guest with some shares, each with a daemon of its own, that waits for its turn to be measured."""

    def __init__(self, stack, name, kernel, image, daemons, queues=1, cpus=2):
        """`daemons` are (mount point, share, arguments, command or None)."""
        self.name = name
        self.daemons = {}
        devices = []
        for point, share, arguments, command in daemons:
            daemon = stack.enter_context(Daemon(share, arguments, command, name="bench"))
            self.daemons[point] = daemon
            devices.append((point, daemon.socket, queues))
        self.guest = stack.enter_context(Guest(kernel, image, devices, cpus=cpus, name="bench"))
        for point in self.daemons:
            self.guest.mount(point, f"/{point}")

    def fio(self, point, arguments, runtime):
        """Runs fio in a mount; returns MiB/s of writing."""
        words = " ".join(shlex.quote(word) for word in arguments)
        limit = runtime * 10 + 120
        self.guest.output(f"rm -f /tmp/fio.json; fio --directory=/{point} --output=/tmp/fio.json --output-format=json {words}",
                          limit)
        text = self.guest.output("cat /tmp/fio.json", 60)
        # fio may warn before the JSON begins.
        jobs = json.loads(text[text.index("{"):])["jobs"]
        failed = [job["error"] for job in jobs if job["error"]]
        if failed:
            raise HarnessError(f"{self.name}: fio ended with errors {failed}")
        return sum(job["write"]["io_bytes"] for job in jobs) / MIB / (max(job["write"]["runtime"] for job in jobs) / 1000)


def shared_file(jobs, runtime, more=()):
    """The original's job for one file that all jobs write."""
    return ["--name=ssf", "--filename=ssf", "--size=100g", "--blocksize=1m", "--ioengine=sync", f"--numjobs={jobs}",
            "--group_reporting=1", "--fallocate=none", f"--runtime={runtime}", "--rw=randwrite:256",
            "--rw_sequencer=sequential", "--fsync_on_close=1", *more]


def file_per_job(jobs, runtime, more=()):
    """The original's job for a file of each job's own."""
    return ["--name=fpj", "--rw=write", "--size=100G", "--bs=1M", f"--runtime={runtime}", f"--numjobs={jobs}",
            "--group_reporting=1", "--fallocate=none", "--ioengine=sync", *more]


class Progress:
    """Says how far a long run is, and how long it will take."""

    def __init__(self, points):
        self.points = points
        self.done = 0
        self.begun = time.monotonic()

    def step(self, what):
        self.done += 1
        left = (time.monotonic() - self.begun) / self.done * (self.points - self.done)
        say(f"[{self.done}/{self.points}, {left / 60:.0f} min left] {what}")


def median(values):
    return statistics.median(values)


def spread(values):
    """How far the extremes are apart, as a part of the median."""
    middle = statistics.median(values)
    return (max(values) - min(values)) / middle if middle else 0.0
