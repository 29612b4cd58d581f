//! lanefsd with faults on cue: `faulty-daemon [FAULTS] -- LANEFSD'S OPTIONS`.
//!
//! Guests are tested with it for what a good daemon does not do: an error for one range of a file,
//! slow writes, and openers of one file that are told different things. It also watches that the
//! latter does not happen by itself.

mod openers;

use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Parser;
use fuse_protocol::flags::OpenReplyFlags;
use fuse_protocol::ids::NodeId;
use fuse_protocol::reply::Entry;
use fuse_protocol::request::{Create, Open, Release, Write};
use lanefsd::cli::{self, Command};
use lanefsd::config::{Config, Sandbox, Seccomp};
use lanefsd::daemon;
use lanefsd::fs::{Context, FileSystem, Opened};
use lanefsd::sys::guest_buffers::GuestReader;
use openers::Openers;
use rustix::fs::OFlags;
use rustix::io::Errno;

#[derive(Clone, Debug, Parser)]
#[command(about)]
struct Faults {
    /// Writes that touch bytes from here on get EIO
    #[arg(long, default_value_t = u64::MAX)]
    fail_from: u64,
    /// … up to here
    #[arg(long, default_value_t = u64::MAX)]
    fail_to: u64,
    /// Milliseconds that each write takes longer
    #[arg(long, default_value_t = 0)]
    delay: u64,
    /// Openers with O_DIRECT get parallel direct writes, the others of the same file its cache
    #[arg(long)]
    mixed_modes: bool,
    /// Options of lanefsd
    #[arg(last = true)]
    options: Vec<OsString>,
}

/// The file system below, with faults.
struct Faulty {
    inner: Arc<dyn FileSystem>,
    faults: Faults,
    openers: Openers,
}

impl Faulty {
    fn opened(&self, node: NodeId, mut opened: Opened, flags: u32) -> Opened {
        if self.faults.mixed_modes {
            opened.flags = match flags & OFlags::DIRECT.bits() != 0 {
                true => {
                    OpenReplyFlags::DIRECT_IO
                        | OpenReplyFlags::PARALLEL_DIRECT_WRITES
                        | OpenReplyFlags::PARALLEL_EXTENDING_WRITES
                }
                false => OpenReplyFlags::KEEP_CACHE,
            };
        }
        self.openers.opened(node, opened);
        opened
    }
}

impl FileSystem for Faulty {
    fn below(&self) -> Result<&dyn FileSystem, Errno> {
        Ok(&*self.inner)
    }

    fn open(&self, ctx: &Context, node: NodeId, open: &Open) -> Result<Opened, Errno> {
        self.inner.open(ctx, node, open).map(|opened| self.opened(node, opened, open.flags))
    }

    fn create(&self, ctx: &Context, parent: NodeId, create: &Create<'_>) -> Result<(Entry, Opened), Errno> {
        let (entry, opened) = self.inner.create(ctx, parent, create)?;
        Ok((entry, self.opened(entry.node, opened, create.flags)))
    }

    fn release(&self, ctx: &Context, node: NodeId, release: &Release) -> Result<(), Errno> {
        self.openers.released(node, release.handle);
        self.inner.release(ctx, node, release)
    }

    fn destroy(&self) {
        self.openers.report();
        self.inner.destroy();
    }

    fn write(
        &self,
        ctx: &Context,
        node: NodeId,
        write: &Write,
        data: &mut GuestReader<'_>,
    ) -> Result<usize, Errno> {
        thread::sleep(Duration::from_millis(self.faults.delay));
        let end = write.offset.saturating_add(u64::from(write.size));
        if write.offset < self.faults.fail_to && end > self.faults.fail_from {
            return Err(Errno::IO);
        }
        self.inner.write(ctx, node, write, data)
    }
}

fn main() -> Result<ExitCode> {
    let faults = Faults::parse();
    let program = OsString::from("lanefsd");
    let Command::Serve(config) = cli::parse(std::iter::once(program).chain(faults.options.iter().cloned()))?
    else {
        bail!("this daemon only serves");
    };
    // Its own code may make other system calls than lanefsd.
    let config = Config { sandbox: Some(Sandbox::None), seccomp: Seccomp::None, ..*config };
    let wrap = |inner| Arc::new(Faulty { inner, faults, openers: Openers::default() }) as Arc<dyn FileSystem>;
    Ok(daemon::run(config, wrap)?.into())
}
