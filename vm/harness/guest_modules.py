"""Our FUSE modules for guest kernels: patches of guest-kernel/ on the distribution's own sources."""

import hashlib
import os
import pathlib
import re
import shutil
import subprocess

from . import apt, cache
from .host import HarnessError, log, require, run
from .paths import CACHE, REPO

ROOM = REPO / "guest-kernel"
# Kernel series that there are patches for, and the suite that has their sources.
SERIES = {"5.10": "bullseye", "6.1": "bookworm", "6.12": "trixie", "7.2": "sid"}
# Series whose kernels have FUSE built in: one module for all, and the boot option that keeps FUSE of the kernel off.
BUILT_IN = ("6.12", "7.2")
BOOT_OPTION = "initcall_blacklist=fuse_init,virtio_fs_init"
LOADER = pathlib.Path("/lib64/ld-linux-x86-64.so.2")
BUILD_TOOLS = ["make", "gcc", "patch", "xz:xz-utils", "/usr/lib/x86_64-linux-gnu/libelf.so.1:libelf1"]


def series_of(release: str) -> str:
    """The series that a kernel release belongs to."""
    found = re.match(r"\d+\.\d+", release)
    if not found or found[0] not in SERIES:
        raise HarnessError(f"there are no patches for kernel {release}; guest-kernel/patches has {', '.join(SERIES)}")
    return found[0]


def suite_of(release: str) -> str:
    """The suite that has the headers of a kernel release."""
    series = series_of(release)
    # Debian 12 has the kernel of 13 as well.
    return "bookworm-backports" if series == "6.12" and "+deb12" in release else SERIES[series]


def modules(series: str) -> tuple[str, ...]:
    """The files that are built for a series."""
    return ("lanefs.ko",) if series in BUILT_IN else ("fuse.ko", "virtiofs.ko")


def version() -> str:
    """The version that the modules carry."""
    found = re.search(r'^version = "(.*)"', (REPO / "Cargo.toml").read_text(), re.MULTILINE)
    if found is None:
        raise HarnessError("Cargo.toml names no version")
    return f"lanefsd-{found[1]}"


def patches(series: str) -> list[pathlib.Path]:
    found = sorted((ROOM / "patches" / series).glob("*.patch"))
    if not found:
        raise HarnessError(f"guest-kernel/patches/{series} holds no patches")
    return found


def build(release: str) -> pathlib.Path:
    """Builds the modules for a kernel release, unless they are up to date; returns their folder."""
    series = series_of(release)
    out = ROOM / "out" / release
    stamp = out / "made-from"
    inputs = fingerprint(series)
    with cache.locked(CACHE / "modules" / release, f"the FUSE modules for {release}"):
        if stamp.exists() and stamp.read_text() == inputs and all((out / name).exists() for name in modules(series)):
            return out
        require(*BUILD_TOOLS)
        tree = headers(release)
        log.info("building the patched FUSE modules for %s", release)
        work = CACHE / "modules" / release
        try:
            patched_source(series, work)
            run(make_command(series, tree, work))
            cache.remove(out)
            out.mkdir(parents=True)
            for name in modules(series):
                run(["strip", "--strip-debug", "-o", out / name, work / "fs/fuse" / name])
            # The last file: without it they are built again.
            stamp.write_text(inputs)
        finally:
            cache.remove(work)
    return out


def knows(switch: str) -> bool:
    """Whether the host's compiler knows a switch."""
    command = ["gcc", switch, "-E", "-x", "c", "/dev/null"]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def make_command(series: str, tree: pathlib.Path, work: pathlib.Path) -> list[str]:
    """The command that compiles the modules in `work` with the headers in `tree`."""
    # The headers of 5.10 name a compiler that newer suites lack.
    words = ["CONFIG_FUSE_FS=m", "CONFIG_VIRTIO_FS=m", "CC=gcc", f'KCFLAGS=-DLANEFS_VERSION=\\"{version()}\\"']
    # Type information for BPF would need pahole.
    words += ["CONFIG_DEBUG_INFO_BTF_MODULES="]
    words += ["LANEFS_ONE_MODULE=y"] if series in BUILT_IN else []
    # A switch of GCC 14, in the place of which older ones have another.
    words += [] if knows("-fmin-function-alignment=16") else ["CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT="]
    return ["make", "-C", str(tree), f"M={work / 'fs/fuse'}", *words, f"-j{os.cpu_count()}", "modules"]


def fingerprint(series: str) -> str:
    """A hash of all that the modules of a series are made from."""
    digest = hashlib.sha256(version().encode())
    for patch in patches(series):
        digest.update(patch.read_bytes())
    return digest.hexdigest()


