//! Many callers at once, on all workers of two queues: what one creates is never another's, and
//! no worker keeps anything of whom it served.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use fuse_protocol::flags::WriteFlags;
use lanefsd_frontend::client::{Change, ROOT};
use lanefsd_frontend::random::Random;
use lanefsd_frontend::{Backend, Caller, Client, Session};
use rustix::fs::{XattrFlags, setxattr};

use crate::common;

/// The group that directory `team` belongs to.
const TEAM: u32 = 777;
/// The user who must not be used.
const FORBIDDEN: u32 = 4000;
/// rwx for owner and group, nothing for others.
const ACL: [u8; 28] = [
    2, 0, 0, 0, //
    1, 0, 7, 0, 255, 255, 255, 255, //
    4, 0, 7, 0, 255, 255, 255, 255, //
    32, 0, 0, 0, 255, 255, 255, 255,
];

/// How the daemon runs, and what that does to ids and modes.
struct TestConfig {
    args: &'static [&'static str],
    /// What the host's ids are higher by.
    shift: u32,
    /// A default ACL sets umasks aside.
    acls: bool,
}

const CONFIGS: [TestConfig; 3] = [
    TestConfig { args: &["--translate-uid=forbid-guest:4000:1"], shift: 0, acls: false },
    TestConfig { args: &["--translate-uid=forbid-guest:4000:1", "--posix-acl"], shift: 0, acls: true },
    TestConfig {
        args: &[
            "--sandbox=namespace",
            "--posix-acl",
            "--translate-uid=forbid-guest:4000:1",
            "--translate-uid=map:0:100000:4000",
            "--translate-gid=map:0:100000:4000",
        ],
        shift: 100_000,
        acls: true,
    },
];

/// Ids, groups, capabilities and umask of each thread that serves, with the number of such threads.
fn thread_states(backend: &Backend) -> BTreeMap<String, usize> {
    let mut states = BTreeMap::new();
    for task in fs::read_dir(backend.proc("task")).unwrap().flatten() {
        // A worker that was not needed any more may have gone.
        let Ok(status) = fs::read_to_string(task.path().join("status")) else { continue };
        let told = ["Umask:", "Uid:", "Gid:", "Groups:", "CapPrm:", "CapEff:", "CapInh:", "CapBnd:"];
        let lines: Vec<_> = status
            .lines()
            .filter(|line| told.iter().any(|name| line.starts_with(name)))
            .map(without_fsetid)
            .collect();
        *states.entry(lines.join("\n")).or_default() += 1;
    }
    states
}

/// A worker has CAP_FSETID or not as its last request needed it; nothing else may stay.
fn without_fsetid(line: &str) -> String {
    const FSETID: u64 = 1 << 4;
    match line.strip_prefix("CapEff:\t") {
        Some(sets) => format!("CapEff: {:x}", u64::from_str_radix(sets, 16).unwrap() & !FSETID),
        None => line.to_owned(),
    }
}

/// The directories of the share, as the guest knows them.
#[derive(Clone, Copy)]
struct Directories {
    open: u64,
    team: u64,
    acl: u64,
}

