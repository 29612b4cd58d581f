//! Ways to overwrite bytes of a file from guest memory, by one thread and by two, in one file and in two.
//!
//! `cargo run --release --example mapped_writes -- DIRECTORY...` prints MB/s for 4 KiB, 64 KiB and 1 MiB:
//!
//! - `pwritev2`: the system call, from a mapping of a memory file.
//! - `preadv2`: of the memory file, with a mapping of the file as the target; fstat(2) after it.
//! - `copy`: into the mapping, by the copy that reports faults ([`lanefsd::sys::fault_copy`]); fstat(2) after it.
//!
//! `warm`: all pages are mapped and dirty. `clean`: they were just written back, and each block is written once. `cold`: they are not
//! in memory. On a tmpfs pages are never clean or cold.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a tool for developers"
)]
#![allow(clippy::cast_precision_loss, reason = "figures for people")]

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use lanefsd::sys::fault_copy::Guarded;
use rustix::fs::{Advice, MemfdFlags, fadvise, memfd_create};
use rustix::io::{ReadWriteFlags, preadv2, pwritev2};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

const FILE: usize = 128 << 20;
const MEMORY: usize = 64 << 20;
const PAGE: usize = 4096;
const TIME: Duration = Duration::from_millis(700);

#[derive(Clone, Copy, Debug)]
enum Way {
    Pwritev2,
    Preadv2,
    Copy,
}

/// A file and a mapping of it.
struct Target {
    file: File,
    start: *mut u8,
    len: usize,
}

// SAFETY: threads write bytes of it by address only, and nothing reads them.
unsafe impl Send for Target {}
// SAFETY: the same.
unsafe impl Sync for Target {}

impl Target {
    fn of(file: File, len: usize) -> Target {
        file.set_len(len as u64).unwrap();
        for offset in (0..len).step_by(1 << 20) {
            file.write_all_at(&vec![1; 1 << 20], offset as u64).unwrap();
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address.
        let start = unsafe { mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, file.as_fd(), 0) }
            .unwrap();
        Target { file, start: start.cast(), len }
    }

    fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.len);
        self.start.wrapping_add(offset)
    }

    /// Maps all pages and makes them dirty.
    fn warm(&self) {
        for offset in (0..self.len).step_by(PAGE) {
            // SAFETY: it is inside the mapping.
            unsafe { self.at(offset).write_volatile(1) };
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // SAFETY: nothing uses it any more.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}

fn write(way: Way, file: &Target, offset: usize, memory: &Target, from: usize, block: usize) {
    // SAFETY: both are mapped, and bytes of them are copied by the kernel or by address.
    unsafe {
        match way {
            Way::Pwritev2 => {
                let data = [IoSlice::new(std::slice::from_raw_parts(memory.at(from), block))];
                assert_eq!(pwritev2(&file.file, &data, offset as u64, ReadWriteFlags::empty()), Ok(block));
                return;
            }
            Way::Preadv2 => {
                let mut window = [IoSliceMut::new(std::slice::from_raw_parts_mut(file.at(offset), block))];
                assert_eq!(
                    preadv2(&memory.file, &mut window, from as u64, ReadWriteFlags::empty()),
                    Ok(block)
                );
            }
            Way::Copy => Guarded::new().unwrap().copy(file.at(offset), memory.at(from), block).unwrap(),
        }
    }
    rustix::fs::fstat(&file.file).unwrap();
}

/// Random blocks by `threads`, each in the file of its number or all in the first: MB/s.
fn warm(way: Way, block: usize, threads: usize, files: &[Target], memory: &Target) -> f64 {
    let begun = Instant::now();
    let counts: Vec<usize> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads)
            .map(|thread| {
                let file = &files[thread % files.len()];
                scope.spawn(move || {
                    let mut random = 0x9e37_79b9_7f4a_7c15_usize.wrapping_mul(thread + 1);
                    let mut count = 0;
                    while count % 64 != 0 || begun.elapsed() < TIME {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        let (to, from) = (random % (FILE / block), (random >> 32) % (MEMORY / block));
                        write(way, file, to * block, memory, from * block, block);
                        count += 1;
                    }
                    count
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    counts.iter().sum::<usize>() as f64 * block as f64 / begun.elapsed().as_secs_f64() / 1e6
}

/// Each block once, after `before`: MB/s.
fn once(way: Way, block: usize, file: &Target, memory: &Target, before: impl Fn()) -> f64 {
    let mut time = Duration::ZERO;
    for _ in 0..3 {
        before();
        let begun = Instant::now();
        for offset in (0..MEMORY).step_by(block) {
            write(way, file, offset, memory, offset, block);
        }
        time += begun.elapsed();
    }
    3.0 * MEMORY as f64 / time.as_secs_f64() / 1e6
}

fn measure(directory: &Path) {
    let names = ["mapped-writes-0", "mapped-writes-1"].map(|name| directory.join(name));
    let open = |name| File::options().read(true).write(true).create(true).truncate(true).open(name).unwrap();
    let files: Vec<Target> = names.iter().map(|name| Target::of(open(name), FILE)).collect();
    let memory = Target::of(memfd_create(c"memory", MemfdFlags::CLOEXEC).unwrap().into(), MEMORY);
    println!(
        "{}: block, way: one thread; two, one file; two, two files; clean; cold (MB/s)",
        directory.display()
    );
    for block in [4096, 64 << 10, 1 << 20] {
        for way in [Way::Pwritev2, Way::Preadv2, Way::Copy] {
            files.iter().for_each(Target::warm);
            let one = &files[..1];
            let [alone, shared, apart] = [(1, one), (2, one), (2, &files[..])]
                .map(|(threads, files)| warm(way, block, threads, files, &memory));
            let file = &files[0];
            let clean = once(way, block, file, &memory, || file.file.sync_all().unwrap());
            let cold = once(way, block, file, &memory, || {
                file.file.sync_all().unwrap();
                // SAFETY: the mapping shows the file's bytes again when they are touched.
                unsafe { rustix::mm::madvise(file.start.cast(), FILE, rustix::mm::Advice::LinuxDontNeed) }
                    .unwrap();
                fadvise(&file.file, 0, None, Advice::DontNeed).unwrap();
            });
            println!("{block:>8} {way:?}: {alone:.0}; {shared:.0}; {apart:.0}; {clean:.0}; {cold:.0}");
        }
    }
    drop(files);
    names.iter().for_each(|name| std::fs::remove_file(name).unwrap());
}

fn main() {
    let directories: Vec<_> = std::env::args_os().skip(1).collect();
    assert!(!directories.is_empty(), "give directories to measure in");
    directories.iter().for_each(|directory| measure(Path::new(directory)));
}
