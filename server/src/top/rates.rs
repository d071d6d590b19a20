//! What has happened between two snapshots, for each second and for each request.

use vfio_user_blk::config::SortBy;
use vfio_user_blk::control::{DeviceSnapshot, QueueSnapshot, Snapshot, Stages, Statistics};

/// What a device or a queue does.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    /// Its name, or the queue's number.
    pub(super) name: String,
    /// Whether this is a queue, of the device in the last row that is none.
    pub(super) is_queue: bool,
    pub(super) state: &'static str,
    /// Requests a second.
    pub(super) iops: f64,
    /// Bytes a second.
    pub(super) read: f64,
    /// Bytes a second.
    pub(super) written: f64,
    /// Requests a second that the store failed.
    pub(super) errors: f64,
    /// Requests in flight.
    pub(super) depth: u64,
    /// How long the pieces of their way took.
    pub(super) stages: Stages,
    /// For each request; `None` without requests.
    pub(super) kicks: Option<f64>,
    /// The same.
    pub(super) interrupts: Option<f64>,
    /// The part of the looks at the queue that found something; `None` if there were none.
    pub(super) hits: Option<f64>,
}

/// A row for each device that there is now, sorted, and if `queues` one for each of its queues below it.
pub(super) fn rows(before: &Snapshot, now: &Snapshot, sort: SortBy, queues: bool) -> Vec<Row> {
    let seconds = now.time_ns.saturating_sub(before.time_ns) as f64 / 1e9;
    let mut groups: Vec<Vec<Row>> = now
        .devices
        .iter()
        .map(|device| {
            let old = before.devices.iter().find(|old| old.name == device.name);
            group(old, device, seconds, queues)
        })
        .collect();
    let by = |group: &Vec<Row>| group.first().map_or(0.0, |row| key(row, sort));
    // Stable: as the server has them where there is no difference.
    groups.sort_by(|a, b| by(b).total_cmp(&by(a)));
    groups.concat()
}

fn key(row: &Row, sort: SortBy) -> f64 {
    match sort {
        SortBy::None => 0.0,
        SortBy::Iops => row.iops,
        SortBy::Bandwidth => row.read + row.written,
        SortBy::Depth => row.depth as f64,
        SortBy::Latency => row.stages.submit_to_reap.quantile_ns(0.99).unwrap_or(0) as f64,
        SortBy::Errors => row.errors,
    }
}

fn group(old: Option<&DeviceSnapshot>, device: &DeviceSnapshot, seconds: f64, queues: bool) -> Vec<Row> {
    let state = match (device.paused, device.held, device.attached) {
        (true, ..) => "paused",
        (false, 1.., _) => "holds",
        (false, 0, true) => "in use",
        (false, 0, false) => "waits",
    };
    let nothing = QueueSnapshot::default();
    let each: Vec<_> = (device.queues.iter().enumerate())
        .map(|(index, queue)| {
            let old = old.and_then(|old| old.queues.get(index)).filter(|old| is_older(old, queue));
            let old = old.unwrap_or(&nothing);
            (queue.statistics.since(&old.statistics), queue.stages.since(&old.stages))
        })
        .collect();
    let sum = each.iter().map(|(statistics, _)| statistics).sum();
    let stages = each.iter().map(|(_, stages)| stages).sum();
    let device = Row { state, ..row(device.name.clone(), &sum, stages, seconds) };
    let of_queue = |(index, (statistics, stages)): (usize, &(Statistics, Stages))| Row {
        is_queue: true,
        ..row(index.to_string(), statistics, stages.clone(), seconds)
    };
    let queues = each.iter().enumerate().filter(|_| queues).map(of_queue);
    [device].into_iter().chain(queues).collect()
}

/// Whether one comes before the other. If not, another device has got the name meanwhile, and has counted from nothing.
fn is_older(old: &QueueSnapshot, now: &QueueSnapshot) -> bool {
    let (old, now) = (&old.statistics, &now.statistics);
    old.operations() <= now.operations() && old.kicks <= now.kicks && old.polls_in_vain <= now.polls_in_vain
}

