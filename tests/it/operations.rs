//! Every operation at least once, compared with what the host sees.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::client::{Change, ROOT};
use lanefsd_frontend::{Caller, Request, Segmentation};

use crate::common;

#[test]
fn lookup_getattr_statx_access() {
    let (backend, session) = common::serve(&[]);
    let path = backend.path("file");
    fs::write(&path, "0123456789").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let client = session.client();
    let entry = client.lookup(ROOT, "file").unwrap();
    let host = fs::metadata(&path).unwrap();
    for attr in [entry.attr, client.getattr(entry.nodeid).unwrap()] {
        assert_eq!(attr.ino, host.ino());
        assert_eq!(attr.size, 10);
        assert_eq!(attr.mode, host.mode());
        assert_eq!((attr.uid, attr.gid, attr.nlink), (host.uid(), host.gid(), 1));
        assert_eq!(attr.blocks, host.blocks());
        assert_eq!((attr.mtime, attr.mtimensec), (host.mtime() as u64, host.mtime_nsec() as u32));
    }
    assert_eq!(common::errno(client.lookup(ROOT, "missing")), libc::ENOENT);
    client.access(entry.nodeid, libc::R_OK | libc::W_OK).unwrap();
    assert_eq!(common::errno(client.user(12345, 12345).access(entry.nodeid, libc::R_OK)), libc::EACCES);
    let root = client.getattr(ROOT).unwrap();
    assert_eq!(root.ino, fs::metadata(backend.share()).unwrap().ino());
}

#[test]
fn statx_has_the_birth_time() {
    let (_directory, backend, session) = common::on_disk(&[]);
    fs::write(backend.path("file"), "x").unwrap();
    let node = session.client().lookup(ROOT, "file").unwrap().nodeid;
    let stat = session.client().statx(node, libc::STATX_BASIC_STATS | libc::STATX_BTIME).unwrap();
    let host = fs::metadata(backend.path("file")).unwrap();
    assert_eq!((stat.ino, stat.size, u32::from(stat.mode)), (host.ino(), 1, host.mode()));
    if let Ok(created) = host.created() {
        let since = created.duration_since(std::time::UNIX_EPOCH).unwrap();
        assert_ne!(stat.mask & libc::STATX_BTIME, 0);
        assert_eq!((stat.btime.tv_sec as u64, stat.btime.tv_nsec), (since.as_secs(), since.subsec_nanos()));
    }
}

#[test]
fn setattr() {
    let (backend, session) = common::serve(&[]);
    let path = backend.path("file");
    fs::write(&path, "0123456789").unwrap();
    let client = session.client();
    let node = client.lookup(ROOT, "file").unwrap().nodeid;
    let attr = client.setattr(node, Change::none().mode(0o604).uid(1001).gid(1002)).unwrap();
    assert_eq!((attr.mode & 0o7777, attr.uid, attr.gid), (0o604, 1001, 1002));
    let attr = client.setattr(node, Change::none().size(4).times((1_000_000, 5), (2_000_000, 7))).unwrap();
    assert_eq!(attr.size, 4);
    let host = fs::metadata(&path).unwrap();
    assert_eq!((host.mode() & 0o7777, host.uid(), host.gid(), host.len()), (0o604, 1001, 1002, 4));
    assert_eq!(
        (host.atime(), host.atime_nsec(), host.mtime(), host.mtime_nsec()),
        (1_000_000, 5, 2_000_000, 7)
    );
    client.setattr(node, Change::none().times_now()).unwrap();
    assert!(fs::metadata(&path).unwrap().mtime() > 2_000_000);
    // Through an open file, also when the name is gone.
    let fh = client.open(node, libc::O_RDWR).unwrap().fh;
    client.unlink(ROOT, "file").unwrap();
    assert_eq!(client.setattr(node, Change::none().size(9).handle(fh)).unwrap().size, 9);
    assert_eq!(client.read(node, fh, 0, 100).unwrap(), b"0123\0\0\0\0\0");
    client.release(node, fh).unwrap();
}

