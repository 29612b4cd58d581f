//! The Debian package.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::{output, run};

/// What is installed as it is in the repository: from, to.
const AS_IS: [(&str, &str); 8] = [
    ("dist/60-lanefsd.json", "usr/share/qemu/vhost-user/60-lanefsd.json"),
    ("dist/systemd/lanefsd@.service", "lib/systemd/system/lanefsd@.service"),
    ("dist/systemd/lanefsd@.socket", "lib/systemd/system/lanefsd@.socket"),
    ("dist/apparmor/usr.bin.lanefsd", "usr/share/apparmor/extra-profiles/usr.bin.lanefsd"),
    ("dist/examples/share.conf", "usr/share/doc/lanefsd/examples/share.conf"),
    ("dist/grafana/lanefsd.json", "usr/share/doc/lanefsd/examples/grafana-dashboard.json"),
    ("dist/prometheus/lanefsd.rules.yml", "usr/share/doc/lanefsd/examples/prometheus-rules.yml"),
    ("dist/bpftrace/lanefsd-latency.bt", "usr/share/doc/lanefsd/examples/lanefsd-latency.bt"),
];
/// What was made from the options.
const MADE: [(&str, &str); 6] = [
    ("completions/lanefsd.bash", "usr/share/bash-completion/completions/lanefsd"),
    ("completions/_lanefsd", "usr/share/zsh/vendor-completions/_lanefsd"),
    ("completions/lanefsd.fish", "usr/share/fish/vendor_completions.d/lanefsd.fish"),
    ("completions/lanefsctl.bash", "usr/share/bash-completion/completions/lanefsctl"),
    ("completions/_lanefsctl", "usr/share/zsh/vendor-completions/_lanefsctl"),
    ("completions/lanefsctl.fish", "usr/share/fish/vendor_completions.d/lanefsctl.fish"),
];
/// Programs in usr/bin.
const PROGRAMS: [&str; 2] = ["lanefsd", "lanefsctl"];
/// Manual pages and their sections.
const PAGES: [(&str, &str); 4] =
    [("lanefsd", "8"), ("lanefsd-upgrade", "8"), ("lanefsd-reopen", "8"), ("lanefsctl", "1")];
/// Scripts of the package manager.
const SCRIPTS: [&str; 3] = ["postinst", "prerm", "postrm"];
const DOC: &str = "usr/share/doc/lanefsd";
/// As in the control file.
const MAINTAINER: &str = "The lanefsd authors <lanefsd@localhost>";

/// Makes the package in `dist`, where manual pages and completions are, and returns its path.
///
/// `programs` are the paths of [`PROGRAMS`]. Runs dpkg-deb, dpkg-shlibdeps, strip and gzip.
pub(super) fn package(dist: &Path, programs: [&Path; 2]) -> Result<PathBuf> {
    let root = dist.join("debian");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    for (from, name) in programs.iter().zip(PROGRAMS) {
        let to = root.join("usr/bin").join(name);
        install(from, &to, 0o755)?;
        run(Command::new("strip").args(["--strip-unneeded", "--remove-section=.comment"]).arg(to))?;
    }
    // Where programs of this kind are expected. The other way round, libvirtd's AppArmor profile would not let it start.
    fs::create_dir_all(root.join("usr/libexec"))?;
    symlink("../bin/lanefsd", root.join("usr/libexec/lanefsd"))?;
    fs::create_dir_all(root.join("etc/lanefsd"))?;
    for (from, to) in AS_IS {
        install(Path::new(from), &root.join(to), 0o644)?;
    }
    for (from, to) in MADE {
        install(&dist.join(from), &root.join(to), 0o644)?;
    }
    for (name, section) in PAGES {
        let page = format!("{name}.{section}");
        let to = root.join(format!("usr/share/man/man{section}/{page}"));
        compressed(&fs::read(dist.join("man").join(&page))?, &to)?;
    }
    install(Path::new("README.md"), &root.join(DOC).join("README.md"), 0o644)?;
    install(Path::new("dist/debian/overrides"), &root.join("usr/share/lintian/overrides/lanefsd"), 0o644)?;
    compressed(&fs::read("CHANGELOG.md")?, &root.join(DOC).join("NEWS"))?;
    compressed(changelog()?.as_bytes(), &root.join(DOC).join("changelog"))?;
    write(&root.join(DOC).join("copyright"), &copyright()?, 0o644)?;
    control(&root)?;
    let version = env!("CARGO_PKG_VERSION");
    let package = dist.join(format!("lanefsd_{version}_{}.deb", architecture()?));
    let new = package.with_extension("new");
    run(Command::new("dpkg-deb").args(["--build", "--root-owner-group"]).arg(&root).arg(&new))?;
    // Whoever reads an earlier one goes on with that.
    fs::rename(&new, &package)?;
    Ok(package)
}

