"""What the commands share: signals, error messages, and what a guest needs on the host."""

import pathlib
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from . import debug_kernel, guest_modules, initramfs, kernels, qemu
from .host import HarnessError, build_daemon, require
from .kernels import Kernel

HOST_PROGRAMS = [
    "busybox:busybox-static",
    "cpio",
    "fio",
    "depmod:kmod",
    "xz:xz-utils",
    "mkfs.xfs:xfsprogs",
    "mkfs.ext4:e2fsprogs",
    "gcc",
    "setpriv:util-linux",
]


def exit_on_signals() -> None:
    """Makes signals unwind the stack, so that everything is cleaned up."""

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


def main(function: Callable[[], int]) -> NoReturn:
    """Runs a command; errors are one message."""
    exit_on_signals()
    try:
        sys.exit(function())
    except HarnessError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def prepare(
    kernel_name: str = kernels.DEFAULT, stock_modules: bool = False, daemon: bool = True
) -> tuple[Kernel, pathlib.Path]:
    """Makes sure of everything that a guest needs; returns its kernel and initramfs.

    Kernels that we have patches for get our modules, unless `stock_modules` says otherwise.
    """
    require(*HOST_PROGRAMS)
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
