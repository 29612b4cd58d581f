//! One run of a scenario: a daemon, a session, and the moment at which the worker dies.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fuse_protocol::abi::EntryOut;
use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::message::feature;
use lanefsd_frontend::ring::Part;
use lanefsd_frontend::{Backend, Client, Session, SessionOptions};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// When the worker dies with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// It lives.
    Never,
    /// Before the system calls.
    Before,
    /// After them, and before the journal says that the request is done.
    After,
    /// After the journal, and before the used entry.
    Unpublished,
    /// After the used entry, and before the notification.
    Unnotified,
    /// After the system calls, where it hangs: an upgrade cuts it off.
    CutOff,
}

const MOMENTS: [Moment; 6] =
    [Moment::Never, Moment::Before, Moment::After, Moment::Unpublished, Moment::Unnotified, Moment::CutOff];

/// How long a worker has for its death, and the front end for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A daemon, and a guest in session with it.
pub struct Trial {
    pub moment: Moment,
    pub backend: Backend,
    pub session: Session,
    /// Lookups that the guest has counted.
    lookups: RefCell<BTreeMap<u64, u64>>,
    descriptors: usize,
    worker: u32,
    armed: Cell<bool>,
    share: TempDir,
}

/// Runs a scenario at each moment; all that fail are told together.
pub fn at_each_moment(args: &[&str], scenario: impl Fn(&Trial)) {
    at_moments(&MOMENTS, args, scenario);
}

/// The same at some moments.
pub fn at_moments(moments: &[Moment], args: &[&str], scenario: impl Fn(&Trial)) {
    let chosen = std::env::var("LANEFSD_TEST_MOMENT").ok();
    let mut failed = Vec::new();
    for &moment in moments {
        if chosen.as_ref().is_some_and(|chosen| *chosen != format!("{moment:?}")) {
            continue;
        }
        let run = || {
            let trial = Trial::start(moment, args, &[]);
            scenario(&trial);
            trial.end();
        };
        if catch_unwind(AssertUnwindSafe(run)).is_err() {
            failed.push(moment);
        }
    }
    assert!(failed.is_empty(), "the scenario failed at {failed:?}");
}

impl Trial {
    /// Starts a daemon with these options and variables, and a session.
    pub fn start(moment: Moment, args: &[&str], variables: &[(&str, &str)]) -> Trial {
        let share = tempfile::Builder::new()
            .prefix("survival-")
            .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
            .expect("a directory below target/");
        let further = std::env::var("LANEFSD_TEST_ARGS").unwrap_or_default();
        let mut starter = Backend::of(env!("CARGO_BIN_EXE_lanefsd-dying"))
            .args(["--xattr", "--posix-lock", "--flock", "--cache=never"])
            .args(args)
            .args(further.split_whitespace())
            .share(share.path());
        for (name, value) in variables {
            starter = starter.env(name, value);
        }
        let backend = starter.start().expect("the back end starts");
        let mut options =
            SessionOptions { timeout: PATIENCE, hideable_rings: true, ..SessionOptions::default() };
        if moment == Moment::Unpublished {
            // The device writes its event index behind the used entries.
            options.features &= !feature::EVENT_IDX;
        }
        let session = backend.connect(options).expect("the front end connects");
        let descriptors = backend.descriptors().expect("the back end runs").len();
        let worker = worker_of(&backend);
        Trial {
            moment,
            backend,
            session,
            lookups: RefCell::default(),
            descriptors,
            worker,
            armed: Cell::new(false),
            share,
        }
    }

