//! What came of a run.

use std::fmt::Write;
use std::time::Duration;

use anyhow::Result;
use hdrhistogram::Histogram;
use serde_json::json;
use vfio_user_blk::config::BenchArgs;

use super::queue::QueueResult;

/// The longest latency that is told apart from longer ones, in nanoseconds.
const MAX_LATENCY: u64 = 60_000_000_000;

/// An empty histogram of latencies in nanoseconds, to three digits.
pub(super) fn histogram() -> Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, MAX_LATENCY, 3)?)
}

/// The results of all queues together.
pub(super) struct Report {
    iops: f64,
    bytes_per_second: f64,
    requests: u64,
    /// Nanoseconds.
    latency: Histogram<u64>,
    kicks: u64,
    interrupts: u64,
    verified: Option<u64>,
}

impl Report {
    pub(super) fn new(arguments: &BenchArgs, elapsed: Duration, queues: Vec<QueueResult>) -> Result<Self> {
        let mut report = Self {
            iops: 0.0,
            bytes_per_second: 0.0,
            requests: 0,
            latency: histogram()?,
            kicks: 0,
            interrupts: 0,
            verified: arguments.verify.then_some(0),
        };
        for queue in queues {
            report.latency.add(queue.latency)?;
            report.kicks += queue.kicks;
            report.interrupts += queue.interrupts;
            report.verified = report.verified.map(|verified| verified + queue.verified);
        }
        report.requests = report.latency.len();
        report.iops = report.requests as f64 / elapsed.as_secs_f64();
        report.bytes_per_second = report.iops * arguments.bs.0 as f64;
        Ok(report)
    }

    fn microseconds(&self, quantile: f64) -> f64 {
        self.latency.value_at_quantile(quantile) as f64 / 1000.0
    }

    fn per_io(&self, count: u64) -> f64 {
        count as f64 / self.requests.max(1) as f64
    }

    /// For people.
    pub(super) fn table(&self) -> String {
        let mut text = String::new();
        let mut row = |name: &str, value: String| {
            let _infallible = writeln!(text, "{name:<22}{value:>16}");
        };
        row("IOPS", grouped(self.iops as u64));
        row("bandwidth, MiB/s", format!("{:.1}", self.bytes_per_second / f64::from(1 << 20)));
        row("mean, us", format!("{:.3}", self.latency.mean() / 1000.0));
        for (name, quantile) in [("p50, us", 0.5), ("p99, us", 0.99), ("p99.9, us", 0.999)] {
            row(name, format!("{:.3}", self.microseconds(quantile)));
        }
        row("kicks a request", format!("{:.4}", self.per_io(self.kicks)));
        row("interrupts a request", format!("{:.4}", self.per_io(self.interrupts)));
        row("requests", grouped(self.requests));
        if let Some(verified) = self.verified {
            row("verified", grouped(verified));
        }
        text.trim_end().to_owned()
    }

    /// For programs.
    pub(super) fn json(&self) -> String {
        let mut object = json!({
            "iops": self.iops,
            "bytes_per_second": self.bytes_per_second,
            "requests": self.requests,
            "mean_us": self.latency.mean() / 1000.0,
            "p50_us": self.microseconds(0.5),
            "p99_us": self.microseconds(0.99),
            "p999_us": self.microseconds(0.999),
            "kicks_per_io": self.per_io(self.kicks),
            "interrupts_per_io": self.per_io(self.interrupts),
        });
        if let (Some(verified), Some(object)) = (self.verified, object.as_object_mut()) {
            object.insert("verified".into(), verified.into());
        }
        object.to_string()
    }
}

/// A number with its thousands set apart.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}