#[test]
fn names_come_and_go() {
    let (backend, session) = common::serve(&[]);
    let client = session.client();
    let dir = client.mkdir(ROOT, "dir", 0o750, 0o022).unwrap();
    assert_eq!(fs::metadata(backend.path("dir")).unwrap().mode() & 0o7777, 0o750);
    let link = client.symlink(dir.nodeid, "link", "../some where").unwrap();
    assert_eq!(client.readlink(link.nodeid).unwrap(), b"../some where");
    assert_eq!(fs::read_link(backend.path("dir/link")).unwrap().to_str(), Some("../some where"));
    let fifo = client.mknod(dir.nodeid, "fifo", libc::S_IFIFO | 0o666, 0, 0o022).unwrap();
    assert_eq!(fifo.attr.mode, libc::S_IFIFO | 0o644);
    assert_eq!(fs::metadata(backend.path("dir/fifo")).unwrap().mode(), libc::S_IFIFO | 0o644);
    let file = client.mknod(dir.nodeid, "file", libc::S_IFREG | 0o600, 0, 0).unwrap();
    let second = client.link(file.nodeid, ROOT, "second").unwrap();
    assert_eq!((second.nodeid, second.attr.nlink), (file.nodeid, 2));
    assert_eq!(common::errno(client.mkdir(ROOT, "second", 0o700, 0)), libc::EEXIST);

    client.rename(ROOT, "second", dir.nodeid, "third").unwrap();
    assert!(!backend.path("second").exists() && backend.path("dir/third").exists());
    fs::write(backend.path("other"), "other").unwrap();
    let noreplace = client.rename2(ROOT, "other", dir.nodeid, "third", libc::RENAME_NOREPLACE);
    assert_eq!(common::errno(noreplace), libc::EEXIST);
    client.rename2(ROOT, "other", dir.nodeid, "third", libc::RENAME_EXCHANGE).unwrap();
    assert_eq!(fs::read_to_string(backend.path("dir/third")).unwrap(), "other");

    assert_eq!(common::errno(client.rmdir(ROOT, "dir")), libc::ENOTEMPTY);
    assert_eq!(common::errno(client.unlink(ROOT, "dir")), libc::EISDIR);
    for name in ["link", "fifo", "file", "third"] {
        client.unlink(dir.nodeid, name).unwrap();
    }
    client.unlink(ROOT, "other").unwrap();
    client.rmdir(ROOT, "dir").unwrap();
    assert_eq!(fs::read_dir(backend.share()).unwrap().count(), 0);
}

#[test]
fn creation_has_the_callers_ids_groups_and_umask() {
    let (backend, session) = common::serve(&[]);
    fs::set_permissions(backend.share(), fs::Permissions::from_mode(0o777)).unwrap();
    let user = session.client().user(1234, 2345);
    user.mkdir(ROOT, "dir", 0o777, 0o027).unwrap();
    user.symlink(ROOT, "link", "x").unwrap();
    user.mknod(ROOT, "node", libc::S_IFREG | 0o666, 0, 0o077).unwrap();
    let (entry, open) = user.create(ROOT, "file", libc::O_RDWR, 0o666, 0o022).unwrap();
    user.release(entry.nodeid, open.fh).unwrap();
    for (name, mode) in [("dir", 0o750), ("node", 0o600), ("file", 0o644)] {
        let host = fs::metadata(backend.path(name)).unwrap();
        assert_eq!((host.uid(), host.gid(), host.mode() & 0o7777), (1234, 2345, mode), "{name}");
    }
    let link = fs::symlink_metadata(backend.path("link")).unwrap();
    assert_eq!((link.uid(), link.gid()), (1234, 2345));
    // Root's next request is root's again, whichever worker does it.
    for i in 0..20 {
        session.client().mkdir(ROOT, format!("root-{i}"), 0o700, 0).unwrap();
        assert_eq!(fs::metadata(backend.path(&format!("root-{i}"))).unwrap().uid(), 0);
    }
    // A directory that belongs to a group, and the caller is in it only by a supplementary group.
    fs::create_dir(backend.path("team")).unwrap();
    std::os::unix::fs::chown(backend.path("team"), Some(0), Some(777)).unwrap();
    fs::set_permissions(backend.path("team"), fs::Permissions::from_mode(0o2770)).unwrap();
    let team = session.client().lookup(ROOT, "team").unwrap().nodeid;
    let member = session.client().caller(Caller { uid: 1234, gid: 2345, pid: 1, group: Some(777) });
    member.mkdir(team, "yes", 0o700, 0).unwrap();
    assert_eq!(fs::metadata(backend.path("team/yes")).unwrap().gid(), 777);
}

