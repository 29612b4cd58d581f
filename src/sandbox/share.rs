//! Advice for a share that cannot be opened.

use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};
use rustix::io::Errno;

/// What to do when opening the directory failed so.
pub(super) fn advice(path: &Path, errno: Errno) -> String {
    match errno {
        Errno::NOENT => match first_missing(path) {
            Some(missing) if missing != path => {
                format!("{} does not exist; check --shared-dir, or create it", missing.display())
            }
            _ => "it does not exist; check --shared-dir, or create it".into(),
        },
        Errno::NOTDIR if kind(path).is_ok_and(|kind| kind != FileType::Directory) => {
            "it is not a directory; to share a single file, share its directory".into()
        }
        Errno::ACCESS => match first_shut(path) {
            Some(shut) => format!(
                "the user that the daemon serves as may not enter {}; give it the right to search (chmod o+x, setfacl), or start the daemon as another user",
                shut.display()
            ),
            None => "the user that the daemon serves as may not enter a directory on the way to it; give it the right to search (chmod o+x, setfacl), or start the daemon as another user".into(),
        },
        _ => "--shared-dir needs a directory that exists".into(),
    }
}

/// The first part of a path that is missing.
fn first_missing(path: &Path) -> Option<&Path> {
    parts(path).find(|part| kind(part) == Err(Errno::NOENT))
}

/// The directory that keeps the rest of the path from being looked at.
fn first_shut(path: &Path) -> Option<&Path> {
    parts(path).find(|part| kind(part) == Err(Errno::ACCESS))?.parent()
}

/// The path's ancestors, the uppermost first, and itself.
fn parts(path: &Path) -> impl Iterator<Item = &Path> {
    let mut parts: Vec<_> = path.ancestors().filter(|part| *part != Path::new("")).collect();
    parts.reverse();
    parts.into_iter()
}

fn kind(path: &Path) -> Result<FileType, Errno> {
    let stat = statx(CWD, path, AtFlags::empty(), StatxFlags::TYPE)?;
    Ok(FileType::from_raw_mode(stat.stx_mode.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_advice_fits_the_mistake() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::fs::write(at("file"), "").unwrap();
        assert!(advice(&at("none"), Errno::NOENT).starts_with("it does not exist"));
        let parent = at("none").display().to_string();
        assert!(advice(&at("none/a/b"), Errno::NOENT).starts_with(&parent));
        assert!(advice(&at("file"), Errno::NOTDIR).contains("share its directory"));
        assert!(!advice(&at("file/b"), Errno::NOTDIR).contains("share its directory"));
        assert!(advice(&at("none"), Errno::LOOP).contains("--shared-dir"));
    }
}
