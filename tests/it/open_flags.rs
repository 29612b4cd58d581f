//! Direct or cached is decided per inode: the open flags of two openers never disagree.

use std::collections::HashMap;
use std::sync::Mutex;

use fuse_protocol::flags::{InitFlags, OpenReplyFlags};
use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::random::Random;
use lanefsd_frontend::{Client, Session, SessionOptions};

use crate::common;

const MODE: OpenReplyFlags = OpenReplyFlags::DIRECT_IO.union(OpenReplyFlags::PARALLEL_DIRECT_WRITES);

fn mode(open_flags: u32) -> OpenReplyFlags {
    OpenReplyFlags::from_bits_retain(open_flags) & MODE
}

/// Opens (and releases) and returns the flags that tell direct from cached.
fn open_once(client: &Client<'_>, node: u64, flags: i32) -> OpenReplyFlags {
    let open = client.open(node, flags).unwrap();
    client.release(node, open.fh).unwrap();
    mode(open.open_flags)
}

fn session(args: &[&str]) -> (lanefsd_frontend::Backend, Session) {
    common::serve_with(args, common::queues(4))
}

/// Flags that the daemon's process has an open file of this name open with.
fn host_flags(backend: &lanefsd_frontend::Backend, name: &str) -> Vec<i32> {
    let proc = backend.proc("");
    let mut found = Vec::new();
    for entry in proc.join("fd").read_dir().unwrap().flatten() {
        let is_it = std::fs::read_link(entry.path()).is_ok_and(|target| target.ends_with(name));
        let info = std::fs::read_to_string(proc.join("fdinfo").join(entry.file_name())).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
        let flags = i32::from_str_radix(flags, 8).unwrap();
        if is_it && flags & libc::O_PATH == 0 {
            found.push(flags);
        }
    }
    found
}

#[test]
fn noatime_is_passed_on_if_asked_for() {
    for (args, passed) in [(&[][..], 0), (&["--preserve-noatime"], libc::O_NOATIME)] {
        let (backend, session) = session(args);
        std::fs::write(backend.path("old"), "x").unwrap();
        let client = session.client();
        let node = client.lookup(ROOT, "old").unwrap().nodeid;
        client.open(node, libc::O_RDONLY | libc::O_NOATIME).unwrap();
        client.create(ROOT, "new", libc::O_RDWR | libc::O_NOATIME, 0o600, 0).unwrap();
        for name in ["old", "new"] {
            let flags = host_flags(&backend, name);
            assert_eq!(flags.len(), 1);
            assert_eq!(flags[0] & libc::O_NOATIME, passed, "{args:?} {name}");
        }
    }
}

#[test]
fn the_policy_decides_for_open_and_create() {
    let cases: [(&[&str], OpenReplyFlags, OpenReplyFlags); 6] = [
        // Options, flags of a plain opener, flags of an O_DIRECT opener; each is the first one.
        (&["--cache=auto"], OpenReplyFlags::empty(), MODE),
        (&["--cache=always"], OpenReplyFlags::empty(), MODE),
        (&["--cache=never"], MODE, MODE),
        (&["--cache=metadata"], MODE, MODE),
        (&["--cache=auto", "--parallel-direct-writes=always"], MODE, MODE),
        (
            &["--cache=never", "--parallel-direct-writes=never"],
            OpenReplyFlags::DIRECT_IO,
            OpenReplyFlags::DIRECT_IO,
        ),
    ];
    for (args, plain, direct) in cases {
        // O_DIRECT is refused by some file systems; the share is on disk.
        let directory = common::disk_directory();
        let backend =
            common::starter().args(args).args(["--allow-direct-io"]).share(directory.path()).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        let client = session.client();
        for (flags, want) in [(libc::O_RDWR, plain), (libc::O_RDWR | libc::O_DIRECT, direct)] {
            let (entry, open) = client.create(ROOT, format!("f{flags}"), flags, 0o600, 0).unwrap();
            assert_eq!(mode(open.open_flags), want, "CREATE with {flags:#o}, {args:?}");
            client.release(entry.nodeid, open.fh).unwrap();
            assert_eq!(open_once(&client, entry.nodeid, flags), want, "OPEN with {flags:#o}, {args:?}");
        }
        let dir = client.opendir(ROOT).unwrap();
        assert_eq!(mode(dir.open_flags), OpenReplyFlags::empty(), "a directory");
    }
}

