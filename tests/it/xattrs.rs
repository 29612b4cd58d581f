//! Extended attributes with other names on the host.

use std::fs;
use std::path::Path;

use lanefsd_frontend::Backend;
use lanefsd_frontend::client::{Change, ROOT};
use rustix::fs::{XattrFlags, getxattr, listxattr, setxattr};

use crate::common;

/// Names of the attributes on the host, sorted.
fn host_list(path: &Path) -> Vec<String> {
    let mut names = vec![0; 4096];
    let len = listxattr(path, names.as_mut_slice()).unwrap();
    let text = String::from_utf8(names[..len].to_vec()).unwrap();
    let mut names: Vec<_> = text.split_terminator('\0').map(str::to_owned).collect();
    names.sort();
    names
}

#[test]
fn names_are_prefixed_on_the_host_and_only_there() {
    let (_directory, backend, session) = common::on_disk(&["--xattrmap=:map::user.virtiofs.:"]);
    let path = backend.path("file");
    fs::write(&path, "").unwrap();
    setxattr(&path, "user.host", b"host's", XattrFlags::empty()).unwrap();
    let client = session.client();
    let node = client.lookup(ROOT, "file").unwrap().nodeid;
    for name in ["user.a", "trusted.overlay.opaque", "security.selinux"] {
        client.setxattr(node, name, name.as_bytes(), 0).unwrap();
        assert_eq!(client.getxattr(node, name, 100).unwrap(), name.as_bytes());
    }
    let names = host_list(&path);
    let expected = [
        "user.host",
        "user.virtiofs.security.selinux",
        "user.virtiofs.trusted.overlay.opaque",
        "user.virtiofs.user.a",
    ];
    assert_eq!(names, expected);
    // The guest sees what it set and nothing else.
    let mut listed: Vec<_> =
        client.listxattr(node, 200).unwrap().split(|byte| *byte == 0).map(<[u8]>::to_vec).collect();
    listed.sort();
    assert_eq!(listed, [&b""[..], b"security.selinux", b"trusted.overlay.opaque", b"user.a"]);
    let len = "security.selinux\0trusted.overlay.opaque\0user.a\0".len();
    assert_eq!(client.listxattr(node, len).unwrap().len(), len);
    assert_eq!(common::errno(client.listxattr(node, len - 1)), libc::ERANGE);
    assert_eq!(client.listxattr_size(node).unwrap(), len);
    assert_eq!(common::errno(client.getxattr(node, "user.host", 100)), libc::ENODATA);
    client.removexattr(node, "user.a").unwrap();
    assert_eq!(host_list(&path), expected[..3]);
    // A name that only gets too long on the host.
    let long = format!("user.{}", "n".repeat(245));
    assert_eq!(common::errno(client.setxattr(node, &long, b"x", 0)), libc::ERANGE);
    assert_eq!(common::errno(client.getxattr(node, &long, 100)), libc::ENODATA);
}

#[test]
fn a_list_longer_than_usual() {
    let (_directory, backend, session) =
        common::on_disk(&["--xattrmap=:bad:all:user.bad:user.bad::ok:all:::"]);
    let path = backend.path("file");
    fs::write(&path, "").unwrap();
    for i in 0..100 {
        let name = format!("user.{}{i:03}", if i % 2 == 0 { "bad" } else { "good" });
        setxattr(&path, &name, b"", XattrFlags::empty()).unwrap();
    }
    let node = session.client().lookup(ROOT, "file").unwrap().nodeid;
    let listed = session.client().listxattr(node, 65536).unwrap();
    assert_eq!(listed.iter().filter(|byte| **byte == 0).count(), 50);
    assert!(!String::from_utf8(listed).unwrap().contains("bad"));
}

#[test]
fn rules_that_refuse() {
    let map = "--xattrmap=:unsupported:all:security.selinux:security.selinux:\n\
               :bad:all:security.:security.: /prefix/all/trusted./user.t./ /bad/client/user.t.// /ok/all///";
    let (_directory, backend, session) = common::on_disk(&[map]);
    let path = backend.path("file");
    fs::write(&path, "").unwrap();
    for name in ["security.selinux", "security.ima2", "user.seen"] {
        setxattr(&path, name, b"host's", XattrFlags::empty()).unwrap();
    }
    let client = session.client();
    let node = client.lookup(ROOT, "file").unwrap().nodeid;
    for (name, set, get) in [
        ("security.selinux", libc::ENOTSUP, libc::ENOTSUP),
        ("security.ima2", libc::EPERM, libc::ENODATA),
        ("user.t.trusted.a", libc::EPERM, libc::ENODATA),
    ] {
        assert_eq!(common::errno(client.setxattr(node, name, b"guest's", 0)), set, "set {name}");
        assert_eq!(common::errno(client.removexattr(node, name)), set, "remove {name}");
        assert_eq!(common::errno(client.getxattr(node, name, 100)), get, "get {name}");
        assert_eq!(common::errno(client.getxattr_size(node, name)), get, "size of {name}");
    }
    assert_eq!(client.listxattr(node, 100).unwrap(), b"user.seen\0");
    assert_eq!(getxattr_of(&path, "security.ima2"), b"host's");
    client.setxattr(node, "trusted.a", b"x", 0).unwrap();
    assert_eq!(getxattr_of(&path, "user.t.trusted.a"), b"x");
}

fn getxattr_of(path: &Path, name: &str) -> Vec<u8> {
    let mut value = vec![0; 1000];
    let len = getxattr(path, name, value.as_mut_slice()).unwrap();
    value.truncate(len);
    value
}

fn client_ok<T>(result: lanefsd_frontend::Result<T>) {
    result.map(|_| ()).unwrap();
}

