//! The tables and plots, and where they go: docs/performance.md.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use testbed::{Progress, Tool};

use super::plan::{Group, Results, Unit};
use super::plot::{self, Row};
use super::ratios::{Bar, Measured, by_place, median};

/// Between these lines the text is ours, all other text of the file its writer's.
const BEGIN: &str = "<!-- written by cargo xtask bench: begin -->\n";
const END: &str = "<!-- written by cargo xtask bench: end -->";

/// The plots: file name, title, and the subjects by name with their labels, ours marked.
type Plot = (&'static str, &'static str, &'static [(&'static str, &'static str, bool)]);
const PLOTS: [Plot; 3] = [
    (
        "performance-null.svg",
        "null, 4 KiB reads, driver polling: requests a second",
        &[
            ("null-always-1", "depth 1: poll always", true),
            ("null-adaptive-1", "depth 1: poll adaptive", true),
            ("null-qsd-1", "depth 1: qemu-storage-daemon", false),
            ("null-always-32", "depth 32: poll always", true),
            ("null-adaptive-32", "depth 32: poll adaptive", true),
            ("null-qsd-32", "depth 32: qemu-storage-daemon", false),
        ],
    ),
    (
        "performance-event.svg",
        "null, 4 KiB reads, driver sleeping on eventfds: requests a second",
        &[
            ("null-event-1", "depth 1: poll adaptive", true),
            ("null-event-qsd-1", "depth 1: qemu-storage-daemon", false),
            ("null-event-32", "depth 32: poll adaptive", true),
            ("null-event-qsd-32", "depth 32: qemu-storage-daemon", false),
        ],
    ),
    (
        "performance-file.svg",
        "file, direct, random 4 KiB: requests a second",
        &[
            ("file-read-1", "read, depth 1: vfio-user-blk", true),
            ("file-read-fio-1", "read, depth 1: fio", false),
            ("file-read-32", "read, depth 32: vfio-user-blk", true),
            ("file-read-fio-32", "read, depth 32: fio", false),
            ("file-read-qsd-32", "read, depth 32: qemu-storage-daemon", false),
            ("file-write-1", "write, depth 1: vfio-user-blk", true),
            ("file-write-fio-1", "write, depth 1: fio", false),
            ("file-write-32", "write, depth 32: vfio-user-blk", true),
            ("file-write-fio-32", "write, depth 32: fio", false),
            ("file-write-qsd-32", "write, depth 32: qemu-storage-daemon", false),
        ],
    ),
];

/// The machine, in words: its processor, how many of them, its kernel, and what was measured beside us.
pub(super) fn machine(rounds: usize, seconds: f64) -> Result<String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").context("cannot read /proc/cpuinfo")?;
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name));
        line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim())
    };
    let model = field("model name").unwrap_or("unknown processor");
    let guest = field("flags").is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor"));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let progress = Progress::silent();
    let (fio, daemon) = (Tool::Fio.version(&progress)?, Tool::QemuStorageDaemon.version(&progress)?);
    Ok(format!(
        "{model}, {cores} cores{}, Linux {}; {fio}, {daemon}. The median of {rounds} rounds of {seconds} s each.",
        if guest { " of a virtual machine" } else { "" },
        kernel.trim()
    ))
}

/// The table of ratios.
pub(super) fn ratio_table(measured: &[Measured]) -> String {
    let mut text = "| measure | measured | lowest to highest | bar | |\n|---|---|---|---|---|\n".to_owned();
    for Measured { title, bar, ratios, unit } in measured {
        let (value, (low, high)) = (median(ratios), range(ratios));
        let (bar_text, verdict) = match bar {
            Some(bar @ Bar::AtMost(most)) => (format!("<= {most}{unit}"), bar.is_reached(value)),
            Some(bar @ Bar::AtLeast(least)) => (format!(">= {least}{unit}"), bar.is_reached(value)),
            None => (String::new(), true),
        };
        let verdict = match bar {
            Some(_) if verdict => "reached",
            Some(_) => "**missed**",
            None => "",
        };
        let spread = if ratios.len() > 1 { format!("{} to {}", short(low), short(high)) } else { String::new() };
        row(&mut text, &[title, &format!("{}{unit}", short(value)), &spread, &bar_text, verdict]);
    }
    text
}

