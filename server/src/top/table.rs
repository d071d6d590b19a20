//! The columns, and how their numbers are written.

use vfio_user_blk::control::Latencies;

use super::rates::Row;
use crate::ctl::aligned;

type Cell = fn(&Row) -> String;

/// Each with its title, how wide it is on a terminal (the first takes what is left), and what stands in it.
pub(super) const COLUMNS: &[(&str, u16, Cell)] = &[
    ("DEVICE", 0, |row| if row.is_queue { format!("  queue {}", row.name) } else { printable(&row.name) }),
    ("STATE", 6, |row| row.state.to_owned()),
    ("IOPS", 6, |row| scaled(row.iops, 1000.0)),
    ("READ/s", 7, |row| scaled(row.read, 1024.0)),
    ("WRITE/s", 7, |row| scaled(row.written, 1024.0)),
    ("ERR/s", 5, |row| scaled(row.errors, 1000.0)),
    ("DEPTH", 5, |row| row.depth.to_string()),
    ("KICK p50", 8, |row| quantile(&row.stages.kick_to_submit, 0.5)),
    ("p99", 8, |row| quantile(&row.stages.kick_to_submit, 0.99)),
    ("STORE p50", 9, |row| quantile(&row.stages.submit_to_reap, 0.5)),
    ("p99", 8, |row| quantile(&row.stages.submit_to_reap, 0.99)),
    ("INTR p50", 8, |row| quantile(&row.stages.reap_to_interrupt, 0.5)),
    ("p99", 8, |row| quantile(&row.stages.reap_to_interrupt, 0.99)),
    ("KICK/op", 7, |row| ratio(row.kicks)),
    ("INTR/op", 7, |row| ratio(row.interrupts)),
    ("POLL%", 6, |row| row.hits.map_or_else(none, |hits| format!("{:.1}", hits * 100.0))),
];

/// All rows, below the titles.
pub(super) fn text(rows: &[Row]) -> String {
    let titles = COLUMNS.iter().map(|(title, ..)| (*title).to_owned()).collect();
    let cells = rows.iter().map(|row| COLUMNS.iter().map(|(.., cell)| cell(row)).collect());
    aligned(&[titles].into_iter().chain(cells).collect::<Vec<_>>())
}

fn none() -> String {
    "-".to_owned()
}

fn ratio(ratio: Option<f64>) -> String {
    ratio.map_or_else(none, |ratio| format!("{ratio:.2}"))
}

fn quantile(latencies: &Latencies, part: f64) -> String {
    latencies.quantile_ns(part).map_or_else(none, time)
}

/// A name without what a terminal would obey.
fn printable(name: &str) -> String {
    name.chars().map(|char| if char.is_control() { '?' } else { char }).collect()
}

/// A number of few digits, with a letter for its thousands.
fn scaled(number: f64, thousand: f64) -> String {
    let mut rest = number;
    for unit in ["", "k", "M", "G"] {
        if rest < thousand {
            let digits = if rest >= 100.0 || unit.is_empty() { 0 } else { 1 };
            return format!("{rest:.digits$}{unit}");
        }
        rest /= thousand;
    }
    format!("{rest:.0}T")
}

/// A time for people, of nanoseconds.
pub(crate) fn time(nanoseconds: u64) -> String {
    match nanoseconds {
        0..1_000 => format!("{nanoseconds}ns"),
        1_000..1_000_000 => format!("{:.1}us", nanoseconds as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1}ms", nanoseconds as f64 / 1e6),
        _ => format!("{:.1}s", nanoseconds as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use vfio_user_blk::config::SortBy;

    use super::*;
    use crate::top::rates::{self, tests::two};

    #[test]
    fn numbers_are_short() {
        for (number, thousand, written) in [
            (0.0, 1000.0, "0"),
            (999.4, 1000.0, "999"),
            (1234.0, 1000.0, "1.2k"),
            (234_567.0, 1000.0, "235k"),
            (7.81e6, 1000.0, "7.8M"),
            (1048576.0, 1024.0, "1.0M"),
            (5e15, 1000.0, "5000T"),
        ] {
            assert_eq!(scaled(number, thousand), written);
        }
        assert_eq!([0, 1500, 2_500_000, 3_000_000_000].map(time), ["0ns", "1.5us", "2.5ms", "3.0s"]);
    }

    #[test]
    fn a_table_has_titles_and_a_row_each() {
        let (before, now) = two();
        let text = text(&rates::rows(&before, &now, SortBy::Iops, true));
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 7);
        assert!(lines[0].starts_with("DEVICE     STATE   IOPS"), "{text}");
        assert!(lines[1].starts_with("b          in use  8.0k  31.2M"), "{text}");
        assert!(lines[2].starts_with("  queue 0          2.0k  7.8M"), "{text}");
        assert!(lines[1].ends_with("0.50     0.25     25.0"), "{text}");
        assert_eq!(printable("a\u{1b}[2Jb"), "a?[2Jb");
    }
}