#[test]
fn data_goes_in_and_out_in_every_cut() {
    let (_directory, backend, session) = common::on_disk(&[]);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o644, 0).unwrap();
    let node = entry.nodeid;
    let mut cuts = vec![
        Segmentation::Linux,
        Segmentation::Scattered,
        Segmentation::Contiguous,
        Segmentation::One,
        Segmentation::Bytes,
    ];
    cuts.extend((0..20).map(Segmentation::Random));
    for (i, segmentation) in cuts.into_iter().enumerate() {
        let client = client.segmentation(segmentation);
        for len in [1, 100, 4096, 70_001] {
            let data: Vec<u8> = (0..len).map(|at| (at * 7 + i * 31 + len) as u8).collect();
            assert_eq!(client.write(node, open.fh, 123, &data).unwrap(), len, "{segmentation:?}");
            assert_eq!(client.read(node, open.fh, 123, len).unwrap(), data, "{segmentation:?}");
            let host = fs::read(backend.path("file")).unwrap();
            assert_eq!(&host[123..123 + len], data, "{segmentation:?}");
        }
    }
    assert!(client.read(node, open.fh, 1 << 40, 100).unwrap().is_empty());
    let data = vec![5; session.max_write()];
    assert!(data.len() >= 1 << 20 || common::is_foreign());
    assert_eq!(client.write(node, open.fh, 0, &data).unwrap(), data.len());
    assert_eq!(client.read(node, open.fh, 0, data.len()).unwrap(), data);
    client.flush(node, open.fh, 1).unwrap();
    client.fsync(node, open.fh, false).unwrap();
    client.fsync(node, open.fh, true).unwrap();
    client.release(node, open.fh).unwrap();
    assert_eq!(common::errno(client.read(node, open.fh, 0, 10)), libc::EBADF);
}

#[test]
fn open_flags_are_honoured() {
    let (backend, session) = common::serve(&[]);
    let path = backend.path("file");
    fs::write(&path, "0123456789").unwrap();
    let client = session.client();
    let node = client.lookup(ROOT, "file").unwrap().nodeid;
    let read_only = client.open(node, libc::O_RDONLY).unwrap().fh;
    assert_eq!(common::errno(client.write(node, read_only, 0, b"x")), libc::EBADF);
    let truncated = client.open(node, libc::O_RDWR | libc::O_TRUNC).unwrap().fh;
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    // The reply to CREATE has the size after the truncation.
    fs::write(&path, "0123456789").unwrap();
    let (entry, _) = client.create(ROOT, "file", libc::O_RDWR | libc::O_TRUNC, 0o600, 0).unwrap();
    assert_eq!((entry.nodeid, entry.attr.size), (node, 0));
    client.write(node, truncated, 0, b"abc").unwrap();
    // The guest decides where an append goes; the offset counts nevertheless for a file shared by many.
    let append = client.open(node, libc::O_WRONLY | libc::O_APPEND).unwrap().fh;
    client
        .write_with(
            node,
            append,
            3,
            b"def",
            fuse_protocol::flags::WriteFlags::empty(),
            libc::O_WRONLY | libc::O_APPEND,
        )
        .unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"abcdef");
    for fh in [read_only, truncated, append] {
        client.release(node, fh).unwrap();
    }
    assert_eq!(
        common::errno(client.create(ROOT, "file", libc::O_RDWR | libc::O_EXCL, 0o600, 0)),
        libc::EEXIST
    );
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    assert_eq!(entry.nodeid, node);
    client.release(node, open.fh).unwrap();
}

#[test]
fn holes_and_ranges() {
    let (_directory, backend, session) = common::on_disk(&[]);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "sparse", libc::O_RDWR, 0o644, 0).unwrap();
    let (node, fh) = (entry.nodeid, open.fh);
    client.write(node, fh, 1 << 20, &[1; 4096]).unwrap();
    client.fallocate(node, fh, 0, 0, 4 << 20).unwrap();
    assert_eq!(client.getattr(node).unwrap().size, 4 << 20);
    client.fallocate(node, fh, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 0, 1 << 20).unwrap();
    assert_eq!(client.lseek(node, fh, 0, libc::SEEK_DATA).unwrap(), 1 << 20);
    assert_eq!(client.lseek(node, fh, 0, libc::SEEK_HOLE).unwrap(), 0);
    assert_eq!(common::errno(client.lseek(node, fh, 4 << 20, libc::SEEK_DATA)), libc::ENXIO);
    assert_eq!(fs::metadata(backend.path("sparse")).unwrap().len(), 4 << 20);

    let (to, to_open) = client.create(ROOT, "copy", libc::O_RDWR, 0o644, 0).unwrap();
    let copied = client.copy_file_range((node, fh, 1 << 20), (to.nodeid, to_open.fh, 10), 4096).unwrap();
    assert_eq!(copied, 4096);
    assert_eq!(&fs::read(backend.path("copy")).unwrap()[10..], vec![1; 4096]);
    for (n, h) in [(node, fh), (to.nodeid, to_open.fh)] {
        client.release(n, h).unwrap();
    }
}

