//! `loadgen limit`: the same work as plain system calls, by as many threads as operations would be in
//! flight. What no back end can beat on this host, save by overlapping better than the host's
//! scheduler does.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use lanefsd_frontend::memory::{Memory, PAGE};
use lanefsd_frontend::random::Random;
use rustix::fs::{AtFlags, Mode, OFlags, RawDir, StatxFlags, openat, statx, unlinkat};
use rustix::process::{Resource, Rlimit};

use crate::error::{LoadError, Result};
use crate::layout::{self, entry_name};
use crate::options::{LimitOptions, Op, Segments, Work};
use crate::process::Usage;
use crate::report::Report;
use crate::syscalls;
use crate::tally::{Coordinator, Phase, Tally};

/// More threads than this gain nothing on any host that this is for.
const MOST_THREADS: usize = 64;
/// Bytes of a small file.
const SMALL_FILE: usize = 4096;

/// Measures the host.
pub fn limit(options: &LimitOptions) -> Result<Report> {
    let work = &options.work;
    work.check()?;
    layout::prepare(&options.share, work)?;
    let threads = work.in_flight().min(MOST_THREADS);
    let paths = Arc::new(paths(&options.share, work)?);
    let buffers = (0..threads).map(|_| Iovecs::new(work)).collect::<Result<Vec<_>>>()?;
    let buffers = Arc::new(buffers);
    let worker = |number| Worker::new(&options.share, work, &paths, &buffers, number);
    let workers = (0..threads).map(worker);
    let workers = workers.collect::<Result<Vec<_>>>()?;
    let coordinator = Coordinator::default();
    thread::scope(|scope| {
        let handles: Vec<_> =
            workers.into_iter().map(|worker| scope.spawn(|| worker.run(&coordinator))).collect();
        thread::sleep(work.warmup());
        let own = std::process::id();
        let (before, begin) = (Usage::of(own), Instant::now());
        coordinator.begin(Phase::Measure);
        thread::sleep(work.time());
        coordinator.begin(Phase::After);
        let wall = begin.elapsed();
        let spent = Usage::of(own).since(&before);
        let calls = work.syscalls.then(|| syscalls::per_operation(own, &coordinator));
        coordinator.begin(Phase::Stop);
        let mut tally = Tally::default();
        for handle in handles {
            let died = |_| LoadError::Options("a thread of the limit panicked".into());
            tally.add(&handle.join().map_err(died)??);
        }
        let mut report = Report::new(work, wall, &tally, &spent);
        (report.notifications_per_operation, report.kicks_per_operation) = (None, None);
        report.threads = Some(threads);
        report.system_calls(calls);
        Ok(report)
    })
}

/// One thread, and what it works on.
struct Worker {
    op: Op,
    work: Work,
    data: Option<File>,
    directory: OwnedFd,
    /// O_PATH descriptors of the many files, as a back end holds them.
    paths: Arc<Vec<OwnedFd>>,
    names: Vec<String>,
    own_name: String,
    /// Buffers of all threads, which take turns with them: as many bytes are touched as by requests in
    /// flight, whichever threads happen to run.
    buffers: Arc<Vec<Iovecs>>,
    turn: usize,
    blocks: usize,
    random: Random,
}

/// Buffers in memory like a guest's.
struct Iovecs {
    list: Vec<libc::iovec>,
    _memory: Arc<Memory>,
}

// SAFETY: the vectors point into the mapping that is kept beside them. They are only handed to the
// kernel, and what the bytes are does not matter to anybody.
unsafe impl Send for Iovecs {}
// SAFETY: as above.
unsafe impl Sync for Iovecs {}

/// O_PATH descriptors of the many files if the operation needs them.
fn paths(share: &Path, work: &Work) -> Result<Vec<OwnedFd>> {
    if work.op != Op::Getattr {
        return Ok(Vec::new());
    }
    // A thousand descriptors are the usual soft limit.
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let most = Rlimit { current: limit.maximum, maximum: limit.maximum };
    rustix::process::setrlimit(Resource::Nofile, most).map_err(LoadError::system("raise RLIMIT_NOFILE"))?;
    let dir = share.join(layout::many(work.entries));
    (0..work.entries).map(|index| open(&dir.join(entry_name(index)), OFlags::PATH)).collect()
}

fn open(path: &Path, flags: OFlags) -> Result<OwnedFd> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
        .map_err(LoadError::system(format!("open {}", path.display())))
}