/// The mode of a file whose first opener has O_DIRECT, and whether shared mappings were agreed on.
fn direct_opener(args: &[&str], minor: u32, init_flags: InitFlags) -> (OpenReplyFlags, bool) {
    let options = SessionOptions { minor, init_flags, ..SessionOptions::default() };
    let (_backend, session) = common::serve_with(args, options);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR | libc::O_DIRECT, 0o600, 0).unwrap();
    // Whoever comes later gets the same.
    assert_eq!(open_once(&client, entry.nodeid, libc::O_RDWR), mode(open.open_flags));
    (mode(open.open_flags), session.init_flags().contains(InitFlags::DIRECT_IO_ALLOW_MMAP))
}

#[test]
fn one_direct_opener_takes_shared_mappings_from_nobody() {
    let all = lanefsd_frontend::session::linux_init_flags();
    let cached = OpenReplyFlags::empty();
    for args in [&[][..], &["--cache=always"]] {
        // From Linux 6.9 on, a file can be parallel and mapped.
        assert_eq!(direct_opener(args, 45, all), (MODE, true), "{args:?}");
        assert_eq!(direct_opener(args, 40, all), (MODE, true), "{args:?}");
        // Before, or in a guest that does not want it, it stays in the cache.
        for minor in [31, 37, 39] {
            assert_eq!(direct_opener(args, minor, all), (cached, false), "{args:?} {minor}");
        }
        assert_eq!(direct_opener(args, 45, all - InitFlags::DIRECT_IO_ALLOW_MMAP), (cached, false));
    }
    // Who asks for parallel writes gets them, of any guest.
    for args in [&["--cache=never"][..], &["--cache=metadata"], &["--parallel-direct-writes=always"]] {
        assert_eq!(direct_opener(args, 37, all), (MODE, false), "{args:?}");
    }
    // Where no data is to be cached, mappings are for the user to ask for.
    assert_eq!(direct_opener(&["--cache=never"], 45, all), (MODE, false));
    assert_eq!(direct_opener(&["--cache=never", "--allow-mmap"], 45, all), (MODE, true));
}

#[test]
fn files_that_are_only_read_are_not_flushed_unless_locks_are_the_hosts() {
    for (args, skipped) in [(&[][..], true), (&["--cache=never"], true), (&["--posix-lock"], false)] {
        let (_backend, session) = session(args);
        let client = session.client();
        let (entry, created) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
        for (flags, skipped) in [(libc::O_RDONLY, skipped), (libc::O_WRONLY, false), (libc::O_RDWR, false)] {
            let open = client.open(entry.nodeid, flags).unwrap();
            let reply = OpenReplyFlags::from_bits_retain(open.open_flags);
            assert_eq!(reply.contains(OpenReplyFlags::NOFLUSH), skipped, "{args:?} {flags:#o}");
        }
        assert!(!OpenReplyFlags::from_bits_retain(created.open_flags).contains(OpenReplyFlags::NOFLUSH));
    }
}

#[test]
fn never_means_never() {
    let (_backend, session) = session(&["--parallel-direct-writes=never"]);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    assert!(!mode(open.open_flags).contains(OpenReplyFlags::PARALLEL_DIRECT_WRITES));
    let direct = open_once(&client, entry.nodeid, libc::O_RDWR | libc::O_DIRECT);
    assert!(!direct.contains(OpenReplyFlags::PARALLEL_DIRECT_WRITES));
}

