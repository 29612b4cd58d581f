"""A daemon for a share: ours, or another vhost-user back end."""

import contextlib
import itertools
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Self

from .host import HarnessError
from .paths import DAEMON, FAULTY_DAEMON, LOGS

COUNTER = itertools.count(1)
# A socket that listens (__SO_ACCEPTCON), among the flags in /proc/net/unix.
LISTENS = 0x10000


def listens(path: pathlib.Path) -> bool:
    """Whether a connection to a socket is taken. The path is there a little earlier."""
    for line in pathlib.Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]:
        fields = line.split()
        if fields[-1] == str(path) and int(fields[3], 16) & LISTENS:
            return True
    return False


class Daemon:
    """A running back end; a context manager that ends it."""

    def __init__(
        self,
        share: pathlib.Path,
        arguments: Sequence[str] = (),
        command: str | None = None,
        name: str = "daemon",
        faults: Sequence[str] | None = None,
    ) -> None:
        """`command` runs another back end; {socket} and {share} in it are replaced. With `faults`, which are
        options of vm/faulty-daemon, ours runs with those."""
        LOGS.mkdir(parents=True, exist_ok=True)
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="lanefsd-daemon-"))
        self.socket = self.directory / "socket"
        self.logfile = LOGS / f"{name}-{os.getpid()}-{next(COUNTER)}.log"
        if command:
            words = [word.format(socket=self.socket, share=share) for word in shlex.split(command)]
        elif faults is not None:
            words = [str(FAULTY_DAEMON), *faults, "--", "--socket-path", str(self.socket), "--shared-dir", str(share)]
        else:
            words = [str(DAEMON), "--socket-path", str(self.socket), "--shared-dir", str(share)]
        # The kernel ends it if we are killed.
        words = ["setpriv", "--pdeathsig", "TERM", *words, *arguments]
        with open(self.logfile, "wb") as errors:
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)
        deadline = time.monotonic() + 10
        while not listens(self.socket):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise HarnessError(f"the daemon does not listen: {self.log()}")
            time.sleep(0.01)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self) -> str:
        """Its log so far."""
        return self.logfile.read_text(errors="replace")

    def wait(self, timeout: float = 20) -> int:
        """Waits until it has ended by itself; returns its exit status."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise HarnessError(f"the daemon still runs after {timeout} s: {self.log()}") from None

    def signal(self, number: int) -> None:
        """Sends a signal to it, and to the process that serves in its place, if there is one."""
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for child in children.read_text().split():
            os.kill(int(child), number)
        self.process.send_signal(number)

    def worker(self) -> int | None:
        """The process that serves in its place, if there is one that lives."""
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for child in children.read_text().split():
            with contextlib.suppress(OSError):
                state = pathlib.Path(f"/proc/{child}/stat").read_text().rpartition(") ")[2]
                if not state.startswith("Z"):
                    return int(child)
        return None

    def replace_worker(self, number: int, timeout: float = 10) -> None:
        """Ends the process that serves by a signal, and waits until another one is there."""
        victim = self.worker()
        if victim is None:
            raise HarnessError(f"the daemon has no worker: {self.log()}")
        os.kill(victim, number)
        self.wait_for_another(victim, timeout)

    def upgrade(self, timeout: float = 20) -> None:
        """Upgrades it to the program that it was started from, and waits until that serves."""
        before = self.worker()
        text = "upgraded from lanefsd"
        upgrades = self.log().count(text)
        self.process.send_signal(signal.SIGHUP)
        self.wait_for_another(before, timeout)
        deadline = time.monotonic() + timeout
        while self.log().count(text) == upgrades:
            if time.monotonic() > deadline:
                raise HarnessError(f"the daemon was not upgraded: {self.log()}")
            time.sleep(0.01)

    def wait_for_another(self, victim: int | None, timeout: float) -> None:
        """Waits until another process than this one serves."""
        deadline = time.monotonic() + timeout
        while self.worker() in (victim, None):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise HarnessError(f"the daemon makes no worker in place of {victim}: {self.log()}")
            time.sleep(0.001)

    def kill(self) -> None:
        """Ends it without warning."""
        self.signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
