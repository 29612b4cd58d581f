"""What the programs here share: building, shares in memory, and runs of the load generator."""

import atexit
import datetime
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any

# The helpers for the host exist once.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "vm"))
from harness.host import Word, build_workspace, log, run
from harness.paths import REPO as ROOT
from harness.paths import TARGET

__all__ = ["ROOT", "TARGET", "Facts", "Report", "Shares", "Word", "begin", "build", "log", "machine", "measure", "run"]

IMAGE_BYTES = 512 << 20

# What the load generator prints.
Report = dict[str, Any]
# Where and of what figures were taken.
Facts = dict[str, Any]


def build() -> pathlib.Path:
    """Builds the daemon and the load generator; returns their folder."""
    log.info("building lanefsd and the load generator")
    build_workspace()
    return TARGET / "release"


class Shares:
    """A tmpfs, and images in it with file systems of these `kinds`; all gone after `close`."""

    def __init__(self, kinds: Iterable[str] = ()) -> None:
        self.base = pathlib.Path(tempfile.mkdtemp(prefix="lanefsd-load-"))
        self.mounted: list[Word] = []
        atexit.register(self.close)
        self.mount("-t", "tmpfs", "-o", "size=3g", "tmpfs", self.base)
        self.of = {"tmpfs": self.base / "tmpfs"}
        self.of["tmpfs"].mkdir()
        makers = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q"]}
        for kind, make in ((kind, makers[kind]) for kind in kinds):
            image, share = self.base / f"{kind}.img", self.base / kind
            with open(image, "wb") as file:
                file.truncate(IMAGE_BYTES)
            run([*make, image])
            share.mkdir()
            self.mount("-o", "loop", image, share)
            self.of[kind] = share

    def mount(self, *arguments: Word) -> None:
        run(["mount", *arguments])
        self.mounted.append(arguments[-1])

    def close(self) -> None:
        while self.mounted:
            where = self.mounted.pop()
            if subprocess.run(["umount", str(where)]).returncode != 0:
                subprocess.run(["umount", "--lazy", str(where)])
        shutil.rmtree(self.base, ignore_errors=True)


def busy() -> tuple[float, float]:
    """CPU time of the whole machine and of our children, in seconds."""
    with open("/proc/stat") as file:
        fields = [int(field) for field in file.readline().split()[1:]]
    idle = fields[3] + fields[4]
    times = os.times()
    total = (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")
    return total, times.children_user + times.children_system


def wait_for_quiet(quiet_timeout: float) -> None:
    """Waits until others leave most of the machine alone, at most `quiet_timeout` seconds."""
    deadline = time.monotonic() + quiet_timeout
    while time.monotonic() < deadline:
        before = busy()[0]
        time.sleep(0.25)
        if (busy()[0] - before) / 0.25 < 0.3:
            return


def measure(name: str, command: Sequence[Word], quiet_timeout: float) -> Report | None:
    """One run of the load generator; None if it failed. Adds how many CPUs were busy with other things."""
    wait_for_quiet(quiet_timeout)
    (total, own), begin = busy(), time.monotonic()
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    (total_after, own_after), wall = busy(), time.monotonic() - begin
    if done.returncode != 0:
        log.info(f"  {name}: {done.stderr.strip()}")
        return None
    report = json.loads(done.stdout)
    # CPU time of a back end that was killed and waited for is in that of the generator.
    report["foreign_cpus"] = max(0.0, (total_after - total) - (own_after - own)) / wall
    return report


def text_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip()


def machine() -> Facts:
    """Where and of what the figures were taken."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    model = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": text_of("git", "rev-parse", "--short=12", "HEAD"),
        "changes": bool(text_of("git", "status", "--porcelain", "--untracked-files=no")),
        "kernel": os.uname().release,
        "cpus": os.cpu_count(),
        "model": model[0] if model else "unknown",
    }


def begin(program: str) -> None:
    """What a program does first that mounts shares."""
    if os.geteuid() != 0:
        sys.exit(f"{program}: it has to run as root, for the mounts of the shares")
    # So that a signal runs what atexit holds.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
