"""Guest kernels from Debian's packages, unpacked into the cache and installed nowhere.

Each suite has an apt configuration of its own below the cache, so that the host's stays as it is.
"""

import pathlib
import re
import shutil

from .paths import CACHE, HarnessError, run, say

MIRROR = "http://deb.debian.org/debian"
SECURITY = "http://deb.debian.org/debian-security"

# Name, suite, and the package that depends on the newest image of it.
KERNELS = {
    "5.10": ("bullseye", "linux-image-cloud-amd64"),
    "6.1": ("bookworm", "linux-image-cloud-amd64"),
    "6.12": ("trixie", "linux-image-cloud-amd64"),
    "7.2": ("sid", "linux-image-cloud-amd64"),
}
DEFAULT = "6.1"


class Apt:
    """A private apt configuration for one suite."""

    def __init__(self, suite):
        self.suite = suite
        self.home = CACHE / "apt" / suite
        self.options = [
            "-o", f"Dir::Etc::sourcelist={self.home}/sources.list", "-o", "Dir::Etc::sourceparts=/dev/null",
            "-o", f"Dir::State={self.home}/state", "-o", f"Dir::State::status={self.home}/status",
            "-o", f"Dir::Cache={self.home}/cache", "-o", "APT::Sandbox::User=root",
            "-o", "Acquire::Check-Valid-Until=false", "-o", "Acquire::Languages=none",
        ]

    def update(self):
        """Fetches the suite's lists, once per cache."""
        if (self.home / "updated").exists():
            return
        say(f"fetching the package lists of {self.suite}")
        for folder in ("state/lists/partial", "cache/archives/partial"):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
        (self.home / "status").touch()
        # Keys of other suites than the host's may be missing here; the packages run in a guest only.
        lines = [f"deb [trusted=yes] {MIRROR} {self.suite} main"]
        if self.suite in ("bullseye", "bookworm", "trixie"):
            lines.append(f"deb [trusted=yes] {SECURITY} {self.suite}-security main")
        (self.home / "sources.list").write_text("\n".join(lines) + "\n")
        run(["apt-get", *self.options, "update"])
        (self.home / "updated").touch()

    def depends(self, package):
        """Names of the packages that `package` depends on."""
        text = run(["apt-cache", *self.options, "depends", "--no-recommends", "--no-suggests", package])
        return re.findall(r"Depends: (\S+)", text)

    def unpack(self, package, directory):
        """Downloads a package and unpacks it into `directory`."""
        downloads = self.home / "downloads"
        shutil.rmtree(downloads, ignore_errors=True)
        downloads.mkdir(parents=True)
        run(["apt-get", *self.options, "download", package], cwd=downloads)
        for deb in downloads.glob("*.deb"):
            run(["dpkg-deb", "-x", deb, directory])
        shutil.rmtree(downloads)


class Kernel:
    """An unpacked kernel: its image, and its modules with a modules.dep."""

    def __init__(self, name, root, release):
        self.name = name
        self.root = root
        self.release = release
        self.image = root / "boot" / f"vmlinuz-{release}"

    def module_file(self, path):
        return self.root / "lib/modules" / self.release / path


def fetch(name):
    """The kernel with this name, fetched if the cache lacks it."""
    if name not in KERNELS:
        raise HarnessError(f"there is no kernel {name}; known are {', '.join(KERNELS)}")
    home = CACHE / "kernels" / name
    marker = home / "release"
    if not marker.exists():
        shutil.rmtree(home, ignore_errors=True)
        marker.parent.mkdir(parents=True)
        marker.write_text(unpack(name, home))
    return Kernel(name, home, marker.read_text())


def unpack(name, home):
    suite, meta = KERNELS[name]
    apt = Apt(suite)
    apt.update()
    images = [package for package in apt.depends(meta) if package.startswith("linux-image-")]
    if not images:
        raise HarnessError(f"{meta} of {suite} names no image")
    image = images[0]
    say(f"fetching {image} from {suite}")
    # From Debian 14 on the image's files are in packages that it depends on.
    parts = [package for package in apt.depends(image) if re.match(r"linux-(binary|modules)-", package)]
    for package in [image, *parts]:
        apt.unpack(package, home)
    # Newer packages have everything below /usr.
    if (home / "usr/lib/modules").is_dir() and not (home / "lib/modules").exists():
        (home / "lib").mkdir(exist_ok=True)
        (home / "usr/lib/modules").rename(home / "lib/modules")
    releases = [path.name for path in (home / "lib/modules").iterdir()]
    if len(releases) != 1:
        raise HarnessError(f"{image} holds modules for {releases}, not for one kernel")
    release = releases[0]
    if not (home / "boot" / f"vmlinuz-{release}").exists():
        found = [*home.rglob("vmlinuz*")]
        if not found:
            raise HarnessError(f"{image} and what it depends on hold no kernel image")
        (home / "boot").mkdir(exist_ok=True)
        shutil.copy(found[0], home / "boot" / f"vmlinuz-{release}")
    run(["depmod", "-b", home, release])
    return release


def fuse_header():
    """`linux/fuse.h` of the newest kernel, with which a test compares our structs."""
    header = CACHE / "fuse.h"
    if not header.exists():
        apt = Apt("sid")
        apt.update()
        say("fetching linux-libc-dev from sid")
        scratch = CACHE / "libc-dev"
        apt.unpack("linux-libc-dev", scratch)
        pathlib.Path(header).write_text((scratch / "usr/include/linux/fuse.h").read_text())
        shutil.rmtree(scratch)
    return header
