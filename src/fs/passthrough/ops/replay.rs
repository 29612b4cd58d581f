//! Requests that a process has died with and that are served again: what they may have done already.
//!
//! Most requests can simply be done twice: one that has no reply yet may be ordered after all others. The rest is
//! here. A request notes what it needs for that before it changes anything, and only if its process may be followed by
//! another one.

use std::ffi::CStr;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::fs::{AtFlags, FileType, Statx, StatxFlags, Timespec, statx, unlinkat};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use rustix::time::{ClockId, clock_gettime};

use crate::fs::Result;
use crate::fs::passthrough::handle_table::Handle;
use crate::fs::passthrough::host::file::Opener;
use crate::fs::passthrough::host::{kind, stat, stat_entry};
use crate::fs::passthrough::inode::{InodeKey, InodeTable, adopt_descriptor};
use crate::state_file::{Attempt, Effects};
use crate::sys::guest_buffers::GuestReader;

/// In place of a time: what was to be made was there.
const WAS_THERE: u64 = 1;
/// Bytes that are compared at once.
const PIECE: usize = 64 << 10;

/// Makes `name`, of type `made`. What an earlier process made of it and could not answer is removed first: it may lack
/// its owner or its labels. Nothing is removed that the guest knows, that is older than the request, that has a content,
/// or that is of another type.
pub fn make<T>(
    inodes: &InodeTable,
    effects: Effects<'_>,
    place: (BorrowedFd<'_>, &CStr),
    made: FileType,
    make: impl FnOnce() -> Result<T>,
) -> Result<T> {
    match effects.attempted() {
        Attempt::NotMade | Attempt::Failed => {}
        Attempt::UnderWay | Attempt::Succeeded => remove_own(inodes, effects, place, made),
    }
    if effects.outlives() {
        // Somebody else's is not to be taken for ours.
        let is_there = stat_entry(place.0, place.1).is_ok();
        effects.set_before(if is_there { WAS_THERE } else { not_later() });
    }
    effects.attempt(make)
}

fn remove_own(
    inodes: &InodeTable,
    effects: Effects<'_>,
    (parent, name): (BorrowedFd<'_>, &CStr),
    made: FileType,
) {
    let Some(begun) = effects.before().filter(|begun| *begun != WAS_THERE) else { return };
    let Ok(found) = stat_entry(parent, name) else { return };
    let is_new = effects.was_alive(begun, made_at(&found));
    let is_own = is_new && kind(&found) == made && has_no_content(&found);
    if is_own && !inodes.knows(&found) {
        let is_directory = made == FileType::Directory;
        let flags = if is_directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        // If it cannot be removed, somebody uses it already, and the request says that it exists.
        let _ = unlinkat(parent, name, flags);
    }
}

/// Nanoseconds since 1970, not later than the time stamp of what is made from now on: some file systems stamp with the
/// clock's last step, and some with the time itself.
fn not_later() -> u64 {
    nanoseconds(clock_gettime(ClockId::RealtimeCoarse))
}

/// The same, not earlier than the time stamp of what was made before.
fn not_earlier() -> u64 {
    nanoseconds(clock_gettime(ClockId::Realtime))
}

fn nanoseconds(time: Timespec) -> u64 {
    let all = time.tv_sec.saturating_mul(1_000_000_000).saturating_add(time.tv_nsec);
    u64::try_from(all).unwrap_or(0).max(WAS_THERE + 1)
}

/// When an inode was made. Where the file system does not say so, its last change: it was not made later.
fn made_at(found: &Statx) -> u64 {
    let has_birth = found.stx_mask & StatxFlags::BTIME.bits() != 0;
    let made = if has_birth { found.stx_btime } else { found.stx_ctime };
    nanoseconds(Timespec { tv_sec: made.tv_sec, tv_nsec: made.tv_nsec.into() })
}

/// A new directory has no entries, or else it is not removed; the others have no bytes and one name.
fn has_no_content(found: &Statx) -> bool {
    match kind(found) {
        FileType::RegularFile => found.stx_size == 0 && found.stx_nlink == 1,
        FileType::Directory => true,
        _ => found.stx_nlink == 1,
    }
}

/// Removes something with `remove`, unless an earlier process has: what `find` finds has gone, or was made since.
pub fn remove(
    effects: Effects<'_>,
    find: impl Fn() -> Found,
    remove: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let is_done = match (effects.attempted(), effects.before()) {
        (Attempt::Succeeded, _) => true,
        (Attempt::UnderWay, begun) => match find() {
            Found::Nothing => true,
            Found::MadeAt(made) => begun.is_some_and(|begun| made > begun),
            Found::Something => false,
        },
        (Attempt::NotMade | Attempt::Failed, _) => false,
    };
    if is_done {
        return Ok(());
    }
    if effects.outlives() {
        effects.set_before(not_earlier());
    }
    effects.attempt(remove)
}

/// What is there that a request removes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing, any more.
    Nothing,
    /// Something that was made then, in nanoseconds since 1970.
    MadeAt(u64),
    /// Something of any age.
    Something,
}

/// What has this name.
pub fn find(directory: impl AsFd, name: &CStr) -> Found {
    match stat_entry(directory, name) {
        Ok(found) if found.stx_mask & StatxFlags::BTIME.bits() != 0 => Found::MadeAt(made_at(&found)),
        Err(Errno::NOENT) => Found::Nothing,
        _ => Found::Something,
    }
}

/// A number of what has this name, not 0. The host uses inode numbers again at once, so it is mixed with the time when the
/// inode was made, where the file system has that.
pub fn number_of(directory: impl AsFd, name: &CStr) -> Option<u64> {
    let stat = stat_entry(directory, name).ok()?;
    let made = if stat.stx_mask & StatxFlags::BTIME.bits() == 0 { 0 } else { made_at(&stat) };
    Some((stat.stx_ino ^ made.rotate_left(24)).max(1))
}

/// Gives something a name with `link`, or a value, unless an earlier process has: `is_linked` tells where that is not
/// known.
pub fn link(
    effects: Effects<'_>,
    is_linked: impl FnOnce() -> bool,
    link: impl FnOnce() -> Result<()>,
) -> Result<()> {
    match effects.attempted() {
        Attempt::Succeeded => Ok(()),
        Attempt::UnderWay if is_linked() => Ok(()),
        _ => effects.attempt(link),
    }
}

/// Renames `from` to `to`, which are directories and names, with `rename`.
pub fn rename(
    effects: Effects<'_>,
    from: (BorrowedFd<'_>, &CStr),
    to: (BorrowedFd<'_>, &CStr),
    rename: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let number = |(directory, name): (BorrowedFd<'_>, &CStr)| number_of(directory, name);
    let is_done = match effects.attempted() {
        Attempt::Succeeded => true,
        Attempt::UnderWay => {
            effects.before().is_some_and(|moved| number(to) == Some(moved) && number(from) != Some(moved))
        }
        Attempt::NotMade | Attempt::Failed => false,
    };
    if is_done {
        return Ok(());
    }
    if effects.outlives()
        && let Some(number) = number(from)
    {
        effects.set_before(number);
    }
    effects.attempt(rename)
}

/// Begins an append to the end of `file`, which the caller has locked. Returns how many bytes of `data` an earlier
/// process has appended: they are taken from its front.
pub fn begin_append(
    effects: Effects<'_>,
    opener: Opener<'_>,
    handle: &Handle,
    data: &mut GuestReader<'_>,
) -> Result<usize> {
    if !effects.outlives() {
        return Ok(0);
    }
    let size = statx(handle.fd(), c"", AtFlags::EMPTY_PATH, StatxFlags::SIZE)?.stx_size;
    // One more than the size, which may be 0.
    let Some(before) = effects.before().map(|noted| noted.saturating_sub(1)) else {
        effects.set_before(size.saturating_add(1));
        return Ok(0);
    };
    let there = usize::try_from(size.saturating_sub(before)).unwrap_or(usize::MAX).min(data.len());
    // The handle may be for writing alone, or take whole blocks.
    let reader = opener.witness(handle.fd())?;
    if !is_there(reader.as_fd(), before, data, there) {
        // Somebody else has appended.
        return Ok(0);
    }
    data.skip(there);
    Ok(there)
}

/// Whether the first `len` bytes of `data` are in the file at `offset`.
fn is_there(file: BorrowedFd<'_>, offset: u64, data: &GuestReader<'_>, len: usize) -> bool {
    let (mut hosts, mut guests) = (vec![0; PIECE.min(len)], vec![0; PIECE.min(len)]);
    (0..len).step_by(PIECE).all(|done| {
        let count = PIECE.min(len - done);
        hosts.truncate(count);
        guests.truncate(count);
        let at = offset.saturating_add(done as u64);
        let read = preadv2(file, &mut [IoSliceMut::new(&mut hosts)], at, ReadWriteFlags::empty());
        read == Ok(count) && data.peek_at(done, &mut guests) == count && hosts == guests
    })
}

/// Makes a file durable with `sync`.
///
/// The kernel tells each open file once of an error of writeback. A process that dies before it has answered takes the
/// error with it. So a second open file of the same inode is made first: a later process asks that one, too. Where
/// there is none, a later process says EIO, as it cannot know.
pub fn sync(
    effects: Effects<'_>,
    opener: Opener<'_>,
    handle: &Handle,
    sync: impl Fn(BorrowedFd<'_>) -> Result<()>,
) -> Result<()> {
    if !effects.outlives() {
        return sync(handle.fd());
    }
    if let Some(number) = effects.held_descriptor() {
        let witness = adopt_descriptor(number);
        let number = |file: BorrowedFd<'_>| stat(file).map(|stat| InodeKey::of(&stat));
        let is_it = number(witness.as_fd()).is_ok_and(|witness| number(handle.fd()) == Ok(witness));
        if !is_it {
            // It is somebody else's.
            std::mem::forget(witness);
            return Err(Errno::IO);
        }
        let result = sync(handle.fd()).and(sync(witness.as_fd()));
        effects.let_descriptor_go();
        return result;
    }
    if effects.before().is_some() {
        return Err(Errno::IO);
    }
    let witness = opener.witness(handle.fd());
    match &witness {
        Ok(witness) => effects.hold_descriptor(witness.as_fd().as_raw_fd()),
        Err(_) => effects.set_before(1),
    }
    let result = sync(handle.fd());
    // Before it is closed.
    effects.let_descriptor_go();
    result
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::MetadataExt;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::path::Path;
    use std::sync::Arc;

    use rustix::fs::{linkat, mkdirat, renameat};

    use super::*;
    use crate::fs::passthrough::inode::{FdCache, Records};
    use crate::limits::{FdQuota, GuestFd};
    use crate::state_file::{Journal, Place, StateFile};

    /// A request, and the directory that it works in.
    struct Request {
        folder: tempfile::TempDir,
        directory: OwnedFd,
        state: Arc<StateFile>,
        journal: Journal,
        inodes: InodeTable,
    }

    impl Request {
        fn new() -> Request {
            let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
            let state = StateFile::create_shared().unwrap();
            let journal = Journal::new(&state, 1);
            journal.start(Place { descriptors: 1, available: 2, used: 3, size: 8 }, 0, 0);
            assert!(journal.take(0));
            journal.begin_request(0, 1, 9, 40);
            let cache = FdCache::unlimited(&Arc::new(FdQuota::new(1000, 0)), &Records::new(&state));
            let root = GuestFd::uncounted(fs::File::open(folder.path()).unwrap().into());
            let key = InodeKey::of(&stat(&root).unwrap());
            let inodes = InodeTable::new(root, key, cache).unwrap();
            let directory = fs::File::open(folder.path()).unwrap().into();
            Request { folder, directory, state, journal, inodes }
        }

        fn path(&self, name: &str) -> std::path::PathBuf {
            self.folder.path().join(name)
        }

        fn place<'a>(&'a self, name: &'a CStr) -> (BorrowedFd<'a>, &'a CStr) {
            (self.directory.as_fd(), name)
        }

        /// The first attempt: the process dies inside the call, after `call` has run.
        fn dies(&self, serve: impl FnOnce(&Request, Effects<'_>) -> Result<()>) {
            let died = catch_unwind(AssertUnwindSafe(|| serve(self, self.journal.effects(0, false))));
            assert!(died.is_err());
            self.state.recover();
            assert_eq!(self.again().attempted(), Attempt::UnderWay);
        }

        fn again(&self) -> Effects<'_> {
            self.journal.effects(0, true)
        }

        fn unlink(&self, effects: Effects<'_>, dies: Option<bool>) -> Result<()> {
            let find = || find(&self.directory, c"name");
            remove(effects, find, || cut(dies, || unlinkat(&self.directory, c"name", AtFlags::empty())))
        }

        fn mkdir(&self, effects: Effects<'_>, dies: Option<bool>) -> Result<()> {
            let mkdir = || mkdirat(&self.directory, c"name", 0o700.into());
            make(&self.inodes, effects, self.place(c"name"), FileType::Directory, || cut(dies, mkdir))
        }

        fn rename(&self, effects: Effects<'_>, dies: Option<bool>) -> Result<()> {
            let call = || renameat(&self.directory, c"name", &self.directory, c"new");
            rename(effects, self.place(c"name"), self.place(c"new"), || cut(dies, call))
        }

        fn link(&self, effects: Effects<'_>, dies: Option<bool>) -> Result<()> {
            let number = number_of(&self.directory, c"name");
            let is_linked = || number_of(&self.directory, c"new") == number;
            let call = || linkat(&self.directory, c"name", &self.directory, c"new", AtFlags::empty());
            link(effects, is_linked, || cut(dies, call))
        }
    }

    /// Makes a call, or dies before it (`false`) or after it (`true`).
    fn cut(dies: Option<bool>, call: impl FnOnce() -> Result<()>) -> Result<()> {
        match dies {
            None => call(),
            Some(after) => {
                if after {
                    call().unwrap();
                }
                panic!("the process is killed")
            }
        }
    }

    fn number(path: &Path) -> u64 {
        fs::symlink_metadata(path).unwrap().ino()
    }

    /// FUSE and NFS have none.
    #[test]
    fn without_a_time_of_creation_the_last_change_counts() {
        let request = Request::new();
        fs::write(request.path("file"), "").unwrap();
        let mut found = stat_entry(&request.directory, c"file").unwrap();
        (found.stx_btime.tv_sec, found.stx_ctime.tv_sec) = (1000, 2000);
        assert_eq!(made_at(&found) / 1_000_000_000, 1000);
        found.stx_mask &= !StatxFlags::BTIME.bits();
        assert_eq!(made_at(&found) / 1_000_000_000, 2000);
    }

    #[test]
    fn what_was_removed_is_not_removed_again() {
        for after in [false, true] {
            let request = Request::new();
            fs::write(request.path("name"), "ours").unwrap();
            request.dies(|request, effects| request.unlink(effects, Some(after)));
            if after {
                // Another guest has waited for that. The clock of time stamps moves on in steps.
                std::thread::sleep(std::time::Duration::from_millis(30));
                fs::write(request.path("name"), "theirs").unwrap();
            }
            assert_eq!(request.unlink(request.again(), None), Ok(()));
            assert_eq!(request.path("name").exists(), after);
        }
        let request = Request::new();
        request.dies(|request, effects| request.unlink(effects, Some(false)));
        assert_eq!(request.unlink(request.again(), None), Ok(()), "nobody knows whether it was there");
    }

    #[test]
    fn what_was_made_is_made_once() {
        for after in [false, true] {
            let request = Request::new();
            request.dies(|request, effects| request.mkdir(effects, Some(after)));
            assert_eq!(request.mkdir(request.again(), None), Ok(()));
            assert!(request.path("name").is_dir());
        }
    }

    #[test]
    fn what_was_there_is_not_taken_for_its_own() {
        let request = Request::new();
        fs::create_dir(request.path("name")).unwrap();
        let theirs = number(&request.path("name"));
        request.dies(|request, effects| request.mkdir(effects, Some(false)));
        assert_eq!(request.mkdir(request.again(), None), Err(Errno::EXIST));
        assert_eq!(number(&request.path("name")), theirs);
    }

    #[test]
    fn what_others_made_after_the_death_is_not_taken_for_its_own() {
        let request = Request::new();
        request.dies(|request, effects| request.mkdir(effects, Some(false)));
        // The clock of time stamps moves on in steps.
        std::thread::sleep(std::time::Duration::from_millis(30));
        fs::create_dir(request.path("name")).unwrap();
        let theirs = number(&request.path("name"));
        assert_eq!(request.mkdir(request.again(), None), Err(Errno::EXIST));
        assert_eq!(number(&request.path("name")), theirs);
    }

    #[test]
    fn what_has_a_content_or_another_type_is_not_taken_for_its_own() {
        let request = Request::new();
        request.dies(|request, effects| request.mkdir(effects, Some(true)));
        fs::write(request.path("name").join("file"), "used").unwrap();
        assert_eq!(request.mkdir(request.again(), None), Err(Errno::EXIST));
        let request = Request::new();
        request.dies(|request, effects| request.mkdir(effects, Some(false)));
        fs::write(request.path("name"), "").unwrap();
        assert_eq!(request.mkdir(request.again(), None), Err(Errno::EXIST));
    }

    #[test]
    fn what_was_renamed_is_not_renamed_again() {
        for after in [false, true] {
            let request = Request::new();
            fs::write(request.path("name"), "moved").unwrap();
            fs::write(request.path("new"), "replaced").unwrap();
            request.dies(|request, effects| request.rename(effects, Some(after)));
            if after {
                fs::write(request.path("name"), "theirs").unwrap();
            }
            assert_eq!(request.rename(request.again(), None), Ok(()));
            assert_eq!(fs::read_to_string(request.path("new")).unwrap(), "moved");
            assert_eq!(request.path("name").exists(), after);
        }
    }

    #[test]
    fn what_was_linked_is_linked_once() {
        for after in [false, true] {
            let request = Request::new();
            fs::write(request.path("name"), "").unwrap();
            request.dies(|request, effects| request.link(effects, Some(after)));
            assert_eq!(request.link(request.again(), None), Ok(()));
            assert_eq!(number(&request.path("new")), number(&request.path("name")));
        }
        let request = Request::new();
        fs::write(request.path("name"), "").unwrap();
        fs::write(request.path("new"), "theirs").unwrap();
        request.dies(|request, effects| request.link(effects, Some(false)));
        assert_eq!(request.link(request.again(), None), Err(Errno::EXIST));
    }
}
