"""A Debian userland for the guest: a disk image, mounted read-write and thrown away afterwards."""

import contextlib
import shutil
import time

from . import initramfs
from .kernels import MIRROR, SECURITY, Kernel
from .paths import CACHE, HarnessError, need, run, say

PACKAGES = ["git", "rsync", "sqlite3", "make", "gcc", "libc6-dev", "xz-utils", "attr", "acl", "procps", "bc",
            "flex", "bison", "diffutils"]
INSIDE = "/debian"


def image():
    """The image, made once: Debian bookworm with what workloads need."""
    target = CACHE / "debian.ext4"
    if target.exists():
        return target
    need("debootstrap", "mkfs.ext4:e2fsprogs")
    say("making a Debian root for the guest (a few minutes, once)")
    root = CACHE / "debian-root"
    shutil.rmtree(root, ignore_errors=True)
    try:
        run(["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", "bookworm", root, MIRROR])
        shutil.rmtree(root / "var/cache/apt/archives", ignore_errors=True)
        scratch = target.with_suffix(".part")
        scratch.unlink(missing_ok=True)
        run(["mkfs.ext4", "-q", "-d", root, scratch, "3G"])
        scratch.rename(target)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return target


def enter(guest):
    """Mounts the image, with the share at /mnt inside it too."""
    guest.output(f"""mkdir -p {INSIDE}; mount -t ext4 /dev/vda {INSIDE}
        for folder in proc sys dev tmp mnt; do mount --bind /$folder {INSIDE}/$folder; done""", 60)


def run_inside(guest, command, timeout=600):
    """Runs a shell command in the Debian root; returns its output."""
    guest.output(f"cat >/tmp/inside <<'END_OF_COMMAND'\nset -e\n{command}\nEND_OF_COMMAND")
    environment = "PATH=/usr/bin:/bin:/usr/sbin:/sbin HOME=/root LC_ALL=C"
    return guest.output(f"env -i {environment} chroot {INSIDE} /bin/bash /tmp/inside", timeout)


def set_clock(guest):
    """Sets the guest's clock a little ahead of the host's, which stamps the files on the share.

    At boot it is behind by up to a second, and make(1) would warn of files from the future.
    """
    guest.output(f"chroot {INSIDE} /bin/date -s @{time.time() + 0.5}")


def system():
    """A directory with an installed Debian: kernel, headers, initramfs, and what builds modules. Made once."""
    target = CACHE / "debian-system"
    if target.exists():
        return target
    need("debootstrap")
    say("making a Debian system with a kernel (a few minutes, once)")
    scratch = target.with_suffix(".part")
    shutil.rmtree(scratch, ignore_errors=True)
    run(["debootstrap", "--variant=minbase", "--include=kmod,dkms,make,gcc,libc6-dev", "bookworm", scratch, MIRROR])
    with inside(scratch) as chroot:
        # The headers have to be those of the kernel: both are the newest.
        (scratch / "etc/apt/sources.list").write_text(
            f"deb {MIRROR} bookworm main\ndeb {SECURITY} bookworm-security main\n")
        (scratch / "etc/kernel-img.conf").write_text("do_symlinks = no\n")
        chroot("apt-get update")
        chroot("apt-get install -y --no-install-recommends linux-image-cloud-amd64 linux-headers-cloud-amd64 initramfs-tools")
        # What the guest's disk needs before the root is there.
        with open(scratch / "etc/initramfs-tools/modules", "a") as modules:
            modules.write("virtio_pci\nvirtio_blk\next4\n")
        chroot("update-initramfs -u -k all; apt-get clean")
    scratch.rename(target)
    return target


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


def tree():
    """A directory with a Debian that systemd starts, to be the root of a guest: a kernel, an initramfs that
    knows virtiofs, podman, and the agent as a service. Made once; use a copy."""
    target = CACHE / "debian-tree"
    if target.exists():
        return target
    need("debootstrap")
    say("making a Debian with systemd and podman (some minutes, once)")
    scratch = target.with_suffix(".part")
    shutil.rmtree(scratch, ignore_errors=True)
    packages = "systemd,systemd-sysv,dbus,udev,kmod,attr,procps"
    run(["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", scratch, MIRROR])
    with inside(scratch) as chroot:
        (scratch / "etc/apt/sources.list").write_text(
            f"deb {MIRROR} bookworm main\ndeb {SECURITY} bookworm-security main\n")
        (scratch / "etc/kernel-img.conf").write_text("do_symlinks = no\n")
        chroot("apt-get update")
        chroot("apt-get install -y --no-install-recommends podman crun linux-image-cloud-amd64 initramfs-tools")
        # The parts of the root's mount, which initramfs-tools would find only on a running system.
        with open(scratch / "etc/initramfs-tools/modules", "a") as modules:
            modules.write("virtio_pci\nvirtiofs\n")
        chroot("update-initramfs -u -k all; apt-get clean; passwd -d root")
        (scratch / "etc/fstab").write_text("share / virtiofs defaults 0 0\n")
        (scratch / "etc/hostname").write_text("guest\n")
        initramfs.write_program(scratch / "usr/local/sbin/lanefs-agent", initramfs.AGENT)
        (scratch / "etc/systemd/system/lanefs-agent.service").write_text(AGENT_SERVICE)
        # What would begin work of its own some time after the start.
        timers = "apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer"
        chroot(f"systemctl enable lanefs-agent.service; systemctl mask {timers}")
        # podman's own services fail where the share cannot be an upper layer.
        chroot("systemctl disable podman.service podman.socket podman-restart.service podman-auto-update.service "
               "podman-auto-update.timer")
    scratch.rename(target)
    return target


def kernel_of(root):
    """The kernel that is installed in a Debian root."""
    releases = [path.name for path in (root / "lib/modules").iterdir()]
    if len(releases) != 1:
        raise HarnessError(f"the root has kernels {releases}, not one")
    return Kernel("debian", root, releases[0])


def fetch(root, package):
    """Fetches a package, with the host's network, for an `apt-get install --no-download` in the guest."""
    with inside(root) as chroot:
        chroot(f"apt-get -o APT::Sandbox::User=root install -y --no-install-recommends --download-only {package}")


@contextlib.contextmanager
def inside(root):
    """Yields a function that runs a shell command in a Debian root; its /proc, /sys and /dev are there meanwhile."""
    with contextlib.ExitStack() as stack:
        for kind, folder in (("proc", "proc"), ("sysfs", "sys"), ("devtmpfs", "dev")):
            run(["mount", "-t", kind, kind, root / folder])
            stack.callback(run, ["umount", "--lazy", root / folder])

        def chroot(command):
            environment = "PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C DEBIAN_FRONTEND=noninteractive"
            return run(["chroot", root, "/usr/bin/env", "-i", *environment.split(), "/bin/sh", "-ec", command])

        yield chroot
