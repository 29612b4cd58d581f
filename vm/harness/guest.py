"""A guest: QEMU, the console's log, and an agent that runs commands."""

import base64
import itertools
import os
import pathlib
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Protocol, Self

from . import qemu
from .host import HarnessError
from .initramfs import kernel_options
from .kernels import Kernel
from .paths import LOGS
from .qmp import Qmp, QmpError

BOOT_TIMEOUT = 90
# Seconds in which the agent acknowledges a command, and how often one is sent.
ACKNOWLEDGED = 20
TRIES = 3
COUNTER = itertools.count(1)
# An NMI makes a hung guest print the stack of each CPU. The kernel neither checks its clock nor tests its timer,
# since both look broken in an emulated guest on a busy host.
KERNEL_OPTIONS = (
    "console=ttyS0 quiet panic=0 oops=panic unknown_nmi_panic panic_print=65 "
    "tsc=reliable no_timer_check net.ifnames=0 cryptomgr.notests"
)
# The first lines of crash reports on the console.
TROUBLE = ("kernel BUG", "BUG: ", "Oops", "Uhhuh. NMI")
# The kernel's message about a CPU without timer interrupts. An emulated CPU rarely gets into that state, whatever
# the guest does, and blocks everything that waits for it.
STOPPED_CLOCK = "Possible timer handling issue on cpu"
# QEMU's message when an emulated CPU uses a memory map that another one has just replaced, mostly while booting.
REPLACED_MAP = "Assertion `section_index < d->map.sections_nb' failed"
# A kernel patches itself while it boots. An emulated CPU met the breakpoint that guards such a place after it was gone:
# seen once in some hundred boots with four CPUs, with QEMU 10 too (see SOUND in qemu.py).
STALE_BREAKPOINT = "int3: 0000 [#"


class GuestError(HarnessError):
    """The guest hangs, has panicked, or QEMU has ended; the text ends with the console's tail."""

    @property
    def emulator_failed(self) -> bool:
        """Whether QEMU failed: a CPU got no timer interrupts any more or ran old code, or QEMU has ended itself."""
        return any(words in str(self) for words in (STOPPED_CLOCK, REPLACED_MAP, STALE_BREAKPOINT))


# Tag, socket path, and request queues of a share.
Device = tuple[str, pathlib.Path, int]


class Process(Protocol):
    """The operations of a guest on the process that runs it."""

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def kill(self) -> None: ...


