//! The session that another daemon has begun with a guest: what INIT would have negotiated stands in the snapshot.

use fuse_protocol::abi;
use fuse_protocol::flags::InitFlags;

use super::session::Session;
use crate::fs::FileSystem;
use crate::migration::{self, MigrationError, Snapshot};

/// The minor version that virtiofsd has, and so a guest that is newer: one that names supplementary groups is.
const VIRTIOFSD_MINOR: u32 = 38;
/// The same of a guest that is older, as far as requests differ by it.
const OLD_MINOR: u32 = 36;
/// What virtiofsd negotiates with each guest that can do it.
const VIRTIOFSD_FLAGS: InitFlags = InitFlags::ASYNC_READ
    .union(InitFlags::PARALLEL_DIROPS)
    .union(InitFlags::BIG_WRITES)
    .union(InitFlags::AUTO_INVAL_DATA)
    .union(InitFlags::ASYNC_DIO)
    .union(InitFlags::HAS_IOCTL_DIR)
    .union(InitFlags::ATOMIC_O_TRUNC)
    .union(InitFlags::MAX_PAGES)
    .union(InitFlags::INIT_EXT)
    .union(InitFlags::ALLOW_IDMAP);
/// What it negotiates only if an option asks for it. HANDLE_KILLPRIV_V2 is not among it, which is off there where nobody
/// asks: without it the daemon clears set-id bits by itself, which is right for either guest.
const VIRTIOFSD_OPTIONAL: InitFlags =
    InitFlags::DO_READDIRPLUS.union(InitFlags::READDIRPLUS_AUTO).union(InitFlags::SECURITY_CTX);
/// What goes with POSIX ACLs there, and only with them.
const VIRTIOFSD_ACL: InitFlags =
    InitFlags::POSIX_ACL.union(InitFlags::DONT_MASK).union(InitFlags::SETXATTR_EXT);
/// Flags that are no promise of the file system: the guest and the device agree on them, also on how requests are laid out.
const OF_THE_DEVICE: InitFlags =
    InitFlags::MAX_PAGES.union(InitFlags::INIT_EXT).union(InitFlags::SETXATTR_EXT);

impl Session {
    /// Takes over a session. The caller has excluded all requests.
    pub(super) fn load(&self, fs: &dyn FileSystem, mut snapshot: Snapshot) -> Result<(), MigrationError> {
        if self.agreement().is_active() {
            return Err(MigrationError("a guest has mounted the share already".into()));
        }
        if let Some(session) = &mut snapshot.session {
            complete(session, fs.offered_flags());
            check(session, fs)?;
        }
        fs.load(snapshot).inspect_err(|_| {
            fs.destroy();
            self.agreement().end();
        })
    }
}

/// Fills in what a stream of virtiofsd does not say: as far as requests differ by it, what its options and ours are together.
fn complete(session: &mut migration::Session, offered: InitFlags) {
    session.minor.get_or_insert(if session.create_supp_group { VIRTIOFSD_MINOR } else { OLD_MINOR });
    session.flags.get_or_insert_with(|| {
        let mut flags = VIRTIOFSD_FLAGS | VIRTIOFSD_OPTIONAL & offered;
        flags.set(InitFlags::WRITEBACK_CACHE, session.writeback);
        flags.set(InitFlags::SUBMOUNTS, session.submounts);
        flags.set(VIRTIOFSD_ACL, session.posix_acl);
        flags.set(InitFlags::CREATE_SUPP_GROUP, session.create_supp_group);
        flags.bits()
    });
}