#[test]
fn capabilities_with_another_name_go_when_the_file_changes() {
    let (_directory, backend, session) =
        common::on_disk(&["--xattrmap=:map:security.capability:user.virtiofs.:"]);
    let path = backend.path("tool");
    let client = session.client();
    let (entry, open) = client.create(ROOT, "tool", libc::O_RDWR, 0o755, 0).unwrap();
    let (node, fh) = (entry.nodeid, open.fh);
    let mut capability = [0; 20];
    capability[3] = 2;
    let name = "user.virtiofs.security.capability";
    let check = |what: &str, change: &dyn Fn()| {
        client.setxattr(node, "security.capability", &capability, 0).unwrap();
        assert_eq!(host_list(&path), [name], "before {what}");
        change();
        assert_eq!(host_list(&path), Vec::<String>::new(), "after {what}");
    };
    check("write", &|| client_ok(client.write(node, fh, 0, b"x")));
    check("truncate", &|| client_ok(client.setattr(node, Change::none().size(0))));
    check("chown", &|| client_ok(client.setattr(node, Change::none().uid(5))));
    check("fallocate", &|| client.fallocate(node, fh, 0, 0, 10).unwrap());
    check("open", &|| client_ok(client.open(node, libc::O_RDWR | libc::O_TRUNC)));
    client.setxattr(node, "security.capability", &capability, 0).unwrap();
    client.setattr(node, Change::none().mode(0o700)).unwrap();
    client.read(node, fh, 0, 10).unwrap();
    assert_eq!(host_list(&path), [name], "reading and chmod leave it");
}

#[test]
fn rules_that_are_none_are_refused_at_start() {
    let share = tempfile::tempdir().unwrap();
    let base = ["--sandbox=none", "--fd=3", "--shared-dir", share.path().to_str().unwrap()];
    for (rules, words) in [
        ("--xattrmap=:ok:client:::", "server"),
        ("--xattrmap=:ok:all:::x", "rule 2"),
        ("--xattrmap=", "no rule"),
        ("--xattrmap=:good:all:::", "\"good\""),
    ] {
        let (status, stderr) =
            Backend::of(common::program()).bare().args(base).args([rules]).refuse().unwrap();
        assert_eq!(status.code(), Some(1), "{stderr}");
        assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
        assert!(stderr.contains("--xattrmap") && stderr.contains(words), "{stderr}");
    }
}

/// `cp -a`, `rsync -X`, dnf and flatpak leave out an attribute that is not supported, and fail at one
/// that is forbidden.
#[test]
fn attributes_that_the_daemon_never_may_write_are_unsupported() {
    for (args, refused) in [(&["--xattr"][..], true), (&["--xattr", "--modcaps=+sys_admin"], false)] {
        let (_directory, backend, session) = common::on_disk(args);
        fs::write(backend.path("file"), "").unwrap();
        let client = session.client();
        let node = client.lookup(ROOT, "file").unwrap().nodeid;
        for name in ["trusted.overlay.opaque", "security.foo"] {
            if refused {
                assert_eq!(common::errno(client.setxattr(node, name, b"y", 0)), libc::ENOTSUP, "{name}");
                setxattr(backend.path("file"), name, b"y", XattrFlags::empty()).unwrap();
                assert_eq!(common::errno(client.removexattr(node, name)), libc::ENOTSUP, "{name}");
            } else {
                client.setxattr(node, name, b"y", 0).unwrap();
                client.removexattr(node, name).unwrap();
            }
        }
        client.setxattr(node, "user.name", b"y", 0).unwrap();
    }
}

/// What overlayfs of a guest does in its upper directory, as docs/options.md says it can.
#[test]
fn an_overlay_keeps_its_upper_directory_on_the_share() {
    for sandbox in ["--sandbox=none", "--sandbox=chroot", "--sandbox=namespace"] {
        for (args, prefix, refusal) in [
            (&["--xattr", "--modcaps=+sys_admin"][..], "trusted", None),
            (&["--xattr"], "user", None),
            (&["--xattrmap=:map::user.virtiofs.:"], "trusted", None),
            (&["--xattr"], "trusted", Some(libc::ENOTSUP)),
        ] {
            let (_directory, _backend, session) = common::on_disk(&[&[sandbox], args].concat());
            let client = session.client();
            let upper = client.mkdir(ROOT, "upper", 0o755, 0).unwrap().nodeid;
            let work = client.mkdir(ROOT, "work", 0o755, 0).unwrap().nodeid;
            let opaque = format!("{prefix}.overlay.opaque");
            let set = client.setxattr(upper, &opaque, b"y", 0);
            if let Some(errno) = refusal {
                assert_eq!(common::errno(set), errno, "{sandbox} {args:?}");
                continue;
            }
            set.unwrap();
            assert_eq!(client.getxattr(upper, &opaque, 10).unwrap(), b"y");
            // A file is copied up under a temporary name, and a lower one is hidden.
            let (entry, open) = client.create(work, "#1", libc::O_RDWR, 0o600, 0).unwrap();
            client.setxattr(entry.nodeid, format!("{prefix}.overlay.origin"), b"o", 0).unwrap();
            client.release(entry.nodeid, open.fh).unwrap();
            client.rename2(work, "#1", upper, "file", 0).unwrap();
            client.rename2(upper, "file", work, "#2", libc::RENAME_WHITEOUT).unwrap();
            let whiteout = client.lookup(upper, "file").unwrap().attr;
            assert_eq!((whiteout.mode & libc::S_IFMT, whiteout.rdev), (libc::S_IFCHR, 0));
            client.rename2(work, "#2", upper, "file", libc::RENAME_EXCHANGE).unwrap();
            assert_eq!(client.lookup(upper, "file").unwrap().nodeid, entry.nodeid);
        }
    }
}
