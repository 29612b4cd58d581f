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

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
IMAGE_BYTES = 512 << 20


def say(text):
    print(text, file=sys.stderr, flush=True)


def run(*command, **options):
    return subprocess.run([str(part) for part in command], check=True, **options)


def need(paths_to_packages):
    missing = [package for path, package in paths_to_packages.items() if not os.path.exists(path)]
    if missing:
        say(f"installing {' '.join(missing)}")
        run("apt-get", "update", "-q", stdout=subprocess.DEVNULL)
        environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
        run("apt-get", "install", "-y", "-q", "--no-install-recommends", *missing,
            env=environment, stdout=subprocess.DEVNULL)


def build():
    """Builds the daemon and the load generator; returns their folder."""
    say("building lanefsd and the load generator")
    run("cargo", "build", "--release", "--locked", "--workspace", "--exclude", "lanefsd-guest-tools",
        cwd=ROOT, env=dict(os.environ, CARGO_TARGET_DIR=str(TARGET)))
    return TARGET / "release"


class Shares:
    """A tmpfs, and images in it with file systems of these `kinds`; all gone after `close`."""

    def __init__(self, kinds=()):
        self.base = pathlib.Path(tempfile.mkdtemp(prefix="lanefsd-load-"))
        self.mounted = []
        atexit.register(self.close)
        self.mount("-t", "tmpfs", "-o", "size=3g", "tmpfs", self.base)
        self.of = {"tmpfs": self.base / "tmpfs"}
        self.of["tmpfs"].mkdir()
        makers = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q"]}
        for kind, make in ((kind, makers[kind]) for kind in kinds):
            image, share = self.base / f"{kind}.img", self.base / kind
            with open(image, "wb") as file:
                file.truncate(IMAGE_BYTES)
            run(*make, image)
            share.mkdir()
            self.mount("-o", "loop", image, share)
            self.of[kind] = share

    def mount(self, *arguments):
        run("mount", *arguments)
        self.mounted.append(arguments[-1])

    def close(self):
        while self.mounted:
            where = self.mounted.pop()
            if subprocess.run(["umount", where]).returncode != 0:
                subprocess.run(["umount", "--lazy", where])
        shutil.rmtree(self.base, ignore_errors=True)


def busy():
    """CPU time of the whole machine and of our children, in seconds."""
    with open("/proc/stat") as file:
        fields = [int(field) for field in file.readline().split()[1:]]
    idle = fields[3] + fields[4]
    times = os.times()
    total = (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")
    return total, times.children_user + times.children_system


def wait_for_quiet(patience):
    """Waits until others leave most of the machine alone, at most `patience` seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        before = busy()[0]
        time.sleep(0.25)
        if (busy()[0] - before) / 0.25 < 0.3:
            return


def measure(name, command, patience):
    """One run of the load generator; None if it failed. Adds how many CPUs were busy with other things."""
    wait_for_quiet(patience)
    (total, own), begin = busy(), time.monotonic()
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    (total_after, own_after), wall = busy(), time.monotonic() - begin
    if done.returncode != 0:
        say(f"  {name}: {done.stderr.strip()}")
        return None
    report = json.loads(done.stdout)
    # CPU time of a back end that was killed and waited for is in that of the generator.
    report["foreign_cpus"] = max(0.0, (total_after - total) - (own_after - own)) / wall
    return report


def text_of(*command):
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip()


def machine():
    """Where and of what the figures were taken."""
    model = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": text_of("git", "rev-parse", "--short=12", "HEAD"),
        "changes": bool(text_of("git", "status", "--porcelain", "--untracked-files=no")),
        "kernel": os.uname().release,
        "cpus": os.cpu_count(),
        "model": model[0] if model else "unknown",
    }


def begin(program):
    """What a program does first that mounts shares."""
    if os.geteuid() != 0:
        sys.exit(f"{program}: it has to run as root, for the mounts of the shares")
    # So that a signal runs what atexit holds.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
