//! The workers of a queue and the end of a session under every order of their threads' steps.
//!
//! loom also fails a run in which a thread never wakes up, so each of these tests shows that no
//! wake-up and no kick is lost.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::time::Duration;

use lanefsd_loom::session_lock::{SessionLock, Slot};
use lanefsd_loom::worker_count::{Action, Parked, WorkerCount};
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

/// Runs `model` with at most `preemptions` switches away from a thread that could go on.
fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// Why an idle worker woke up.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wakeup {
    Work,
    Idle,
}

/// An edge-triggered epoll instance, and the ring.
#[derive(Default)]
struct Events {
    /// Kicks and wake-ups that have woken no worker yet.
    edges: usize,
    /// Workers whose idle time is over.
    timeouts: usize,
    /// Chains in the ring.
    chains: usize,
    /// The guest kicks for the next chain.
    kick_wanted: bool,
}

impl Events {
    /// The guest makes a chain available.
    fn offer(&mut self) {
        self.chains += 1;
        self.edges += usize::from(std::mem::take(&mut self.kick_wanted));
    }
}

struct Queue {
    worker_count: WorkerCount,
    events: Mutex<Events>,
    changed: Condvar,
}

impl Queue {
    /// A queue with so many workers, played by the model.
    fn new(limit: usize, workers: usize) -> Arc<Queue> {
        let worker_count = WorkerCount::new(limit);
        (0..workers).for_each(|_| assert_eq!(worker_count.spawn_if_allowed(), Action::Spawn));
        Arc::new(Queue { worker_count, events: Mutex::default(), changed: Condvar::new() })
    }

    fn signal(&self, change: impl FnOnce(&mut Events)) {
        change(&mut self.events.lock().unwrap());
        self.changed.notify_all();
    }

    /// Pops a chain. If there is none, the guest kicks for the next one.
    fn pop(&self) -> bool {
        let mut events = self.events.lock().unwrap();
        let found = events.chains > 0;
        events.chains -= usize::from(found);
        events.kick_wanted = !found;
        found
    }

    fn sleep(&self) -> Wakeup {
        self.worker_count.begin_idle();
        self.sleep_on()
    }

    /// The rest of a sleep.
    fn sleep_on(&self) -> Wakeup {
        let mut events = self.events.lock().unwrap();
        let woken = loop {
            if events.edges > 0 {
                events.edges -= 1;
                break Wakeup::Work;
            }
            if events.timeouts > 0 {
                events.timeouts -= 1;
                break Wakeup::Idle;
            }
            events = self.changed.wait(events).unwrap();
        };
        drop(events);
        self.worker_count.end_idle();
        woken
    }
}

/// A worker that sleeps already. It ends after it has popped a chain or exited.
fn idle_worker(queue: &Arc<Queue>) -> thread::JoinHandle<()> {
    queue.worker_count.begin_idle();
    let queue = Arc::clone(queue);
    thread::spawn(move || {
        let mut woken = queue.sleep_on();
        while woken == Wakeup::Work || !queue.worker_count.try_exit() {
            if queue.pop() {
                return;
            }
            woken = queue.sleep();
        }
    })
}

/// Ends one sleep at any moment.
fn clock(queue: &Arc<Queue>) -> thread::JoinHandle<()> {
    let queue = Arc::clone(queue);
    thread::spawn(move || queue.signal(|events| events.timeouts += 1))
}

/// Wakes or spawns a worker. One that is spawned ends after its first chain.
fn perform(queue: &Arc<Queue>, action: Action) -> Option<thread::JoinHandle<()>> {
    match action {
        Action::Nothing => None,
        Action::WakeOne => {
            queue.signal(|events| events.edges += 1);
            None
        }
        Action::Spawn => {
            let queue = Arc::clone(queue);
            Some(thread::spawn(move || while !queue.pop() && queue.sleep() == Wakeup::Work {}))
        }
    }
}

#[test]
fn workers_that_time_out_together_never_all_exit() {
    check(3, || {
        let queue = Queue::new(4, 3);
        let left = Arc::new(AtomicUsize::new(0));
        let time_out = |queue: &Queue, left: &AtomicUsize| {
            queue.worker_count.end_idle();
            if queue.worker_count.try_exit() {
                left.fetch_add(1, Ordering::SeqCst);
            }
        };
        (0..3).for_each(|_| queue.worker_count.begin_idle());
        let threads = [(); 2].map(|()| {
            let (queue, left) = (Arc::clone(&queue), Arc::clone(&left));
            thread::spawn(move || time_out(&queue, &left))
        });
        time_out(&queue, &left);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert!(left.load(Ordering::SeqCst) <= 1, "two have to stay");
    });
}