class Guest:
    """A booted guest; a context manager that leaves nothing running."""

    process: Process | None
    agent: socket.socket | None

    def __init__(
        self,
        kernel: Kernel | None,
        initramfs: pathlib.Path | None,
        devices: Sequence[Device],
        cpus: int = 2,
        memory: str = "1G",
        disks: Sequence[pathlib.Path] = (),
        queue_size: int = 1024,
        interactive: bool = False,
        name: str = "guest",
        timeout_scale: float = 1,
        append: str = "",
        firmware: pathlib.Path | None = None,
        qemu_options: Sequence[str] = (),
    ) -> None:
        """`devices` are (tag, socket path, request queues); `disks` are image files. All that the guest does may
        take `timeout_scale` times as long as usual. `append` goes to the kernel's command line. Without a kernel the
        `firmware` chooses what it boots; without an initramfs the kernel mounts its root itself. With `-incoming`
        among the `qemu_options` it does not boot, and its agent answers once a migration to it has ended."""
        self.prepare(name, timeout_scale)
        command = [*self.machine(cpus, memory), *self.serial_lines(interactive), *qemu_options]
        if kernel:
            options = f"{KERNEL_OPTIONS} {kernel_options(kernel, initramfs)} {append}"
            command += ["-kernel", str(kernel.image), "-append", options]
        if initramfs:
            command += ["-initrd", str(initramfs)]
        if firmware:
            command += ["-bios", str(firmware)]
        for number, (tag, path, queues) in enumerate(devices):
            device = f"chardev=fs{number},tag={tag},queue-size={queue_size},num-request-queues={queues}"
            command += ["-chardev", f"socket,id=fs{number},path={path}", "-device", f"vhost-user-fs-pci,{device}"]
        for number, disk in enumerate(disks):
            command += ["-drive", f"if=none,id=disk{number},file={disk},format=raw,snapshot=on"]
            command += ["-device", f"virtio-blk-pci,drive=disk{number}"]
        try:
            stdin, stdout = (None, None) if interactive else (subprocess.DEVNULL, subprocess.DEVNULL)
            with open(self.console.with_suffix(".qemu"), "wb") as errors:
                self.process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=errors)
            self.agent = self.connect("agent")
            if "-incoming" not in qemu_options:
                self.wait_for_agent()
        except BaseException:
            self.close()
            raise

    def machine(self, cpus: int, memory: str) -> list[str]:
        """The words of a command line for a machine without devices. The kernel ends QEMU if we are killed."""
        command = ["setpriv", "--pdeathsig", "TERM", *qemu.machine(), "-smp", str(cpus), "-m", memory]
        command += ["-object", f"memory-backend-memfd,id=mem,size={memory},share=on", "-numa", "node,memdev=mem"]
        command += ["-display", "none", "-nic", "none", "-monitor", "none"]
        command += ["-action", "reboot=reset,panic=exit-failure"]
        return [*command, "-qmp", f"unix:{self.directory}/qmp,server=on,wait=off"]

    def serial_lines(self, interactive: bool) -> list[str]:
        """The console and the agent's line."""
        if interactive:
            console = ["-chardev", f"stdio,id=console,signal=off,logfile={self.console}", "-serial", "chardev:console"]
        else:
            console = ["-serial", f"file:{self.console}"]
        return [*console, "-serial", f"unix:{self.directory}/agent,server=on,wait=off"]

    def prepare(self, name: str, timeout_scale: float) -> None:
        """A state of not being started yet."""
        LOGS.mkdir(parents=True, exist_ok=True)
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="lanefsd-vm-"))
        self.console = LOGS / f"{name}-{os.getpid()}-{next(COUNTER)}.console"
        self.agent = None
        self.buffer = b""
        self.words = itertools.count(1)
        self.process = None
        self.timeout_scale = timeout_scale
        # Set when it hangs, has panicked, or is gone.
        self.broken = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self, name: str) -> socket.socket:
        """Connects to a socket that QEMU makes when it starts."""
        deadline = time.monotonic() + 15
        while True:
            link = socket.socket(socket.AF_UNIX)
            try:
                link.connect(str(self.directory / name))
                return link
            except OSError:
                link.close()
                if self.running.poll() is not None:
                    raise self.error("QEMU has ended") from None
                if time.monotonic() > deadline:
                    raise self.error(f"QEMU does not listen at {name}") from None
                time.sleep(0.02)

    @property
    def running(self) -> Process:
        """The process, which has been started."""
        if self.process is None:
            raise HarnessError("the guest has not been started")
        return self.process

    @property
    def link(self) -> socket.socket:
        """The agent's end, which has been connected."""
        if self.agent is None:
            raise HarnessError("the guest's agent is not connected")
        return self.agent

    def wait_for_agent(self) -> None:
        self.read_until(b"agent ready\n", BOOT_TIMEOUT * self.timeout_scale, "booting")

    def run(
        self, command: str, timeout: float = 120, sink: Callable[[bytes], None] | None = None, check: bool = True
    ) -> tuple[int, str]:
        """Runs a shell command; returns (status, output). With `check` a status other than 0 raises."""
        word = f"end-{next(self.words)}-{os.urandom(4).hex()}"
        encoded = base64.b64encode(command.encode()).decode()
        self.send(word, encoded)
        output = self.read_until(f"\n{word} ".encode(), timeout * self.timeout_scale, f"running {command!r}", sink)
        status = int(self.read_until(b"\n", 10, "waiting for the exit status"))
        text = output.decode(errors="replace").removesuffix("\n")
        if check and status != 0:
            raise HarnessError(f"{command!r} ended with status {status} in the guest:\n{text}")
        return status, text

    def output(self, command: str, timeout: float = 120) -> str:
        """The output of a command that has to succeed."""
        return self.run(command, timeout)[1]

    def mount(self, tag: str = "share", at: str = "/mnt", options: str = "") -> None:
        """Mounts a share."""
        more = f"-o {options}" if options else ""
        self.run(f"mkdir -p {at} && mount -t virtiofs {more} {tag} {at}", 30)

    def shell(self) -> None:
        """A shell on the console, until it is left."""
        self.send("end-shell", "shell")
        self.read_until(b"\nend-shell ", None, "running a shell")

    def send(self, word: str, encoded: str) -> None:
        """Sends a line to the agent until the agent acknowledges it."""
        for _ in range(TRIES):
            self.link.sendall(f"{word} {encoded} .\n".encode())
            deadline = time.monotonic() + ACKNOWLEDGED * self.timeout_scale
            while time.monotonic() < deadline:
                if f"got {word}\n".encode() in self.buffer:
                    break
                self.receive(0.5)
            else:
                # Ends the rest of the line, which the agent ignores.
                self.link.sendall(b"\n")
                continue
            break
        self.read_until(f"got {word}\n".encode(), ACKNOWLEDGED * self.timeout_scale, "taking a command")

    def receive(self, timeout: float) -> bool:
        """Waits for output of the agent; returns whether there was any."""
        ready, _, _ = select.select([self.link], [], [], timeout)
        if ready:
            data = self.link.recv(65536)
            if not data:
                raise self.error("QEMU has ended")
            self.buffer += data
        return bool(ready)

    def read_until(
        self, end: bytes, timeout: float | None, doing: str, sink: Callable[[bytes], None] | None = None
    ) -> bytes:
        deadline = None if timeout is None else time.monotonic() + timeout
        shown = 0
        while True:
            place = self.buffer.find(end)
            if sink is not None:
                upto = place if place >= 0 else max(shown, len(self.buffer) - len(end))
                sink(self.buffer[shown:upto])
                shown = max(shown, upto)
            if place >= 0:
                before = self.buffer[:place]
                self.buffer = self.buffer[place + len(end) :]
                return before
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                self.interrogate()
                raise self.error(f"the guest did not finish {doing} in {timeout:g} s")
            if self.receive(1 if left is None else min(left, 1)):
                continue
            if self.running.poll() is not None:
                raise self.error(f"QEMU ended while {doing}")
            if "Kernel panic" in self.log():
                raise self.error(f"the guest's kernel panicked while {doing}")

    def open_qmp(self) -> Qmp:
        """A QMP connection; QEMU has one at a time."""
        return Qmp(self.connect("qmp"))

    def qmp(self, *commands: str) -> None:
        """Runs QMP commands, one after the other."""
        with self.open_qmp() as connection:
            for execute in commands:
                try:
                    connection.run(execute)
                except QmpError as error:
                    raise self.error(str(error)) from error

    def interrogate(self) -> None:
        """Makes a hung guest print the stack of each CPU on the console, and panic."""
        try:
            self.qmp("inject-nmi")
        except (HarnessError, OSError, ValueError):
            return
        deadline = time.monotonic() + 5 * self.timeout_scale
        while "end Kernel panic" not in self.log() and time.monotonic() < deadline:
            time.sleep(0.1)

    def reset(self) -> None:
        """Resets the machine, as its button would, and waits until it has booted again."""
        self.buffer = b""
        self.qmp("system_reset")
        self.wait_for_agent()

    def leave(self, command: str) -> None:
        """Sends a command after which the agent does not answer any more."""
        self.send(f"end-{next(self.words)}-{os.urandom(4).hex()}", base64.b64encode(command.encode()).decode())

    def reboot(self, command: str = "reboot -f") -> None:
        """Lets the guest reboot itself, and waits until it has booted again."""
        self.leave(command)
        self.wait_for_agent()

    def power_off(self, command: str = "poweroff -f", timeout: float = 30) -> None:
        """Lets the guest turn itself off, and waits until QEMU has ended."""
        self.leave(command)
        try:
            status = self.running.wait(timeout * self.timeout_scale)
        except subprocess.TimeoutExpired:
            self.interrogate()
            raise self.error(f"the guest did not turn itself off in {timeout * self.timeout_scale:g} s") from None
        if status:
            raise self.error(f"QEMU ended with status {status}")

    def log(self) -> str:
        """The console's log so far."""
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def error(self, what: str) -> GuestError:
        self.broken = True
        lines = self.log().splitlines()
        # A crash report begins with its cause. Without one, the last lines are the most useful.
        crash = next((number for number, line in enumerate(lines) if any(word in line for word in TROUBLE)), None)
        tail = "\n".join(lines[-25:] if crash is None else lines[crash : crash + 60])
        qemu = self.console.with_suffix(".qemu")
        said = qemu.read_text(errors="replace")[-1000:] if qemu.exists() else ""
        clock = "".join(f"{line}\n" for line in lines if STOPPED_CLOCK in line)
        return GuestError(f"{what}; console log {self.console}:\n{clock}{tail}\n{said}")

    def close(self) -> None:
        """Ends QEMU, whatever state it is in."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.agent is not None:
            self.agent.close()
        shutil.rmtree(self.directory, ignore_errors=True)