def source_folder(series: str) -> pathlib.Path:
    """The kernel's sources as Debian packs them, and fs/fuse of them in the folder `fuse`."""

    def make(scratch: pathlib.Path) -> None:
        source = apt.Apt(SERIES[series])
        source.update()
        log.info("fetching linux-source-%s from %s", series, SERIES[series])
        source.unpack([f"linux-source-{series}"], scratch)
        (scratch / "fuse").mkdir()
        only = f"linux-source-{series}/fs/fuse"
        run(["tar", "-C", scratch / "fuse", "--strip-components=1", "-xf", archive_in(scratch), only])

    return cache.cached(CACHE / "linux-source" / series, make, apt.VERIFIED)


def archive_in(folder: pathlib.Path) -> pathlib.Path:
    return next(folder.rglob("linux-source-*.tar.xz"))


def source_archive(series: str) -> pathlib.Path:
    """The archive of a series' sources."""
    return archive_in(source_folder(series))


def patched_source(series: str, into: pathlib.Path) -> None:
    """Copies fs/fuse of a series and applies our patches."""
    original = source_folder(series) / "fuse"
    cache.remove(into)
    shutil.copytree(original, into)
    for patch in patches(series):
        try:
            run(["patch", "--strip=1", "--fuzz=0", "--forward", "--input", patch], cwd=into)
        except HarnessError as error:
            raise HarnessError(
                f"{patch.relative_to(REPO)} does not apply to linux-source-{series}; it has to be carried over:\n{error}"
            ) from None


def lacks_libraries(path: pathlib.Path) -> bool:
    """Whether a file is a program that the host's libraries are too old for."""
    if path.is_symlink() or not path.is_file() or not os.access(path, os.X_OK):
        return False
    with open(path, "rb") as file:
        if file.read(4) != b"\x7fELF" or str(LOADER).encode() not in file.read():
            return False
    # It fails for a library that is missing, and only complains about versions that a library lacks.
    answer = subprocess.run([LOADER, "--list", path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return answer.returncode != 0 or "not found" in answer.stdout


def libraries_of(source: apt.Apt, packages: list[str]) -> list[str]:
    """The libraries that packages depend on, and those that these depend on."""
    found: list[str] = []
    wanted = list(packages)
    while wanted:
        depends = [name for name in source.depends(wanted.pop()) if re.match(r"lib|zlib", name)]
        new = [name for name in depends if name not in found]
        found += new
        wanted += new
    return found


def adapt_tools(source: apt.Apt, packages: list[str], home: pathlib.Path, place: pathlib.Path) -> None:
    """Lets the build tools of unpacked packages run with the libraries of their own suite where the host's are older.

    `place` is where `home` will be.
    """
    tools = [path for path in home.rglob("*") if lacks_libraries(path)]
    if not tools:
        return
    log.info("fetching libraries of %s for the tools in its headers", source.suite)
    source.unpack(libraries_of(source, packages), home / "libraries")
    libraries = place / "libraries/usr/lib/x86_64-linux-gnu"
    for tool in tools:
        real = tool.rename(tool.with_name(f"{tool.name}.elf"))
        command = f'{libraries / LOADER.name} --library-path {libraries} {place / real.relative_to(home)} "$@"'
        tool.write_text(f"#!/bin/sh\nexec {command}\n")
        tool.chmod(0o755)


def headers(release: str) -> pathlib.Path:
    """The headers of a kernel release, unpacked and made to find each other; returns their folder."""
    suite = suite_of(release)
    home = CACHE / "headers" / release
    tree = f"usr/src/linux-headers-{release}"

    def make(scratch: pathlib.Path) -> None:
        source = apt.Apt(suite)
        source.update()
        log.info("fetching linux-headers-%s from %s", release, suite)
        try:
            # They depend on a compiler as well, and some on the image.
            depends = source.depends(f"linux-headers-{release}")
            parts = [part for part in depends if re.match(r"linux-(headers|kbuild)-", part)]
            packages = [f"linux-headers-{release}", *parts]
            source.unpack(packages, scratch)
            adapt_tools(source, packages, scratch, home)
        except HarnessError as error:
            raise HarnessError(
                f"the headers of {release} cannot be had from {suite}, which keeps those of its newest kernels; "
                f"remove {source.home} to look again:\n{error}"
            ) from None
        makefile = scratch / tree / "Makefile"
        makefile.write_text(makefile.read_text().replace("/usr/src/", f"{home}/usr/src/"))

    return cache.cached(home, make, apt.VERIFIED) / tree
