//! Whether the host is short of memory: the kernel's pressure stall information (PSI).
//!
//! `memory.pressure` of the cgroup of this process says for how long its programs have waited for memory, and `/proc/pressure/memory`
//! the same of the host. Either is opened before the sandbox, and read when somebody asks.
//!
//! A trigger (poll(2) with a threshold that is written to the file) tells at once, but needs CAP_SYS_RESOURCE before Linux 6.5, a
//! thread that waits for it, and a kernel thread that measures as long as it is there. MemAvailable and the like say nothing of a cgroup with a
//! limit, and a low number may be just what the host is to have.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::{ReadWriteFlags, preadv2};

/// The file of the whole host.
const HOST: &str = "/proc/pressure/memory";
/// Where cgroups of version 2 are, alone and beside those of version 1.
const CGROUPS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// Where the kernel tells of waits for memory.
#[derive(Debug)]
pub struct MemoryPressure(OwnedFd);

impl MemoryPressure {
    /// That of the cgroup of this process, or else of the host; `None` if the kernel does not tell.
    pub fn open() -> Option<MemoryPressure> {
        let own = fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| own_group(&text));
        let of_group = own.into_iter().flat_map(|group| CGROUPS.map(|root| file_of(root, &group)));
        let open = |path: PathBuf| MemoryPressure::at(&path);
        of_group.chain([HOST.into()]).find_map(open)
    }

    fn at(path: &Path) -> Option<MemoryPressure> {
        let file = openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let pressure = MemoryPressure(file);
        // It can be opened where it cannot be read.
        pressure.stalled().map(|_| pressure)
    }

    /// Nanoseconds in which at least one program has waited for memory, since some moment.
    pub fn stalled(&self) -> Option<u64> {
        let mut bytes = [0; 256];
        let buffers = &mut [std::io::IoSliceMut::new(&mut bytes)];
        let len = preadv2(&self.0, buffers, 0, ReadWriteFlags::empty()).ok()?;
        total(std::str::from_utf8(bytes.get(..len)?).ok()?)
    }
}

fn file_of(root: &str, group: &str) -> PathBuf {
    Path::new(root).join(group).join("memory.pressure")
}

/// The cgroup of version 2, below their root. In a container, whose root is its own group, that is mostly the empty name.
fn own_group(text: &str) -> Option<String> {
    text.lines().find_map(|line| line.strip_prefix("0::/")).map(str::to_owned)
}

/// The microseconds of `some`, in nanoseconds.
fn total(text: &str) -> Option<u64> {
    let some = text.lines().find(|line| line.starts_with("some "))?;
    let micros: u64 = some.rsplit_once("total=")?.1.parse().ok()?;
    micros.checked_mul(1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_some_program_is_read() {
        let text = "some avg10=1.53 avg60=0.87 avg300=0.25 total=2513211\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
        assert_eq!(total(text), Some(2_513_211_000));
        assert_eq!(total("full avg10=0.00 avg60=0.00 avg300=0.00 total=7\n"), None);
        assert_eq!(total("some avg10=0.00 total=x"), None);
        assert_eq!(total(&format!("some total={}", u64::MAX)), None);
    }

    #[test]
    fn the_group_is_found_among_those_of_version_1() {
        assert_eq!(
            own_group("4:memory:/old\n0::/system.slice/a.service\n").as_deref(),
            Some("system.slice/a.service")
        );
        assert_eq!(own_group("0::/\n").as_deref(), Some(""));
        assert_eq!(file_of(CGROUPS[0], "").to_str(), Some("/sys/fs/cgroup/memory.pressure"));
        assert_eq!(own_group("4:memory:/old\n"), None);
        assert_eq!(file_of(CGROUPS[1], "a/b").to_str(), Some("/sys/fs/cgroup/unified/a/b/memory.pressure"));
    }

    #[test]
    fn a_file_that_tells_nothing_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory.pressure");
        assert!(MemoryPressure::at(&path).is_none());
        fs::write(&path, "").unwrap();
        assert!(MemoryPressure::at(&path).is_none());
        fs::write(&path, "some avg10=0.00 avg60=0.00 avg300=0.00 total=12\n").unwrap();
        let pressure = MemoryPressure::at(&path).unwrap();
        assert_eq!(pressure.stalled(), Some(12_000));
        fs::write(&path, "some avg10=0.00 avg60=0.00 avg300=0.00 total=13\n").unwrap();
        assert_eq!(pressure.stalled(), Some(13_000));
    }
}