fn set_up(backend: &Backend, config: &TestConfig, client: &Client<'_>) -> Directories {
    let node = |name: &str, mode: u32, gid: u32| {
        let path = backend.path(name);
        fs::create_dir(&path).unwrap();
        chown(&path, Some(config.shift), Some(gid + config.shift)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        client.lookup(ROOT, name).unwrap().nodeid
    };
    let directories = Directories {
        open: node("open", 0o777, 0),
        team: node("team", 0o2770, TEAM),
        acl: node("acl", 0o777, 0),
    };
    setxattr(backend.path("acl"), "system.posix_acl_default", &ACL, XattrFlags::empty()).unwrap();
    directories
}

fn any_caller(random: &mut Random) -> Caller {
    let uid = [0, 1, 1000, 1001, 2000 + random.below(100) as u32][random.below(5)];
    let gid = [0, 5, 1000, 3000 + random.below(100) as u32][random.below(4)];
    let group = [None, Some(TEAM), Some(88)][random.below(3)];
    Caller { uid, gid, pid: 1, group }
}

/// Creates something of a random kind and returns whether it went well.
fn create(
    client: &Client<'_>,
    parent: u64,
    name: &str,
    kind: usize,
    mode: u32,
    umask: u32,
) -> Result<(), i32> {
    let result = match kind {
        0 => client.mkdir(parent, name, mode, umask).map(drop_value),
        1 => client.mknod(parent, name, libc::S_IFREG | mode, 0, umask).map(drop_value),
        2 => client.symlink(parent, name, "x").map(drop_value),
        3 => client
            .create(parent, name, libc::O_RDWR, mode, umask)
            .and_then(|(entry, open)| client.release(entry.nodeid, open.fh)),
        _ => client.tmpfile_with(parent, libc::O_RDWR, mode, umask).and_then(|(entry, open)| {
            client.link(entry.nodeid, parent, name)?;
            client.release(entry.nodeid, open.fh)
        }),
    };
    result.map_err(|error| error.errno().unwrap().0)
}

fn drop_value<T>(_value: T) {}

/// One creation that has to go well, looked at on the host.
fn create_and_check(
    config: &TestConfig,
    backend: &Backend,
    client: &Client<'_>,
    (directory, node): (&str, u64),
    random: &mut Random,
    name: &str,
) {
    let caller = any_caller(random);
    let (mode, umask) = (random.below(0o1000) as u32, random.below(0o1000) as u32);
    let kind = random.below(5);
    let result = create(&client.caller(caller), node, name, kind, mode, umask);
    let what = format!("{directory}/{name} of kind {kind}, {mode:o} with umask {umask:o}, by {caller:?}");
    // Whether the caller may is for the guest's kernel to say.
    assert_eq!(result, Ok(()), "{what}");
    let host = fs::symlink_metadata(backend.path(directory).join(name)).unwrap();
    let gid = if directory == "team" { TEAM } else { caller.gid };
    assert_eq!((host.uid(), host.gid()), (caller.uid + config.shift, gid + config.shift), "{what}");
    let expected = match (kind, directory) {
        (2, _) => 0o777,
        (_, "acl") if config.acls => mode & 0o770,
        (_, "acl") => mode & !umask & 0o770,
        (0, "team") => mode & !umask | 0o2000,
        _ => mode & !umask,
    };
    assert_eq!(host.mode() & 0o7777, expected, "{what}");
}

/// One request that has to fail, at a different step of its service each.
fn fail(client: &Client<'_>, directories: Directories, random: &mut Random) {
    let client = client.caller(Caller { uid: 1000, gid: 1000, pid: 1, group: Some(88) });
    let (mode, umask) = (0o777, random.below(0o1000) as u32);
    let kind = random.below(5);
    let long = "n".repeat(256);
    let (expected, got) = match random.below(5) {
        0 => (libc::EPERM, create(&client.user(FORBIDDEN, 1000), directories.open, "x", kind, mode, umask)),
        1 => (libc::EINVAL, create(&client.user(1000, u32::MAX), directories.open, "x", kind, mode, umask)),
        2 => (libc::ESTALE, create(&client, 1 << 40, "x", kind, mode, umask)),
        3 => (libc::EEXIST, create(&client, ROOT, "open", kind % 3, mode, umask)),
        _ => (libc::ENAMETOOLONG, create(&client, directories.open, &long, kind % 4, mode, umask)),
    };
    assert_eq!(got, Err(expected), "kind {kind}");
}

/// A request that takes a capability off its worker for a while.
fn clear_set_id_bits(client: &Client<'_>, backend: &Backend, node: u64, name: &str) {
    let root = client.caller(Caller::default());
    let (entry, open) = root.create(node, name, libc::O_RDWR, 0o666, 0).unwrap();
    for flags in [WriteFlags::KILL_SUIDGID, WriteFlags::empty()] {
        root.setattr(entry.nodeid, Change::none().mode(0o6777)).unwrap();
        root.write_with(entry.nodeid, open.fh, 0, b"x", flags, libc::O_RDWR).unwrap();
        let left = fs::metadata(backend.path("open").join(name)).unwrap().mode() & 0o6000;
        assert_eq!(left, if flags.is_empty() { 0o6000 } else { 0 });
    }
    root.release(entry.nodeid, open.fh).unwrap();
}

fn work(config: &TestConfig, backend: &Backend, session: &Session, directories: Directories, thread: u64) {
    let mut random = Random::new(thread);
    let client = session.client().on(1 + thread as usize % 2);
    for round in 0..120 {
        let name = format!("{thread}-{round}");
        let (directory, node) =
            [("open", directories.open), ("team", directories.team), ("acl", directories.acl)]
                [random.below(3)];
        match random.below(4) {
            0 => fail(&client, directories, &mut random),
            1 => clear_set_id_bits(&client, backend, directories.open, &name),
            _ => create_and_check(config, backend, &client, (directory, node), &mut random, &name),
        }
    }
}

#[test]
fn callers_never_get_mixed_up() {
    for config in &CONFIGS {
        let directory = common::disk_directory();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let backend = common::starter()
            .args(config.args)
            .args(["--thread-pool-size=8", "--tmpfile"])
            .share(directory.path())
            .start()
            .unwrap();
        let options = common::queues(2);
        let session = backend.connect(options).unwrap();
        session.client().getattr(ROOT).unwrap();
        let before = thread_states(&backend);
        assert_eq!(before.len(), 1, "all threads begin alike: {before:#?}");
        let directories = set_up(&backend, config, &session.client());
        std::thread::scope(|scope| {
            for thread in 0..16 {
                let (backend, session) = (&backend, &session);
                scope.spawn(move || work(config, backend, session, directories, thread));
            }
        });
        let after = thread_states(&backend);
        assert_eq!(
            after.keys().collect::<Vec<_>>(),
            before.keys().collect::<Vec<_>>(),
            "a thread kept something"
        );
        let workers = after.values().sum::<usize>() - before.values().sum::<usize>();
        assert!(workers >= 2, "only {workers} workers joined those that were there at the start: {before:?}");
    }
}
