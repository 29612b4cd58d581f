"""Packages come from the host's mirror, and a package or list that was tampered with is refused."""

import dataclasses
import gzip
import hashlib
import pathlib
import shutil
import subprocess

import pytest

from harness import apt
from harness.host import HarnessError, require, run


@dataclasses.dataclass
class Repository:
    """A signed repository with one package, in a directory."""

    root: pathlib.Path
    keys: pathlib.Path

    @property
    def dist(self) -> pathlib.Path:
        return self.root / "dists/bookworm"

    @property
    def package(self) -> pathlib.Path:
        return self.root / "pool/thing_1_all.deb"

    def archive(self) -> apt.Archive:
        return apt.Archive(f"file:{self.root}", None, self.keys / "public.gpg")

    def build(self) -> None:
        """Makes the package, and lists that describe it."""
        source = self.root.parent / "thing"
        (source / "DEBIAN").mkdir(parents=True)
        (source / "usr/share").mkdir(parents=True)
        (source / "usr/share/thing").write_text("as it was packed\n")
        fields = ["Package: thing", "Version: 1", "Architecture: all", "Maintainer: nobody", "Description: for a test"]
        (source / "DEBIAN/control").write_text("\n".join(fields) + "\n")
        self.package.parent.mkdir(parents=True)
        run(["dpkg-deb", "--root-owner-group", "-Zgzip", "--build", source, self.package])
        data = self.package.read_bytes()
        fields += [
            "Filename: pool/thing_1_all.deb",
            f"Size: {len(data)}",
            f"SHA256: {hashlib.sha256(data).hexdigest()}",
        ]
        self.list_packages("\n".join(fields) + "\n")
        self.sign()

    def list_packages(self, text: str) -> None:
        folder = self.dist / "main/binary-amd64"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "Packages").write_text(text)
        with gzip.open(folder / "Packages.gz", "wt") as file:
            file.write(text)

    def sign(self) -> None:
        lines = ["Origin: test", "Suite: bookworm", "Codename: bookworm", "Architectures: amd64", "Components: main"]
        lines += ["Date: Sat, 01 Aug 2026 00:00:00 UTC", "SHA256:"]
        for path in sorted(self.dist.glob("main/**/Packages*")):
            data = path.read_bytes()
            lines.append(f" {hashlib.sha256(data).hexdigest()} {len(data)} {path.relative_to(self.dist)}")
        release = self.dist / "Release"
        release.write_text("\n".join(lines) + "\n")
        signed = self.dist / "InRelease"
        signed.unlink(missing_ok=True)
        gpg(self.keys, "--clearsign", "--output", str(signed), str(release))


def gpg(home: pathlib.Path, *words: str) -> None:
    run(["gpg", "--homedir", home, "--batch", "--quiet", "--pinentry-mode=loopback", "--passphrase=", *words])


def make_key(home: pathlib.Path) -> pathlib.Path:
    home.mkdir(mode=0o700)
    gpg(home, "--quick-generate-key", "a test", "ed25519", "sign", "never")
    gpg(home, "--export", "--output", str(home / "public.gpg"))
    return home


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    require("gpg")
    folder = tmp_path_factory.mktemp("made")
    repository = Repository(folder / "archive", make_key(folder / "keys"))
    repository.build()
    return repository


@pytest.fixture
def repository(made: Repository, tmp_path: pathlib.Path) -> Repository:
    """A copy that a test may change."""
    shutil.copytree(made.root, tmp_path / "archive")
    return Repository(tmp_path / "archive", made.keys)


def fetch(repository: Repository, home: pathlib.Path) -> pathlib.Path:
    """Fetches the package as the harness does; returns where it is unpacked."""
    source = apt.Apt("bookworm", repository.archive(), home / "apt")
    source.update()
    source.unpack(["thing"], home / "unpacked")
    return home / "unpacked"


def test_a_signed_package_is_unpacked(repository: Repository, tmp_path: pathlib.Path) -> None:
    unpacked = fetch(repository, tmp_path)
    assert (unpacked / "usr/share/thing").read_text() == "as it was packed\n"
    listed = (unpacked / apt.VERIFIED).read_text().split()
    assert listed == [hashlib.sha256(repository.package.read_bytes()).hexdigest(), "thing_1_all.deb"]


def test_a_tampered_package_is_refused(repository: Repository, tmp_path: pathlib.Path) -> None:
    data = bytearray(repository.package.read_bytes())
    data[-20] ^= 1
    repository.package.write_bytes(data)
    with pytest.raises(HarnessError, match=r"(?i)hash sum mismatch|SHA-256"):
        fetch(repository, tmp_path)
    assert not (tmp_path / "unpacked").exists()


