//! A file of the guest that is written through mappings, and what the host sees of that.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use lanefsd_frontend::client::{Client, ROOT};
use lanefsd_frontend::{Backend, Session};

use super::disk::Disk;

pub const PAGE: usize = 4096;
pub const ALWAYS: [&str; 2] = ["--cache=never", "--mapped-writes=always"];
/// Blocks as large as pages, which small file systems do not have otherwise.
pub const WHOLE_PAGES: [&str; 2] = ["-b", "4096"];
/// Longer than the granularity of times of files.
pub const JIFFIES: Duration = Duration::from_millis(15);

pub fn serve(share: &Path, args: &[&str], queues: usize) -> (Backend, Session) {
    // With the sandbox that users get: the handler, the mappings and the times have to do with what it allows.
    let backend = Backend::of(super::program()).args(args).share(share).start().unwrap();
    let session = backend.connect(super::queues(queues)).unwrap();
    (backend, session)
}

/// A file of the guest, open.
#[derive(Clone, Copy)]
pub struct File<'a> {
    pub client: Client<'a>,
    pub node: u64,
    pub fh: u64,
}

impl<'a> File<'a> {
    pub fn create(session: &'a Session, name: &str, len: usize) -> File<'a> {
        File::create_in(session, ROOT, name, len)
    }

    pub fn create_in(session: &'a Session, folder: u64, name: &str, len: usize) -> File<'a> {
        let client = session.client();
        let (entry, open) = client.create(folder, name, libc::O_RDWR, 0o644, 0).unwrap();
        let file = File { client, node: entry.nodeid, fh: open.fh };
        for offset in (0..len).step_by(64 * PAGE) {
            file.write(offset, &vec![0; (64 * PAGE).min(len - offset)]);
        }
        file
    }

    pub fn write(self, offset: usize, bytes: &[u8]) {
        assert_eq!(self.client.write(self.node, self.fh, offset as u64, bytes).unwrap(), bytes.len());
    }

    pub fn refused(self, offset: usize, bytes: &[u8]) -> i32 {
        super::errno(self.client.write(self.node, self.fh, offset as u64, bytes))
    }

    /// Writes there until it is done through a mapping: the daemon's system calls write less than that.
    pub fn warm(self, backend: &Backend, offset: usize, bytes: &[u8]) {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            let before = bytes_of_calls(backend);
            for _ in 0..8 {
                self.write(offset, bytes);
            }
            if bytes_of_calls(backend) - before < 8 * bytes.len() {
                break;
            }
            assert!(Instant::now() < deadline, "no write goes through a mapping");
        }
    }
}

/// Bytes that the process that serves has written by system calls; eight of them for each notification.
pub fn bytes_of_calls(backend: &Backend) -> usize {
    let pid = backend.worker().unwrap();
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    io.lines().find_map(|line| line.strip_prefix("wchar: ")).unwrap().parse().unwrap()
}

/// MiB of shared writable mappings in the process that serves: of a file, or of all files on the file system of a directory.
/// None may be both shared and executable.
pub fn mapped(backend: &Backend, path: &Path) -> usize {
    let pid = backend.worker().unwrap();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let meta = fs::metadata(path).unwrap();
    let device = format!("{:02x}:{:02x}", libc::major(meta.dev()), libc::minor(meta.dev()));
    let inode = meta.ino().to_string();
    let mut len = 0;
    for line in maps.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        assert!(!(words[1].contains('x') && words[1].contains('s')), "{line}");
        if words[1] == "rw-s" && words[3] == device && (meta.is_dir() || words[4] == inode) {
            let (start, end) = words[0].split_once('-').unwrap();
            let number = |text| usize::from_str_radix(text, 16).unwrap();
            len += number(end) - number(start);
        }
    }
    len >> 20
}

/// mtime and ctime on the host, of which mtime is never the later one.
pub fn times(path: &Path) -> [(i64, i64); 2] {
    let meta = fs::metadata(path).unwrap();
    let times = [(meta.mtime(), meta.mtime_nsec()), (meta.ctime(), meta.ctime_nsec())];
    assert!(times[0] <= times[1]);
    times
}

pub fn disks() -> [fn() -> Disk; 3] {
    [|| Disk::tmpfs(64), || Disk::ext4(64, &WHOLE_PAGES), Disk::xfs]
}
