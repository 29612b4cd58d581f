//! Security labels that the guest gives what it creates.

use std::fs;
use std::os::unix::fs::MetadataExt;

use fuse_protocol::abi::{CreateIn, EntryOut, MkdirIn, MknodIn, OpenOut};
use fuse_protocol::flags::InitFlags;
use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::connection::Connection;
use lanefsd_frontend::request::label_extension;
use lanefsd_frontend::session::linux_init_flags;
use lanefsd_frontend::{Backend, Caller, Client, Request, Result, Session, SessionOptions};
use rustix::io::Errno;
use tempfile::TempDir;

use crate::common;

const SELINUX: &str = "security.selinux";
/// What it takes to write labels where the host's kernel has no SELinux.
const PRIVILEGE: &str = "--modcaps=+sys_admin";
const LABEL: &[u8] = b"system_u:object_r:user_home_t:s0\0";
const KINDS: [&str; 5] = ["dir", "node", "link", "file", "tmpfile"];

fn with_labels() -> SessionOptions {
    SessionOptions { init_flags: linux_init_flags() | InitFlags::SECURITY_CTX, ..SessionOptions::default() }
}

fn on_disk(args: &[&str], options: SessionOptions) -> (TempDir, Backend, Session) {
    let starter = common::starter().args(args).args([PRIVILEGE, "--tmpfile"]);
    common::serve_on(common::open_directory(), starter, options)
}

/// The request that makes one of [`KINDS`] under its own name.
fn creation(kind: &str, flags: i32) -> Request<'static> {
    let umask = 0;
    let create = |opcode| {
        let arg =
            CreateIn { flags: flags.cast_unsigned(), mode: libc::S_IFREG | 0o640, umask, open_flags: 0 };
        Request::new(opcode, ROOT).arg(&arg).reply_data(size_of::<EntryOut>() + size_of::<OpenOut>())
    };
    let entry = size_of::<EntryOut>();
    match kind {
        "dir" => Request::new(Opcode::Mkdir, ROOT)
            .arg(&MkdirIn { mode: 0o750, umask })
            .name("dir")
            .reply_data(entry),
        "node" => Request::new(Opcode::Mknod, ROOT)
            .arg(&MknodIn { mode: libc::S_IFIFO | 0o640, rdev: 0, umask, padding: 0 })
            .name("node")
            .reply_data(entry),
        "link" => Request::new(Opcode::Symlink, ROOT).name("link").name("nowhere").reply_data(entry),
        "file" => create(Opcode::Create).name("file"),
        _ => create(Opcode::Tmpfile).name("/"),
    }
}

/// Makes all kinds with a label; the tmpfile gets its name at the end.
fn make_one_of_each(client: &Client<'_>, name: &str) -> Result<()> {
    for kind in KINDS {
        let reply = client.call_bytes(&creation(kind, libc::O_RDWR).label(name, LABEL))?;
        if kind == "tmpfile" {
            let node = u64::from_le_bytes(reply[..8].try_into().unwrap());
            client.link(node, ROOT, "tmpfile")?;
        }
    }
    Ok(())
}

#[test]
fn everything_that_is_created_has_its_label_and_its_owner() {
    let (_directory, backend, session) = on_disk(&["--security-label"], with_labels());
    let client = session.client().caller(Caller { uid: 1000, gid: 1001, pid: 1, group: Some(7) });
    make_one_of_each(&client, SELINUX).unwrap();
    for kind in KINDS {
        let path = backend.path(kind);
        assert_eq!(common::host_xattr(&path, SELINUX).as_deref(), Ok(LABEL), "{kind}");
        let host = fs::symlink_metadata(&path).unwrap();
        assert_eq!((host.uid(), host.gid()), (1000, 1001), "{kind}");
        let mode = match kind {
            "dir" => 0o750,
            "link" => 0o777,
            _ => 0o640,
        };
        assert_eq!(host.mode() & 0o7777, mode, "{kind}");
        if kind != "dir" {
            assert_eq!(host.nlink(), 1, "{kind}");
        }
    }
    // A file that is there keeps its label, and O_EXCL counts.
    let again = creation("file", libc::O_RDWR).label(SELINUX, b"other");
    client.call_bytes(&again).unwrap();
    let exclusive = creation("file", libc::O_RDWR | libc::O_EXCL).label(SELINUX, b"other");
    assert_eq!(common::errno(client.call_bytes(&exclusive)), libc::EEXIST);
    assert_eq!(common::host_xattr(&backend.path("file"), SELINUX).as_deref(), Ok(LABEL));
    assert_eq!(fs::read_dir(backend.share()).unwrap().count(), KINDS.len());
    // A request without a label creates as ever.
    client.mkdir(ROOT, "plain", 0o755, 0).unwrap();
    assert_eq!(common::host_xattr(&backend.path("plain"), SELINUX), Err(Errno::NODATA));
}

#[test]
fn a_new_file_is_readable_and_writable_at_once() {
    let (_directory, backend, session) = on_disk(&["--security-label"], with_labels());
    let client = session.client().user(1000, 1000);
    let reply =
        client.call_bytes(&creation("file", libc::O_RDWR | libc::O_EXCL).label(SELINUX, LABEL)).unwrap();
    let node = u64::from_le_bytes(reply[..8].try_into().unwrap());
    let fh = u64::from_le_bytes(reply[size_of::<EntryOut>()..][..8].try_into().unwrap());
    client.write(node, fh, 0, b"labelled").unwrap();
    assert_eq!(client.read(node, fh, 0, 100).unwrap(), b"labelled");
    assert_eq!(client.lookup(ROOT, "file").unwrap().nodeid, node);
    client.release(node, fh).unwrap();
    assert_eq!(fs::read(backend.path("file")).unwrap(), b"labelled");
}

