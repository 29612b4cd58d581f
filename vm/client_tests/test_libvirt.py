"""libvirt, which starts lanefsd for a domain of its own, from the Debian package."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Self

from harness import cli, disk
from harness.guest import KERNEL_OPTIONS, Guest
from harness.host import HarnessError, Word, log, require, run
from harness.paths import LOGS

from .setup import TROUBLE, Setup, package, step

DRIVER = pathlib.Path("/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so")
NAME = "lanefsd-test"
# Version 2 of control groups, whatever the host has.
GROUPS_V2 = "umount --recursive --lazy /sys/fs/cgroup 2>/dev/null || true; mount -t cgroup2 cgroup2 /sys/fs/cgroup"
# libvirtd has fixed places for what it writes. Here they are folders of ours, for it and for all that it starts, and
# all of that is killed with the first process.
START = """set -e
# The package, as if it were installed, and no other daemon for libvirt to find.
mount -t overlay -o "lowerdir=$1/package/usr:/usr" overlay /usr
mount --bind "$1/package/usr/share/qemu/vhost-user" /usr/share/qemu/vhost-user
for pair in run:/run etc:/etc/libvirt lib:/var/lib/libvirt cache:/var/cache/libvirt log:/var/log/libvirt; do
    mkdir -p "$1/${pair%%:*}" "${pair#*:}"
    mount --bind "$1/${pair%%:*}" "${pair#*:}"
done
# A user and a group that Debian's package would make on the host are wanted, though the configuration names root.
for table in passwd:64055::/nonexistent:/usr/sbin/nologin group:; do
    { cat "/etc/${table%%:*}"; echo "libvirt-qemu:x:64055:${table#*:}"; } >"$1/${table%%:*}"
    mount --bind "$1/${table%%:*}" "/etc/${table%%:*}"
done
# libvirtd needs control groups; it ends with a segmentation fault at a hot-plug where none are.
GROUPS_OF_OURS
# The shell stays, since the first process has to wait for all that have lost their parents.
libvirtd --config "$1/etc/libvirtd.conf" --pid-file "$1/run/libvirtd.pid" &
wait $!
""".replace("GROUPS_OF_OURS", GROUPS_V2)
# Where libvirtd makes groups for its domains if systemd does not do it.
GROUPS = "/sys/fs/cgroup/machine"
HAS_GROUPS = f"{GROUPS_V2}; [ ! -e {GROUPS} ] || echo there"
# They are empty as soon as the kernel is done with the processes, which have been killed.
REMOVE_GROUPS = f"""{GROUPS_V2}
for i in $(seq 100); do
    [ -e {GROUPS} ] || exit 0
    find {GROUPS} -depth -type d -exec rmdir {{}} + 2>/dev/null || sleep 0.1
done
exit 1
"""
LIBVIRTD = """auth_unix_rw = "none"
log_outputs = "2:stderr"
"""
QEMU = """user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
stdio_handler = "file"
namespaces = []
"""
# Debian 12's QEMU is sound with one emulated CPU only, see harness/qemu.py.
DOMAIN = """<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>768</memory>
  <vcpu>1</vcpu>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{kernel}</kernel><initrd>{initramfs}</initrd><cmdline>{options}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <cpu mode='maximum'/>
  <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>
  <devices>
    {filesystem}
    <serial type='file'><source path='{console}'/><target port='0'/></serial>
    <serial type='unix'><source mode='bind' path='{agent}'/><target port='1'/></serial>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
