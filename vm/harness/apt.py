"""Debian packages of other suites than the host's, verified and unpacked into the cache, installed nowhere.

Each suite has an apt configuration of its own below the cache, so that the host's stays as it is. Mirror and proxies
are those of the host's apt. apt checks the lists against the archive's keyring, whatever the host's configuration
allows, and the hash of each package is compared with the one in these lists: QEMU is one of the packages, and it runs
as root on the host.
"""

import dataclasses
import functools
import hashlib
import pathlib
import re

from . import cache
from .host import HarnessError, install, log, run
from .paths import CACHE

KEYRING = pathlib.Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Suites that the host's sources may name, in the order in which they are preferred as a mirror of all suites.
MAIN = ("bookworm", "trixie", "bullseye", "stable", "testing", "sid", "unstable", "forky", "oldstable")
# Suites that get security updates apart.
WITH_SECURITY = ("bullseye", "bookworm", "trixie")
# Its support has ended, and so have its lists' validity dates. Only guests run packages from it.
ENDED = ("bullseye",)
# The file in an unpacked tree that lists the packages and their hashes. A tree without it is not used.
VERIFIED = "verified-packages"

CONFIGURATION = """\
// Hooks of the host's apt, which are meant for its own lists.
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::IndexTargets::deb::DEP-11;
Dir::Etc::sourcelist "{home}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
// Only the keyring that sources.list names is trusted.
Dir::Etc::trusted "/dev/null";
Dir::Etc::trustedparts "/dev/null";
Dir::State "{home}/state";
Dir::State::status "{home}/status";
Dir::Cache "{home}/cache";
APT::Sandbox::User "root";
APT::Get::AllowUnauthenticated "false";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowWeakRepositories "false";
Acquire::AllowDowngradeToInsecureRepositories "false";
Acquire::Languages "none";
Acquire::Retries "3";
"""


@dataclasses.dataclass(frozen=True)
class Archive:
    """Where packages come from, and the keys that sign their lists."""

    main: str
    security: str | None
    keyring: pathlib.Path = KEYRING

    def sources(self, suite: str) -> str:
        """The lines of sources.list for a suite."""
        options = f"signed-by={self.keyring}" + (" check-valid-until=no" if suite in ENDED else "")
        lines = [f"deb [{options}] {self.main} {suite} main"]
        if self.security and suite in WITH_SECURITY:
            lines.append(f"deb [{options}] {self.security} {suite}-security main")
        return "".join(f"{line}\n" for line in lines)


