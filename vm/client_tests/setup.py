"""What the clients of `vm/clients` have in common."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

from harness import cli, debian, disk, initramfs, kernels
from harness.daemon import Daemon
from harness.guest import Guest
from harness.host import build_daemon, cargo_environment, log, run
from harness.paths import DAEMON, REPO

# An emulated system is slow at times: systemd gives up none of its units for that.
SYSTEMD = (
    "systemd.default_timeout_start_sec=1800 systemd.default_device_timeout_sec=1800 systemd.service_watchdogs=false "
    "udev.event_timeout=1800"
)
# A daemon's log has none of these after a good session.
TROUBLE = ("panicked", "ERROR", "is broken", "seccomp")


def step(text: str) -> None:
    """Progress within a client."""
    log.info(f"       {text}")


def package() -> pathlib.Path:
    """The Debian package of this tree."""
    build_daemon()
    # Built with the others: alone they would have other features, and be built anew.
    command = ["cargo", "xtask", "dist", "--program", str(DAEMON), "--client", str(DAEMON.with_name("lanefsctl"))]
    return pathlib.Path(run(command, cwd=REPO, env=cargo_environment()).split()[-1])


class Setup:
    """Shares, guests, and how long to wait for them."""

    def __init__(self, timeout_scale: float) -> None:
        self.timeout_scale = timeout_scale

    @contextlib.contextmanager
    def daemon(self, share: pathlib.Path, *arguments: str, **more: Any) -> Iterator[Daemon]:
        """A daemon whose log has to be clean at the end."""
        with Daemon(share, arguments, name="client", **more) as daemon:
            yield daemon
            found = [line for line in daemon.log().splitlines() if any(word in line for word in TROUBLE)]
            assert not found, found

    @contextlib.contextmanager
    def small_guest(self, *daemons: Daemon, kernel: str = kernels.DEFAULT, **more: Any) -> Iterator[Guest]:
        """The guest of `vm/test` with a device for each daemon: tags share, share1, share2 …"""
        booted, image = cli.prepare(kernel)
        devices = [(f"share{number}" if number else "share", daemon.socket, 1) for number, daemon in enumerate(daemons)]
        with Guest(booted, image, devices, name="client", timeout_scale=self.timeout_scale, **more) as guest:
            yield guest

    @contextlib.contextmanager
    def debian_root(self, made: debian.Root = debian.SYSTEMD) -> Iterator[pathlib.Path]:
        """A fresh copy of a Debian tree."""
        tree = made.fetch()
        with disk.directory() as scratch:
            root = scratch / "root"
            run(["cp", "-a", "--reflink=auto", tree, root])
            # The copy's timestamps do not change the agent.
            initramfs.write_program(root / "usr/local/sbin/lanefs-agent", initramfs.AGENT)
            yield root

    @contextlib.contextmanager
    def debian_guest(
        self, root: pathlib.Path, *arguments: str, kernel: str | None = None
    ) -> Iterator[tuple[Guest, Daemon]]:
        """A guest whose root is the share. Without `kernel` it starts as an installed Debian does; with the name of
        one that has virtiofs built in, that one mounts the share itself."""
        cli.prepare()
        if kernel:
            booted, image = kernels.fetch(kernel), None
            run(["cp", "-a", booted.module_file(""), root / "usr/lib/modules"])
        else:
            booted = debian.kernel_of(root)
            image = root / "boot" / f"initrd.img-{booted.release}"
        with (
            self.daemon(root, *arguments) as daemon,
            Guest(
                booted,
                image,
                [("share", daemon.socket, 1)],
                memory="2G",
                name="client",
                timeout_scale=self.timeout_scale,
                append=f"root=share rootfstype=virtiofs rw {SYSTEMD}",
            ) as guest,
        ):
            yield guest, daemon
