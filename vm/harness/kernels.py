"""Guest kernels from Debian's packages, unpacked into the cache and installed nowhere."""

import pathlib
import re
import shutil

from . import apt, cache
from .host import HarnessError, log, run
from .paths import CACHE

# Name, suite, and the package that depends on the newest image of it.
KERNELS = {
    "5.10": ("bullseye", "linux-image-cloud-amd64"),
    "6.1": ("bookworm", "linux-image-cloud-amd64"),
    "6.12": ("trixie", "linux-image-cloud-amd64"),
    "7.2": ("sid", "linux-image-cloud-amd64"),
}
DEFAULT = "6.1"


class Kernel:
    """An unpacked kernel: its image, and its modules with a modules.dep."""

    def __init__(self, name: str, root: pathlib.Path, release: str) -> None:
        self.name = name
        self.root = root
        self.release = release
        self.image = root / "boot" / f"vmlinuz-{release}"

    def module_file(self, path: str) -> pathlib.Path:
        return self.root / "lib/modules" / self.release / path


def fetch(name: str) -> Kernel:
    """The kernel with this name, fetched if the cache lacks it."""
    if name not in KERNELS:
        raise HarnessError(f"there is no kernel {name}; known are {', '.join(KERNELS)}")
    home = cache.cached(CACHE / "kernels" / name, lambda scratch: unpack(name, scratch), apt.VERIFIED)
    return Kernel(name, home, (home / "release").read_text())


def unpack(name: str, home: pathlib.Path) -> None:
    """Unpacks the newest image of a suite into a folder."""
    suite, meta = KERNELS[name]
    source = apt.Apt(suite)
    source.update()
    images = [package for package in source.depends(meta) if package.startswith("linux-image-")]
    if not images:
        raise HarnessError(f"{meta} of {suite} names no image")
    image = images[0]
    log.info("fetching %s from %s", image, suite)
    # From Debian 14 on the image's files are in packages that it depends on.
    parts = [package for package in source.depends(image) if re.match(r"linux-(binary|modules)-", package)]
    source.unpack([image, *parts], home)
    # Newer packages have everything below /usr.
    if (home / "usr/lib/modules").is_dir() and not (home / "lib/modules").exists():
        (home / "lib").mkdir(exist_ok=True)
        (home / "usr/lib/modules").rename(home / "lib/modules")
    release = release_of(home)
    if not (home / "boot" / f"vmlinuz-{release}").exists():
        found = [*home.rglob("vmlinuz*")]
        if not found:
            raise HarnessError(f"{image} and what it depends on hold no kernel image")
        (home / "boot").mkdir(exist_ok=True)
        shutil.copy(found[0], home / "boot" / f"vmlinuz-{release}")
    run(["depmod", "-b", home, release])
    (home / "release").write_text(release)


def release_of(root: pathlib.Path) -> str:
    """The release of the only kernel below a root."""
    releases = [path.name for path in (root / "lib/modules").iterdir()]
    if len(releases) != 1:
        raise HarnessError(f"{root} holds modules for {releases}, not for one kernel")
    return releases[0]


def fuse_header() -> pathlib.Path:
    """`linux/fuse.h` of the newest kernel, with which a test compares our structs."""

    def make(scratch: pathlib.Path) -> None:
        source = apt.Apt("sid")
        source.update()
        log.info("fetching linux-libc-dev from sid")
        source.unpack(["linux-libc-dev"], scratch)

    return cache.cached(CACHE / "linux-libc-dev", make, apt.VERIFIED) / "usr/include/linux/fuse.h"
