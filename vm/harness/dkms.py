"""The Debian package that builds our modules for a guest's own kernel."""

import pathlib
import re
import shutil
import textwrap

from . import cache, guest_modules
from .host import log, require, run
from .paths import CACHE, REPO

NAME = "lanefs-fuse"

MAKEFILE = """\
# Called by dkms with the release and the headers of the kernel to build for.
SERIES := $(shell echo $(KREL) | cut -d. -f1,2)
# Kernels that have FUSE built in take one module for all of it.
MODULE_WORDS := $(if $(filter @BUILT_IN@,$(SERIES)),LANEFS_ONE_MODULE=y)

modules:
	rm -rf build
	cp -r $(SERIES) build
	$(MAKE) -C $(KDIR) M=$(CURDIR)/build CONFIG_FUSE_FS=m CONFIG_VIRTIO_FS=m $(MODULE_WORDS) \\
		KCFLAGS='-DLANEFS_VERSION=\\"@MODULE_VERSION@\\"' modules

clean:
	rm -rf build
"""

DKMS = """\
PACKAGE_NAME="@NAME@"
PACKAGE_VERSION="@VERSION@"
MAKE[0]="make modules KREL=$kernelver KDIR=$kernel_source_dir"
CLEAN="make clean"
BUILT_MODULE_LOCATION[0]="build"
DEST_MODULE_LOCATION[0]="/updates/dkms"
case "$kernelver" in
@BUILT_IN_PATTERN@)
    BUILT_MODULE_NAME[0]="lanefs"
    ;;
*)
    BUILT_MODULE_NAME[0]="fuse"
    BUILT_MODULE_NAME[1]="virtiofs"
    BUILT_MODULE_LOCATION[1]="build"
    DEST_MODULE_LOCATION[1]="/updates/dkms"
    ;;
esac
BUILD_EXCLUSIVE_KERNEL="^(@SERIES@)\\."
AUTOINSTALL="yes"
"""

CONTROL = """\
Package: @NAME@-dkms
Version: @VERSION@
Architecture: all
Maintainer: lanefsd developers <lanefsd@localhost>
Depends: dkms, make, gcc
Section: kernel
Priority: optional
Description: FUSE and virtio-fs modules with parallel extending writes
 The kernel's own fuse and virtiofs modules with the patches of lanefsd: direct
 writes that extend a file run in parallel, virtio-fs uses all request queues,
 and the page cache agrees with direct writes. For Linux @SERIES_WORDS@.
"""

POSTINST = """\
#!/bin/sh
set -e
if [ "$1" = configure ]; then
    /usr/lib/dkms/common.postinst @NAME@ @VERSION@ "" "" "$2"
fi
"""

PRERM = """\
#!/bin/sh
set -e
if [ "$1" = remove ] || [ "$1" = upgrade ]; then
    dkms remove -m @NAME@ -v @VERSION@ --all
fi
"""


def package() -> pathlib.Path:
    """Builds the package; returns its path."""
    require("dpkg-deb:dpkg", "patch", "xz:xz-utils")
    version = guest_modules.version().removeprefix("lanefsd-")
    out = guest_modules.ROOM / "out" / f"{NAME}-dkms_{version}_all.deb"
    root = CACHE / "dkms-package"
    with cache.locked(root):
        cache.remove(root)
        log.info(f"packing {out.name}")
        fill(root, version)
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = out.with_suffix(".part")
        run(["dpkg-deb", "--root-owner-group", "-Zgzip", "--build", root, scratch])
        scratch.rename(out)
        cache.remove(root)
    return out


def fill(root: pathlib.Path, version: str) -> None:
    """Fills the package's tree: sources of each series, and what dpkg and dkms need."""
    source = root / "usr/src" / f"{NAME}-{version}"
    source.mkdir(parents=True)
    for series in guest_modules.SERIES:
        scratch = CACHE / f"dkms-{series}"
        guest_modules.patched_source(series, scratch)
        shutil.move(scratch / "fs/fuse", source / series)
        cache.remove(scratch)
    words = {
        "@NAME@": NAME,
        "@VERSION@": version,
        "@MODULE_VERSION@": guest_modules.version(),
        "@SERIES@": "|".join(re.escape(series) for series in guest_modules.SERIES),
        "@SERIES_WORDS@": ", ".join(guest_modules.SERIES),
        "@BUILT_IN@": " ".join(guest_modules.BUILT_IN),
        "@BUILT_IN_PATTERN@": " | ".join(f"{series}.*" for series in guest_modules.BUILT_IN),
    }
    for path, text, mode in (
        (source / "Makefile", MAKEFILE, 0o644),
        (source / "dkms.conf", DKMS, 0o644),
        (root / "DEBIAN/control", CONTROL, 0o644),
        (root / "DEBIAN/postinst", POSTINST, 0o755),
        (root / "DEBIAN/prerm", PRERM, 0o755),
        (root / "usr/share/doc" / f"{NAME}-dkms" / "copyright", copyright_text(), 0o644),
    ):
        for word, value in words.items():
            text = text.replace(word, value)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)


def copyright_text() -> str:
    return (
        textwrap.dedent("""\
        The modules are those of Linux, with changes by the lanefsd developers.
        License: GPL-2.0-only
        On Debian systems the full text is in /usr/share/common-licenses/GPL-2.
        """)
        + f"Patches: {REPO.name}/guest-kernel/patches\n"
    )
