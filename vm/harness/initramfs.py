"""The guest's first file system: busybox, our tools, the modules that it needs, and fio where that is wanted."""

import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence

from . import cache, guest_modules
from .host import HarnessError, cargo_environment, log, run
from .kernels import Kernel
from .paths import CACHE, REPO, TARGET

# Modules that a guest may need; built-in ones and those that a kernel lacks are skipped.
MODULES = ["virtio_pci", "virtio_blk", "lanefs", "virtiofs", "fuse", "ext4", "xfs", "overlay", "loop"]
TOOLS_TARGET = "x86_64-unknown-linux-gnu"
# Linked statically, they run on the host as well.
TOOLS_FOLDER = TARGET / TOOLS_TARGET / "release"

INIT = """#!/bin/sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/ TERM=linux
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /tmp /mnt
mount -t devpts pts /dev/pts
mount -t tmpfs tmp /tmp
mount -t tmpfs shm /dev/shm
for module in %s; do modprobe $module 2>/dev/null; done
dmesg -n 4
exec /agent
"""

# Commands come base64-encoded, one a line, with a word that marks their end and a dot that shows that the line is
# whole. Each is acknowledged: a serial line may lose what is sent, and then the line comes again.
AGENT = """#!/bin/sh
exec 3<>/dev/ttyS1
stty raw -echo <&3
echo "agent ready" >&3
last=
while read -r word command whole <&3; do
    [ "$whole" = . ] || continue
    echo "got $word" >&3
    [ "$word" != "$last" ] || continue
    last=$word
    case $command in
    shell) setsid -c sh -c 'exec sh -i </dev/ttyS0 >/dev/ttyS0 2>&1'; status=$? ;;
    *) echo "$command" | base64 -d >/tmp/command
       sh /tmp/command >&3 2>&1 </dev/null; status=$? ;;
    esac
    echo >&3
    echo "$word $status" >&3
done
poweroff -f
"""


def build_tools() -> pathlib.Path:
    """Builds the programs that run in the guest, linked statically; returns their folder."""
    environment = cargo_environment()
    environment["RUSTFLAGS"] = "-C target-feature=+crt-static -C strip=symbols"
    environment["CARGO_PROFILE_RELEASE_LTO"] = "off"
    command = ["cargo", "build", "--release", "--locked", "-p", "lanefsd-guest-tools", "--target", TOOLS_TARGET]
    run(command, cwd=REPO, env=environment)
    return TOOLS_FOLDER


