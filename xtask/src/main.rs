//! What a person or CI runs in this repository: `cargo xtask demo`, `cargo xtask test`.

mod demo;
mod test;

use std::process::ExitCode;

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
    /// Fetch what demo and test need (QEMU, a guest) into ~/.cache/vfio-user-blk.
    Fetch,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Demo(options) => demo::run(&options).map(|()| ExitCode::SUCCESS),
        Command::Test => test::run(),
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
