//! Warnings about likely mistakes in a configuration that works.

use std::path::Path;

use rustix::fs::{Access, AtFlags, CWD, accessat};

use crate::config::{Config, Listen};
use crate::logging::Remark;

/// Checks `config` for likely mistakes. Called before the sandbox is entered, since it resolves paths.
pub(super) fn about(config: &Config) -> Vec<Remark> {
    let mut remarks = Vec::new();
    if let Listen::Path(socket) = &config.listen
        && is_inside(socket, &config.shared_dir)
    {
        remarks.push(Remark::warning(format!(
            "the socket {} is inside the share, where the guest can remove it and change its pid file; choose another --socket-path",
            socket.display()
        )));
    }
    let share = config.shared_dir.display();
    let may = |access| accessat(CWD, &config.shared_dir, access, AtFlags::EACCESS).is_ok();
    if !may(Access::READ_OK | Access::EXEC_OK) {
        remarks.push(Remark::warning(format!(
            "this user may not list {share}, so the guest cannot list it either; give the user the permission (chmod, setfacl)"
        )));
    } else if !config.readonly && !may(Access::WRITE_OK) {
        remarks.push(Remark::information(format!(
            "this user may not write to {share}, so the guest cannot create files in the root directory of the share"
        )));
    }
    remarks
}

fn is_inside(socket: &Path, share: &Path) -> bool {
    let parent = socket.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
    match (parent.canonicalize(), share.canonicalize()) {
        // With the whole host as the share it is intended.
        (Ok(_), Ok(share)) if share == Path::new("/") => false,
        (Ok(parent), Ok(share)) => parent.starts_with(share),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_in_the_share_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let share = directory.path().join("share");
        std::fs::create_dir_all(share.join("run")).unwrap();
        std::os::unix::fs::symlink(&share, directory.path().join("link")).unwrap();
        assert!(is_inside(&share.join("socket"), &share));
        assert!(is_inside(&directory.path().join("link/run/socket"), &share));
        assert!(!is_inside(&directory.path().join("socket"), &share));
        assert!(!is_inside(&directory.path().join("share2/socket"), &share));
        assert!(!is_inside(Path::new("/run/socket"), Path::new("/")));
    }
}