/// Whether requests of such a session can be served.
fn check(session: &migration::Session, fs: &dyn FileSystem) -> Result<(), MigrationError> {
    let minor = session.minor.unwrap_or_default();
    if !(abi::OLDEST_MINOR_VERSION..=abi::KERNEL_MINOR_VERSION).contains(&minor) {
        return Err(MigrationError(format!(
            "the guest speaks FUSE 7.{minor}, and this daemon 7.{} to 7.{}",
            abi::OLDEST_MINOR_VERSION,
            abi::KERNEL_MINOR_VERSION
        )));
    }
    let flags = InitFlags::from_bits_retain(session.flags.unwrap_or_default());
    let more = flags - (fs.offered_flags() | OF_THE_DEVICE);
    if !more.is_empty() {
        return Err(MigrationError(format!(
            "the guest was promised {more:?}, which this daemon lacks: start it with the options of the source"
        )));
    }
    let missing = fs.required_flags() - flags;
    if !missing.is_empty() {
        return Err(MigrationError(format!(
            "the guest lacks {missing:?}, which --posix-acl or --security-label demands without a mode or with always"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use fuse_protocol::init::Negotiated;

    use super::*;
    use crate::fs::{self, Agreement};

    /// A file system that offers these flags, and takes over what fits.
    struct Stub {
        agreement: Arc<Agreement>,
        offered: InitFlags,
        required: InitFlags,
        loaded: Mutex<Option<migration::Session>>,
        destroyed: Mutex<u32>,
    }

    impl FileSystem for Stub {
        fn agreement(&self) -> fs::Result<&Arc<Agreement>> {
            Ok(&self.agreement)
        }

        fn offered_flags(&self) -> InitFlags {
            self.offered
        }

        fn required_flags(&self) -> InitFlags {
            self.required
        }

        fn destroy(&self) {
            *self.destroyed.lock().unwrap() += 1;
        }

        fn load(&self, snapshot: Snapshot) -> Result<(), MigrationError> {
            if snapshot.next_node == 7 {
                return Err(MigrationError("there is no such file".into()));
            }
            *self.loaded.lock().unwrap() = snapshot.session;
            Ok(())
        }
    }

    fn stub(offered: InitFlags) -> Stub {
        let (agreement, required) = (Arc::default(), InitFlags::empty());
        Stub { agreement, offered, required, loaded: Mutex::default(), destroyed: Mutex::default() }
    }

    fn load(stub: &Stub, session: migration::Session) -> Result<migration::Session, String> {
        let snapshot = Snapshot { session: Some(session), ..Snapshot::default() };
        Session::new(stub).load(stub, snapshot).map_err(|error| error.0)?;
        Ok(stub.loaded.lock().unwrap().clone().unwrap())
    }

    #[test]
    fn what_a_stream_of_virtiofsd_leaves_out_is_filled_in() {
        let plain = stub(InitFlags::all() - InitFlags::SECURITY_CTX);
        let session = load(&plain, migration::Session::default()).unwrap();
        let flags = InitFlags::from_bits_retain(session.flags.unwrap());
        assert_eq!(session.minor, Some(36));
        assert!(flags.contains(VIRTIOFSD_FLAGS | InitFlags::READDIRPLUS_AUTO));
        assert!(!flags.intersects(VIRTIOFSD_ACL | InitFlags::SECURITY_CTX | InitFlags::HANDLE_KILLPRIV_V2));
        let full = migration::Session {
            writeback: true,
            submounts: true,
            posix_acl: true,
            create_supp_group: true,
            ..migration::Session::default()
        };
        let session = load(&stub(InitFlags::all()), full).unwrap();
        let flags = InitFlags::from_bits_retain(session.flags.unwrap());
        let more = InitFlags::WRITEBACK_CACHE | InitFlags::SUBMOUNTS | InitFlags::CREATE_SUPP_GROUP;
        assert!(flags.contains(VIRTIOFSD_ACL | more | InitFlags::SECURITY_CTX) && session.minor == Some(38));
    }

    #[test]
    fn what_a_guest_was_promised_is_kept_or_refused() {
        let session = migration::Session {
            minor: Some(45),
            flags: Some((InitFlags::MAX_PAGES | InitFlags::FLOCK_LOCKS).bits()),
            ..migration::Session::default()
        };
        let error = load(&stub(InitFlags::ASYNC_READ), session.clone()).unwrap_err();
        assert!(error.starts_with("the guest was promised InitFlags(FLOCK_LOCKS), which"), "{error}");
        assert_eq!(load(&stub(InitFlags::FLOCK_LOCKS), session.clone()).unwrap(), session);
        let mut strict = stub(InitFlags::all());
        strict.required = InitFlags::POSIX_ACL;
        assert!(load(&strict, session.clone()).unwrap_err().contains("lacks InitFlags(POSIX_ACL)"));
        for minor in [0, 26, 46, u32::MAX] {
            let error =
                load(&stub(InitFlags::all()), migration::Session { minor: Some(minor), ..session.clone() });
            assert!(error.unwrap_err().starts_with("the guest speaks FUSE 7."));
        }
    }

    #[test]
    fn a_load_that_fails_leaves_no_session() {
        let stub = stub(InitFlags::all());
        let negotiated = Negotiated {
            minor: 45,
            flags: InitFlags::empty(),
            max_write: 4096,
            max_readahead: 0,
            max_pages: 1,
        };
        stub.agreement.begin(&negotiated);
        let snapshot = Snapshot { next_node: 7, ..Snapshot::default() };
        let error = Session::new(&stub).load(&stub, snapshot.clone()).unwrap_err();
        assert_eq!(
            (error.0.as_str(), *stub.destroyed.lock().unwrap()),
            ("a guest has mounted the share already", 0)
        );
        stub.agreement.end();
        let error = Session::new(&stub).load(&stub, snapshot).unwrap_err();
        assert_eq!((error.0.as_str(), *stub.destroyed.lock().unwrap()), ("there is no such file", 1));
        assert!(!stub.agreement.is_active());
    }
}
