"""Debian systems for guests: a userland on a disk image, and roots with a kernel of their own. Each is made once."""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable

from . import apt, cache, initramfs
from .guest import Guest
from .host import log, require, run
from .kernels import Kernel, release_of
from .paths import CACHE

SUITE = "bookworm"
# Where a guest mounts the image.
INSIDE = "/debian"
MOUNTS = "mount -t proc proc {root}/proc; mount -t sysfs sys {root}/sys; mount -t devtmpfs dev {root}/dev"
ENVIRONMENT = "PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C DEBIAN_FRONTEND=noninteractive"


@dataclasses.dataclass(frozen=True)
class Root:
    """A Debian root directory in the cache."""

    name: str
    what: str
    # Packages that debootstrap installs.
    base: str
    # Packages that apt installs afterwards, with the suite's security updates.
    packages: str = ""
    # Modules that the initramfs needs beside those that initramfs-tools finds on a running system.
    modules: str = ""
    suite: str = SUITE
    finish: Callable[[pathlib.Path], None] = lambda root: None

    def make(self, root: pathlib.Path) -> None:
        """Installs it into an empty place."""
        bootstrap(root, self.base, self.suite)
        if not self.packages:
            return
        # The headers have to be those of the kernel: both are the newest, which only a root with security updates has.
        (root / "etc/kernel-img.conf").write_text("do_symlinks = no\n")
        chroot(root, "apt-get update")
        chroot(root, f"apt-get install -y --no-install-recommends {self.packages} initramfs-tools")
        with open(root / "etc/initramfs-tools/modules", "a") as modules:
            modules.write(self.modules.replace(" ", "\n") + "\n")
        chroot(root, "update-initramfs -u -k all; apt-get clean")
        self.finish(root)

    def fetch(self) -> pathlib.Path:
        """Its directory, made once; use a copy."""

        def make(scratch: pathlib.Path) -> None:
            log.info("making %s (some minutes, once)", self.what)
            self.make(scratch)

        require("debootstrap")
        return cache.cached(CACHE / self.name, make)


def bootstrap(root: pathlib.Path, packages: str, suite: str) -> None:
    """Installs a minimal Debian, verified with the archive's keyring, from the mirror of the host's apt."""
    source = apt.archive()
    if source.main.startswith("https:"):
        packages += ",ca-certificates"
    command = ["debootstrap", "--variant=minbase", "--force-check-gpg", f"--keyring={source.keyring}"]
    # The namespace takes debootstrap's mounts with it, also if debootstrap is killed.
    run(
        ["unshare", "--mount", *command, f"--include={packages}", suite, root, source.main],
        env={**os.environ, **apt.proxies()},
    )
    (root / "etc/apt/sources.list").write_text(source.sources(suite))


def chroot(root: pathlib.Path, command: str) -> str:
    """Runs a shell command in a Debian root with the host's network; /proc, /sys and /dev are there meanwhile."""
    environment = [*ENVIRONMENT.split(), *(f"{name}={value}" for name, value in apt.proxies().items())]
    script = f'{MOUNTS.format(root="$0")}; exec chroot "$0" /usr/bin/env -i "$@"'
    # The mounts are in a namespace of their own, so that a killed command leaves none behind.
    return run(["unshare", "--mount", "sh", "-ec", script, root, *environment, "/bin/sh", "-ec", command])


# Tools of everyday work.
USERLAND = Root(
    "debian-root",
    "a Debian root for the guest",
    "git,rsync,sqlite3,make,gcc,libc6-dev,xz-utils,attr,acl,procps,bc,flex,bison,diffutils",
)
# Kernel, headers, initramfs, and tools that build modules.
DKMS = Root(
    "debian-system",
    "a Debian system with a kernel",
    "kmod,dkms,make,gcc,libc6-dev",
    "linux-image-cloud-amd64 linux-headers-cloud-amd64",
    "virtio_pci virtio_blk ext4",
)

# The same with Debian 13, whose kernel has FUSE built in.
DKMS_TRIXIE = dataclasses.replace(DKMS, name="trixie-system", what="a Debian 13 system with a kernel", suite="trixie")

