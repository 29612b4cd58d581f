"""A guest kernel that watches itself: lockdep, sleeps in atomic context, KASAN, hung tasks.

Built from the distribution's sources with our patches applied and a small configuration. It takes a
quarter of an hour on two CPUs, and is kept.
"""

import os
import shutil

from . import guest_modules
from .kernels import Kernel
from .paths import CACHE, HarnessError, need, run, say

SERIES = "6.1"
NAME = f"{SERIES}-debug"
SUFFIX = "-lanefsd-debug"
TOOLS = ["make", "gcc", "patch", "flex", "bison", "bc", "xz:xz-utils", "depmod:kmod"]
# Page tables of five levels are off: KASAN mistakes addresses while the boot CPU's features are not known yet.
GUEST = {"patience": 5, "append": "no5lvl"}
WATCHES = ("PROVE_LOCKING", "DEBUG_ATOMIC_SLEEP", "KASAN", "DETECT_HUNG_TASK", "FUSE_FS", "VIRTIO_FS", "VIRTIO_PCI")


def fetch():
    """The kernel, built if there is none yet. Its modules are always those with the patches of today."""
    home = CACHE / "kernels" / NAME
    marker = home / "release"
    inputs = guest_modules.fingerprint(SERIES) + (guest_modules.ROOM / "debug.config").read_text()
    stamp = home / "made-from"
    if not (stamp.exists() and stamp.read_text() == inputs):
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        marker.write_text(build(home))
        stamp.write_text(inputs)
    return Kernel(NAME, home, marker.read_text())


def modules(kernel):
    """The folder with its patched fuse.ko and virtiofs.ko."""
    return kernel.module_file("kernel/fs/fuse")


def build(home):
    need(*TOOLS)
    for file, package in (("/usr/include/libelf.h", "libelf-dev"), ("/usr/include/openssl/opensslv.h", "libssl-dev")):
        if not os.path.exists(file):
            run(["apt-get", "install", "-y", "--no-install-recommends", package])
    tree = CACHE / "debug-kernel"
    if not (tree / "Makefile").exists():
        say(f"unpacking linux-source-{SERIES}")
        tree.mkdir(parents=True, exist_ok=True)
        run(["tar", "-C", tree, "--strip-components=1", "-xf", guest_modules.source_archive(SERIES)])
    scratch = CACHE / "debug-kernel-fuse"
    guest_modules.patched_source(SERIES, scratch)
    shutil.rmtree(tree / "fs/fuse")
    shutil.move(scratch / "fs/fuse", tree / "fs/fuse")
    shutil.rmtree(scratch)
    say("building the kernel that watches itself (a quarter of an hour on two CPUs)")
    make = ["make", "-C", tree, f"LOCALVERSION={SUFFIX}", f"-j{os.cpu_count()}", "-s",
            f'KCFLAGS=-DLANEFS_VERSION=\\"{guest_modules.version()}\\"']
    run([*make, "tinyconfig"])
    run(["scripts/kconfig/merge_config.sh", "-m", ".config", guest_modules.ROOM / "debug.config"], cwd=tree)
    run([*make, "olddefconfig"])
    chosen = (tree / ".config").read_text()
    missing = [option for option in WATCHES if f"CONFIG_{option}=" not in chosen]
    if missing:
        raise HarnessError(f"the configuration in {tree} lacks {', '.join(missing)}")
    run([*make, "bzImage", "modules"])
    run([*make, f"INSTALL_MOD_PATH={home}", "modules_install"])
    release = run(["make", "--no-print-directory", "-C", tree, "-s", f"LOCALVERSION={SUFFIX}", "kernelrelease"]).strip().splitlines()[-1]
    (home / "boot").mkdir()
    shutil.copy(tree / "arch/x86/boot/bzImage", home / "boot" / f"vmlinuz-{release}")
    return release
