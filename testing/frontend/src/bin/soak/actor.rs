//! A process in the guest that does one thing after the other with a file of its own and a stripe of a
//! file that all share, and knows what every answer has to be.

use std::collections::VecDeque;

use fuse_protocol::abi::{
    AccessIn, Attr, AttrOut, CreateIn, Dirent, EntryOut, FsyncIn, GetattrIn, MkdirIn, OpenIn, OpenOut,
    ReadIn, ReleaseIn, RenameIn, StatfsOut, WriteOut,
};
use fuse_protocol::flags::{InitFlags, WriteFlags};
use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::client::{Change, Client, Lock, data};
use lanefsd_frontend::queue::{Completion, Token};
use lanefsd_frontend::random::Random;
use lanefsd_frontend::request::{Reply, Request};
use lanefsd_frontend::{Errno, Segmentation};
use zerocopy::FromBytes;

use crate::Failure;

/// Bytes of the shared file that one actor owns.
pub const SHARED_STRIPE: usize = 64 << 10;
/// An actor's own file grows to at most this size.
const MOST: usize = 256 << 10;
/// Forgotten nodes that an actor remembers for the check at the end.
const REMEMBERED: usize = 100;

/// A part of the shared file.
pub struct Stripe {
    /// The shared file's node.
    pub node: u64,
    /// This queue's handle of it.
    pub fh: u64,
    /// Where the stripe begins.
    pub offset: u64,
    /// What is in it.
    pub content: Vec<u8>,
}

/// What an actor does next or waits for.
#[derive(Clone, Debug)]
enum Step {
    Create,
    Lookup,
    Getattr,
    Truncate(usize),
    Chmod(u32),
    Access,
    Statfs,
    Open,
    Write(usize, Vec<u8>),
    Read(usize, usize),
    Fsync,
    Release,
    Rename,
    Unlink,
    SharedWrite(usize, Vec<u8>),
    SharedRead(usize, usize),
    Mkdir,
    Rmdir,
    Symlink,
    Readlink(u64),
    RemoveSymlink,
    Opendir,
    List(u64, u64),
    Releasedir(u64),
    /// An owner takes a lock, another one does not get it, and the first one gives it back.
    Lock,
    TryLock,
    Unlock,
    Missing,
    BadHandle,
}

/// See the module.
pub struct Actor {
    home: u64,
    slot: String,
    generation: u64,
    exists: bool,
    node: u64,
    lookups: u64,
    handles: Vec<u64>,
    content: Vec<u8>,
    mode: u32,
    stripe: Stripe,
    random: Random,
    step: Step,
    next: VecDeque<Step>,
    /// Nodes that were forgotten to the last lookup, the latest ones.
    forgotten: VecDeque<u64>,
    /// How often the own name was seen in the listing under way.
    seen: usize,
    /// FSYNC may fail with EIO: a worker that dies with it may have taken an error of the disk along.
    pub tolerates_lost_fsync: bool,
}

impl Actor {
    /// An actor without a file yet; its names in directory `home` begin with `slot`.
    pub fn new(home: u64, slot: String, stripe: Stripe, random: Random) -> Actor {
        Actor {
            home,
            slot,
            generation: 0,
            exists: false,
            node: 0,
            lookups: 0,
            handles: Vec::new(),
            content: Vec::new(),
            mode: 0o600,
            stripe,
            random,
            step: Step::Create,
            next: VecDeque::new(),
            forgotten: VecDeque::new(),
            seen: 0,
            tolerates_lost_fsync: false,
        }
    }

    /// The name of the actor's file in its home.
    pub fn name(&self) -> String {
        format!("{}-{}", self.slot, self.generation)
    }

    /// What the file has to hold; `None` if there is none.
    pub fn content(&self) -> Option<&[u8]> {
        self.exists.then_some(&self.content)
    }

    /// The actor's part of the shared file.
    pub fn stripe(&self) -> &Stripe {
        &self.stripe
    }

