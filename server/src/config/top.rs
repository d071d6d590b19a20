//! The words of `top`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::DEFAULT_CONTROL_SOCKET;

/// What to show
#[derive(Clone, Debug, Args)]
pub struct TopArgs {
    /// Control socket of the server
    #[arg(long, value_name = "PATH", default_value = DEFAULT_CONTROL_SOCKET)]
    pub socket: PathBuf,

    /// Seconds between two looks, 0.1 to 3600
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    pub interval: Duration,

    /// Print one table and end; needs no terminal
    #[arg(long)]
    pub once: bool,

    /// Print a table each interval, until it is ended; needs no terminal
    #[arg(long, conflicts_with = "once")]
    pub batch: bool,

    /// A row for each queue, besides that of its device
    #[arg(long)]
    pub queues: bool,

    /// What the devices are sorted by, the most first
    #[arg(long, value_enum, default_value_t)]
    pub sort: SortBy,
}

/// What devices are sorted by
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SortBy {
    /// As the server has them
    #[default]
    None,
    /// Requests a second
    Iops,
    /// Bytes a second
    Bandwidth,
    /// Requests in flight
    Depth,
    /// The 99th percentile of their time with the store
    Latency,
    /// Requests a second that failed
    Errors,
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "it must be a number from 0.1 to 3600".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_seconds() {
        assert_eq!(interval("0.5"), Ok(Duration::from_millis(500)));
        assert!(["0", "-1", "3601", "NaN", "1s", ""].iter().all(|text| interval(text).is_err()));
    }
}
