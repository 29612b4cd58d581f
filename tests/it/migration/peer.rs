//! A session that moves between virtiofsd and lanefsd.
//!
//! `LANEFSD_TEST_PEER` names virtiofsd 1.14; `tests/run load` builds and names it.

use std::fs;
use std::path::Path;

use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::connection::Connection;
use lanefsd_frontend::message::protocol;
use lanefsd_frontend::{Backend, Session, SessionOptions};

use crate::common;

/// What virtiofsd is asked for, besides the share.
fn virtiofsd(share: &Path, options: &[&str]) -> Backend {
    let program = std::env::var_os("LANEFSD_TEST_PEER").expect("LANEFSD_TEST_PEER names virtiofsd 1.14");
    Backend::of(program).args(["--sandbox=none", "--xattr"]).args(options).share(share).start().unwrap()
}

/// As users start it: in the sandbox, with a supervisor.
fn lanefsd(share: &Path, options: &[&str]) -> Backend {
    let back = ["--xattr", "--migration-format=virtiofsd"];
    Backend::of(common::program()).args(back).args(options).share(share).start().unwrap()
}

/// A guest, with as much of the protocol as both have.
fn options() -> SessionOptions {
    let protocol_features =
        protocol::MQ | protocol::REPLY_ACK | protocol::CONFIGURE_MEM_SLOTS | protocol::DEVICE_STATE;
    SessionOptions { protocol_features, ..common::queues(1) }
}

fn move_to(session: &Session, from: &mut Backend, to: Backend) -> Backend {
    let bases = session.stop_queues().unwrap();
    let state = session.save_device_state().unwrap_or_else(|error| panic!("{error}: {}", from.stderr()));
    let moved = session.move_to(Connection::connect(to.socket()).unwrap(), &state, &bases);
    drop(moved.unwrap_or_else(|error| panic!("{error}: {}", to.stderr())));
    from.expect_success().unwrap();
    to
}

/// What a guest has.
struct Guest {
    directory: u64,
    deep: u64,
    file: (u64, u64),
    listing: u64,
    link: u64,
}

impl Guest {
    fn new(session: &Session, share: &Path, forgets: bool) -> Guest {
        fs::create_dir_all(share.join("directory/ä/deep")).unwrap();
        fs::write(share.join("directory/ä/deep/file"), "0123456789").unwrap();
        std::os::unix::fs::symlink("target", share.join("link")).unwrap();
        let client = session.client();
        let directory = client.lookup(ROOT, "directory").unwrap().nodeid;
        let other = client.lookup(directory, "ä").unwrap().nodeid;
        let deep = client.lookup(other, "deep").unwrap().nodeid;
        let node = client.lookup(deep, "file").unwrap().nodeid;
        assert_eq!(client.lookup(deep, "file").unwrap().nodeid, node);
        // No Linux guest forgets a directory on the way. Another one may.
        if forgets {
            client.forget(other, 1).unwrap();
        }
        let fh = client.open(node, libc::O_RDWR).unwrap().fh;
        let listing = client.opendir(deep).unwrap().fh;
        let link = client.lookup(ROOT, "link").unwrap().nodeid;
        Guest { directory, deep, file: (node, fh), listing, link }
    }

    fn work(&self, session: &Session, round: u8) {
        let client = session.client();
        let (node, fh) = self.file;
        assert_eq!(client.write(node, fh, u64::from(round), b"x").unwrap(), 1);
        let data = client.read(node, fh, 0, 100).unwrap();
        assert_eq!((data.len(), data[usize::from(round)]), (10, b'x'));
        assert_eq!(client.getattr(self.directory).unwrap().mode & libc::S_IFMT, libc::S_IFDIR);
        assert_eq!(client.readlink(self.link).unwrap(), b"target");
        let names = client.readdir(self.deep, self.listing, 0, 4096).unwrap();
        assert_eq!(names.len(), 3 + usize::from(round), "{names:?}");
        // Names lead to the nodes that the guest has, and what is new gets another one.
        assert_eq!(client.lookup(self.deep, "file").unwrap().nodeid, node);
        client.forget(node, 1).unwrap();
        let (new, open) = client.create(self.deep, format!("new{round}"), libc::O_RDWR, 0o600, 0).unwrap();
        assert!(![ROOT, self.directory, self.deep, node, self.link].contains(&new.nodeid) && open.fh != fh);
        client.release(new.nodeid, open.fh).unwrap();
        // Requests in the form that was negotiated.
        client.setxattr(node, "user.round", &[round], 0).unwrap();
        assert_eq!(client.getxattr(node, "user.round", 10).unwrap(), [round]);
        common::every_queue_answers(session);
    }