    fn other_name(&self, kind: &str) -> String {
        format!("{}-{kind}", self.slot)
    }

    /// Sends the next request.
    pub fn send(&mut self, client: &Client<'_>) -> Result<Token, Failure> {
        self.step = match self.next.pop_front() {
            Some(step) => step,
            None => self.choose(client)?,
        };
        let segmentation = match self.random.below(8) {
            0 => Segmentation::Random(self.random.bits()),
            1 => Segmentation::One,
            2 => Segmentation::Contiguous,
            3 => Segmentation::Scattered,
            4 if self.random.below(16) == 0 => Segmentation::Bytes,
            _ => Segmentation::Linux,
        };
        let data = match &self.step {
            Step::Write(_, data) | Step::SharedWrite(_, data) => data.clone(),
            _ => Vec::new(),
        };
        let request = self.request(&data);
        Ok(client.segmentation(segmentation).send(request)?.token)
    }

    fn choose(&mut self, client: &Client<'_>) -> Result<Step, Failure> {
        if !self.exists {
            if !self.handles.is_empty() {
                return Ok(Step::Release);
            }
            self.forget(client, self.node, self.lookups)?;
            self.lookups = 0;
            self.generation += 1;
            return Ok(Step::Create);
        }
        if self.handles.is_empty() {
            return Ok(Step::Open);
        }
        if self.lookups > 20 {
            client.forget_later(self.node, 19)?;
            self.lookups -= 19;
        }
        Ok(match self.random.below(100) {
            0..10 => Step::Lookup,
            10..20 => Step::Getattr,
            20..23 => Step::Truncate(self.random.below(MOST)),
            23..25 => Step::Chmod(0o600 | self.random.below(0o100) as u32),
            25..28 => Step::Access,
            28 => Step::Statfs,
            29..33 if self.handles.len() < 4 => Step::Open,
            33..50 => self.random_write(),
            50..66 => Step::Read(self.random.below(MOST), 1 + self.random.below(40_000)),
            66 => Step::Fsync,
            67..71 => Step::Release,
            71..74 => Step::Rename,
            74 => Step::Unlink,
            75..82 => self.random_shared_write(),
            82..88 => {
                let at = self.random.below(SHARED_STRIPE - 1);
                Step::SharedRead(at, 1 + self.random.below(SHARED_STRIPE - at - 1))
            }
            88..91 => Step::Mkdir,
            91..94 => Step::Symlink,
            94 => Step::Opendir,
            95 => Step::BadHandle,
            96 if client.session().init_flags().contains(InitFlags::POSIX_LOCKS) => Step::Lock,
            _ => Step::Missing,
        })
    }

    fn random_write(&mut self) -> Step {
        let at = self.random.below(MOST - 40_000);
        let len = 1 + self.random.below([512, 4096, 40_000][self.random.clone().below(3)]);
        Step::Write(at, self.random.bytes(len))
    }

    fn random_shared_write(&mut self) -> Step {
        let at = self.random.below(SHARED_STRIPE - 1);
        let len = 1 + self.random.below((SHARED_STRIPE - at).min(9000) - 1);
        Step::SharedWrite(at, self.random.bytes(len))
    }