/// Longer than what is copied at once, with data around each border.
#[test]
fn long_copies_are_whole() {
    const PIECE: u64 = 64 << 20;
    let (_directory, backend, session) = common::on_disk(&[]);
    let client = session.client();
    let (from, open) = client.create(ROOT, "from", libc::O_RDWR, 0o644, 0).unwrap();
    let (node, fh, size) = (from.nodeid, open.fh, 2 * PIECE + 5000);
    for (mark, border) in [(1, 100), (2, PIECE), (3, 2 * PIECE)] {
        client.write(node, fh, border - 100, &[mark; 200]).unwrap();
    }
    client.setattr(node, Change::none().size(size)).unwrap();
    let (to, open) = client.create(ROOT, "to", libc::O_RDWR, 0o644, 0).unwrap();
    let target = |offset| (to.nodeid, open.fh, offset);
    // More is asked for than there is, in both forms.
    assert_eq!(client.copy_file_range((node, fh, 10), target(0), 1 << 40).unwrap() as u64, size - 10);
    assert_eq!(client.copy_file_range_64((node, fh, 10), target(0), u64::MAX).unwrap(), size - 10);
    let (source, copy) = (fs::read(backend.path("from")).unwrap(), fs::read(backend.path("to")).unwrap());
    assert!(source[10..] == copy);
    // A copy behind the file's own end stops where the file ended, and ranges that share bytes are refused.
    let within = |offset, len| client.copy_file_range_64((node, fh, 0), (node, fh, offset), len);
    assert_eq!(common::errno(within(PIECE, size)), libc::EINVAL);
    assert_eq!(common::errno(within(size - 1, u64::MAX)), libc::EINVAL);
    assert_eq!(within(size, u64::MAX).unwrap(), size);
    assert_eq!(fs::metadata(backend.path("from")).unwrap().len(), 2 * size);
    let twice = fs::read(backend.path("from")).unwrap();
    assert!(twice[..size as usize] == source && twice[size as usize..] == source);
    assert_eq!(client.copy_file_range_64((node, fh, 2 * size), target(0), u64::MAX).unwrap(), 0);
}

#[test]
fn operations_of_new_kernels() {
    let (_directory, backend, session) = common::on_disk(&["--tmpfile"]);
    let client = session.client();
    let (temporary, open) = client.tmpfile(ROOT, libc::O_RDWR, 0o640).unwrap();
    client.write(temporary.nodeid, open.fh, 0, b"kept").unwrap();
    assert_eq!(fs::read_dir(backend.share()).unwrap().count(), 0);
    client.link(temporary.nodeid, ROOT, "named").unwrap();
    assert_eq!(fs::read(backend.path("named")).unwrap(), b"kept");
    let (to, to_open) = client.create(ROOT, "copy", libc::O_RDWR, 0o644, 0).unwrap();
    let copied =
        client.copy_file_range_64((temporary.nodeid, open.fh, 0), (to.nodeid, to_open.fh, 0), 4).unwrap();
    assert_eq!(copied, 4);
    client.release(temporary.nodeid, open.fh).unwrap();
    client.release(to.nodeid, to_open.fh).unwrap();
    client.syncfs(ROOT).unwrap();
}

/// Linux' overlayfs would keep the dentry without a name for its upper file, and lose it.
#[test]
fn files_without_a_name_are_made_where_they_are_asked_for() {
    let (_directory, _backend, session) = common::on_disk(&[]);
    assert_eq!(common::errno(session.client().tmpfile(ROOT, libc::O_RDWR, 0o640)), libc::ENOSYS);
}

#[test]
fn statfs_is_the_hosts() {
    let (_directory, _backend, session) = common::on_disk(&[]);
    let stat = session.client().statfs(ROOT).unwrap();
    assert!(stat.blocks > 0 && stat.bfree <= stat.blocks && stat.bsize >= 512);
    assert_eq!(stat.namelen, 255);
}