#[test]
fn labels_have_their_mapped_names() {
    let map = "--xattrmap=:map:security.selinux:trusted.virtiofs.:";
    let (_directory, backend, session) = on_disk(&["--security-label", map], with_labels());
    make_one_of_each(&session.client(), SELINUX).unwrap();
    for kind in KINDS {
        let path = backend.path(kind);
        assert_eq!(
            common::host_xattr(&path, "trusted.virtiofs.security.selinux").as_deref(),
            Ok(LABEL),
            "{kind}"
        );
        assert_eq!(common::host_xattr(&path, SELINUX), Err(Errno::NODATA), "{kind}");
    }
}

#[test]
fn what_cannot_be_labelled_is_not_there() {
    // user.* attributes are for files and directories alone.
    let map = "--xattrmap=:map:security.selinux:user.virtiofs.:";
    let (_directory, backend, session) = on_disk(&["--security-label", map], with_labels());
    let client = session.client();
    for kind in ["node", "link"] {
        let refused = client.call_bytes(&creation(kind, 0).label(SELINUX, LABEL));
        assert_eq!(common::errno(refused), libc::EPERM, "{kind}");
    }
    // No file system knows such attributes, nor are the host's own for the guest to write.
    for (name, errno) in [("nonsense", libc::EOPNOTSUPP), ("user.virtiofs.security.selinux", libc::EPERM)] {
        for kind in KINDS {
            let refused = client.call_bytes(&creation(kind, libc::O_RDWR).label(name, LABEL));
            assert_eq!(common::errno(refused), errno, "{kind} {name}");
        }
    }
    assert_eq!(fs::read_dir(backend.share()).unwrap().count(), 0);
    let descriptors = backend.descriptors().unwrap();
    let left = descriptors.iter().find(|target| target.contains("share") && target.contains("deleted"));
    assert_eq!(left, None);
    for kind in ["dir", "file"] {
        client.call_bytes(&creation(kind, libc::O_RDWR).label(SELINUX, LABEL)).unwrap();
    }
}

#[test]
fn guests_before_linux_6_3_send_labels_without_announcing_them() {
    let (_directory, backend, session) =
        on_disk(&["--security-label"], SessionOptions { minor: 37, ..with_labels() });
    let client = session.client();
    for kind in KINDS {
        let old = creation(kind, libc::O_RDWR).arg(&label_extension(SELINUX, LABEL)[..]);
        let reply = client.call_bytes(&old).unwrap();
        if kind == "tmpfile" {
            let node = u64::from_le_bytes(reply[..8].try_into().unwrap());
            client.link(node, ROOT, "tmpfile").unwrap();
        }
        assert_eq!(common::host_xattr(&backend.path(kind), SELINUX).as_deref(), Ok(LABEL), "{kind}");
    }
    // Such a guest without an LSM sends a header that announces nothing.
    client
        .call_bytes(&Request::new(Opcode::Symlink, ROOT).name("s").name("t").arg(&[8u32, 0]).reply_data(128))
        .unwrap();
}

#[test]
fn labels_are_agreed_on_or_left_alone() {
    for (args, offered) in
        [(&[][..], false), (&["--security-label=never"], false), (&["--security-label=auto"], true)]
    {
        let (_directory, backend, session) = on_disk(args, with_labels());
        assert_eq!(session.init_flags().contains(InitFlags::SECURITY_CTX), offered, "{args:?}");
        let labelled = creation("dir", 0).label(SELINUX, LABEL);
        session.client().call_bytes(&labelled).unwrap();
        assert_eq!(common::host_xattr(&backend.path("dir"), SELINUX).is_ok(), offered, "{args:?}");
    }
    let directory = common::disk_directory();
    let backend = common::starter()
        .args(["--security-label=always", PRIVILEGE])
        .share(directory.path())
        .start()
        .unwrap();
    let session =
        Session::start(Connection::connect(backend.socket()).unwrap(), SessionOptions::default()).unwrap();
    assert_eq!(common::errno(session.init()), libc::EPROTO);
    common::wait_for_words(&backend, "SECURITY_CTX");
}

#[test]
fn a_host_that_cannot_keep_labels_is_told_at_start() {
    for (share, map, words) in [
        ("/proc/sys", None, "cannot keep security labels"),
        ("/tmp", Some("--xattrmap=:bad:all:security.:security.::ok:all:::"), "--xattrmap"),
    ] {
        let mut args = vec!["--security-label", "--log-level=error"];
        args.extend(map);
        let (status, stderr) = common::starter().args(&args).share(share).refuse().unwrap();
        assert_eq!(status.code(), Some(1), "{stderr}");
        assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
        assert!(stderr.contains(words), "{stderr}");
        args[0] = "--security-label=auto";
        let backend = common::starter().args(&args).share(share).start().unwrap();
        let session = backend.connect(with_labels()).unwrap();
        assert!(!session.init_flags().contains(InitFlags::SECURITY_CTX));
    }
}

#[test]
fn a_daemon_that_may_not_write_labels_says_so_at_start() {
    // With SELinux in the host's kernel, security.selinux itself would take no capability.
    let args =
        ["--security-label", "--xattrmap=:map:security.selinux:trusted.virtiofs.:", "--log-level=error"];
    let share = common::disk_directory();
    let (status, stderr) = common::starter().args(args).share(share.path()).refuse().unwrap();
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
    assert!(stderr.contains("security.selinux") && stderr.contains("--modcaps=+sys_admin"), "{stderr}");
    assert_eq!(fs::read_dir(share.path()).unwrap().count(), 0);
}
