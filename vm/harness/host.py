"""Commands on the host: running them, installing what is missing, building the project, and progress messages."""

import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from . import cache
from .paths import BACKEND, DAEMON, REPO, TARGET

# Anything that becomes one word of a command line.
Word = str | int | float | pathlib.Path

SYSTEM_PATH = "/usr/sbin:/sbin:/usr/bin:/bin:/usr/local/bin"
# One for the machine, since there is one dpkg. Work trees side by side wait for each other.
PACKAGES_LOCK = pathlib.Path("/run/lock/lanefsd-packages")
# What apt-get reports while another program, which does not know our lock, holds one of apt's.
APT_IS_BUSY = re.compile(r"Could not get lock|Unable to lock|Unable to acquire the dpkg frontend lock")
APT_BUSY_TIMEOUT = 600
# All commands build the same set: with another one, packages would have other features and be built anew.
HOST_PACKAGES = ("lanefsd", "lanefsctl", "lanefsd-frontend", "lanefsd-loadgen", "faultfs", "lanefsd-faulty")

log = logging.getLogger("lanefsd.harness")


class HarnessError(Exception):
    """An error that a person can act on; the text says how."""


def configure_logging() -> None:
    """Writes progress to stderr, so that the output of guest commands stays clean."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


configure_logging()


def run(
    command: Sequence[Word],
    cwd: pathlib.Path | None = None,
    env: Mapping[str, str] | None = None,
    warnings: bool = True,
) -> str:
    """Runs a host command and returns its output, with its stderr unless `warnings` is false. The output of a
    command that fails is in the error.

    The command inherits the cache locks that this thread holds: if we are killed, it keeps them until it ends.
    """
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if warnings else subprocess.PIPE,
        text=True,
        errors="replace",
        cwd=cwd,
        env=env,
        pass_fds=cache.held_locks(),
    )
    if done.returncode != 0:
        raise HarnessError(f"{' '.join(words)} failed with status {done.returncode}:\n{done.stdout}{done.stderr or ''}")
    return done.stdout


def install(*packages: str, upgrade: bool = False) -> None:
    """Installs Debian packages on the host with the host's own apt."""
    log.info("installing %s", " ".join(packages))
    with cache.locked(PACKAGES_LOCK, "packages of this machine"):
        apt_get("update")
        kind = ["--only-upgrade"] if upgrade else []
        apt_get("install", "-y", "--no-install-recommends", *kind, *packages)


def apt_get(*words: str) -> None:
    """Runs the host's apt-get; waits while another program uses it."""
    deadline = time.monotonic() + APT_BUSY_TIMEOUT
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    while True:
        try:
            run(["apt-get", "-o", f"DPkg::Lock::Timeout={APT_BUSY_TIMEOUT}", *words], env=environment)
            return
        except HarnessError as error:
            if not APT_IS_BUSY.search(str(error)) or time.monotonic() > deadline:
                raise
        log.info("waiting for another program that uses apt-get")
        time.sleep(5)


def require(*programs: str) -> None:
    """Installs the Debian packages of missing programs. `program:package` names a package with another name; a
    program with slashes is a file that has to exist."""
    missing = []
    for entry in programs:
        program, _, package = entry.partition(":")
        found = os.path.exists(program) if "/" in program else shutil.which(program, path=SYSTEM_PATH)
        if not found:
            missing.append(package or program)
    if missing:
        install(*missing)


def build_daemon() -> None:
    """Builds the daemon and the other host programs; cargo does nothing if they are up to date."""
    if not BACKEND:
        build_workspace()


def build_workspace() -> None:
    """Builds all programs that run on the host."""
    if shutil.which("cargo") is None:
        raise HarnessError("cargo is missing; install a Rust toolchain (see rust-version in Cargo.toml)")
    if not DAEMON.exists():
        log.info("building lanefsd (about a minute)")
    packages = [word for name in HOST_PACKAGES for word in ("--package", name)]
    run(["cargo", "build", "--release", "--locked", *packages], cwd=REPO, env=cargo_environment())


def cargo_install(name: str, version: str, program: str) -> pathlib.Path:
    """Installs a published program below `target/`, once; returns its path."""

    def make(scratch: pathlib.Path) -> None:
        log.info("building %s %s (a few minutes)", name, version)
        run(
            ["cargo", "install", name, "--version", version, "--locked", "--root", scratch],
            cwd=REPO,
            env=cargo_environment(),
        )

    proof = f"bin/{program}"
    return cache.cached(TARGET / f"{name}-{version}", make, proof) / proof


def cargo_environment() -> dict[str, str]:
    """The environment for builds below `target/`, independent of the caller's."""
    environment = dict(os.environ)
    environment["CARGO_TARGET_DIR"] = str(TARGET)
    environment.pop("RUSTFLAGS", None)
    return environment
