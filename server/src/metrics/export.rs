//! The counters as OpenMetrics text, which Prometheus reads.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use super::{Kind, Stage, Statistics};
use crate::devices::{Devices, Handle};

/// What each name starts with.
const PREFIX: &str = "vfio_user_blk";

/// The text, of all devices as they are now.
///
/// # Errors
/// If there is no memory for it.
pub(super) fn text(devices: &Arc<Devices>) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(All(Arc::clone(devices))));
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}

struct All(Arc<Devices>);

impl fmt::Debug for All {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the devices")
    }
}

type Read = fn(&Statistics) -> u64;
/// Counters of a queue: name, help, unit, and for each value of one more label what it is.
type Family = (&'static str, &'static str, Option<Unit>, &'static [(Option<(&'static str, &'static str)>, Read)]);

const FAMILIES: &[Family] = &[
    (
        "operations",
        "Requests that were taken off the queue",
        None,
        &[
            (Some(("operation", Kind::NAMES[0])), |now| now.reads),
            (Some(("operation", Kind::NAMES[1])), |now| now.writes),
            (Some(("operation", Kind::NAMES[2])), |now| now.flushes),
            (Some(("operation", Kind::NAMES[3])), |now| now.discards),
            (Some(("operation", Kind::NAMES[4])), |now| now.write_zeroes),
            (Some(("operation", Kind::NAMES[5])), |now| now.other),
        ],
    ),
    (
        "transferred",
        "Data of reads and writes",
        Some(Unit::Bytes),
        &[(Some(("direction", "read")), |now| now.read_bytes), (Some(("direction", "write")), |now| now.written_bytes)],
    ),
    (
        "errors",
        "Requests that the store failed",
        None,
        &[(Some(("error", "io")), |now| now.io_errors), (Some(("error", "unsupported")), |now| now.unsupported)],
    ),
    ("kicks", "Kicks that the worker heard of", None, &[(None, |now| now.kicks)]),
    ("interrupts_sent", "Batches given back with an interrupt", None, &[(None, |now| now.interrupts_sent)]),
    (
        "interrupts_suppressed",
        "Batches given back to a driver that wanted none",
        None,
        &[(None, |now| now.interrupts_suppressed)],
    ),
    (
        "polls",
        "Times that the worker looked at the queue",
        None,
        &[(Some(("found", "work")), |now| now.polls_with_work), (Some(("found", "nothing")), |now| now.polls_in_vain)],
    ),
];

impl Collector for All {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let devices: Vec<(Handle, Vec<Statistics>)> =
            self.0.list().into_iter().map(|device| (device.clone(), device.metrics.read())).collect();
        let queues = || {
            devices.iter().flat_map(|(device, queues)| {
                (0usize..).zip(queues).map(move |(index, now)| (device, index, index.to_string(), now))
            })
        };
        for (name, help, unit, values) in FAMILIES {
            let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
            for (device, _, queue, now) in queues() {
                for (label, read) in *values {
                    let mut labels = vec![("device", device.name.as_str()), ("queue", queue.as_str())];
                    labels.extend(*label);
                    let labels = labels.as_slice();
                    family.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&read(now), None)?;
                }
            }
        }
        let mut family = encoder.encode_descriptor(
            "requests_in_flight",
            "Requests that the store is working on",
            None,
            MetricType::Gauge,
        )?;
        for (device, _, queue, now) in queues() {
            let labels = [("device", device.name.as_str()), ("queue", queue.as_str())];
            let in_flight = i64::try_from(now.in_flight).unwrap_or(i64::MAX);
            ConstGauge::new(in_flight).encode(family.encode_family(&labels)?)?;
        }
        let mut family = encoder.encode_descriptor(
            "requests_held",
            "Requests that the storage has failed and that wait in the server",
            None,
            MetricType::Gauge,
        )?;
        for (device, _) in &devices {
            let Some(held) = device.held() else { continue };
            let requests = i64::try_from(held.requests).unwrap_or(i64::MAX);
            ConstGauge::new(requests).encode(family.encode_family(&[("device", device.name.as_str())])?)?;
        }
        let mut family = encoder.encode_descriptor(
            "stage",
            "How long requests take for a piece of their way",
            Some(&Unit::Seconds),
            MetricType::Histogram,
        )?;
        for (device, index, queue, _) in queues() {
            let metrics = device.metrics.queue(u16::try_from(index).unwrap_or(u16::MAX));
            for (histogram, stage) in metrics.stages.iter().zip(Stage::NAMES) {
                let labels = [("device", device.name.as_str()), ("queue", queue.as_str()), ("stage", stage)];
                let buckets: Vec<_> = histogram.read().collect();
                let count = buckets.iter().map(|(_, count)| count).sum();
                let sum = histogram.sum() as f64 / 1e9;
                family.encode_family(&labels)?.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
            }
        }
        let mut family =
            encoder.encode_descriptor("size", "Size of the disk", Some(&Unit::Bytes), MetricType::Gauge)?;
        for (device, _) in &devices {
            let size = i64::try_from(device.status().size).unwrap_or(i64::MAX);
            ConstGauge::new(size).encode(family.encode_family(&[("device", device.name.as_str())])?)?;
        }
        Ok(())
    }
}
