//! A daemon that shares a store of which calls can fail, and take their time.

use faultfs::{FILE, FaultFs};
use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::{Backend, Session};
use tempfile::TempDir;

/// The daemon with its front end, and the store's file, open.
pub struct Host {
    pub session: Session,
    pub backend: Backend,
    pub store: FaultFs,
    // Ends after the mount on it.
    pub directory: TempDir,
    pub node: u64,
    pub fh: u64,
}

impl Host {
    pub fn serve(args: &[&str]) -> Host {
        super::own_mounts();
        let directory = super::disk_directory();
        let store = FaultFs::mount(directory.path()).unwrap();
        let backend = Backend::of(super::program()).args(args).share(directory.path()).start().unwrap();
        let session = backend.connect(super::queues(2)).unwrap();
        let node = session.client().lookup(ROOT, FILE).unwrap().nodeid;
        let fh = session.client().open(node, libc::O_RDWR).unwrap().fh;
        Host { session, backend, store, directory, node, fh }
    }
}