"""
FILESYSTEM = """<filesystem type='mount' accessmode='passthrough'>
      <driver type='virtiofs' queue='1024'/>
      <binary{path} xattr='on'><cache mode='always'/><lock posix='on' flock='on'/></binary>
      <source dir='{share}'/><target dir='{tag}'/>
    </filesystem>"""


INSTALLED = "/usr/bin/lanefsd"


def filesystem(share: pathlib.Path, tag: str, path: str = "") -> str:
    """The element for a share. Without a path, libvirt looks for the daemon."""
    return FILESYSTEM.format(path=path and f" path='{path}'", share=share, tag=tag)


class Libvirt:
    """A libvirtd of our own; a context manager that ends it and all that it has started."""

    def __init__(self, timeout_scale: float) -> None:
        self.timeout_scale = timeout_scale
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="lanefsd-libvirt-"))
        self.logfile = LOGS / f"libvirtd-{os.getpid()}.log"
        LOGS.mkdir(parents=True, exist_ok=True)
        (self.directory / "etc").mkdir()
        run(["dpkg-deb", "--extract", package(), self.directory / "package"])
        (self.directory / "etc/libvirtd.conf").write_text(LIBVIRTD)
        (self.directory / "etc/qemu.conf").write_text(QEMU)
        self.had_groups = run(["unshare", "--mount", "sh", "-ec", HAS_GROUPS]) != ""
        words = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", START, "sh"]
        with open(self.logfile, "wb") as errors:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", *words, str(self.directory)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
        try:
            self.wait_for(lambda: self.virsh("version", check=False)[0] == 0, 60, "libvirtd answers")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def virsh(self, *words: Word, check: bool = True) -> tuple[int, str]:
        """Runs a command of virsh; returns (status, output)."""
        socket = self.directory / "run/libvirt/libvirt-sock"
        done = subprocess.run(
            ["virsh", "--connect", f"qemu:///system?socket={socket}", *map(str, words)],
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if check and done.returncode:
            raise HarnessError(f"virsh {' '.join(map(str, words))}: {done.stdout}\n{self.log()[-2000:]}")
        return done.returncode, done.stdout.strip()

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds * self.timeout_scale
        while not condition():
            if self.process.poll() is not None:
                raise HarnessError(f"libvirtd has ended:\n{self.log()[-2000:]}")
            if time.monotonic() > deadline:
                raise HarnessError(f"{what}: not so after {seconds * self.timeout_scale:g} s\n{self.log()[-2000:]}")
            time.sleep(0.2)

    def log(self) -> str:
        """What libvirtd and the daemons for its domains have said."""
        logs = [self.logfile, *(self.directory / "log").rglob("*.log")]
        return "\n".join(path.read_text(errors="replace") for path in logs)

    def daemons(self, share: pathlib.Path) -> list[int]:
        """The processes of lanefsd that serve a directory, the outer and the inner one."""
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().decode(errors="replace").replace("\0", " ")
                if words.startswith(INSTALLED) and str(share) in words:
                    found.append(int(path.parent.name))
        return found

    def close(self) -> None:
        # unshare(1) kills the first process of the namespace when it is killed, and the kernel all others.
        self.process.kill()
        self.process.wait()
        for name in ("log", "run"):
            for path in (self.directory / name).rglob("*virtiofsd.log"):
                shutil.copy(path, LOGS / f"{os.getpid()}-{path.name}")
        shutil.rmtree(self.directory, ignore_errors=True)
        if not self.had_groups:
            run(["unshare", "--mount", "sh", "-ec", REMOVE_GROUPS])


class Domain:
    """A domain in the place of a process."""

    def __init__(self, libvirt: Libvirt) -> None:
        self.libvirt = libvirt

    def poll(self) -> int | None:
        status, state = self.libvirt.virsh("domstate", NAME, check=False)
        return 0 if status or "shut off" in state else None

    def wait(self, timeout: float | None = 30) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if timeout is not None and deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(NAME, timeout)
            time.sleep(0.5)
        return 0

    def send_signal(self, _: int) -> None:
        self.libvirt.virsh("destroy", NAME, check=False)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class DomainGuest(Guest):
    """A guest that libvirt has started."""

    def __init__(self, libvirt: Libvirt, share: pathlib.Path, timeout_scale: float) -> None:
        kernel, image = cli.prepare()
        self.prepare("libvirt", timeout_scale)
        self.libvirt = libvirt
        xml = self.directory / "domain.xml"
        xml.write_text(
            DOMAIN.format(
                name=NAME,
                kernel=kernel.image,
                initramfs=image,
                options=KERNEL_OPTIONS,
                filesystem=filesystem(share, "share"),
                console=self.console,
                agent=self.directory / "agent",
            )
        )
        try:
            libvirt.virsh("create", xml)
            self.process = Domain(libvirt)
            self.agent = self.connect("agent")
            self.wait_for_agent()
        except BaseException:
            self.close()
            raise

    def interrogate(self) -> None:
        self.libvirt.virsh("inject-nmi", NAME, check=False)
        time.sleep(5)

    def reset(self) -> None:
        self.buffer = b""
        self.libvirt.virsh("reset", NAME)
        self.wait_for_agent()

    def plug(self, share: pathlib.Path, tag: str) -> None:
        """Adds a share while the guest runs, and waits until its driver has it."""
        xml = self.directory / f"{tag}.xml"
        xml.write_text(filesystem(share, tag, INSTALLED))
        self.libvirt.virsh("attach-device", NAME, xml, "--live")
        self.output(
            f"""for i in $(seq 300); do
            mkdir -p /tmp/{tag}; mount -t virtiofs {tag} /tmp/{tag} 2>/dev/null && exit; sleep 0.1; done; exit 1""",
            60,
        )

    def unplug(self, share: pathlib.Path, tag: str) -> None:
        """Takes it away again; its daemon ends."""
        self.output(f"umount /tmp/{tag}")
        self.libvirt.virsh("detach-device", NAME, self.directory / f"{tag}.xml", "--live")
        self.libvirt.wait_for(
            lambda: not self.libvirt.daemons(share), 30, f"{tag} is unplugged and its daemon has ended"
        )


def life(guest: DomainGuest, libvirt: Libvirt, share: pathlib.Path, second: pathlib.Path) -> None:
    step("mounts, reads and writes")
    guest.mount()
    guest.output("echo one >/mnt/file; sync; locks free /mnt/locked")
    assert (share / "file").read_text() == "one\n"
    for number in range(2):
        step("a second share is plugged in, and out")
        guest.plug(second, "second")
        guest.output(f"echo {number} >>/tmp/second/file; cat /mnt/file")
        assert libvirt.daemons(second)
        guest.unplug(second, "second")
    assert (second / "file").read_text() == "0\n1\n"
    step("is stopped and goes on")
    guest.output(
        "(while :; do date >>/mnt/noise; done) </dev/null >/dev/null 2>&1 & while ! [ -s /mnt/noise ]; do sleep 0.1; done"
    )
    for _ in range(3):
        libvirt.virsh("suspend", NAME)
        libvirt.virsh("resume", NAME)
    size = (share / "noise").stat().st_size
    libvirt.wait_for(lambda: (share / "noise").stat().st_size > size, 30, "the guest writes again")
    step("is reset")
    guest.reset()
    guest.mount()
    assert guest.output("cat /mnt/file") == "one"
    step("turns itself off")
    guest.power_off()
    libvirt.wait_for(lambda: not libvirt.daemons(share), 20, "the daemon has ended")


def test_libvirt(setup: Setup) -> None:
    """Libvirt starts the packaged lanefsd for a domain, plugs a second share in and out, stops and resets the domain."""
    require("libvirtd:libvirt-daemon", "virsh:libvirt-clients", "qemu-system-x86_64:qemu-system-x86")
    if not DRIVER.exists():
        log.info("installing libvirt's driver for QEMU")
        run(["apt-get", "install", "-y", "--no-install-recommends", "libvirt-daemon-driver-qemu"])
    with disk.directory() as share, disk.directory() as second, Libvirt(setup.timeout_scale) as server:
        with DomainGuest(server, share, setup.timeout_scale) as guest:
            life(guest, server, share, second)
        found = [
            line for line in server.log().splitlines() if "lanefsd" in line and any(word in line for word in TROUBLE)
        ]
        assert not found, found
