//! What an operator should know about a running share: one sentence each, which says what to do.

use fuse_protocol::flags::InitFlags;

use super::serve::Sources;
use crate::metrics::{Gauges, Sample};

/// Descriptors of a virtqueue that let many requests be under way.
const GOOD_QUEUE: u32 = 512;

/// The remarks about a share that is served.
pub(super) fn of(sample: &Sample, gauges: Gauges, sources: &Sources<'_>) -> Vec<String> {
    let (minor, flags) = sources.state.session();
    of_parts(sample, gauges, (minor > 0).then_some(flags), sources.subject.cpus)
}

fn of_parts(sample: &Sample, gauges: Gauges, session: Option<u64>, cpus: usize) -> Vec<String> {
    let mut remarks = Vec::new();
    // The first is the high-priority queue.
    let requests: Vec<_> = sample.queues.iter().skip(1).filter(|queue| queue.size > 0).collect();
    if let Some(queue) = requests.iter().find(|queue| queue.size < GOOD_QUEUE) {
        remarks.push(format!(
            "a virtqueue has {} descriptors, so that few requests are under way at once: give the device queue-size=1024 \
             (QEMU) or queue='1024' (libvirt)",
            queue.size
        ));
    }
    if requests.len() == 1 && cpus > 1 {
        remarks.push(
            "there is one request queue: with several virtual CPUs, give the device num-request-queues, one for each"
                .into(),
        );
    }
    if let Some(flags) = session {
        if flags & InitFlags::ASYNC_DIO.bits() == 0 {
            remarks.push(
                "the guest's kernel makes the requests of an O_DIRECT write one after the other: it is old"
                    .into(),
            );
        }
        if sample.writers.iter().sum::<u64>() > 1000 && sample.writers.iter().skip(1).all(|count| *count == 0)
        {
            remarks.push(
                "no two writers have ever written one file at once: if the guest has several, its kernel serializes them; \
                 Linux 6.1 or newer does not, or the module of lanefsd's guest-kernel"
                    .into(),
            );
        }
    }
    if gauges.descriptor_limit > 0
        && gauges.descriptors.saturating_mul(10) > gauges.descriptor_limit.saturating_mul(9)
    {
        remarks.push(format!(
            "the guest has {} of {} descriptors: raise --rlimit-nofile, or LimitNOFILE= of the unit",
            gauges.descriptors, gauges.descriptor_limit
        ));
    }
    remarks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::QueueSample;

    #[test]
    fn each_remark_has_its_cause() {
        let queue = |index, size| QueueSample { index, size, ..QueueSample::default() };
        let good =
            Sample { queues: vec![queue(0, 128), queue(1, 1024), queue(2, 1024)], ..Sample::default() };
        let flags = Some(InitFlags::ASYNC_DIO.bits());
        let none = Gauges::default();
        assert!(of_parts(&good, none, flags, 4).is_empty());
        assert!(of_parts(&Sample::default(), none, None, 4).is_empty());
        let short = Sample { queues: vec![queue(0, 128), queue(1, 128), queue(2, 128)], ..Sample::default() };
        assert!(of_parts(&short, none, flags, 4)[0].contains("128 descriptors"));
        let one = Sample { queues: vec![queue(0, 128), queue(1, 1024)], ..Sample::default() };
        assert!(of_parts(&one, none, flags, 4)[0].contains("num-request-queues"));
        assert!(of_parts(&one, none, flags, 1).is_empty());
        assert!(of_parts(&good, none, Some(0), 4)[0].contains("one after the other"));
        let alone = Sample { writers: [2000, 0, 0, 0, 0, 0, 0, 0], ..good.clone() };
        assert!(of_parts(&alone, none, flags, 4)[0].contains("serializes"));
        let full = Gauges { descriptors: 950, descriptor_limit: 1000, ..none };
        assert!(of_parts(&good, full, flags, 4)[0].contains("950 of 1000"));
    }
}
