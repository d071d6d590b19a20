//! `cargo xtask bench`: how fast the server is, beside what the machine could do and what others do.
//!
//! ```text
//! plan       what is measured
//!  turns      side by side, some milliseconds each
//!  floors    what the machine itself can do
//!  servers   our server and the peers, one at a time, on a core of their own
//!   load     the driver: the same for all
//!   disk, vhost_user   how it is attached
//!  tenants   devices beside each other
//! ratios     of what was measured, and their bars
//! report     tables and plots
//! budget     `--check`: instructions, counted by callgrind
//! against    `--against`: two builds of the server
//! ```

mod against;
mod budget;
mod callgrind;
mod disk;
mod floors;
mod load;
mod plan;
mod plot;
mod ratios;
mod report;
mod servers;
mod tenants;
mod turns;
mod vhost_user;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use testbed::{Progress, Server, Tool};

use ratios::{Bar, Measured};
use servers::Place;

/// The load average from which a machine is not quiet.
const BUSY: f64 = 0.5;
/// Where servers run.
const SERVER_CPU: usize = 0;
/// Where drivers run.
const DRIVER_CPU: usize = 1;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Shorter measurements, on a smaller file
    #[arg(long)]
    quick: bool,
    /// Only what has one of these in its name; nothing is written to docs/performance.md then
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    only: Vec<String>,
    /// How often each is started and measured; the median counts
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=99))]
    rounds: u16,
    /// The folder of the file that is read and written [default: target/bench]
    #[arg(long, value_name = "PATH")]
    folder: Option<PathBuf>,
    /// Compare with another build of the server instead, in short turns
    #[arg(long, value_name = "PROGRAM", conflicts_with_all = ["check", "only"])]
    against: Option<PathBuf>,
    /// Count the instructions of a request instead, and fail if they are more than tests/budget.toml allows
    #[arg(long)]
    check: bool,
    /// Make what is counted the budget
    #[arg(long, requires = "check")]
    bless: bool,
    /// Print where the instructions go, by function
    #[arg(long, requires = "check")]
    profile: bool,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    if cfg!(debug_assertions) {
        return crate::run_optimised();
    }
    if options.check {
        return budget::check(options.bless, &options.only, options.profile);
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    ensure!(cores > DRIVER_CPU, "server and driver need a core each, and this machine has one");
    let progress = Progress::stderr();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize()?;
    let folder = std::path::absolute(options.folder.clone().unwrap_or_else(|| root.join("target/bench")))?;
    if let Some(other) = &options.against {
        return against::compare(other, &folder, &progress);
    }
    // Before the first round, so that no measurement waits for a download or a build.
    Tool::Fio.command(&progress)?;
    Tool::QemuStorageDaemon.command(&progress)?;
    Tool::Nbdkit.command(&progress)?;
    Server::build()?;

    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    if load.parse::<f64>().is_ok_and(|load| load > BUSY) {
        eprintln!(
            "warning: this machine is busy with other things, and the measurements will tell of them: load {load}"
        );
    }

    let duration = Duration::from_millis(if options.quick { 400 } else { 2000 });
    let sockets = tempfile::tempdir().context("cannot make a temporary folder")?;
    let chosen = |name: &str| is_chosen(name, &options.only);
    let file_size = if options.quick { 256 << 20 } else { 2 << 30 };
    let mut groups = plan::groups(file_size);
    groups.iter_mut().for_each(|group| group.subjects.retain(|subject| chosen(subject.name)));
    groups.retain(|group| !group.subjects.is_empty());
    let of_file = groups.iter().flat_map(|group| &group.subjects).any(plan::Subject::is_of_file);
    let file = test_file(&folder, if of_file { file_size } else { 0 }, &progress)?;
    let place = Place { folder: sockets.path().to_owned(), file: file.path().to_owned() };
    let rounds = usize::from(options.rounds);
    let results = plan::measure(&groups, &place, rounds, duration, &progress)?;
    let mut measured = ratios::ratios(&results);
    if chosen("instructions") {
        measured.push(one(
            "instructions a null 4 KiB request at depth 32",
            Bar::AtMost(300.0),
            budget::null_read()?,
            "",
        ));
    }
    if chosen("idle") {
        measured.extend(idle(&place, duration, &progress)?);
    }
    let machine = report::machine(rounds, duration.as_secs_f64())?;
    let tables = [
        machine + "\n",
        report::ratio_table(&measured),
        report::place_table(&results),
        report::value_table(&groups, &results),
    ]
    .join("\n");
    println!("{tables}");
    if options.only.is_empty() {
        let page = report::write(&root.join("docs"), &tables, &results)?;
        println!("written to {}", page.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether one of `only` is part of `name`, or everything is.
fn is_chosen(name: &str, only: &[String]) -> bool {
    only.is_empty() || only.iter().any(|part| name.contains(part.as_str()))
}

fn one(title: &str, bar: Bar, value: f64, unit: &'static str) -> Measured {
    Measured { title: title.to_owned(), bar: Some(bar), ratios: vec![value], unit }
}

fn idle(place: &Place, duration: Duration, progress: &Progress) -> Result<[Measured; 3]> {
    let step = progress.step("attaching a thousand devices");
    // The clock of processor time ticks every 10 ms.
    let idle = tenants::idle(place, duration * 5)?;
    step.done("done");
    Ok([
        one("CPU of 1,000 attached idle devices, of one core", Bar::AtMost(1.0), idle.cpu * 100.0, " %"),
        one("resident memory, server with one device", Bar::AtMost(12.0), idle.one_device / f64::from(1 << 20), " MiB"),
        one("each further idle device", Bar::AtMost(64.0), idle.further_device / 1024.0, " KiB"),
    ])
}

/// A file without holes, gone when this is dropped.
fn test_file(folder: &Path, size: u64, progress: &Progress) -> Result<tempfile::NamedTempFile> {
    let context = || format!("cannot make a file of {} MiB in {}", size >> 20, folder.display());
    std::fs::create_dir_all(folder).with_context(context)?;
    let mut temporary = tempfile::NamedTempFile::new_in(folder).with_context(context)?;
    let step = progress.step(format!("writing a file of {} MiB", size >> 20));
    let piece = vec![0xa5; 1 << 20];
    let file: &mut File = temporary.as_file_mut();
    for written in (0..size).step_by(piece.len()) {
        file.write_all(&piece).with_context(context)?;
        step.advance(written, size);
    }
    file.sync_all().with_context(context)?;
    step.done("done");
    Ok(temporary)
}