    /// The guest.
    pub fn client(&self) -> Client<'_> {
        self.session.client()
    }

    /// A path of the host in the share.
    pub fn path(&self, name: &str) -> PathBuf {
        self.share.path().join(name)
    }

    /// The share.
    pub fn share(&self) -> &Path {
        self.share.path()
    }

    /// The worker dies with the next request, which is this operation.
    pub fn die(&self, operation: &str) {
        self.die_at(operation, 1);
    }

    /// The worker dies with the next request, if the moment is outside of the file system; otherwise at the call with
    /// this number of the operation, from 1 on.
    pub fn die_at(&self, operation: &str, call: u32) {
        self.armed.set(self.moment != Moment::Never);
        match self.moment {
            Moment::Never => {}
            Moment::Before => self.arm(&format!("before:{operation}:{call}")),
            Moment::After => self.arm(&format!("after:{operation}:{call}")),
            Moment::Unpublished => self.hide(Part::UsedEntries),
            Moment::Unnotified => self.hide(Part::UsedEvent),
            Moment::CutOff => {
                self.arm(&format!("hang:{operation}:{call}"));
                self.upgrade_when_it_hangs();
            }
        }
    }

    /// Arms a fail point of the daemon at which the worker will die.
    pub fn die_whenever(&self, text: &str) {
        self.armed.set(true);
        self.arm(text);
    }

    /// Arms a fail point of the daemon.
    fn arm(&self, text: &str) {
        let answer = self.client().lookup(ROOT, format!("!die:{text}"));
        assert_eq!(errno(answer), libc::ENOENT);
    }

    /// The worker gets SIGBUS as it touches this part of a ring. The parent is stopped until the part is back.
    fn hide(&self, part: Part) {
        let (parent, worker) = (self.backend.pid(), self.worker());
        assert_ne!(parent, worker, "the daemon has no worker that could die");
        self.backend.signal(libc::SIGSTOP).expect("the parent is there");
        for queue in self.session.queues() {
            queue.with_ring(|ring| ring.hide(part)).expect("memory can be cut");
        }
        self.session.after_next_send(move |session| {
            let deadline = Instant::now() + PATIENCE;
            while !is_dead(worker) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            let died = is_dead(worker);
            for queue in session.queues() {
                queue.with_ring(|ring| ring.show()).expect("memory can be restored");
            }
            // SAFETY: a plain system call; the parent was not reaped.
            #[allow(unsafe_code)]
            let resumed = unsafe { libc::kill(parent.cast_signed(), libc::SIGCONT) };
            assert_eq!(resumed, 0, "the parent is gone");
            assert!(died, "the worker lives on without its used ring");
        });
    }

    /// The daemon is upgraded as soon as the next request hangs.
    fn upgrade_when_it_hangs(&self) {
        let daemon = self.backend.pid();
        self.session.after_next_send(move |_| {
            let deadline = Instant::now() + PATIENCE;
            let log = format!("/proc/{daemon}/fd/2");
            let hangs = || fs::read_to_string(&log).is_ok_and(|text| text.contains("a thread hangs"));
            while !hangs() {
                assert!(Instant::now() < deadline, "the request does not come to its fail point");
                std::thread::sleep(Duration::from_millis(1));
            }
            let daemon = Pid::from_raw(daemon.cast_signed()).expect("a process id");
            kill_process(daemon, Signal::HUP).expect("the daemon runs");
        });
    }

    /// The guest has got this entry: counts the lookup, and returns the node.
    pub fn saw(&self, entry: EntryOut) -> u64 {
        *self.lookups.borrow_mut().entry(entry.nodeid).or_default() += 1;
        entry.nodeid
    }

    /// The guest forgets a node by itself.
    pub fn forgets(&self, node: u64, lookups: u64) {
        let mut known = self.lookups.borrow_mut();
        let count = known.get_mut(&node).expect("a node that the guest has");
        *count -= lookups;
        if *count == 0 {
            known.remove(&node);
        }
    }

    /// Lookups of a node that the guest has counted.
    pub fn lookups(&self, node: u64) -> u64 {
        self.lookups.borrow().get(&node).copied().unwrap_or(0)
    }

    /// The session has ended: the guest knows nothing any more.
    pub fn forgets_all(&self) {
        self.lookups.borrow_mut().clear();
    }

    /// The process that serves now.
    pub fn worker(&self) -> u32 {
        worker_of(&self.backend)
    }

    /// Kills the worker from outside.
    pub fn kill_worker(&self) {
        let worker = Pid::from_raw(self.worker().cast_signed()).expect("a process id");
        kill_process(worker, Signal::KILL).expect("the worker runs");
    }

    /// Looks a name in the root up, and counts that.
    pub fn look(&self, name: &str) -> u64 {
        self.saw(self.client().lookup(ROOT, name).expect("the name is there"))
    }

    /// A file that the guest has created, with this content: its node and an open handle.
    pub fn file(&self, name: &str, content: &[u8]) -> (u64, u64) {
        let client = self.client();
        let (entry, open) = client.create(ROOT, name, libc::O_RDWR, 0o644, 0).expect("the file is created");
        let node = self.saw(entry);
        if !content.is_empty() {
            assert_eq!(client.write(node, open.fh, 0, content).expect("the file is written"), content.len());
        }
        (node, open.fh)
    }

    /// Checks that the worker has died where it had to, and that nothing is left of it: each inode has as many
    /// lookups as the guest has counted, and no descriptor is open that was not at the beginning. The scenario has
    /// released its handles.
    pub fn end(mut self) {
        let deadline = Instant::now() + PATIENCE;
        // An answer that was published before a death may be here before the worker has ended.
        while self.armed.get() && !is_dead(self.worker) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        let died = is_dead(self.worker);
        assert_eq!(died, self.armed.get(), "the worker {}", if died { "died" } else { "lives" });
        let client = self.client();
        for (node, lookups) in self.lookups.take() {
            if lookups > 1 {
                client.forget(node, lookups - 1).expect("FORGET is taken");
            }
            client.getattr(node).unwrap_or_else(|error| panic!("node {node} has too few lookups: {error}"));
            client.forget(node, 1).expect("FORGET is taken");
            let known = client.getattr(node);
            assert!(known.is_err(), "node {node} was forgotten {lookups} times and has lookups left");
        }
        self.expect_few_descriptors();
        drop(self.session);
        self.backend.expect_success().expect("a clean end");
    }

    fn expect_few_descriptors(&self) {
        let deadline = Instant::now() + Duration::from_secs(3);
        loop {
            let now = self.backend.descriptors().expect("the back end runs");
            if now.len() <= self.descriptors {
                return;
            }
            assert!(Instant::now() < deadline, "{} descriptors at first, now {now:?}", self.descriptors);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The child of a daemon, which serves; itself if it has none. A worker may have died, and its successor not begun.
fn worker_of(backend: &Backend) -> u32 {
    backend.worker().unwrap_or(backend.pid())
}

/// Whether a process has ended, though its parent may not know yet.
fn is_dead(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
    state.is_none_or(|state| matches!(state, 'Z' | 'X'))
}

/// The errno of a request that has to be refused.
pub fn errno<T: std::fmt::Debug>(result: lanefsd_frontend::Result<T>) -> i32 {
    match result {
        Ok(value) => panic!("the request was to be refused, but gave {value:?}"),
        Err(error) => error.errno().unwrap_or_else(|| panic!("the request failed otherwise: {error}")).0,
    }
}