    fn request<'d>(&self, data: &'d [u8]) -> Request<'d> {
        let entry = |opcode, parent| Request::new(opcode, parent).reply::<EntryOut>();
        let handle = self.handles.first().copied().unwrap_or(0);
        let flags = libc::O_RDWR.cast_unsigned();
        match &self.step {
            Step::Create => {
                let arg = CreateIn { flags, mode: libc::S_IFREG | 0o600, umask: 0, open_flags: 0 };
                Request::new(Opcode::Create, self.home)
                    .arg(&arg)
                    .name(self.name())
                    .reply::<(EntryOut, OpenOut)>()
            }
            Step::Lookup => entry(Opcode::Lookup, self.home).name(self.name()),
            Step::Getattr => {
                Request::new(Opcode::Getattr, self.node).arg(&GetattrIn::default()).reply::<AttrOut>()
            }
            Step::Truncate(size) => self.setattr(Change::none().size(*size as u64).handle(handle)),
            Step::Chmod(mode) => self.setattr(Change::none().mode(*mode)),
            Step::Access => Request::new(Opcode::Access, self.node).arg(&AccessIn { mask: 4, padding: 0 }),
            Step::Statfs => Request::new(Opcode::Statfs, self.node).reply::<StatfsOut>(),
            Step::Open => {
                let arg = OpenIn { flags, open_flags: 0 };
                Request::new(Opcode::Open, self.node).arg(&arg).reply::<OpenOut>()
            }
            Step::Write(at, _) => {
                data::write_request(self.node, handle, *at as u64, data, WriteFlags::empty(), libc::O_RDWR)
            }
            Step::Read(at, len) => data::read_request(self.node, handle, *at as u64, *len),
            Step::Fsync => {
                Request::new(Opcode::Fsync, self.node).arg(&FsyncIn { fh: handle, ..FsyncIn::default() })
            }
            Step::Release => Request::new(Opcode::Release, self.node)
                .arg(&ReleaseIn { fh: handle, ..ReleaseIn::default() }),
            Step::Rename => Request::new(Opcode::Rename, self.home)
                .arg(&RenameIn { newdir: self.home })
                .name(self.name())
                .name(format!("{}-{}", self.slot, self.generation + 1)),
            Step::Unlink => Request::new(Opcode::Unlink, self.home).name(self.name()),
            Step::SharedWrite(at, _) => {
                let offset = self.stripe.offset + *at as u64;
                data::write_request(
                    self.stripe.node,
                    self.stripe.fh,
                    offset,
                    data,
                    WriteFlags::empty(),
                    libc::O_RDWR,
                )
            }
            Step::SharedRead(at, len) => {
                data::read_request(self.stripe.node, self.stripe.fh, self.stripe.offset + *at as u64, *len)
            }
            Step::Mkdir => entry(Opcode::Mkdir, self.home)
                .arg(&MkdirIn { mode: 0o755, umask: 0 })
                .name(self.other_name("dir")),
            Step::Rmdir => Request::new(Opcode::Rmdir, self.home).name(self.other_name("dir")),
            Step::Symlink => {
                entry(Opcode::Symlink, self.home).name(self.other_name("link")).name(self.name())
            }
            Step::Readlink(node) => Request::new(Opcode::Readlink, *node).reply_data(4096),
            Step::RemoveSymlink => Request::new(Opcode::Unlink, self.home).name(self.other_name("link")),
            Step::Opendir => {
                Request::new(Opcode::Opendir, self.home).arg(&OpenIn::default()).reply::<OpenOut>()
            }
            Step::List(fh, offset) => {
                let arg = ReadIn { fh: *fh, offset: *offset, size: 4096, ..ReadIn::default() };
                Request::new(Opcode::Readdir, self.home).arg(&arg).reply_data(4096)
            }
            Step::Releasedir(fh) => Request::new(Opcode::Releasedir, self.home)
                .arg(&ReleaseIn { fh: *fh, ..ReleaseIn::default() }),
            Step::Lock => self.lock(1, libc::F_WRLCK).set_request(self.node, handle),
            Step::TryLock => self.lock(2, libc::F_RDLCK).set_request(self.node, handle),
            Step::Unlock => self.lock(1, libc::F_UNLCK).set_request(self.node, handle),
            Step::Missing => entry(Opcode::Lookup, self.home).name("there is no such name"),
            Step::BadHandle => data::read_request(self.node, u64::MAX - 5, 0, 100),
        }
    }

    fn lock(&self, owner: u64, kind: i32) -> Lock {
        Lock::posix(owner, kind, 0, i64::MAX as u64)
    }

    fn setattr<'d>(&self, change: Change) -> Request<'d> {
        Request::new(Opcode::Setattr, self.node).arg(&change.0).reply::<AttrOut>()
    }

    /// Checks the answer and remembers what it changed.
    pub fn receive(&mut self, client: &Client<'_>, completion: &Completion) -> Result<(), Failure> {
        let reply = Reply::of(completion)?;
        let step = std::mem::replace(&mut self.step, Step::Statfs);
        let expected = match step {
            Step::Missing => Some(Errno(libc::ENOENT)),
            Step::BadHandle => Some(Errno(libc::EBADF)),
            Step::TryLock => Some(Errno(libc::EAGAIN)),
            Step::Fsync if self.tolerates_lost_fsync => reply.errno.filter(|errno| errno.0 == libc::EIO),
            _ => None,
        };
        if reply.errno != expected {
            return Err(self.wrong(&step, format!("{:?} instead of {expected:?}", reply.errno)));
        }
        if reply.errno.is_some() {
            return Ok(());
        }
        self.learn(client, step, &reply)
    }

    fn learn(&mut self, client: &Client<'_>, step: Step, reply: &Reply<'_>) -> Result<(), Failure> {
        match step {
            Step::Create => {
                let entry: EntryOut = reply.body()?;
                let open =
                    OpenOut::read_from_suffix(&reply.bytes()).map_err(|_| "CREATE's reply is short")?.1;
                (self.node, self.lookups, self.exists, self.mode) = (entry.nodeid, 1, true, 0o600);
                self.handles.push(open.fh);
                self.content.clear();
                self.check_attributes(&step, &entry.attr)?;
            }
            Step::Lookup => {
                let entry: EntryOut = reply.body()?;
                if entry.nodeid != self.node {
                    return Err(self.wrong(&step, format!("node {} instead of {}", entry.nodeid, self.node)));
                }
                self.lookups += 1;
                self.check_attributes(&step, &entry.attr)?;
            }
            Step::Getattr => self.check_attributes(&step, &reply.body::<AttrOut>()?.attr)?,
            Step::Truncate(size) => {
                self.content.resize(size, 0);
                self.check_attributes(&step, &reply.body::<AttrOut>()?.attr)?;
            }
            Step::Chmod(mode) => {
                self.mode = mode;
                self.check_attributes(&step, &reply.body::<AttrOut>()?.attr)?;
            }
            Step::Open => self.handles.push(reply.body::<OpenOut>()?.fh),
            Step::Write(at, ref data) => {
                self.check_written(&step, reply, data.len())?;
                self.content.resize(self.content.len().max(at + data.len()), 0);
                self.content[at..at + data.len()].copy_from_slice(data);
            }
            Step::Read(at, len) => {
                let end = (at + len).min(self.content.len());
                self.check_data(&step, reply, self.content.get(at..end).unwrap_or_default())?;
            }
            Step::SharedWrite(at, ref data) => {
                self.check_written(&step, reply, data.len())?;
                self.stripe.content[at..at + data.len()].copy_from_slice(data);
            }
            Step::SharedRead(at, len) => self.check_data(&step, reply, &self.stripe.content[at..at + len])?,
            Step::Release => drop(self.handles.remove(0)),
            Step::Rename => self.generation += 1,
            Step::Unlink => self.exists = false,
            Step::Mkdir => {
                self.forget(client, reply.body::<EntryOut>()?.nodeid, 1)?;
                self.next.push_back(Step::Rmdir);
            }
            Step::Symlink => {
                self.next.push_back(Step::Readlink(reply.body::<EntryOut>()?.nodeid));
                self.next.push_back(Step::RemoveSymlink);
            }
            Step::Readlink(node) => {
                self.check_data(&step, reply, self.name().as_bytes())?;
                self.forget(client, node, 1)?;
            }
            Step::Opendir => {
                self.seen = 0;
                self.next.push_back(Step::List(reply.body::<OpenOut>()?.fh, 0));
            }
            Step::List(fh, _) => self.learn_listing(&step, fh, &reply.bytes())?,
            Step::Access | Step::Statfs | Step::Fsync | Step::Rmdir | Step::RemoveSymlink => {}
            Step::Lock => self.next.extend([Step::TryLock, Step::Unlock]),
            Step::Releasedir(_) | Step::Unlock | Step::TryLock | Step::Missing | Step::BadHandle => {}
        }
        Ok(())
    }

    /// The own file is there from the listing's begin to its end, so it has to show up exactly once.
    fn learn_listing(&mut self, step: &Step, fh: u64, mut bytes: &[u8]) -> Result<(), Failure> {
        let name = self.name();
        let mut last = None;
        while let Ok((dirent, rest)) = Dirent::read_from_prefix(bytes) {
            let len = dirent.namelen as usize;
            self.seen += usize::from(rest.get(..len) == Some(name.as_bytes()));
            last = Some(dirent.off);
            bytes = bytes.get((size_of::<Dirent>() + len).next_multiple_of(8)..).unwrap_or_default();
        }
        match last {
            Some(offset) => self.next.push_back(Step::List(fh, offset)),
            None if self.seen != 1 => {
                return Err(self.wrong(step, format!("the own name was listed {} times", self.seen)));
            }
            None => self.next.push_back(Step::Releasedir(fh)),
        }
        Ok(())
    }

    fn check_attributes(&self, step: &Step, attr: &Attr) -> Result<(), Failure> {
        let want = (self.content.len() as u64, libc::S_IFREG | self.mode);
        if (attr.size, attr.mode) == want {
            return Ok(());
        }
        Err(self.wrong(step, format!("size and mode {:?} instead of {want:?}", (attr.size, attr.mode))))
    }

    fn check_written(&self, step: &Step, reply: &Reply<'_>, len: usize) -> Result<(), Failure> {
        match reply.body::<WriteOut>()?.size as usize {
            size if size == len => Ok(()),
            size => Err(self.wrong(step, format!("{size} of {len} bytes written"))),
        }
    }

    fn check_data(&self, step: &Step, reply: &Reply<'_>, want: &[u8]) -> Result<(), Failure> {
        let got = reply.bytes();
        if got == want {
            return Ok(());
        }
        let at = got.iter().zip(want).position(|(a, b)| a != b).unwrap_or(got.len().min(want.len()));
        Err(self
            .wrong(step, format!("{} bytes instead of {}, different from byte {at}", got.len(), want.len())))
    }

    fn wrong(&self, step: &Step, problem: String) -> Failure {
        let step = match step {
            Step::Write(at, data) => format!("Write of {} bytes at {at}", data.len()),
            Step::SharedWrite(at, data) => format!("SharedWrite of {} bytes at {at}", data.len()),
            other => format!("{other:?}"),
        };
        format!("{}: {step}: {problem}", self.name()).into()
    }

    /// Forgets a node to the last lookup.
    fn forget(&mut self, client: &Client<'_>, node: u64, lookups: u64) -> Result<(), Failure> {
        if lookups > 0 {
            client.forget_later(node, lookups)?;
            self.forgotten.push_back(node);
            if self.forgotten.len() > REMEMBERED {
                self.forgotten.pop_front();
            }
        }
        Ok(())
    }

    /// Nodes that the back end must not know any more once the run is over.
    pub fn forgotten(&self) -> impl Iterator<Item = u64> {
        self.forgotten.iter().copied()
    }

    /// Ends what is open, closes everything and forgets everything.
    pub fn finish(&mut self, client: &Client<'_>) -> Result<(), Failure> {
        while let Some(step) = self.next.pop_front() {
            self.next.push_front(step);
            let token = self.send(client)?;
            let completion = client.queue().wait(token)?;
            self.receive(client, &completion)?;
        }
        for fh in self.handles.drain(..) {
            client.release(self.node, fh)?;
        }
        self.forget(client, self.node, self.lookups)
    }
}