fn row(name: String, what: &Statistics, stages: Stages, seconds: f64) -> Row {
    let each_second = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
    let part = |count: u64, of: u64| (of > 0).then(|| count as f64 / of as f64);
    let requests = what.operations();
    Row {
        name,
        is_queue: false,
        state: "",
        iops: each_second(requests),
        read: each_second(what.read_bytes),
        written: each_second(what.written_bytes),
        errors: each_second(what.io_errors.saturating_add(what.unsupported)),
        depth: what.in_flight,
        stages,
        kicks: part(what.kicks, requests),
        interrupts: part(what.interrupts_sent, requests),
        hits: part(what.polls_with_work, what.polls_with_work.saturating_add(what.polls_in_vain)),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use vfio_user_blk::control::Latencies;

    use super::*;

    fn queue(reads: u64) -> QueueSnapshot {
        let statistics = Statistics {
            reads,
            read_bytes: reads * 4096,
            kicks: reads / 2,
            interrupts_sent: reads / 4,
            polls_with_work: reads,
            polls_in_vain: reads * 3,
            in_flight: 7,
            ..Statistics::default()
        };
        let store = Latencies { sum_ns: reads * 1000, buckets: vec![(Some(1024), reads)] };
        QueueSnapshot { statistics, stages: Stages { submit_to_reap: store, ..Stages::default() } }
    }

    fn device(name: &str, reads: &[u64]) -> DeviceSnapshot {
        let queues = reads.iter().copied().map(queue).collect();
        DeviceSnapshot { name: name.into(), size: 1 << 30, paused: false, attached: true, held: 0, queues }
    }

    /// Half a second in which the second device did more than the first.
    pub(crate) fn two() -> (Snapshot, Snapshot) {
        let before = Snapshot { time_ns: 1_000_000_000, devices: vec![device("a", &[100, 100]), device("b", &[0, 0])] };
        let now =
            Snapshot { time_ns: 1_500_000_000, devices: vec![device("a", &[200, 100]), device("b", &[1000, 3000])] };
        (before, now)
    }

    #[test]
    fn rates_are_by_the_servers_clock() {
        let (before, now) = two();
        let rows = rows(&before, &now, SortBy::None, true);
        let names: Vec<_> = rows.iter().map(|row| (row.name.as_str(), row.is_queue)).collect();
        assert_eq!(names, [("a", false), ("0", true), ("1", true), ("b", false), ("0", true), ("1", true)]);
        let [a, busy, idle, b, ..] = rows.as_slice() else { panic!("{rows:?}") };
        assert_eq!((a.iops, a.read, a.written, a.depth), (200.0, 819_200.0, 0.0, 14));
        assert_eq!((a.kicks, a.interrupts, a.hits), (Some(0.5), Some(0.25), Some(0.25)));
        assert_eq!((busy.iops, busy.state, a.state), (200.0, "", "in use"));
        assert_eq!((idle.iops, idle.kicks, idle.hits), (0.0, None, None));
        assert_eq!(idle.stages.submit_to_reap.quantile_ns(0.5), None);
        assert_eq!((b.iops, b.stages.submit_to_reap.count()), (8000.0, 4000));
    }

    #[test]
    fn the_busiest_comes_first_with_its_queues() {
        let (before, now) = two();
        for sort in [SortBy::Iops, SortBy::Bandwidth] {
            let rows = rows(&before, &now, sort, true);
            assert_eq!((rows[0].name.as_str(), rows[1].is_queue, rows[3].name.as_str()), ("b", true, "a"));
        }
        // Where they are alike they stay as they were.
        assert_eq!(rows(&before, &now, SortBy::Depth, false)[0].name, "a");
    }

    #[test]
    fn a_device_that_came_meanwhile_counts_from_nothing() {
        let (mut before, now) = two();
        // One of the same name that had done more, and one that was not there.
        before.devices[0] = device("a", &[5000, 5000]);
        before.devices.truncate(1);
        let rows = rows(&before, &now, SortBy::None, false);
        assert_eq!((rows[0].iops, rows[1].iops), (600.0, 8000.0));
        // The same moment twice.
        let still = super::rows(&now, &now, SortBy::None, false);
        assert_eq!((still[0].iops, still[0].kicks), (0.0, None));
    }
}