@functools.cache
def archive() -> Archive:
    """The Debian archive of the host's own apt configuration."""
    # apt reads its own files: sources.list, deb822 files, and whatever includes and options there are.
    wanted = ["--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]
    found = run(["apt-get", "indextargets", "--no-release-info", *wanted], warnings=False)
    if not KEYRING.exists():
        install("debian-archive-keyring")
    return choose_archive(found)


def choose_archive(targets: str) -> Archive:
    """Chooses the mirrors among lines of `URI suite component`."""
    mains: dict[str, str] = {}
    security = None
    for line in targets.splitlines():
        uri, suite, component = line.split()
        if component != "main" or uri.startswith("cdrom:"):
            continue
        uri = first_mirror(uri)
        if suite in MAIN:
            mains.setdefault(suite, uri)
        elif re.fullmatch(r"\w+(-security|/updates)", suite):
            security = security or uri
    if not mains:
        raise HarnessError(
            "apt's configuration names no Debian mirror with the component main; add one to sources.list"
        )
    return Archive(min(mains.items(), key=lambda entry: MAIN.index(entry[0]))[1], security)


def first_mirror(uri: str) -> str:
    """The first mirror of a list in a file, as Debian's cloud images have it, which only apt itself can read."""
    if not uri.startswith("mirror+file:"):
        return uri
    lines = pathlib.Path(re.sub(r"^mirror\+file:/*", "/", uri).rstrip("/")).read_text().splitlines()
    mirrors = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
    if not mirrors:
        raise HarnessError(f"the list of mirrors {uri} is empty")
    return mirrors[0]


@functools.cache
def proxies() -> dict[str, str]:
    """The proxies of the host's apt as environment variables, for programs that do not read its configuration."""
    found = {}
    for scheme in ("http", "https"):
        line = run(["apt-config", "shell", "proxy", f"Acquire::{scheme}::Proxy"], warnings=False).strip()
        value = line.removeprefix("proxy=").strip("'\"")
        if value and value != "DIRECT":
            found[f"{scheme}_proxy"] = value
    return found


class Apt:
    """A private apt configuration for one suite."""

    def __init__(self, suite: str, source: Archive | None = None, home: pathlib.Path | None = None) -> None:
        """`source` is the archive, that of the host if not given; `home` keeps the lists."""
        self.suite = suite
        self.home = home or CACHE / "apt" / suite
        self.sources = (source or archive()).sources(suite)
        self.configuration = self.home / "apt.conf"

    def apt(self, program: str, *words: str, cwd: pathlib.Path | None = None, warnings: bool = True) -> str:
        """Runs a program of apt with this configuration."""
        return run([program, "-c", self.configuration, *words], cwd=cwd, warnings=warnings)

    def update(self, again: bool = False) -> None:
        """Fetches the suite's lists and verifies their signature, once per cache and mirror."""
        configuration = CONFIGURATION.format(home=self.home)
        wanted = configuration + self.sources
        marker = self.home / "updated"
        with cache.locked(self.home, f"the package lists of {self.suite}"):
            if not again and marker.exists() and marker.read_text() == wanted:
                return
            log.info("fetching the package lists of %s", self.suite)
            # Lists of another mirror, or of a version of the harness that did not verify them, are not used again.
            cache.remove(marker)
            cache.remove(self.home / "state")
            for folder in ("state/lists/partial", "cache/archives/partial"):
                (self.home / folder).mkdir(parents=True, exist_ok=True)
            (self.home / "status").touch()
            self.configuration.write_text(configuration)
            (self.home / "sources.list").write_text(self.sources)
            self.fetch_lists()
            marker.write_text(wanted)

    def fetch_lists(self) -> None:
        try:
            self.apt("apt-get", "--error-on=any", "update")
        except HarnessError as error:
            if "NO_PUBKEY" in str(error):
                raise HarnessError(
                    f"the host's keyring lacks the key of {self.suite}; upgrade the package debian-archive-keyring:\n{error}"
                ) from None
            raise

    def depends(self, package: str) -> list[str]:
        """Names of the packages that `package` depends on."""
        text = self.apt("apt-cache", "depends", "--no-recommends", "--no-suggests", package, warnings=False)
        return re.findall(r"Depends: (\S+)", text)

    def unpack(self, packages: list[str], directory: pathlib.Path) -> None:
        """Downloads packages, verifies them, and unpacks them into `directory`, with a list of them in `VERIFIED`."""
        with cache.locked(self.home, f"packages of {self.suite}"):
            downloads = self.home / "downloads"
            try:
                found = self.download(packages, downloads)
            except HarnessError as error:
                # The mirror may have newer versions by now than these lists.
                log.info("%s", error)
                self.refresh()
                found = self.download(packages, downloads)
            directory.mkdir(parents=True, exist_ok=True)
            for deb in found:
                run(["dpkg-deb", "-x", deb, directory])
            listed = "".join(f"{found[deb]}  {deb.name}\n" for deb in found)
            with open(directory / VERIFIED, "a") as file:
                file.write(listed)
            cache.remove(downloads)

    def refresh(self) -> None:
        """Fetches the lists again; the caller holds the lock."""
        self.fetch_lists()

    def download(self, packages: list[str], folder: pathlib.Path) -> dict[pathlib.Path, str]:
        """Downloads packages; returns their files, each with its verified SHA-256."""
        cache.remove(folder)
        folder.mkdir(parents=True)
        expected = self.expected(packages)
        self.apt("apt-get", "download", *packages, cwd=folder)
        found = {}
        for name, digest in expected.items():
            path = folder / name
            if not path.exists():
                raise HarnessError(f"apt-get has not downloaded {name}")
            verify(path, digest)
            found[path] = digest
        return found

    def expected(self, packages: list[str]) -> dict[str, str]:
        """File name to SHA-256, as the signed lists have them."""
        lines = self.apt("apt-get", "download", "--print-uris", *packages, warnings=False)
        found = dict(re.findall(r"^'[^']*' (\S+) \d+ SHA256:([0-9a-f]{64})$", lines, re.MULTILINE))
        if len(found) != len(set(packages)):
            raise HarnessError(f"the lists of {self.suite} have no SHA-256 for some of {', '.join(packages)}:\n{lines}")
        return found


def verify(path: pathlib.Path, digest: str) -> None:
    """Compares a file with the SHA-256 that it should have."""
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != digest:
        raise HarnessError(
            f"{path.name} is not the file that the signed lists describe: SHA-256 {actual}, not {digest}"
        )
