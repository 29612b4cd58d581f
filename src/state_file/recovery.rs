//! What a process does first with the state of one that has died.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use super::StateFile;
use super::records::HandleRecord;
use crate::sys::inherited;

/// What was found in the state of a process that has died.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Requests that it served.
    pub in_flight: usize,
    /// Lookups and handles that they had made, and that were taken back.
    pub taken_back: usize,
}

impl StateFile {
    /// Takes back what requests in flight have counted and opened: they are served again. Called before the process makes
    /// its tables.
    pub fn recover(&self) -> Recovered {
        self.recover_from(true)
    }

    /// The same after a process that has not failed, but was ended to make room for another one.
    pub fn recover_after_upgrade(&self) -> Recovered {
        self.recover_from(false)
    }

    /// All descriptors that records and requests in flight name.
    pub fn all_descriptors(self: &Arc<StateFile>) -> Vec<RawFd> {
        let mut all = self.descriptors();
        all.extend(self.held_descriptors());
        all
    }

    fn recover_from(&self, was_a_failure: bool) -> Recovered {
        let mut recovered = Recovered::default();
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
        self.header().recovered_at.store(u64::try_from(now).unwrap_or(u64::MAX), Ordering::Relaxed);
        let started = self.count_deaths(was_a_failure);
        recovered.in_flight = started.len();
        for (slot, tag) in started {
            // The last one first: its tag is there as long as its count was not changed here. Each note goes before its
            // count is changed: a process that dies meanwhile takes nothing back twice.
            for (number, (index, last_tag)) in self.notes(slot, tag).into_iter().enumerate().rev() {
                let record = self.inode(index);
                slot.counted.store(u32::try_from(number).unwrap_or(0), Ordering::Release);
                if record.node() != 0 && last_tag.is_none_or(|tag| record.tag() == tag) {
                    record.change_lookups(0, |count| count.saturating_sub(1));
                    recovered.taken_back += 1;
                }
            }
            slot.counted.store(0, Ordering::Release);
            slot.list.store(0, Ordering::Release);
            let handle = slot.handle.swap(0, Ordering::AcqRel);
            if handle != 0 && self.drop_handle(handle) {
                recovered.taken_back += 1;
            }
        }
        recovered
    }

    fn drop_handle(&self, id: u64) -> bool {
        let mut handles = self.ever_used::<HandleRecord>().map(|index| self.get(index));
        let found = handles.find(|record| record.load().is_some_and(|entry| entry.id == id));
        found.inspect(|record| record.clear()).is_some()
    }
}

/// Closes all descriptors but the standard ones, those in `kept` and those that records name: the process that has
/// died had opened them.
pub fn close_strays(state: &Arc<StateFile>, kept: &[RawFd]) -> std::io::Result<()> {
    let mut all = state.all_descriptors();
    all.extend_from_slice(kept);
    inherited::close_all_but(all)
}

#[cfg(test)]
mod tests {
    use super::super::records::InodeRecord;
    use super::super::slab::{Index, Slab};
    use super::super::{Effects, HandleEntry, InodeEntry, Journal, LongHandle, Place, StoredHandle};
    use super::*;

    const PLACE: Place = Place { descriptors: 0x1000, available: 0x2000, used: 0x3000, size: 8 };

    /// A process with one queue.
    struct Process {
        state: Arc<StateFile>,
        journal: Journal,
        inodes: Slab<InodeRecord>,
    }

    impl Process {
        fn on(state: &Arc<StateFile>) -> Process {
            let journal = Journal::new(state, 1);
            journal.start(PLACE, 0, 0);
            Process { state: Arc::clone(state), journal, inodes: Slab::new(state) }
        }

        fn begin(&self, head: u16) -> Effects<'_> {
            assert!(self.journal.take(head));
            self.journal.begin_request(head, u64::from(head), 1, 40);
            self.journal.effects(head, false)
        }

        /// An inode that was looked up so often.
        fn inode(&self, node: u64, lookups: u64) -> Index<InodeRecord> {
            let index = self.inodes.take().unwrap();
            self.inodes.get(index).store(&InodeEntry { node, lookups, ..entry() }, 0);
            index
        }

        fn end(&self, head: u16) {
            self.journal.done(head, 16);
            self.journal.begin_used_entry(head, 0).end();
        }

