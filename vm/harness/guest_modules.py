"""Our FUSE modules for guest kernels: patches of guest-kernel/ on the distribution's own sources."""

import hashlib
import os
import pathlib
import re
import shutil

from .kernels import Apt
from .paths import CACHE, REPO, HarnessError, need, run, say

ROOM = REPO / "guest-kernel"
# Kernel series that there are patches for, and the suite that has their sources.
SERIES = {"5.10": "bullseye", "6.1": "bookworm"}
MODULES = ("fuse.ko", "virtiofs.ko")
BUILD_TOOLS = ["make", "gcc", "patch", "xz:xz-utils", "dpkg-deb:dpkg"]


def series_of(release):
    """The series that a kernel release belongs to."""
    found = re.match(r"\d+\.\d+", release)
    if not found or found[0] not in SERIES:
        raise HarnessError(f"there are no patches for kernel {release}; guest-kernel/patches has {', '.join(SERIES)}")
    return found[0]


def version():
    """The version that the modules carry."""
    text = (REPO / "Cargo.toml").read_text()
    return "lanefsd-" + re.search(r'^version = "(.*)"', text, re.MULTILINE)[1]


def patches(series):
    found = sorted((ROOM / "patches" / series).glob("*.patch"))
    if not found:
        raise HarnessError(f"guest-kernel/patches/{series} holds no patches")
    return found


def build(release):
    """Builds the modules for a kernel release, unless they are up to date; returns their folder."""
    series = series_of(release)
    out = ROOM / "out" / release
    stamp = out / "made-from"
    inputs = fingerprint(series)
    if stamp.exists() and stamp.read_text() == inputs and all((out / name).exists() for name in MODULES):
        return out
    need(*BUILD_TOOLS)
    if not pathlib.Path("/usr/lib/x86_64-linux-gnu/libelf.so.1").exists():
        run(["apt-get", "install", "-y", "--no-install-recommends", "libelf1"])
    tree = headers(series, release)
    say(f"building the patched FUSE modules for {release}")
    work = CACHE / "modules" / f"{release}-{os.getpid()}"
    try:
        patched_source(series, work)
        # The headers of 5.10 name a compiler that newer suites lack.
        run(["make", "-C", tree, f"M={work / 'fs/fuse'}", "CONFIG_FUSE_FS=m", "CONFIG_VIRTIO_FS=m", "CC=gcc",
             f'KCFLAGS=-DLANEFS_VERSION=\\"{version()}\\"', f"-j{os.cpu_count()}", "modules"])
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for name in MODULES:
            run(["strip", "--strip-debug", "-o", out / name, work / "fs/fuse" / name])
        stamp.write_text(inputs)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def fingerprint(series):
    digest = hashlib.sha256(version().encode())
    for patch in patches(series):
        digest.update(patch.read_bytes())
    return digest.hexdigest()


def source_archive(series):
    """The kernel's sources as Debian packs them."""
    home = CACHE / "linux-source" / series
    if not home.exists():
        apt = Apt(SERIES[series])
        apt.update()
        say(f"fetching linux-source-{series} from {SERIES[series]}")
        scratch = home.with_name(f"{series}.part")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        apt.unpack(f"linux-source-{series}", scratch)
        scratch.rename(home)
    return next(home.rglob("linux-source-*.tar.xz"))


def patched_source(series, into):
    """Unpacks fs/fuse of a series and applies our patches."""
    original = CACHE / "linux-source" / f"{series}-fuse"
    if not original.exists():
        scratch = original.with_suffix(".part")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        run(["tar", "-C", scratch, "--strip-components=1", "-xf", source_archive(series),
             f"linux-source-{series}/fs/fuse"])
        scratch.rename(original)
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(original, into)
    for patch in patches(series):
        try:
            run(["patch", "--strip=1", "--fuzz=0", "--forward", "--input", patch], cwd=into)
        except HarnessError as error:
            raise HarnessError(f"{patch.relative_to(REPO)} does not apply to linux-source-{series}; "
                               f"it has to be carried over:\n{error}") from None


def headers(series, release):
    """The headers of a kernel release, unpacked and made to find each other; returns their folder."""
    home = CACHE / "headers" / release
    tree = home / "usr/src" / f"linux-headers-{release}"
    if tree.exists():
        return tree
    apt = Apt(SERIES[series])
    apt.update()
    say(f"fetching linux-headers-{release} from {SERIES[series]}")
    scratch = home.with_name(f"{release}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        parts = [part for part in apt.depends(f"linux-headers-{release}") if not part.startswith("linux-compiler")]
        for package in (f"linux-headers-{release}", *parts):
            apt.unpack(package, scratch)
    except HarnessError as error:
        raise HarnessError(f"the headers of {release} cannot be had from {SERIES[series]}, which keeps those of its "
                           f"newest kernels; remove {apt.home} to look again:\n{error}") from None
    makefile = scratch / "usr/src" / f"linux-headers-{release}" / "Makefile"
    makefile.write_text(makefile.read_text().replace("/usr/src/", f"{home}/usr/src/"))
    scratch.rename(home)
    return tree
