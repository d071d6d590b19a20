//! What a person or CI runs in this repository: `cargo xtask demo`, `cargo xtask test`.

mod bench;
mod demo;
mod fuzz;
mod guests;
mod models;
mod mutants;
mod test;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use testbed::{Progress, Testbed};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "What a person or CI runs in this repository.")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a disk to a Linux guest in QEMU, and show what the guest does with it.
    Demo(demo::Options),
    /// Run every check and every test, as CI does.
    Test,
    /// Boot every guest that QEMU can run from our disk or with it, and say which works.
    Guests(guests::Options),
    /// Measure the server beside what the machine could do and what others do.
    Bench(bench::Options),
    /// Show that no wakeup is lost: models under loom, the event index, a short stress.
    Models,
    /// Device and driver on two cores, until a wakeup is lost or all rounds are done.
    Stress {
        /// How many requests go there and back.
        #[arg(long, default_value_t = 10_000_000)]
        rounds: u64,
    },
    /// Weaken each ordering of the source, one at a time, and show that a test notices.
    Mutants(mutants::Options),
    /// Have a fuzzer look for inputs that break what guests, clients and operators may say.
    Fuzz(fuzz::Options),
    /// Fetch what demo and test need (QEMU, a guest) into ~/.cache/vfio-user-blk.
    Fetch,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Demo(options) => demo::run(&options).map(|()| ExitCode::SUCCESS),
        Command::Test => test::run(),
        Command::Guests(options) => guests::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Models => models::run(),
        Command::Stress { rounds } => models::stress(rounds),
        Command::Mutants(options) => mutants::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Fetch => Testbed::open(&Progress::stderr()).map(|testbed| {
            println!("ready: QEMU {}", testbed.qemu_version());
            ExitCode::SUCCESS
        }),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// The cargo that runs us.
fn cargo() -> std::process::Command {
    std::process::Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Runs this command again as it is measured: optimised, and the server with it.
fn run_optimised() -> Result<ExitCode> {
    let arguments = std::env::args_os().skip(1);
    let status = cargo()
        .args(["run", "--release", "--quiet", "--package", "xtask", "--"])
        .args(arguments)
        .status()
        .context("cannot run cargo")?;
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}
