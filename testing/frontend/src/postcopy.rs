//! The destination of a migration by post-copy: the guest runs, and its memory comes page by page.
//!
//! What was in memory is kept aside, and nothing is left in the memory files. A thread puts pages back: those that this
//! process or the device has touched, in any order and late, and some that nobody has asked for. A page that is there
//! before it was put is an error: the device has touched what it had to wait for.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::connection::Connection;
use crate::error::{Error, Result};
use crate::memory::{PAGE, Region};
use crate::message::{code, protocol};
use crate::random::Random;
use crate::session::Session;

// Of linux/userfaultfd.h.
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
const UFFDIO_WAKE: u64 = 0x8010_aa02;
const UFFDIO_COPY: u64 = 0xc028_aa03;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
/// Bytes of `struct uffd_msg`.
const MESSAGE: usize = 32;
/// Milliseconds that a wake-up is late, at most.
const LATE: usize = 6;

fn control(fd: RawFd, command: u64, argument: &mut [u64]) -> std::io::Result<()> {
    // SAFETY: each command works with a struct of as many 64-bit words as its caller passes.
    let result = unsafe { libc::ioctl(fd, command, argument.as_mut_ptr()) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// A region whose memory comes.
#[derive(Debug)]
struct Place {
    region: Arc<Region>,
    /// Where the device has it, once that is known.
    base: Option<u64>,
    /// Pages that are not there, by their numbers.
    missing: BTreeMap<usize, Vec<u8>>,
}

impl Place {
    /// The page that an address of this process (`own`) or of the device is on.
    fn page_of(&self, address: u64, own: bool) -> Option<usize> {
        let base = if own { Some(self.region.user_address()) } else { self.base };
        let offset = address.checked_sub(base?)?;
        (offset < self.region.size() as u64).then_some(offset as usize / PAGE)
    }
}

#[derive(Debug)]
struct State {
    places: Vec<Place>,
    /// Pages that were touched: region and page.
    wanted: Vec<(usize, usize)>,
    /// Addresses of the device where accesses wait that go on then.
    late: Vec<(Instant, u64)>,
    /// Pages that nobody gets.
    withheld: Vec<(usize, usize)>,
    random: Random,
    faults: usize,
    error: Option<Error>,
}

#[derive(Debug)]
struct Shared {
    own: File,
    theirs: File,
    state: Mutex<State>,
    /// Pages come only when they are asked for.
    is_lazy: AtomicBool,
    ends: AtomicBool,
}

/// Memory that comes. To drop it ends that, and what has not come is zero.
#[derive(Debug)]
pub struct Incoming {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Incoming {
    /// The destination of a migration, with the userfaultfd of its device.
    pub fn new(theirs: File, seed: u64) -> Result<Incoming> {
        // SAFETY: the call takes flags and no pointer.
        let own = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        if own < 0 {
            return Err(Error::system("make a userfaultfd")(std::io::Error::last_os_error()));
        }
        // SAFETY: the call has returned this descriptor and nobody else owns it.
        let own = unsafe { File::from_raw_fd(own as RawFd) };
        control(own.as_raw_fd(), UFFDIO_API, &mut [0xaa, 0, 0])
            .map_err(Error::system("use a userfaultfd"))?;
        let state = State {
            places: Vec::new(),
            wanted: Vec::new(),
            late: Vec::new(),
            withheld: Vec::new(),
            random: Random::new(seed),
            faults: 0,
            error: None,
        };
        let (state, is_lazy, ends) = (Mutex::new(state), AtomicBool::new(false), AtomicBool::new(false));
        let shared = Arc::new(Shared { own, theirs, state, is_lazy, ends });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::spawn(move || of_thread.run());
        Ok(Incoming { shared, thread: Some(thread) })
    }

    /// Takes the memory of a region away, which comes from now on.
    pub fn take_away(&self, region: &Arc<Region>) -> Result<()> {
        let mut state = self.shared.lock();
        let range = &mut [region.user_address(), region.size() as u64, 1, 0];
        control(self.shared.own.as_raw_fd(), UFFDIO_REGISTER, range)
            .map_err(Error::system("register guest memory"))?;
        let content = region.take_content()?;
        let missing = content.chunks(PAGE).map(<[u8]>::to_vec).enumerate().collect();
        state.places.push(Place { region: Arc::clone(region), base: None, missing });
        Ok(())
    }

    /// Shares regions that were taken away with the device, by a table of all or one by one.
    pub fn share(&self, connection: &Connection, regions: &[Arc<Region>], one_by_one: bool) -> Result<()> {
        let bases = match one_by_one {
            true => {
                regions.iter().map(|region| connection.add_missing_memory(region)).collect::<Result<_>>()?
            }
            false => connection.set_missing_memory(regions)?,
        };
        let mut state = self.shared.lock();
        for (region, base) in regions.iter().zip(bases) {
            let place = state.places.iter_mut().find(|place| Arc::ptr_eq(&place.region, region));
            place.expect("it was taken away").base = Some(base);
        }
        drop(state);
        connection.acknowledge_memory(if one_by_one { code::ADD_MEM_REG } else { code::SET_MEM_TABLE })
    }

    /// Pages come only when they are asked for.
    pub fn be_lazy(&self) {
        self.shared.is_lazy.store(true, Ordering::SeqCst);
    }

    /// The pages of these guest-physical addresses come no more until [`Incoming::finish`].
    pub fn withhold(&self, address: u64, len: usize) {
        let mut state = self.shared.lock();
        let state = &mut *state;
        for (number, place) in state.places.iter().enumerate() {
            let start = place.region.guest_address();
            let has =
                |page: &usize| (address..address + len as u64).contains(&(start + (page * PAGE) as u64));
            state.withheld.extend(place.missing.keys().copied().filter(has).map(|page| (number, page)));
        }
    }

    /// How many accesses of the device to missing pages were answered.
    pub fn faults(&self) -> usize {
        self.shared.lock().faults
    }

    /// Whether the device waits for a page that is withheld.
    pub fn is_waited_for(&self) -> bool {
        let state = self.shared.lock();
        state.wanted.iter().any(|page| state.withheld.contains(page))
    }

    /// Pages that are missing.
    pub fn missing(&self) -> usize {
        self.shared.lock().places.iter().map(|place| place.missing.len()).sum()
    }

    /// Puts all that is missing into place.
    pub fn complete(&self) -> Result<()> {
        let mut state = self.shared.lock();
        state.withheld.clear();
        while let Some(page) = state.any() {
            state.place(&self.shared, page);
        }
        state.wake_late(&self.shared, true);
        match state.error.take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Ends post-copy, with all memory in place.
    pub fn finish(mut self, session: &Session) -> Result<()> {
        self.complete()?;
        session.connection().postcopy_end()?;
        self.stop();
        Ok(())
    }

    fn stop(&mut self) {
        self.shared.ends.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the thread does not fail");
        }
        for place in &self.shared.lock().places {
            let range = &mut [place.region.user_address(), place.region.size() as u64];
            // Nothing waits any more, whatever the answer.
            let _ = control(self.shared.own.as_raw_fd(), UFFDIO_UNREGISTER, range);
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.stop();
    }
}

impl State {
    /// A page that is missing and may come.
    fn any(&mut self) -> Option<(usize, usize)> {
        let many: Vec<usize> =
            (0..self.places.len()).filter(|at| !self.places[*at].missing.is_empty()).collect();
        let number = *many.get(self.random.below(many.len()))?;
        let missing = &self.places[number].missing;
        let from = *missing.keys().last()? + 1;
        let from = self.random.below(from);
        let (page, _) = missing.range(from..).next()?;
        Some((number, *page)).filter(|page| !self.withheld.contains(page))
    }

    /// Puts a page into place and wakes who waits for it, the device perhaps later.
    fn place(&mut self, shared: &Shared, (number, page): (usize, usize)) {
        let Some(place) = self.places.get_mut(number) else { return };
        if let Some(content) = place.missing.remove(&page) {
            let to = place.region.user_address() + (page * PAGE) as u64;
            let copy = &mut [to, content.as_ptr() as u64, PAGE as u64, 0, 0];
            while let Err(error) = control(shared.own.as_raw_fd(), UFFDIO_COPY, copy) {
                if error.raw_os_error() != Some(libc::EAGAIN) {
                    let address = place.region.guest_address() + (page * PAGE) as u64;
                    self.error =
                        Some(Error::system(format!("put the page at {address:#x} into place"))(error));
                    break;
                }
            }
        }
        if let Some(base) = place.base {
            let address = base + (page * PAGE) as u64;
            match self.random.below(4) {
                0 => {
                    let late = Duration::from_millis(self.random.below(LATE) as u64);
                    self.late.push((Instant::now() + late, address));
                }
                _ => wake(shared, address),
            }
        }
    }

    fn wake_late(&mut self, shared: &Shared, all: bool) {
        let now = Instant::now();
        self.late.retain(|(due, address)| {
            let is_due = all || *due <= now;
            if is_due {
                wake(shared, *address);
            }
            !is_due
        });
    }
}

fn wake(shared: &Shared, address: u64) {
    // The process that it was of may have died.
    let _ = control(shared.theirs.as_raw_fd(), UFFDIO_WAKE, &mut [address, PAGE as u64]);
}

impl Shared {
    fn run(&self) {
        while !self.ends.load(Ordering::SeqCst) {
            self.wait();
            let mut state = self.lock();
            self.take_faults(&mut state);
            state.wake_late(self, false);
            let allowed: Vec<usize> =
                (0..state.wanted.len()).filter(|at| !state.withheld.contains(&state.wanted[*at])).collect();
            // In any order, and not at once.
            if !allowed.is_empty() && state.random.below(3) > 0 {
                let at = allowed[state.random.below(allowed.len())];
                let page = state.wanted.swap_remove(at);
                state.place(self, page);
            }
            if !self.is_lazy.load(Ordering::SeqCst)
                && let Some(page) = state.any()
            {
                state.place(self, page);
            }
        }
    }

    fn wait(&self) {
        let entry = |file: &File| libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let mut fds = [entry(&self.own), entry(&self.theirs)];
        // SAFETY: two pollfds, whose descriptors live as long as self.
        unsafe { libc::poll(fds.as_mut_ptr(), 2, 1) };
    }

    fn take_faults(&self, state: &mut State) {
        for (mut file, own) in [(&self.own, true), (&self.theirs, false)] {
            let mut message = [0; MESSAGE];
            while matches!(file.read(&mut message), Ok(MESSAGE)) {
                if message[0] != UFFD_EVENT_PAGEFAULT {
                    continue;
                }
                let address = u64::from_ne_bytes(message[16..24].try_into().expect("eight bytes"));
                let places = state.places.iter().enumerate();
                let found =
                    places.filter_map(|(number, place)| Some((number, place.page_of(address, own)?))).next();
                match found {
                    Some(page) => {
                        state.faults += usize::from(!own);
                        state.wanted.push(page);
                    }
                    None => {
                        let problem = format!("a fault at {address:#x}, which is in no region");
                        state.error = Some(Error::Protocol { message: "post-copy", problem });
                    }
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Session {
    /// The guest goes on with another back end at once, and its memory follows. No request of this process is under way. The
    /// connection with the former back end is returned.
    pub fn move_by_postcopy(
        &self,
        mut other: Connection,
        state: &[u8],
        bases: &[u16],
        seed: u64,
    ) -> Result<(Connection, Incoming)> {
        let features = other.features()? & self.features();
        other.protocol_features()?;
        other.set_protocol_features(self.protocol_features() | protocol::PAGEFAULT)?;
        other.set_owner()?;
        let incoming = Incoming::new(other.postcopy_advise()?, seed)?;
        let regions = self.memory().regions();
        regions.iter().try_for_each(|region| incoming.take_away(region))?;
        other.postcopy_listen()?;
        other.load_device_state(state)?;
        other.set_features(features)?;
        let one_by_one = self.protocol_features() & protocol::CONFIGURE_MEM_SLOTS != 0;
        incoming.share(&other, &regions, one_by_one)?;
        let former = std::mem::replace(&mut *self.connection(), other);
        self.start_queues_at(bases)?;
        Ok((former, incoming))
    }
}
