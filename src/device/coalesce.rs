//! Notification coalescing: one notification for several used entries, while the guest has enough to do.
//!
//! A notification costs the host a system call and the guest an interrupt. While more chains wait and
//! requests are fast, the device adds used entries without a notification, for [`COALESCE_MAX`] at most. A
//! guest that waits for these replies sends nothing meanwhile: with less than [`GUEST_TURNAROUND`] of work
//! left it is notified after [`COALESCE_MIN`], or the ring would run empty before its next request comes.
//!
//! The estimate is a moving average of the service time. A request that takes longer than that holds the
//! notifications back; the [watchdog](super::watchdog) sends them then.

use std::time::Duration;

/// Longest delay of a notification while more chains wait.
const COALESCE_MAX: Duration = Duration::from_micros(30);
/// Most used entries in one notification while more chains wait.
const COALESCE_MAX_USED: u32 = 32;
/// Time from a notification to the guest's next request.
const GUEST_TURNAROUND: Duration = Duration::from_micros(20);
/// Least work that is worth a notification while more chains wait.
const COALESCE_MIN: Duration = Duration::from_micros(10);
/// Requests that take longer on average are worth a wake-up each.
const SLOW_REQUEST: Duration = Duration::from_micros(30);
/// Longest sample of the service time: one request that sleeps does not make a queue look slow.
const SAMPLE_CAP: Duration = Duration::from_micros(120);

/// Used entries of one queue that the guest was not notified of, and the service time of its requests.
///
/// Times are nanoseconds in 32 bits: this is arithmetic for every request.
#[derive(Debug, Default)]
pub(super) struct Coalescing {
    /// Entries added since the guest was last considered for a notification.
    used: u32,
    /// Moving average.
    service_time: u32,
}

impl Coalescing {
    /// Accounts for a request that took `time`.
    pub fn record(&mut self, time: Duration) {
        let sample = if time.as_secs() == 0 { time.subsec_nanos() } else { u32::MAX };
        self.service_time = moved_average(self.service_time, sample);
    }

    /// Accounts for a used entry.
    pub fn add_used(&mut self) {
        self.used = self.used.saturating_add(1);
    }

    /// Number of used entries since the last call: the guest is considered for a notification of them.
    pub fn take_used(&mut self) -> u32 {
        std::mem::take(&mut self.used)
    }

    /// Whether there are used entries that the guest was not considered for.
    pub fn has_used(&self) -> bool {
        self.used > 0
    }

    /// Whether the notification may wait, with `waiting` more chains in the ring.
    pub fn may_coalesce(&self, waiting: u32) -> bool {
        may_coalesce(self.used, waiting, self.service_time)
    }

    /// Whether requests are slow by now.
    pub fn is_slow(&self) -> bool {
        self.service_time > nanoseconds(SLOW_REQUEST)
    }

    /// Whether requests are faster than the guest's next one comes.
    pub fn is_faster_than_guest(&self) -> bool {
        self.service_time < nanoseconds(GUEST_TURNAROUND)
    }
}

/// Whether the notification of `used` entries may wait, since `waiting` more chains take `each` nanoseconds.
fn may_coalesce(used: u32, waiting: u32, each: u32) -> bool {
    if waiting == 0 || used >= COALESCE_MAX_USED {
        return false;
    }
    let (done, left) = (used.saturating_mul(each), waiting.saturating_mul(each));
    done < nanoseconds(if left < nanoseconds(GUEST_TURNAROUND) { COALESCE_MIN } else { COALESCE_MAX })
}

/// An average with one more sample, which has an eighth of the weight.
fn moved_average(average: u32, sample: u32) -> u32 {
    average - average / 8 + sample.min(nanoseconds(SAMPLE_CAP)) / 8
}

/// The constants above in nanoseconds; each is less than a second.
const fn nanoseconds(time: Duration) -> u32 {
    time.subsec_nanos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_request_that_sleeps_does_not_make_a_queue_slow() {
        let fast = (0..100).fold(0, |average, _| moved_average(average, 2_000));
        let limit = nanoseconds(GUEST_TURNAROUND.min(SLOW_REQUEST));
        assert!(moved_average(fast, 100_000_000) < limit);
        assert!(
            (0..100).fold(fast, |average, _| moved_average(average, 200_000)) > nanoseconds(SLOW_REQUEST)
        );
    }

    #[test]
    fn notifications_are_coalesced_while_there_is_enough_to_do() {
        // Requests of one microsecond: with many behind them, 30 share a notification.
        assert!(may_coalesce(29, 100, 1_000));
        assert!(!may_coalesce(30, 100, 1_000));
        // With less to do than the guest takes to answer, ten share one.
        assert!(may_coalesce(9, 19, 1_000));
        assert!(!may_coalesce(10, 19, 1_000));
        assert!(!may_coalesce(1, 0, 1_000));
        // Slow ones are notified at once, and however fast they are, not more than 32 share one.
        assert!(!may_coalesce(1, 1, 10_000));
        assert!(!may_coalesce(1, 100, 30_000));
        assert!(!may_coalesce(32, 100, 0));
    }
}