/// The table of what was measured.
pub(super) fn value_table(groups: &[Group], results: &Results) -> String {
    let mut text = "| what | median | lowest to highest | time each |\n|---|---|---|---|\n".to_owned();
    for subject in groups.iter().flat_map(|group| &group.subjects) {
        let Some(values) = results.get(subject.name).map(|rounds| medians(rounds)) else { continue };
        let (value, (low, high)) = (median(&values), range(&values));
        let (shown, spread, time) = match subject.unit {
            Unit::Rate => (rate(value), format!("{} to {}", rate(low), rate(high)), duration(1e9 / value)),
            Unit::Nanoseconds => (duration(value), format!("{} to {}", duration(low), duration(high)), String::new()),
        };
        row(&mut text, &[&subject.title, &shown, &spread, &time]);
    }
    text
}

/// The table of requests that move no data, by where the two processors lay.
pub(super) fn place_table(results: &Results) -> String {
    let mut text = "| null, always polling | a cache line takes | of the turns | floor | a request | ratio |\n|---|---|---|---|---|---|\n".to_owned();
    for (title, rate, floor) in
        [("depth 1", "null-always-1", "null-floor-1"), ("depth 32", "null-always-32", "null-floor-32")]
    {
        for at in by_place(results, rate, floor) {
            let share = format!("{:.0} %", at.share * 100.0);
            row(&mut text, &[title, at.place, &share, &duration(at.floor), &duration(at.request), &short(at.ratio)]);
        }
    }
    text
}

/// Writes the tables and plots into `docs`.
pub(super) fn write(docs: &Path, tables: &str, results: &Results) -> Result<PathBuf> {
    let page = docs.join("performance.md");
    let mut block = tables.to_owned();
    for (file, title, bars) in PLOTS {
        let rows: Vec<Row> = bars
            .iter()
            .filter_map(|(name, label, ours)| {
                let values = medians(results.get(name)?);
                let (lowest, highest) = range(&values);
                Some(Row { label: (*label).to_owned(), median: median(&values), lowest, highest, ours: *ours })
            })
            .collect();
        let path = docs.join(file);
        fs::write(&path, plot::bars(title, &rows, rate)).with_context(|| format!("cannot write {}", path.display()))?;
        block.push_str(&format!("\n![{title}]({file})\n"));
    }
    let text = fs::read_to_string(&page).with_context(|| format!("cannot read {}", page.display()))?;
    let text = replaced(&text, &block)
        .with_context(|| format!("{} has lost the lines between which the tables go", page.display()))?;
    fs::write(&page, text).with_context(|| format!("cannot write {}", page.display()))?;
    Ok(page)
}

/// `text` with `block` between the marks.
fn replaced(text: &str, block: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{block}\n{END}{after}"))
}

fn row(text: &mut String, cells: &[&str]) {
    // Writing to a String cannot fail.
    let _infallible = writeln!(text, "| {} |", cells.join(" | "));
}

/// The median of each round.
fn medians(rounds: &[Vec<f64>]) -> Vec<f64> {
    rounds.iter().map(|turns| median(turns)).collect()
}

fn range(values: &[f64]) -> (f64, f64) {
    values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(*value), high.max(*value)))
}

fn short(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

/// Requests a second.
fn rate(value: f64) -> String {
    match value {
        1e6.. => format!("{:.2} M", value / 1e6),
        1e3.. => format!("{:.1} k", value / 1e3),
        _ => format!("{value:.0}"),
    }
}

/// Nanoseconds.
fn duration(value: f64) -> String {
    if value >= 1000.0 { format!("{:.2} us", value / 1000.0) } else { format!("{value:.0} ns") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_marks_changes() {
        let text = format!("before\n{BEGIN}old\n{END}\nafter");
        let new = replaced(&text, "new").unwrap();
        assert_eq!(new, format!("before\n{BEGIN}\nnew\n{END}\nafter"));
        assert_eq!(replaced(&new, "new").unwrap(), new);
        assert_eq!(replaced("no marks", "new"), None);
    }

    #[test]
    fn the_page_has_the_marks() {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/performance.md");
        assert!(replaced(&fs::read_to_string(page).unwrap(), "").is_some());
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!([rate(7_810_000.0), rate(14_800.0), rate(90.0)], ["7.81 M", "14.8 k", "90"]);
        assert_eq!([duration(167.4), duration(60_000.0)], ["167 ns", "60.00 us"]);
    }
}
