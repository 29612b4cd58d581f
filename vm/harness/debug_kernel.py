"""The debug kernel for guests: lockdep, sleeps in atomic context, KASAN, hung tasks.

Built from the distribution's sources with our patches applied and a small configuration. It takes a
quarter of an hour on two CPUs, and is kept.
"""

import os
import pathlib
import shutil

from . import cache, guest_modules
from .host import HarnessError, log, require, run
from .kernels import Kernel
from .paths import CACHE

SERIES = "6.1"
NAME = f"{SERIES}-debug"
SUFFIX = "-lanefsd-debug"
TOOLS = ["make", "gcc", "patch", "flex", "bison", "bc", "xz:xz-utils", "depmod:kmod"]
HEADERS = ["/usr/include/libelf.h:libelf-dev", "/usr/include/openssl/opensslv.h:libssl-dev"]
# Page tables of five levels are off: KASAN mistakes addresses while the boot CPU's features are not known yet.
TIMEOUT_SCALE = 5
KERNEL_OPTIONS = "no5lvl"
WATCHES = ("PROVE_LOCKING", "DEBUG_ATOMIC_SLEEP", "KASAN", "DETECT_HUNG_TASK", "FUSE_FS", "VIRTIO_FS", "VIRTIO_PCI")


def fetch() -> Kernel:
    """The kernel, built if there is none yet. Its modules are always those with the patches of today."""
    home = CACHE / "kernels" / NAME
    marker = home / "release"
    inputs = guest_modules.fingerprint(SERIES) + (guest_modules.ROOM / "debug.config").read_text()
    stamp = home / "made-from"
    with cache.locked(home, "the debug kernel"):
        if not (stamp.exists() and stamp.read_text() == inputs):
            cache.remove(home)
            home.mkdir(parents=True)
            marker.write_text(build(home))
            # The last file: without it the kernel is built again.
            stamp.write_text(inputs)
    return Kernel(NAME, home, marker.read_text())


def modules(kernel: Kernel) -> pathlib.Path:
    """The folder with its patched fuse.ko and virtiofs.ko."""
    return kernel.module_file("kernel/fs/fuse")


def unpack_source(scratch: pathlib.Path) -> None:
    log.info("unpacking linux-source-%s", SERIES)
    scratch.mkdir(parents=True)
    run(["tar", "-C", scratch, "--strip-components=1", "-xf", guest_modules.source_archive(SERIES)])


def build(home: pathlib.Path) -> str:
    """Builds the kernel and installs it in `home`; returns its release."""
    require(*TOOLS, *HEADERS)
    tree = cache.cached(CACHE / "debug-kernel", unpack_source, "Makefile")
    scratch = CACHE / "debug-kernel-fuse"
    guest_modules.patched_source(SERIES, scratch)
    cache.remove(tree / "fs/fuse")
    shutil.move(scratch / "fs/fuse", tree / "fs/fuse")
    cache.remove(scratch)
    log.info("building the debug kernel (a quarter of an hour on two CPUs)")
    make = ["make", "-C", str(tree), f"LOCALVERSION={SUFFIX}", "-s"]
    flags = [f"-j{os.cpu_count()}", f'KCFLAGS=-DLANEFS_VERSION=\\"{guest_modules.version()}\\"']
    configure(tree, [*make, *flags])
    run([*make, *flags, "bzImage", "modules"])
    run([*make, *flags, f"INSTALL_MOD_PATH={home}", "modules_install"])
    release = run([*make, "--no-print-directory", "kernelrelease"]).strip().splitlines()[-1]
    (home / "boot").mkdir()
    shutil.copy(tree / "arch/x86/boot/bzImage", home / "boot" / f"vmlinuz-{release}")
    return release


def configure(tree: pathlib.Path, make: list[str]) -> None:
    """Makes the configuration, and checks that nothing that the tests count on was dropped."""
    run([*make, "tinyconfig"])
    run(["scripts/kconfig/merge_config.sh", "-m", ".config", guest_modules.ROOM / "debug.config"], cwd=tree)
    run([*make, "olddefconfig"])
    chosen = (tree / ".config").read_text()
    missing = [option for option in WATCHES if f"CONFIG_{option}=" not in chosen]
    if missing:
        raise HarnessError(f"the configuration in {tree} lacks {', '.join(missing)}")