# The agent starts when the system is up, and is ended with it.
AGENT_SERVICE = """[Unit]
Description=Runs the commands of the test
After=basic.target
[Service]
ExecStart=/usr/local/sbin/lanefs-agent
Environment=HOME=/root LC_ALL=C
StandardOutput=null
StandardError=journal
[Install]
WantedBy=multi-user.target
"""


def finish_systemd(root: pathlib.Path) -> None:
    """Makes a root one that starts from a share, with the agent as a service."""
    (root / "etc/fstab").write_text("share / virtiofs defaults 0 0\n")
    (root / "etc/hostname").write_text("guest\n")
    initramfs.write_program(root / "usr/local/sbin/lanefs-agent", initramfs.AGENT)
    (root / "etc/systemd/system/lanefs-agent.service").write_text(AGENT_SERVICE)
    # Timers that would start work in the middle of a test.
    timers = "apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer"
    chroot(root, f"passwd -d root; systemctl enable lanefs-agent.service; systemctl mask {timers}")


def finish_apparmor(root: pathlib.Path) -> None:
    """The same, without the profiles of other programs: to compile them takes an emulated system minutes."""
    finish_systemd(root)
    chroot(root, "systemctl mask apparmor.service")


def finish_podman(root: pathlib.Path) -> None:
    """The same, without podman's own services: they fail where the share cannot be an upper layer."""
    finish_systemd(root)
    chroot(
        root,
        "systemctl disable podman.service podman.socket podman-restart.service podman-auto-update.service "
        "podman-auto-update.timer",
    )


# A Debian that systemd starts, to be the root of a guest: its initramfs has virtiofs, and it has podman.
SYSTEMD = Root(
    "debian-tree",
    "a Debian with systemd and podman",
    "systemd,systemd-sysv,dbus,udev,kmod,attr,procps",
    "podman crun linux-image-cloud-amd64",
    "virtio_pci virtiofs",
    finish=finish_podman,
)
# The suite after it, with AppArmor in place of podman.
TRIXIE = Root(
    "trixie-tree",
    "a Debian 13 with systemd",
    "systemd,systemd-sysv,dbus,udev,kmod,procps",
    "apparmor linux-image-cloud-amd64",
    "virtio_pci virtiofs",
    "trixie",
    finish_apparmor,
)


def image() -> pathlib.Path:
    """A disk image with the userland."""

    def make(scratch: pathlib.Path) -> None:
        log.info("making %s (some minutes, once)", USERLAND.what)
        root = scratch.with_name("debian-root.part")
        cache.remove(root)
        try:
            USERLAND.make(root)
            chroot(root, "apt-get clean")
            run(["mkfs.ext4", "-q", "-d", root, scratch, "3G"])
        finally:
            cache.remove(root)

    require("debootstrap", "mkfs.ext4:e2fsprogs")
    return cache.cached(CACHE / "debian.ext4", make)


def enter(guest: Guest) -> None:
    """Mounts the image, with the share at /mnt inside it too."""
    guest.output(
        f"""mkdir -p {INSIDE}; mount -t ext4 /dev/vda {INSIDE}
        for folder in proc sys dev tmp mnt; do mount --bind /$folder {INSIDE}/$folder; done""",
        60,
    )


def run_inside(guest: Guest, command: str, timeout: float = 600) -> str:
    """Runs a shell command in the Debian root; returns its output."""
    guest.output(f"cat >/tmp/inside <<'END_OF_COMMAND'\nset -e\n{command}\nEND_OF_COMMAND")
    environment = "PATH=/usr/bin:/bin:/usr/sbin:/sbin HOME=/root LC_ALL=C"
    return guest.output(f"env -i {environment} chroot {INSIDE} /bin/bash /tmp/inside", timeout)


def set_clock(guest: Guest) -> None:
    """Sets the guest's clock a little ahead of the host's, which stamps the files on the share.

    At boot it is behind by up to a second, and make(1) would warn of files from the future.
    """
    guest.output(f"chroot {INSIDE} /bin/date -s @{time.time() + 0.5}")


def kernel_of(root: pathlib.Path) -> Kernel:
    """The kernel that is installed in a Debian root."""
    return Kernel("debian", root, release_of(root))


def fetch(root: pathlib.Path, package: str) -> None:
    """Fetches a package, with the host's network, for an `apt-get install --no-download` in the guest."""
    chroot(root, f"apt-get -o APT::Sandbox::User=root install -y --no-install-recommends --download-only {package}")
