"""The guest's first file system: busybox, our tools, the modules that it needs, and fio where that is wanted."""

import os
import pathlib
import re
import shutil
import subprocess
import threading

from .paths import CACHE, REPO, TARGET, HarnessError, cargo_environment, run, say

# Guests may start side by side, and what they share is made once.
MAKING = threading.Lock()

# What a guest may need; built-in ones and those that a kernel lacks are passed over.
MODULES = ["virtio_pci", "virtio_blk", "virtiofs", "fuse", "ext4", "xfs", "overlay", "loop"]
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


def build_tools():
    """Builds the programs that run in the guest, linked statically; returns their folder."""
    environment = cargo_environment()
    environment["RUSTFLAGS"] = "-C target-feature=+crt-static -C strip=symbols"
    environment["CARGO_PROFILE_RELEASE_LTO"] = "off"
    run(["cargo", "build", "--release", "--locked", "-p", "lanefsd-guest-tools", "--target", TOOLS_TARGET],
        cwd=REPO, env=environment)
    return TOOLS_FOLDER


def with_dependencies(kernel, names):
    """The files of modules and of all that they depend on, in the order of modules.dep."""
    table = {}
    for line in kernel.module_file("modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        table[re.sub(r"\.ko.*", "", pathlib.Path(path).name).replace("-", "_")] = (path, rest.split())
    wanted = []
    for name in names:
        if name in table:
            path, rest = table[name]
            wanted += [path, *rest]
    return list(dict.fromkeys(wanted))


def copy_with_libraries(program, root):
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


def kind(image):
    """Whether an initramfs has patched or stock modules."""
    return image.name.rpartition("-")[2].partition(".")[0]


def make(kernel, modules=None):
    """An initramfs for a kernel; `modules` is a folder with a fuse.ko and a virtiofs.ko to use."""
    tools = programs(build_tools())
    stock = "patched" if modules else "stock"
    image = CACHE / f"initramfs-{kernel.release}-{stock}.cpio.gz"
    sources = [pathlib.Path(__file__), *tools, *(modules.glob("*.ko") if modules else [])]
    if image.exists() and all(source.stat().st_mtime < image.stat().st_mtime for source in sources):
        return image
    say(f"making an initramfs for {kernel.release} ({stock} modules)")
    pack(image, lambda root: fill(root, kernel, modules, tools))
    return image


def with_fio(image):
    """The same initramfs with fio, which Debian links with so much that a boot takes twice as long."""
    fio = CACHE / "fio.cpio.gz"
    source = pathlib.Path(__file__)
    both = image.with_name(image.name.replace("initramfs", "initramfs-fio"))
    with MAKING:
        if not fio.exists() or fio.stat().st_mtime < source.stat().st_mtime:
            pack(fio, lambda root: copy_with_libraries("fio", root))
        if not both.exists() or both.stat().st_mtime < max(image.stat().st_mtime, fio.stat().st_mtime):
            # The kernel unpacks one archive after the other.
            scratch = both.with_suffix(f".{os.getpid()}")
            scratch.write_bytes(image.read_bytes() + fio.read_bytes())
            scratch.rename(both)
    return both


def programs(folder):
    """The tools in a folder of cargo's."""
    return [tool for tool in folder.glob("guest-*") if tool.suffix == "" and os.access(tool, os.X_OK)]


def pack(image, fill_root):
    """Makes an archive of what `fill_root` puts into an empty folder."""
    root = CACHE / f"root-{os.getpid()}"
    shutil.rmtree(root, ignore_errors=True)
    (root / "bin").mkdir(parents=True)
    try:
        fill_root(root)
        scratch = image.with_suffix(f".{os.getpid()}")
        with open(scratch, "wb") as out:
            find = subprocess.Popen(["find", ".", "-print0"], cwd=root, stdout=subprocess.PIPE)
            cpio = subprocess.Popen(["cpio", "--null", "-o", "-H", "newc", "--quiet"], cwd=root,
                                    stdin=find.stdout, stdout=subprocess.PIPE)
            squeeze = subprocess.run(["gzip", "-1"], stdin=cpio.stdout, stdout=out)
            if find.wait() or cpio.wait() or squeeze.returncode:
                raise HarnessError(f"{image} cannot be packed")
        scratch.rename(image)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def fill(root, kernel, modules, tools):
    for folder in ("sbin", "usr/bin", "usr/sbin", "proc", "sys", "dev", "etc", "root"):
        (root / folder).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    for applet in run(["/bin/busybox", "--list"]).split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    for tool in tools:
        shutil.copy(tool, root / "bin" / tool.name.removeprefix("guest-"))
    for path in with_dependencies(kernel, MODULES):
        target = root / "lib/modules" / kernel.release / path
        target.parent.mkdir(parents=True, exist_ok=True)
        ours = modules / pathlib.Path(path).name.removesuffix(".xz").removesuffix(".zst") if modules else None
        if ours is not None and ours.exists():
            shutil.copy(ours, target.with_name(ours.name))
        else:
            shutil.copy(kernel.module_file(path), target)
    for table in kernel.module_file("").glob("modules.*"):
        if table.name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
            (root / "lib/modules" / kernel.release).mkdir(parents=True, exist_ok=True)
            shutil.copy(table, root / "lib/modules" / kernel.release)
    run(["depmod", "-b", root, kernel.release])
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nuser:x:1000:\n")
    write_program(root / "init", INIT % " ".join(MODULES))
    write_program(root / "agent", AGENT)


def write_program(path, text):
    path.write_text(text)
    path.chmod(0o755)
