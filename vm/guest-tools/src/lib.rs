//! What the guest's programs share: buffers for O_DIRECT, patterns, and processes that start together.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fs::File;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::ptr::NonNull;

use anyhow::{Context, Result, ensure};

/// Alignment that every O_DIRECT file accepts, in bytes.
const ALIGNMENT: usize = 4096;

/// A buffer that may be used with O_DIRECT.
pub struct Buffer {
    start: NonNull<u8>,
    layout: Layout,
}

impl Buffer {
    /// `len` bytes, more than 0, of zeros.
    pub fn new(len: usize) -> Result<Buffer> {
        ensure!(len > 0, "a buffer needs a size");
        let layout = Layout::from_size_align(len, ALIGNMENT)?;
        // SAFETY: the layout's size is not 0.
        let start = unsafe { alloc_zeroed(layout) };
        match NonNull::new(start) {
            Some(start) => Ok(Buffer { start, layout }),
            None => handle_alloc_error(layout),
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the allocation has this many initialised bytes and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and freed once.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

/// Opens a file for reading and writing; makes it if it is not there.
pub fn open(path: &Path, direct: bool, append: bool) -> Result<File> {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let mut options = File::options();
    options.read(true).write(true).create(true).append(append).custom_flags(flags);
    options.open(path).with_context(|| format!("{} cannot be opened", path.display()))
}

/// The byte that `writer` writes at `offset`: all bytes of a file differ enough that one that is
/// missing, misplaced or another writer's is seen.
#[allow(clippy::cast_possible_truncation, reason = "one byte is cut out of a word")]
pub fn pattern(writer: u64, offset: u64) -> u8 {
    let mixed = ((offset >> 3) ^ (writer << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    // The byte of the word that the offset falls on.
    (mixed.rotate_left(29) >> (8 * (offset & 7))) as u8
}

/// Fills a buffer with the pattern of `writer` from `offset` on.
pub fn fill(buffer: &mut [u8], writer: u64, offset: u64) {
    for (byte, at) in buffer.iter_mut().zip(offset..) {
        *byte = pattern(writer, at);
    }
}

/// Processes of this program that wait for a common start.
pub struct Writers(Vec<Child>);

impl Writers {
    /// Starts a process for each number below `count`; its arguments are this process's own, then
    /// `--one NUMBER`. It has to call [`wait_for_start`].
    pub fn spawn(count: u64) -> Result<Writers> {
        let program = std::env::current_exe().context("this program is not found")?;
        let spawn = |number: u64| {
            Command::new(&program)
                .args(std::env::args_os().skip(1))
                .args(["--one", &number.to_string()])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .context("a process cannot be started")
        };
        let mut children = (0..count).map(spawn).collect::<Result<Vec<_>>>()?;
        // Each says a byte when it is ready.
        for child in &mut children {
            let stdout = child.stdout.as_mut().context("a process has no output")?;
            let mut byte = [0];
            std::io::Read::read_exact(stdout, &mut byte).context("a process did not get ready")?;
        }
        Ok(Writers(children))
    }

    /// Lets all go on, and waits until all have ended well.
    pub fn run(mut self) -> Result<()> {
        for child in &mut self.0 {
            drop(child.stdin.take());
        }
        let mut failed = 0;
        for child in &mut self.0 {
            failed += u32::from(!child.wait()?.success());
        }
        ensure!(failed == 0, "{failed} processes failed");
        Ok(())
    }
}

/// In a process of a [`Writers`]: says that it is ready and waits for the start.
pub fn wait_for_start() -> Result<()> {
    use std::io::{Read, Write};
    let mut stdout = std::io::stdout();
    stdout.write_all(b"r")?;
    stdout.flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Lets this process write no file beyond `bytes`: EFBIG instead of SIGXFSZ.
pub fn limit_file_size(bytes: u64) -> Result<()> {
    use rustix::process::{Resource, Rlimit, setrlimit};
    // SAFETY: ignoring a signal touches no memory of ours.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    setrlimit(Resource::Fsize, Rlimit { current: Some(bytes), maximum: Some(bytes) })
        .context("the limit cannot be set")
}

/// Small numbers that are different enough; not for secrets.
pub struct Rng(u64);

impl Rng {
    /// The same numbers for the same seed.
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `end`, which must not be 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }
}

/// A mapping of a file's beginning.
pub struct Mapping {
    start: *mut u8,
    len: usize,
}

impl Mapping {
    /// Maps `len` bytes, shared and writable or private.
    pub fn new(file: &File, len: usize, shared: bool) -> Result<Mapping> {
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        let flags = if shared { MapFlags::SHARED } else { MapFlags::PRIVATE };
        let protection = if shared { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: the kernel chooses a free place, so nothing of ours is unmapped.
        let start = unsafe { mmap(std::ptr::null_mut(), len, protection, flags, file, 0) };
        Ok(Mapping { start: start.context("mapping the file failed")?.cast(), len })
    }

    /// The bytes from `offset` on, as they are now.
    pub fn read(&self, offset: usize, len: usize) -> Result<Vec<u8>> {
        let byte = |at: usize| {
            // SAFETY: below the mapping's length, see below. Others may write at any time: a byte
            // at a time, volatile, is all that is assumed.
            unsafe { self.start.add(at).read_volatile() }
        };
        let end = offset.checked_add(len).filter(|end| *end <= self.len).context("beyond the mapping")?;
        Ok((offset..end).map(byte).collect())
    }

    /// Sets bytes of a shared mapping.
    pub fn write(&self, offset: usize, data: &[u8]) -> Result<()> {
        let end = offset.checked_add(data.len()).context("beyond the mapping")?;
        ensure!(end <= self.len, "beyond the mapping");
        for (at, byte) in (offset..).zip(data) {
            // SAFETY: below the mapping's length, which is writable if it is shared.
            unsafe { self.start.add(at).write_volatile(*byte) };
        }
        Ok(())
    }

    /// Waits until what was written is with the server.
    pub fn sync(&self) -> Result<()> {
        // SAFETY: the whole of our own mapping.
        unsafe { rustix::mm::msync(self.start.cast(), self.len, rustix::mm::MsyncFlags::SYNC) }
            .context("msync failed")
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the whole of our own mapping, which nobody uses any more.
        let _ = unsafe { rustix::mm::munmap(self.start.cast(), self.len) };
    }
}