impl Worker {
    fn new(
        share: &Path,
        work: &Work,
        paths: &Arc<Vec<OwnedFd>>,
        buffers: &Arc<Vec<Iovecs>>,
        number: usize,
    ) -> Result<Worker> {
        let dir = share.join(if matches!(work.op, Op::Create | Op::Small) {
            layout::CHURN.to_string()
        } else {
            layout::many(work.entries)
        });
        let directory = open(&dir, OFlags::PATH | OFlags::DIRECTORY)?;
        let names: Vec<String> = (0..work.entries).map(entry_name).collect();
        let data = match work.op {
            Op::Read | Op::Write => {
                let flags = OFlags::RDWR | if work.direct { OFlags::DIRECT } else { OFlags::empty() };
                Some(File::from(open(&share.join(layout::data(number % usize::from(work.files))), flags)?))
            }
            _ => None,
        };
        let blocks = work.bytes_of_file() / work.block as u64;
        Ok(Worker {
            op: work.op,
            work: work.clone(),
            data,
            directory,
            paths: Arc::clone(paths),
            names,
            own_name: format!("l{number:08}"),
            buffers: Arc::clone(buffers),
            turn: number,
            blocks: usize::try_from(blocks).unwrap_or(usize::MAX),
            random: Random::new(number as u64 + 1),
        })
    }

    fn run(mut self, coordinator: &Coordinator) -> Result<Tally> {
        let mut tally = Tally::default();
        let mut phase = Phase::Warmup;
        let mut begin = Instant::now();
        while phase != Phase::Stop {
            let now_phase = coordinator.phase();
            self.once().map_err(LoadError::system(self.op.name()))?;
            let end = Instant::now();
            if phase == Phase::Measure && now_phase == Phase::Measure {
                tally.finished(end - begin);
                tally.requests += 1;
            } else if now_phase == Phase::After {
                coordinator.finished(1);
            }
            (phase, begin) = (now_phase, end);
        }
        Ok(tally)
    }

    fn once(&mut self) -> std::io::Result<()> {
        match self.op {
            Op::Read | Op::Write => {
                let block = self.random.below(self.blocks.max(1)) as u64;
                self.turn = (self.turn + 1) % self.buffers.len();
                self.transfer(block * self.work.block as u64)
            }
            Op::Getattr => {
                let path = &self.paths[self.random.below(self.paths.len())];
                statx(path, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
                Ok(())
            }
            Op::Lookup => {
                let name = &self.names[self.random.below(self.names.len())];
                statx(&self.directory, name.as_str(), AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)?;
                Ok(())
            }
            Op::Create => {
                let file = self.create()?;
                drop(file);
                Ok(unlinkat(&self.directory, &self.own_name, AtFlags::empty())?)
            }
            Op::List => self.list(),
            Op::Small => self.small(),
        }
    }

    fn create(&self) -> std::io::Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = openat(&self.directory, &self.own_name, flags, Mode::from_raw_mode(0o644))?;
        statx(&file, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
        Ok(file)
    }

    fn transfer(&self, offset: u64) -> std::io::Result<()> {
        let fd = self.data.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let iovecs = &self.buffers[self.turn].list;
        let count = iovecs.len() as libc::c_int;
        let offset = offset.cast_signed();
        // SAFETY: the vectors point to memory that `buffers` keep mapped.
        let done = unsafe {
            if self.op == Op::Write {
                libc::pwritev(fd, iovecs.as_ptr(), count, offset)
            } else {
                libc::preadv(fd, iovecs.as_ptr(), count, offset)
            }
        };
        match usize::try_from(done) {
            Ok(done) if done == self.work.block => Ok(()),
            Ok(done) => Err(std::io::Error::other(format!("{done} bytes instead of {}", self.work.block))),
            Err(_) => Err(std::io::Error::last_os_error()),
        }
    }

    fn list(&self) -> std::io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = openat(&self.directory, c".", flags, Mode::empty())?;
        let mut buffer = [std::mem::MaybeUninit::<u8>::uninit(); 16 << 10];
        let mut stream = RawDir::new(dir.as_fd(), &mut buffer);
        let mut seen = 0;
        while let Some(entry) = stream.next() {
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            statx(&self.directory, entry?.file_name(), flags, StatxFlags::BASIC_STATS)?;
            seen += 1;
        }
        if seen < self.work.entries { Err(std::io::Error::other("entries are missing")) } else { Ok(()) }
    }

    fn small(&self) -> std::io::Result<()> {
        let mut data = [0xa5; SMALL_FILE];
        let file = self.create()?;
        rustix::io::pwrite(&file, &data, 0)?;
        drop(file);
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        statx(&self.directory, self.own_name.as_str(), flags, StatxFlags::BASIC_STATS)?;
        let file = openat(&self.directory, &self.own_name, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        rustix::io::pread(&file, &mut data, 0)?;
        drop(file);
        Ok(unlinkat(&self.directory, &self.own_name, AtFlags::empty())?)
    }
}

impl Iovecs {
    fn new(work: &Work) -> Result<Iovecs> {
        let memory = Memory::new(2 * work.block.next_multiple_of(PAGE) + (2 << 20))?;
        let base = memory.regions().first().map_or(0, |region| region.user_address()) as usize;
        let (piece, stride) = match work.segments {
            Segments::Contiguous => (work.block, work.block),
            Segments::Pages => (PAGE, 2 * PAGE),
        };
        let count = work.block.div_ceil(piece);
        let list = (0..count).map(|i| libc::iovec {
            iov_base: (base + i * stride) as *mut libc::c_void,
            iov_len: piece.min(work.block - i * piece),
        });
        Ok(Iovecs { list: list.collect(), _memory: memory })
    }
}