def build_reproducers() -> list[pathlib.Path]:
    """Builds the programs of guest-kernel/tests, linked statically; returns their paths."""
    folder = CACHE / "reproducers"
    sources = sorted((guest_modules.ROOM / "tests").glob("*.c"))
    header = guest_modules.ROOM / "tests" / "server.h"
    found = []
    with cache.locked(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for source in sources:
            program = folder / source.stem
            if not is_newer(program, [source, header]):
                run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-o", program, source])
            found.append(program)
    return found


def with_dependencies(kernel: Kernel, names: Iterable[str]) -> list[str]:
    """The files of modules and of all that they depend on, in the order of modules.dep."""
    table = {}
    for line in kernel.module_file("modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        table[re.sub(r"\.ko.*", "", pathlib.Path(path).name).replace("-", "_")] = (path, rest.split())
    found: list[str] = []
    for name in names:
        if name in table:
            path, dependencies = table[name]
            found += [path, *dependencies]
    return list(dict.fromkeys(found))


def copy_with_libraries(program: str, root: pathlib.Path) -> None:
    """Copies a host program, and the shared libraries it is linked with."""
    source = shutil.which(program)
    if source is None:
        raise HarnessError(f"{program} is missing on the host")
    shutil.copy(source, root / "bin")
    for library in re.findall(r"(/\S+) \(0x", run(["ldd", source])):
        target = root / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copy(library, target)


def kind(image: pathlib.Path) -> str:
    """Whether an initramfs has patched or stock modules."""
    return image.name.rpartition("-")[2].partition(".")[0]


def kernel_options(kernel: Kernel | None, image: pathlib.Path | None) -> str:
    """The options that a kernel needs for the modules in its initramfs."""
    patched = kernel is not None and kernel.name in guest_modules.BUILT_IN and image and kind(image) == "patched"
    return guest_modules.BOOT_OPTION if patched else ""


def make(kernel: Kernel, modules: pathlib.Path | None = None) -> pathlib.Path:
    """An initramfs for a kernel; `modules` is a folder with a fuse.ko and a virtiofs.ko to use."""
    tools = [*programs(build_tools()), *build_reproducers()]
    stock = "patched" if modules else "stock"
    image = CACHE / f"initramfs-{kernel.release}-{stock}.cpio.gz"
    sources = [pathlib.Path(__file__), *tools, kernel.image, *(modules.glob("*.ko") if modules else [])]
    with cache.locked(image):
        if not is_newer(image, sources):
            log.info("making an initramfs for %s (%s modules)", kernel.release, stock)
            pack(image, lambda root: fill(root, kernel, modules, tools))
    return image


def with_fio(image: pathlib.Path) -> pathlib.Path:
    """The same initramfs with fio, which Debian links with so much that a boot takes twice as long."""
    return with_programs(image, "fio")


def with_programs(image: pathlib.Path, *names: str) -> pathlib.Path:
    """The same initramfs with programs of the host, and the libraries that they are linked with."""
    suffix = "-".join(names)
    more = CACHE / f"{suffix}.cpio.gz"
    both = image.with_name(image.name.replace("initramfs", f"initramfs-{suffix}"))

    def fill_root(root: pathlib.Path) -> None:
        for name in names:
            copy_with_libraries(name, root)

    with cache.locked(both):
        with cache.locked(more):
            if not is_newer(more, [pathlib.Path(__file__)]):
                pack(more, fill_root)
        if not is_newer(both, [image, more]):
            # The kernel unpacks one archive after the other.
            scratch = both.with_suffix(".part")
            scratch.write_bytes(image.read_bytes() + more.read_bytes())
            scratch.rename(both)
    return both


def is_newer(target: pathlib.Path, sources: Iterable[pathlib.Path]) -> bool:
    """Whether a file exists and is newer than all that it is made from."""
    return target.exists() and all(source.stat().st_mtime < target.stat().st_mtime for source in sources)


def programs(folder: pathlib.Path) -> list[pathlib.Path]:
    """The tools in a folder of cargo's."""
    return [tool for tool in folder.glob("guest-*") if tool.suffix == "" and os.access(tool, os.X_OK)]


def pack(image: pathlib.Path, fill_root: Callable[[pathlib.Path], None]) -> None:
    """Packs the folder that `fill_root` fills. The caller holds the lock of the image."""
    root = image.with_suffix(".root")
    cache.remove(root)
    (root / "bin").mkdir(parents=True)
    try:
        fill_root(root)
        scratch = image.with_suffix(".part")
        with open(scratch, "wb") as out:
            find = subprocess.Popen(["find", ".", "-print0"], cwd=root, stdout=subprocess.PIPE)
            command = ["cpio", "--null", "-o", "-H", "newc", "--quiet"]
            cpio = subprocess.Popen(command, cwd=root, stdin=find.stdout, stdout=subprocess.PIPE)
            gzip = subprocess.run(["gzip", "-1"], stdin=cpio.stdout, stdout=out)
            if find.wait() or cpio.wait() or gzip.returncode:
                raise HarnessError(f"{image} cannot be packed")
        scratch.rename(image)
    finally:
        cache.remove(root)


def fill(root: pathlib.Path, kernel: Kernel, modules: pathlib.Path | None, tools: Sequence[pathlib.Path]) -> None:
    """Fills the root of an initramfs."""
    for folder in ("sbin", "usr/bin", "usr/sbin", "proc", "sys", "dev", "etc", "root"):
        (root / folder).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    for applet in run(["/bin/busybox", "--list"]).split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    for tool in tools:
        shutil.copy(tool, root / "bin" / tool.name.removeprefix("guest-"))
    copy_modules(root, kernel, modules)
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nuser:x:1000:\n")
    write_program(root / "init", INIT % " ".join(MODULES))
    write_program(root / "agent", AGENT)


def copy_modules(root: pathlib.Path, kernel: Kernel, modules: pathlib.Path | None) -> None:
    """Copies the kernel's modules, or those in `modules` with the same names."""
    place = root / "lib/modules" / kernel.release
    place.mkdir(parents=True)
    for path in with_dependencies(kernel, MODULES):
        target = place / path
        target.parent.mkdir(parents=True, exist_ok=True)
        ours = modules / pathlib.Path(path).name.removesuffix(".xz").removesuffix(".zst") if modules else None
        if ours is not None and ours.exists():
            shutil.copy(ours, target.with_name(ours.name))
        else:
            shutil.copy(kernel.module_file(path), target)
    if modules and (modules / "lanefs.ko").exists():
        # It takes the place of what the kernel has built in.
        (place / "updates").mkdir()
        shutil.copy(modules / "lanefs.ko", place / "updates")
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        if kernel.module_file(name).exists():
            shutil.copy(kernel.module_file(name), place)
    run(["depmod", "-b", root, kernel.release])


def write_program(path: pathlib.Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
