"""What the commands share: options, signals, and messages."""

import signal
import sys

from . import debug_kernel, guest_modules, initramfs, kernels, qemu
from .paths import HarnessError, build_daemon, need

HOST_PROGRAMS = ["busybox:busybox-static", "cpio", "fio", "depmod:kmod",
                 "xz:xz-utils", "mkfs.xfs:xfsprogs", "mkfs.ext4:e2fsprogs", "gcc"]


def main(function):
    """Runs a command; errors are one message, and signals unwind so that everything is cleaned up."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))
    try:
        sys.exit(function())
    except HarnessError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def prepare(kernel_name=kernels.DEFAULT, stock_modules=False, daemon=True):
    """Makes sure of everything that a guest needs; returns its kernel and initramfs.

    Kernels that we have patches for get our modules, unless `stock_modules` says otherwise.
    """
    need(*HOST_PROGRAMS)
    qemu.program()
    if daemon:
        build_daemon()
    if kernel_name == debug_kernel.NAME:
        kernel = debug_kernel.fetch()
        return kernel, initramfs.make(kernel, debug_kernel.modules(kernel))
    kernel = kernels.fetch(kernel_name)
    patched = not stock_modules and kernel.name in guest_modules.SERIES
    modules = guest_modules.build(kernel.release) if patched else None
    return kernel, initramfs.make(kernel, modules)