#[test]
fn extending_writes_are_parallel_unless_turned_off() {
    for (args, allowed) in [(&[][..], true), (&["--no-parallel-extending"], false)] {
        let (_backend, session) = session(&[&["--cache=never"], args].concat());
        let client = session.client();
        let (_, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
        let flags = OpenReplyFlags::from_bits_retain(open.open_flags);
        assert_eq!(flags.contains(OpenReplyFlags::PARALLEL_EXTENDING_WRITES), allowed, "{args:?}");
        assert!(flags.contains(MODE), "{args:?}");
    }
}

#[test]
fn later_openers_follow_the_first_until_the_last_release() {
    let (_backend, session) = session(&["--cache=auto"]);
    let client = session.client();
    let (entry, first) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    let node = entry.nodeid;
    assert_eq!(mode(first.open_flags), OpenReplyFlags::empty());
    assert_eq!(open_once(&client, node, libc::O_RDWR | libc::O_DIRECT), OpenReplyFlags::empty());
    client.release(node, first.fh).unwrap();

    let direct = client.open(node, libc::O_RDWR | libc::O_DIRECT).unwrap();
    assert_eq!(mode(direct.open_flags), MODE);
    let plain = client.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(mode(plain.open_flags), MODE);
    client.release(node, direct.fh).unwrap();
    // The plain opener holds the file in direct mode.
    assert_eq!(open_once(&client, node, libc::O_RDWR), MODE);
    client.release(node, plain.fh).unwrap();
    assert_eq!(open_once(&client, node, libc::O_RDWR), OpenReplyFlags::empty());
    // Another name of the same inode is the same inode.
    let direct = client.open(node, libc::O_RDWR | libc::O_DIRECT).unwrap();
    client.link(node, ROOT, "alias").unwrap();
    let (alias, open) = client.create(ROOT, "alias", libc::O_RDWR, 0o600, 0).unwrap();
    assert_eq!((alias.nodeid, mode(open.open_flags)), (node, MODE));
    client.release(node, open.fh).unwrap();
    client.release(node, direct.fh).unwrap();
}

/// Files that are open, with their mode and the number of openers, as this guest knows it.
type Held = Mutex<HashMap<u64, (OpenReplyFlags, u32)>>;

#[test]
fn racing_open_and_create_agree() {
    for args in
        [&["--cache=auto"][..], &["--cache=never"], &["--cache=auto", "--parallel-direct-writes=always"]]
    {
        let (_backend, session) = session(args);
        let held: Held = Mutex::default();
        let disagreements = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for worker in 0..8 {
                let (session, held, disagreements) = (&session, &held, &disagreements);
                scope.spawn(move || {
                    let client = session.client().on(1 + worker % 4);
                    let mut random = Random::new(worker as u64);
                    for _ in 0..400 {
                        if let Some(problem) = open_and_hold(&client, held, &mut random) {
                            disagreements.lock().unwrap().push(problem);
                        }
                    }
                });
            }
        });
        let disagreements = disagreements.into_inner().unwrap();
        assert!(
            disagreements.is_empty(),
            "{args:?}: {} times, first {}",
            disagreements.len(),
            disagreements[0]
        );
    }
}

/// One opener: by OPEN or CREATE, with or without O_DIRECT; sometimes the name is removed first, so that
/// CREATE really makes a file.
fn open_and_hold(client: &Client<'_>, held: &Held, random: &mut Random) -> Option<String> {
    let name = format!("file-{}", random.below(2));
    let flags = libc::O_RDWR | if random.below(2) == 0 { libc::O_DIRECT } else { 0 };
    if random.below(10) == 0 {
        // Another thread may have been faster.
        let _ = client.unlink(ROOT, &name);
    }
    let (node, open) = if random.below(2) == 0 {
        let (entry, open) = client.create(ROOT, &name, flags, 0o600, 0).ok()?;
        (entry.nodeid, open)
    } else {
        let node = client.lookup(ROOT, &name).ok()?.nodeid;
        (node, client.open(node, flags).ok()?)
    };
    let mine = mode(open.open_flags);
    let mut problem = None;
    {
        let mut held = held.lock().unwrap();
        let (theirs, openers) = held.entry(node).or_insert((mine, 0));
        if *openers > 0 && *theirs != mine {
            problem = Some(format!("node {node} is open with {theirs:?} and was opened with {mine:?}"));
        }
        if *openers == 0 {
            *theirs = mine;
        }
        *openers += 1;
    }
    if random.below(3) == 0 {
        client.write(node, open.fh, 0, &[1; 512]).unwrap();
    }
    held.lock().unwrap().entry(node).and_modify(|(_, openers)| *openers -= 1);
    client.release(node, open.fh).unwrap();
    client.forget(node, 1).unwrap();
    problem
}