#[test]
fn extended_attributes() {
    let (_directory, backend, session) = common::on_disk(&["--xattr"]);
    fs::write(backend.path("file"), "").unwrap();
    let client = session.client();
    let node = client.lookup(ROOT, "file").unwrap().nodeid;
    client.setxattr(node, "user.lane", b"one", 0).unwrap();
    assert_eq!(client.getxattr(node, "user.lane", 100).unwrap(), b"one");
    assert_eq!(client.getxattr_size(node, "user.lane").unwrap(), 3);
    assert_eq!(common::errno(client.getxattr(node, "user.lane", 2)), libc::ERANGE);
    assert_eq!(client.listxattr(node, 100).unwrap(), b"user.lane\0");
    assert_eq!(common::errno(client.setxattr(node, "user.lane", b"two", libc::XATTR_CREATE)), libc::EEXIST);
    client.setxattr(node, "user.lane", b"two", libc::XATTR_REPLACE).unwrap();
    assert_eq!(client.getxattr(node, "user.lane", 100).unwrap(), b"two");
    client.removexattr(node, "user.lane").unwrap();
    assert_eq!(common::errno(client.getxattr(node, "user.lane", 100)), libc::ENODATA);
    // On a directory and with an empty value.
    client.setxattr(ROOT, "user.empty", b"", 0).unwrap();
    assert_eq!(client.getxattr_size(ROOT, "user.empty").unwrap(), 0);
}

#[test]
fn extended_attributes_are_off_by_default() {
    let (_backend, session) = common::serve(&[]);
    assert_eq!(common::errno(session.client().getxattr(ROOT, "user.lane", 100)), libc::ENOSYS);
    assert_eq!(common::errno(session.client().setxattr(ROOT, "user.lane", b"x", 0)), libc::ENOSYS);
}

#[test]
fn what_virtio_fs_has_not_is_enosys() {
    let (_backend, session) = common::serve(&[]);
    for opcode in [Opcode::Poll, Opcode::Bmap] {
        let request = Request::new(opcode, ROOT).arg(&[0u8; 64]).reply_data(64);
        assert_eq!(common::errno(session.client().call_bytes(&request)), libc::ENOSYS, "{opcode:?}");
    }
}

#[test]
fn directories_are_listed_whole() {
    let (backend, session) = common::serve(&[]);
    let mut names: Vec<String> = (0..500).map(|i| format!("{i}-{}", "n".repeat(i % 240))).collect();
    for (i, name) in names.iter().enumerate() {
        match i % 3 {
            0 => fs::create_dir(backend.path(name)).unwrap(),
            1 => symlink("x", backend.path(name)).unwrap(),
            _ => fs::write(backend.path(name), "").unwrap(),
        }
    }
    names.sort();
    let client = session.client();
    for size in [400, 4096, 65_536] {
        let mut listed = client.list_names(ROOT, size).unwrap();
        listed.sort();
        assert_eq!(listed, names, "in pieces of {size} bytes");
    }
    let fh = client.opendir(ROOT).unwrap().fh;
    let (mut offset, mut seen) = (0, 0);
    loop {
        let entries = client.readdirplus(ROOT, fh, offset, 8192).unwrap();
        let Some(last) = entries.last() else { break };
        offset = last.offset;
        for entry in &entries {
            let name = String::from_utf8(entry.name.clone()).unwrap();
            if name == "." || name == ".." {
                continue;
            }
            let host = fs::symlink_metadata(backend.path(&name)).unwrap();
            assert_eq!((entry.ino, u32::from(entry.kind) << 12), (host.ino(), host.mode() & libc::S_IFMT));
            let plus = entry.entry.unwrap();
            if plus.nodeid != 0 {
                assert_eq!(plus.attr.ino, host.ino());
                assert_eq!(client.lookup(ROOT, &name).unwrap().nodeid, plus.nodeid);
                client.forget(plus.nodeid, 2).unwrap();
            }
            seen += 1;
        }
    }
    assert_eq!(seen, names.len());
    client.fsyncdir(ROOT, fh).unwrap();
    client.releasedir(ROOT, fh).unwrap();
}

