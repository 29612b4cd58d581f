"""Where things are: the sources, and everything generated below `target/`."""

import os
import pathlib
import shutil
import subprocess
import sys

REPO = pathlib.Path(__file__).resolve().parents[2]
TARGET = REPO / "target"
CACHE = TARGET / "vm"
LOGS = CACHE / "logs"
# Another build of the daemon can be put into its place, as in the tests of tests/; then nothing is built.
BACKEND = os.environ.get("LANEFSD_TEST_BACKEND")
DAEMON = pathlib.Path(BACKEND) if BACKEND else TARGET / "release" / "lanefsd"
FAULTY_DAEMON = TARGET / "release" / "lanefsd-faulty"
SLOW_STORE = TARGET / "release" / "faultfs"


class HarnessError(Exception):
    """Something that a person can act on; the text says what."""


def say(text):
    """Progress, on stderr, so that output of guest commands stays clean."""
    print(text, file=sys.stderr, flush=True)


def run(command, **options):
    """Runs a host command; its output is shown only if it fails."""
    done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, **options)
    if done.returncode != 0:
        raise HarnessError(f"{' '.join(map(str, command))} failed with status {done.returncode}:\n{done.stdout}")
    return done.stdout


def need(*packages):
    """Installs Debian packages that are missing; `program:package` is missing if the program is."""
    missing = []
    for package in packages:
        program, _, name = package.partition(":")
        if shutil.which(program, path="/usr/sbin:/sbin:/usr/bin:/bin:/usr/local/bin") is None:
            missing.append(name or program)
    if not missing:
        return
    say(f"installing {' '.join(missing)}")
    run(["apt-get", "update"])
    run(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-y", "--no-install-recommends", *missing])


def build_daemon():
    """Builds the daemon; cargo does nothing if it is up to date. All commands build the same set of packages, since
    another set would have other features, and everything would be built anew."""
    if BACKEND:
        return
    if shutil.which("cargo") is None:
        raise HarnessError("cargo is missing; install a Rust toolchain (see rust-version in Cargo.toml)")
    if not DAEMON.exists():
        say("building lanefsd (about a minute)")
    run(["cargo", "build", "--release", "--locked", "--workspace", "--exclude", "lanefsd-guest-tools"], cwd=REPO,
        env=cargo_environment())


def cargo_environment():
    """The environment for builds below `target/`, whatever the caller's says."""
    environment = dict(os.environ)
    environment["CARGO_TARGET_DIR"] = str(TARGET)
    environment.pop("RUSTFLAGS", None)
    return environment
