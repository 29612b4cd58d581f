"""The QEMU that boots the guests, and how it runs their CPUs."""

import functools
import os
import pathlib
import re

from . import apt, cache
from .host import HarnessError, install, log, require, run
from .paths import CACHE

# Before 8.1, emulated CPUs may run code that another CPU is just changing: a guest with several of them panics
# now and then ("Oops: int3"), as kernels patch themselves. Mended by "accel/tcg: Always lock pages
# before translation".
SOUND = (8, 1)
PACKAGES = ["qemu-system-x86", "qemu-system-common", "qemu-system-data"]


def kvm_works() -> bool:
    """Whether KVM boots a guest. /dev/kvm can be there and of no use."""
    flags = pathlib.Path("/proc/cpuinfo").read_text()
    return os.access("/dev/kvm", os.R_OK | os.W_OK) and (" vmx" in flags or " svm" in flags)


def version(program: str) -> tuple[int, int]:
    """Major and minor version of a QEMU."""
    found = re.search(r"version (\d+)\.(\d+)", run([program, "--version"]))
    if found is None:
        raise HarnessError(f"{program} --version names no version")
    return int(found[1]), int(found[2])


@functools.cache
def program() -> str:
    """The QEMU to use: LANEFSD_QEMU, or the host's, or one from backports where the host's emulates CPUs badly."""
    if chosen := os.environ.get("LANEFSD_QEMU"):
        return chosen
    require("qemu-system-x86_64:qemu-system-x86")
    host = "qemu-system-x86_64"
    if kvm_works() or version(host) >= SOUND:
        return host
    binary = from_backports()
    # Its loadable parts are beside it; those of the host's QEMU are not for it.
    os.environ["QEMU_MODULE_DIR"] = str(binary.parents[1] / "lib/x86_64-linux-gnu/qemu")
    return str(binary)


def from_backports() -> pathlib.Path:
    """Debian 12's newer QEMU, unpacked into the cache and installed nowhere."""

    def make(scratch: pathlib.Path) -> None:
        source = apt.Apt("bookworm-backports")
        source.update()
        log.info("fetching a QEMU that emulates several CPUs soundly from bookworm-backports")
        source.unpack(PACKAGES, scratch)
        if "not found" in run(["ldd", scratch / "usr/bin/qemu-system-x86_64"]):
            install(*(package for package in source.depends(PACKAGES[0]) if package.startswith("lib")))

    return cache.cached(CACHE / "qemu", make, apt.VERIFIED) / "usr/bin/qemu-system-x86_64"


def machine() -> list[str]:
    """The words of a command line up to the kind of CPU."""
    accelerator = ["-accel", "kvm", "-cpu", "host"] if kvm_works() else ["-accel", "tcg,thread=multi", "-cpu", "max"]
    # An unpacked QEMU finds its own files, but not the host's firmware. On q35 that needs ten seconds of CPU time
    # with QEMU 10, on pc 0.2.
    return [program(), "-L", "/usr/share/seabios", "-machine", "pc", *accelerator]