#[test]
fn a_listing_is_right_while_entries_come_and_go() {
    let (_directory, backend, session) = common::on_disk(&[]);
    let stays: Vec<String> = (0..300).map(|i| format!("stays-{i}")).collect();
    for name in &stays {
        fs::write(backend.path(name), "").unwrap();
    }
    let client = session.client();
    let fh = client.opendir(ROOT).unwrap().fh;
    let (mut offset, mut seen, mut round) = (0, Vec::new(), 0);
    loop {
        let entries = client.readdir(ROOT, fh, offset, 600).unwrap();
        let Some(last) = entries.last() else { break };
        offset = last.offset;
        seen.extend(entries.iter().map(|entry| String::from_utf8_lossy(&entry.name).into_owned()));
        for i in 0..10 {
            fs::write(backend.path(&format!("comes-{round}-{i}")), "").unwrap();
            if round > 0 {
                fs::remove_file(backend.path(&format!("comes-{}-{i}", round - 1))).unwrap();
            }
        }
        round += 1;
        assert!(round < 2000, "the listing does not end");
    }
    for name in &stays {
        assert_eq!(seen.iter().filter(|&one| one == name).count(), 1, "{name}");
    }
    client.releasedir(ROOT, fh).unwrap();
}

#[test]
fn set_id_bits_go_as_posix_asks() {
    let (_directory, backend, session) = common::on_disk(&[]);
    let path = backend.path("tool");
    let client = session.client();
    let reset = || {
        fs::write(&path, "0123456789").unwrap();
        std::os::unix::fs::chown(&path, Some(1000), Some(1000)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o6777)).unwrap();
    };
    let bits = || fs::metadata(&path).unwrap().mode() & 0o6000;
    reset();
    let node = client.lookup(ROOT, "tool").unwrap().nodeid;
    let fh = client.open(node, libc::O_RDWR).unwrap().fh;
    // The guest knows who writes: with the flag the bits go, without it they stay.
    let kill = fuse_protocol::flags::WriteFlags::KILL_SUIDGID;
    client.user(1000, 1000).write_with(node, fh, 0, b"x", kill, libc::O_RDWR).unwrap();
    assert_eq!(bits(), 0);
    reset();
    client.write(node, fh, 0, b"x").unwrap();
    assert_eq!(bits(), 0o6000, "root may write and keep them");
    client.setattr(node, Change::none().size(3).kill_suidgid()).unwrap();
    assert_eq!(bits(), 0);
    reset();
    client.release(node, fh).unwrap();
    let fh = client.open_with(node, libc::O_RDWR | libc::O_TRUNC, 1).unwrap().fh;
    assert_eq!(bits(), 0);
    client.release(node, fh).unwrap();
    reset();
    client.setattr(node, Change::none().uid(1001)).unwrap();
    assert_eq!(bits(), 0);
}

#[test]
fn forgotten_inodes_are_gone() {
    let (backend, session) = common::serve(&[]);
    let client = session.client();
    let before = backend.descriptors().unwrap().len();
    let mut nodes = Vec::new();
    for i in 0..200 {
        fs::write(backend.path(&format!("f{i}")), "").unwrap();
        let node = client.lookup(ROOT, format!("f{i}")).unwrap().nodeid;
        assert_eq!(client.lookup(ROOT, format!("f{i}")).unwrap().nodeid, node);
        nodes.push(node);
    }
    // One of two lookups is forgotten: every node is still there.
    client.forget_batch(&nodes.iter().map(|&node| (node, 1)).collect::<Vec<_>>()).unwrap();
    for &node in &nodes {
        client.getattr(node).unwrap();
    }
    for &node in &nodes {
        client.forget(node, 1).unwrap();
    }
    for &node in &nodes {
        assert!(common::errno(client.getattr(node)) > 0, "node {node} outlived its last lookup");
    }
    assert!(backend.descriptors().unwrap().len() <= before);
    // The root cannot be forgotten.
    client.forget(ROOT, 1000).unwrap();
    client.getattr(ROOT).unwrap();
}

#[test]
fn read_only_share() {
    let (backend, session) = common::serve(&["--readonly"]);
    fs::write(backend.path("file"), "kept").unwrap();
    let client = session.client();
    let node = client.lookup(ROOT, "file").unwrap().nodeid;
    assert_eq!(client.read_file(node).unwrap(), b"kept");
    assert_eq!(common::errno(client.open(node, libc::O_RDWR)), libc::EROFS);
    assert_eq!(common::errno(client.create(ROOT, "new", libc::O_RDWR, 0o600, 0)), libc::EROFS);
    assert_eq!(common::errno(client.unlink(ROOT, "file")), libc::EROFS);
    assert_eq!(common::errno(client.setattr(node, Change::none().mode(0o600))), libc::EROFS);
}