def test_a_package_that_apt_let_through_is_refused_by_its_hash(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "thing.deb"
    path.write_bytes(b"something else")
    with pytest.raises(HarnessError, match="not the file that the signed lists describe"):
        apt.verify(path, hashlib.sha256(b"thing").hexdigest())


def test_a_tampered_list_is_refused(repository: Repository, tmp_path: pathlib.Path) -> None:
    folder = repository.dist / "main/binary-amd64"
    repository.list_packages((folder / "Packages").read_text().replace("Version: 1", "Version: 2"))
    with pytest.raises(HarnessError, match=r"(?i)hash sum mismatch|unexpected size"):
        fetch(repository, tmp_path)


def test_a_list_with_another_signature_is_refused(repository: Repository, tmp_path: pathlib.Path) -> None:
    trusted = repository.keys
    repository.keys = make_key(tmp_path / "other")
    repository.sign()
    repository.keys = trusted
    with pytest.raises(HarnessError, match="the host's keyring lacks the key of bookworm"):
        fetch(repository, tmp_path)


def test_an_unsigned_archive_is_refused_whatever_the_host_allows(
    repository: Repository, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository.dist / "InRelease").unlink()
    host = tmp_path / "host.conf"
    host.write_text('Acquire::AllowInsecureRepositories "true";\nAPT::Get::AllowUnauthenticated "true";\n')
    monkeypatch.setenv("APT_CONFIG", str(host))
    with pytest.raises(HarnessError, match="is not signed"):
        fetch(repository, tmp_path)


def test_lists_that_were_not_verified_are_not_used_again(repository: Repository, tmp_path: pathlib.Path) -> None:
    """An older version of the harness left a marker without text, and lists that it trusted."""
    (tmp_path / "apt").mkdir()
    (tmp_path / "apt/updated").touch()
    (repository.dist / "InRelease").unlink()
    with pytest.raises(HarnessError, match="is not signed"):
        fetch(repository, tmp_path)


@pytest.fixture
def etc(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An apt configuration in the place of the host's."""
    folder = tmp_path / "etc"
    (folder / "sources.list.d").mkdir(parents=True)
    configuration = folder / "apt.conf"
    lines = ['Dir::Etc "{0}";', 'Dir::Etc::sourcelist "{0}/sources.list";']
    lines += ['Dir::Etc::sourceparts "{0}/sources.list.d";', 'Dir::Etc::parts "{0}/none";']
    lines += ['Acquire::http::Proxy "http://proxy.invalid:3128";']
    configuration.write_text("\n".join(lines).format(folder) + "\n")
    monkeypatch.setenv("APT_CONFIG", str(configuration))
    apt.archive.cache_clear()
    apt.proxies.cache_clear()
    return folder


def test_the_mirror_of_one_line_sources_is_used(etc: pathlib.Path) -> None:
    (etc / "sources.list").write_text(
        "deb https://tools.invalid/debian bookworm stable\n"
        "deb [arch=amd64] http://mirror.invalid/debian bookworm main contrib\n"
        "deb http://mirror.invalid/security bookworm-security main\n"
    )
    found = apt.archive()
    assert (found.main, found.security) == ("http://mirror.invalid/debian/", "http://mirror.invalid/security/")


def test_the_mirror_of_deb822_sources_is_used(etc: pathlib.Path) -> None:
    (etc / "sources.list.d/debian.sources").write_text(
        "Types: deb\nURIs: https://mirror.invalid/debian\nSuites: trixie trixie-updates\nComponents: main\n\n"
        "Types: deb\nURIs: https://mirror.invalid/security\nSuites: trixie-security\nComponents: main\nEnabled: no\n"
    )
    found = apt.archive()
    assert (found.main, found.security) == ("https://mirror.invalid/debian/", None)


def test_the_first_of_a_list_of_mirrors_is_used(etc: pathlib.Path) -> None:
    mirrors = etc / "mirrors.list"
    mirrors.write_text("# near\nhttps://near.invalid/debian\tpriority:1\nhttps://far.invalid/debian\n")
    (etc / "sources.list").write_text(f"deb mirror+file:{mirrors} bookworm main\n")
    assert apt.archive().main == "https://near.invalid/debian"


def test_a_host_without_a_debian_mirror_is_told_so(etc: pathlib.Path) -> None:
    (etc / "sources.list").write_text("deb https://tools.invalid/apt nodistro main\n")
    with pytest.raises(HarnessError, match="names no Debian mirror"):
        apt.archive()


@pytest.mark.usefixtures("etc")
def test_the_proxy_of_apt_is_used_by_others() -> None:
    assert apt.proxies() == {"http_proxy": "http://proxy.invalid:3128"}


def test_no_mirror_is_named_in_the_harness() -> None:
    folder = pathlib.Path(apt.__file__).parents[1]
    done = subprocess.run(["grep", "-rlE", r"trusted=yes|deb\.debian\.org|crates\.io", folder / "harness"], check=False)
    assert done.returncode == 1