/// One worker serves for long, a second one leaves a chain in the ring, and the third one's idle time is
/// over at that moment. A worker has to pop the chain.
#[test]
fn a_wake_up_reaches_a_worker_that_is_about_to_exit() {
    check(3, || {
        let queue = Queue::new(3, 3);
        let threads = [idle_worker(&queue), clock(&queue)];
        queue.signal(Events::offer);
        assert!(perform(&queue, queue.worker_count.wake_or_spawn()).is_none());
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(queue.events.lock().unwrap().chains, 0, "no worker popped the chain");
    });
}

/// One worker serves for long, a second one makes sure that another worker waits for the next kick, and
/// serves too. The third one's idle time is over at that moment, and then the guest kicks.
#[test]
fn a_kick_wakes_a_worker_while_all_but_one_serve() {
    check(3, || {
        let queue = Queue::new(3, 3);
        let threads = [idle_worker(&queue), clock(&queue)];
        let added = if queue.worker_count.idle() == 0 {
            perform(&queue, queue.worker_count.spawn_if_allowed())
        } else {
            None
        };
        // From here on the worker serves, and a kick does not wake it.
        let listeners = 1 + usize::from(added.is_some());
        queue.signal(|events| (events.edges, events.chains) = (listeners, listeners));
        threads.into_iter().chain(added).for_each(|thread| thread.join().unwrap());
        assert!(queue.events.lock().unwrap().chains < listeners, "the kick woke no worker");
    });
}

/// The limit is one worker, and it waits for the next request. Afterwards there are two workers, and one of
/// them is parked.
#[test]
fn a_blocked_worker_is_replaced() {
    check(3, || {
        let queue = Queue::new(1, 1);
        let (done, serving) = (Arc::new((Mutex::new(false), Condvar::new())), Arc::new(AtomicUsize::new(0)));
        let action = queue.worker_count.begin_blocking().unwrap();
        assert_eq!(action, Action::Spawn);
        let replacement = {
            let (queue, done, serving) = (Arc::clone(&queue), Arc::clone(&done), Arc::clone(&serving));
            thread::spawn(move || {
                *done.0.lock().unwrap() = true;
                done.1.notify_all();
                // It never waits, and so serves on.
                serving.fetch_add(1, Ordering::SeqCst);
                queue.worker_count.stop();
                queue.worker_count.exit();
            })
        };
        let mut finished = done.0.lock().unwrap();
        while !*finished {
            finished = done.1.wait(finished).unwrap();
        }
        drop(finished);
        queue.worker_count.end_blocking();
        if !queue.worker_count.is_over_limit()
            || queue.worker_count.park(Duration::from_secs(1)) == Parked::Resume
        {
            queue.worker_count.exit();
        }
        queue.worker_count.wait_until_empty(Duration::from_secs(1), || ());
        replacement.join().unwrap();
        assert_eq!(serving.load(Ordering::SeqCst), 1);
    });
}

/// What a session holds, and whether there is one.
#[derive(Default)]
struct Session {
    begun: AtomicBool,
    table: Mutex<usize>,
}

impl Session {
    /// A request that leaves something in the table, in two steps.
    fn request(&self, session_lock: &Arc<SessionLock>) {
        let mut slot = Slot::register(session_lock);
        let _shared = slot.lock_shared();
        if self.begun.load(Ordering::Relaxed) {
            *self.table.lock().unwrap() += 1;
            assert!(self.begun.load(Ordering::Relaxed), "the session ended in mid-request");
        }
    }

    fn end(&self, session_lock: &Arc<SessionLock>) {
        session_lock.exclusive(
            || (),
            || {
                self.begun.store(false, Ordering::Relaxed);
                *self.table.lock().unwrap() = 0;
            },
        );
    }
}

#[test]
fn the_end_of_a_session_leaves_nothing() {
    check(3, || {
        let (session_lock, session) = (Arc::new(SessionLock::default()), Arc::new(Session::default()));
        session.begun.store(true, Ordering::Relaxed);
        let requests = [(); 2].map(|()| {
            let (session_lock, session) = (Arc::clone(&session_lock), Arc::clone(&session));
            thread::spawn(move || session.request(&session_lock))
        });
        session.end(&session_lock);
        requests.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(*session.table.lock().unwrap(), 0);
    });
}

#[test]
fn ends_and_beginnings_of_sessions_exclude_each_other() {
    check(2, || {
        let (session_lock, session) = (Arc::new(SessionLock::default()), Arc::new(Session::default()));
        let ends = [false, true].map(|begins| {
            let (session_lock, session) = (Arc::clone(&session_lock), Arc::clone(&session));
            thread::spawn(move || {
                if begins {
                    session_lock.exclusive(|| (), || session.begun.store(true, Ordering::Relaxed));
                } else {
                    session.end(&session_lock);
                }
            })
        });
        session.request(&session_lock);
        ends.into_iter().for_each(|thread| thread.join().unwrap());
        if !session.begun.load(Ordering::Relaxed) {
            assert_eq!(*session.table.lock().unwrap(), 0);
        }
    });
}