        fn lookups(&self, index: Index<InodeRecord>) -> u64 {
            self.inodes.get(index).lookups()
        }
    }

    fn entry() -> InodeEntry {
        InodeEntry {
            node: 2,
            lookups: 1,
            ino: 5,
            device: 8 << 20 | 1,
            mount: 30,
            generation: 4,
            kind: 8,
            descriptor: Some(1000),
        }
    }

    fn process() -> Process {
        Process::on(&StateFile::create_shared().unwrap())
    }

    #[test]
    fn lookups_of_a_request_without_a_reply_are_taken_back() {
        let process = process();
        let inodes: Vec<_> = (2..7).map(|node| process.inode(node, 3)).collect();
        let effects = process.begin(0);
        for index in &inodes {
            effects.count_lookup(*index, process.inodes.get(*index));
        }
        assert!(inodes.iter().all(|index| process.lookups(*index) == 4));
        assert_eq!(process.state.recover(), Recovered { in_flight: 1, taken_back: 5 });
        assert!(inodes.iter().all(|index| process.lookups(*index) == 3));
        // Once.
        assert_eq!(process.state.recover(), Recovered { in_flight: 1, taken_back: 0 });
    }

    #[test]
    fn lookups_of_a_request_with_a_reply_stay() {
        let process = process();
        let index = process.inode(2, 1);
        process.begin(0).count_lookup(index, process.inodes.get(index));
        process.journal.done(0, 16);
        assert_eq!(process.state.recover(), Recovered::default());
        assert_eq!(process.lookups(index), 2);
    }

    #[test]
    fn a_lookup_that_was_noted_and_not_counted_is_not_taken_back() {
        let process = process();
        let index = process.inode(2, 1);
        // The note alone, as if the process had died before the next instruction.
        let _tag = process.begin(3).begin_lookups(index);
        assert_eq!(process.state.recover().taken_back, 0);
        assert_eq!(process.lookups(index), 1);
    }

    #[test]
    fn a_lookup_that_the_request_took_back_is_not_taken_back_again() {
        let process = process();
        let index = process.inode(2, 1);
        let effects = process.begin(3);
        effects.count_lookup(index, process.inodes.get(index));
        assert_eq!(effects.take_back_lookup(process.inodes.get(index)), 2);
        assert_eq!(process.state.recover().taken_back, 0);
        assert_eq!(process.lookups(index), 1);
    }

    #[test]
    fn an_inode_that_only_the_request_has_looked_up_has_no_lookups() {
        let process = process();
        let index = process.inodes.take().unwrap();
        let tag = process.begin(0).begin_lookups(index);
        process.inodes.get(index).store(&entry(), tag);
        assert_eq!(process.state.recover().taken_back, 1);
        assert_eq!(process.lookups(index), 0);
        process.inodes.get(index).clear();
        let later = Slab::<InodeRecord>::new(&process.state);
        assert_eq!(later.used().count(), 0);
        assert_eq!(later.take().unwrap().get(), index.get(), "its record is free");
    }

    #[test]
    fn a_listing_of_any_length_is_taken_back() {
        let process = process();
        let index = process.inode(2, 1);
        let effects = process.begin(0);
        (0..5000).for_each(|_| effects.count_lookup(index, process.inodes.get(index)));
        assert_eq!(process.lookups(index), 5001);
        assert_eq!(process.state.recover().taken_back, 5000);
        assert_eq!(process.lookups(index), 1);
    }

    #[test]
    fn a_forget_is_done_once() {
        let process = process();
        let inodes: Vec<_> = (2..5).map(|node| process.inode(node, 10)).collect();
        let forget = |effects: Effects<'_>, number: usize| {
            effects.set_progress(u32::try_from(number).unwrap());
            let record = process.inodes.get(inodes[number]);
            effects.forget(record, 4) == Some(10)
        };
        let effects = process.begin(5);
        assert!(forget(effects, 0) && forget(effects, 1));
        for _ in 0..2 {
            process.state.recover();
            let replay = process.journal.effects(5, true);
            assert_eq!(replay.progress(), 1);
            // Noted, and done before the crash.
            assert!(!replay.must_forget(process.inodes.get(inodes[1])));
        }
        let replay = process.journal.effects(5, true);
        assert!(forget(replay, 2));
        assert_eq!(inodes.iter().map(|index| process.lookups(*index)).collect::<Vec<_>>(), [6, 6, 6]);
    }

    #[test]
    fn a_forget_that_was_noted_and_not_done_is_done() {
        let process = process();
        let index = process.inode(2, 10);
        assert!(process.begin(5).must_forget(process.inodes.get(index)));
        process.state.recover();
        assert!(process.journal.effects(5, true).must_forget(process.inodes.get(index)));
    }

    #[test]
    fn a_forget_is_not_done_twice_whoever_looks_the_inode_up() {
        let process = process();
        let index = process.inode(2, 10);
        let record = process.inodes.get(index);
        let forget = process.begin(1);
        assert_eq!(forget.forget(record, 3), Some(10));
        process.begin(2).count_lookup(index, record);
        process.end(2);
        process.state.recover();
        assert!(!process.journal.effects(1, true).must_forget(record));
        assert_eq!(process.lookups(index), 8, "10 - 3 + 1");
    }

    #[test]
    fn a_tag_of_an_older_request_is_not_taken_for_its_own() {
        let process = process();
        let index = process.inode(2, 1);
        process.begin(0).count_lookup(index, process.inodes.get(index));
        process.end(0);
        process.begin(0);
        process.end(0);
        // The note alone: the process dies before it counts.
        let _tag = process.begin(0).begin_lookups(index);
        process.state.recover();
        assert_eq!(process.lookups(index), 2);
    }

    #[test]
    fn a_process_that_dies_while_it_recovers_takes_nothing_back_twice() {
        let process = process();
        let inodes: Vec<_> = (2..7).map(|node| process.inode(node, 3)).collect();
        let effects = process.begin(0);
        for index in &inodes {
            effects.count_lookup(*index, process.inodes.get(*index));
        }
        // The first steps: the last two notes go, and their counts are changed or not.
        let slot = process.state.slot(1, 0);
        slot.counted.store(3, Ordering::Release);
        process.inodes.get(inodes[4]).change_lookups(0, |count| count - 1);
        process.state.recover();
        let counts: Vec<_> = inodes.iter().map(|index| process.lookups(*index)).collect();
        assert_eq!(counts, [3, 3, 3, 4, 3], "one too many, and none too few");
    }

    #[test]
    fn two_requests_do_not_share_a_slot() {
        let process = process();
        let effects = process.begin(0);
        effects.hold_descriptor(1234);
        assert!(!process.journal.take(0));
        process.state.recover();
        assert_eq!(process.journal.effects(0, true).held_descriptor(), Some(1234));
        process.end(0);
        assert!(process.journal.take(0));
    }

    #[test]
    fn a_handle_without_a_reply_is_closed() {
        let process = process();
        let handles = Slab::<HandleRecord>::new(&process.state);
        let entry =
            HandleEntry { id: 7, node: 2, descriptor: Some(1001), open_flags: 0, mode: 0, inode_mode: 0 };
        let (kept, dropped) = (handles.take().unwrap(), handles.take().unwrap());
        handles.get(kept).store(&entry);
        process.begin(0).open_handle(8);
        handles.get(dropped).store(&HandleEntry { id: 8, descriptor: Some(1002), ..entry });
        process.state.recover();
        assert_eq!(handles.get(kept).load(), Some(entry));
        assert_eq!(handles.get(dropped).load(), None);
        assert_eq!(process.state.descriptors(), [1001]);
    }

    #[test]
    fn a_descriptor_is_held_until_the_request_is_done() {
        let process = process();
        let effects = process.begin(0);
        effects.hold_descriptor(77);
        process.state.recover();
        assert_eq!(process.state.held_descriptors().collect::<Vec<_>>(), [77]);
        assert_eq!(process.journal.effects(0, true).held_descriptor(), Some(77));
        process.journal.effects(0, true).let_descriptor_go();
        assert_eq!(process.state.held_descriptors().count(), 0);
    }

    #[test]
    fn records_are_what_was_stored() {
        let process = process();
        let long = Slab::<LongHandle>::new(&process.state);
        for len in [1, 8, 12, 20, 21, 127, 128] {
            let index = process.inodes.take().unwrap();
            let record = process.inodes.get(index);
            record.store(&entry(), 9);
            assert_eq!(record.load(), Some(entry()));
            assert!(!record.has_handle());
            let bytes: Vec<u8> = (0..len).map(|byte| byte ^ 0x5a).collect();
            let handle = StoredHandle::new(0x81, &bytes).unwrap();
            assert!(record.set_handle(&handle, &long));
            assert_eq!(record.handle(&long).unwrap().bytes(), bytes);
            assert_eq!((record.handle(&long).unwrap().kind, record.load()), (0x81, Some(entry())));
            record.clear();
            record.drop_handle(&long);
            process.inodes.give_back(index);
        }
        assert_eq!(long.used().count(), 0);
        assert!(StoredHandle::new(0x100, &[1]).is_none() && StoredHandle::new(1, &[0; 129]).is_none());
    }

    #[test]
    fn another_process_reads_the_same_file_and_no_other() {
        use rustix::io::fcntl_dupfd_cloexec;
        use std::os::fd::AsFd;

        let process = process();
        process.state.set_session(45, 7);
        let index = process.inode(9, 2);
        let copy = fcntl_dupfd_cloexec(process.state.file().as_fd(), 0).unwrap();
        let other = StateFile::open(copy).unwrap();
        assert_eq!(other.session(), (45, 7));
        assert_eq!(Slab::<InodeRecord>::new(&other).get(index).load(), process.inodes.get(index).load());
        process.state.reset().unwrap();
        assert_eq!((other.session(), other.ever_used::<InodeRecord>().count()), ((0, 0), 0));
        let foreign = tempfile::tempfile().unwrap();
        foreign.set_len(1 << 20).unwrap();
        assert!(matches!(StateFile::open(foreign.into()), Err(super::super::StateError::Foreign)));
        assert!(StateFile::open(tempfile::tempfile().unwrap().into()).is_err());
    }
}