fn architecture() -> Result<String> {
    output(Command::new("dpkg").arg("--print-architecture"))
}

/// What Debian's tools read; people read NEWS. The date is that of the sources, so that a package can be made again.
fn changelog() -> Result<String> {
    let date = output(Command::new("git").args(["log", "-1", "--format=%aD"]))?;
    let version = env!("CARGO_PKG_VERSION");
    Ok(format!(
        "lanefsd ({version}) unstable; urgency=medium\n\n  * See NEWS.gz.\n\n -- {MAINTAINER}  {date}\n"
    ))
}

/// Both licences, by the files that have them.
fn copyright() -> Result<String> {
    let apache = "On Debian systems, the Apache License 2.0 is in /usr/share/common-licenses/Apache-2.0.";
    let bsd = fs::read_to_string("LICENSE-BSD-3-Clause")?;
    let indented: String = bsd
        .lines()
        .map(|line| if line.trim().is_empty() { " .\n".into() } else { format!(" {line}\n") })
        .collect();
    Ok(format!(
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\nUpstream-Name: lanefsd\n\n\
         Files: *\nCopyright: 2026 The lanefsd authors\nLicense: Apache-2.0 or BSD-3-clause\n\n\
         License: Apache-2.0\n {apache}\n\nLicense: BSD-3-clause\n{indented}"
    ))
}

/// The package manager's folder.
fn control(root: &Path) -> Result<()> {
    let folder = root.join("DEBIAN");
    for script in SCRIPTS {
        install(&Path::new("dist/debian").join(script), &folder.join(script), 0o755)?;
    }
    let list = "find . -path ./DEBIAN -prune -o -type f -printf '%P\\0' | sort -z | xargs -0 md5sum";
    let sums = output(Command::new("sh").args(["-c", list]).current_dir(root))?;
    write(&folder.join("md5sums"), &format!("{sums}\n"), 0o644)?;
    let size = output(Command::new("du").args(["-sk", "--exclude=DEBIAN"]).arg(root))?;
    let size = size.split_whitespace().next().context("du prints a size")?;
    let text = fs::read_to_string("dist/debian/control")?
        .replace("@VERSION@", env!("CARGO_PKG_VERSION"))
        .replace("@ARCHITECTURE@", &architecture()?)
        .replace("@SIZE@", size)
        .replace("@DEPENDS@", &libraries(root)?);
    write(&folder.join("control"), &text, 0o644)
}

/// The packages of the libraries that the programs are linked with.
fn libraries(root: &Path) -> Result<String> {
    // It wants a source package around it.
    let source = root.with_file_name("source");
    write(&source.join("debian/control"), "Source: lanefsd\n\nPackage: lanefsd\nArchitecture: any\n", 0o644)?;
    let programs = PROGRAMS.map(|name| root.join("usr/bin").join(name));
    let mut tool = Command::new("dpkg-shlibdeps");
    let found = output(tool.arg("-O").args(programs).current_dir(&source))?;
    Ok(found.strip_prefix("shlibs:Depends=").context("dpkg-shlibdeps names the libraries")?.to_owned())
}

fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    make_parent(path)?;
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
}

fn install(from: &Path, to: &Path, mode: u32) -> Result<()> {
    make_parent(to)?;
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(fs::set_permissions(to, fs::Permissions::from_mode(mode))?)
}

fn compressed(text: &[u8], to: &Path) -> Result<()> {
    make_parent(to)?;
    fs::write(to, text)?;
    run(Command::new("gzip").args(["-9", "--no-name", "--force"]).arg(to))
}

/// Folders that others may enter, whatever the umask is.
fn make_parent(path: &Path) -> Result<()> {
    let parent = path.parent().context("a path in a folder")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))
}