    /// Gives everything back: the counts were the guest's own all along.
    fn end(&self, session: &Session) {
        let client = session.client();
        client.release(self.file.0, self.file.1).unwrap();
        client.forget(self.file.0, 1).unwrap();
        client.getattr(self.file.0).unwrap();
        client.forget(self.file.0, 1).unwrap();
        assert!(client.getattr(self.file.0).is_err());
        client.releasedir(self.deep, self.listing).unwrap();
        client.forget(self.deep, 1).unwrap();
        assert!(client.getattr(self.deep).is_err());
        client.getattr(self.directory).unwrap();
    }
}

/// Moves a session that one of them has begun to and fro.
fn goes_to_and_fro(begins_with_virtiofsd: bool, theirs: &[&str], ours: &[&str]) {
    let share = common::disk_directory();
    let start = |peer: bool| if peer { virtiofsd(share.path(), theirs) } else { lanefsd(share.path(), ours) };
    let mut peer = begins_with_virtiofsd;
    let mut backend = start(peer);
    let session = backend.connect(options()).unwrap();
    let guest = Guest::new(&session, share.path(), !theirs.contains(&"--inode-file-handles=never"));
    for round in 0..5 {
        guest.work(&session, round);
        peer = !peer;
        backend = move_to(&session, &mut backend, start(peer));
    }
    guest.work(&session, 5);
    guest.end(&session);
    drop(session);
    backend.expect_success().unwrap();
}

#[test]
#[ignore = "needs virtiofsd, which tests/run load builds"]
fn a_session_moves_from_virtiofsd_to_lanefsd_and_back() {
    goes_to_and_fro(true, &[], &["--migration-mode=find-paths"]);
    // Without handles, a file that was removed is lost.
    let never = ["--inode-file-handles=never", "--migration-on-error=guest-error"];
    goes_to_and_fro(true, &never, &["--migration-mode=auto"]);
    goes_to_and_fro(
        true,
        &["--migration-verify-handles", "--inode-file-handles=mandatory"],
        &["--migration-mode=find-paths", "--migration-verify-handles"],
    );
    goes_to_and_fro(
        true,
        &["--migration-mode=file-handles", "--inode-file-handles=prefer"],
        &["--migration-mode=file-handles"],
    );
    goes_to_and_fro(
        true,
        &["--migration-confirm-paths", "--cache=never"],
        &["--migration-mode=find-paths", "--migration-confirm-paths", "--cache=never"],
    );
}

#[test]
#[ignore = "needs virtiofsd, which tests/run load builds"]
fn a_session_moves_from_lanefsd_to_virtiofsd_and_back() {
    goes_to_and_fro(false, &[], &["--migration-mode=find-paths"]);
    goes_to_and_fro(false, &["--inode-file-handles=prefer"], &["--migration-mode=auto"]);
    goes_to_and_fro(false, &["--migration-mode=file-handles"], &["--migration-mode=file-handles"]);
}

/// What lanefsd alone has is refused by virtiofsd before it is taken for something else.
#[test]
#[ignore = "needs virtiofsd, which tests/run load builds"]
fn virtiofsd_refuses_our_own_stream() {
    let share = common::disk_directory();
    let mut source = Backend::of(common::program()).share(share.path()).start().unwrap();
    let session = source.connect(options()).unwrap();
    let guest = Guest::new(&session, share.path(), true);
    let bases = session.stop_queues().unwrap();
    let state = session.save_device_state().unwrap();
    let peer = virtiofsd(share.path(), &[]);
    session.move_to(Connection::connect(peer.socket()).unwrap(), &state, &bases).unwrap_err();
    // The source goes on.
    session.start_queues_at(&bases).unwrap();
    guest.end(&session);
    drop(session);
    source.expect_success().unwrap();
}
