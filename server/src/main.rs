//! The command `vfio-user-blk`.

mod bench;
mod ctl;
mod doctor;
mod exit;
mod journal;
mod manual;
mod service;
mod top;

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::thread;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vfio_user_blk::config::{CheckArgs, Cli, Command, ServeArgs, ServerConfig};
use vfio_user_blk::{InheritedSockets, Server};

fn main() -> ExitCode {
    let cli = Cli::read();
    let log = journal::Log::start();
    let result = match cli.command {
        Command::Serve(arguments) => serve(arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Ctl(arguments) => ctl::run(&arguments),
        Command::Top(arguments) => top::run(&arguments),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Check(arguments) => check(&arguments),
        Command::Completions(arguments) => manual::completions(arguments.shell),
        Command::Man(arguments) => manual::page(arguments.command.as_deref()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log.end(&explain(&error));
            ExitCode::from(exit::status(&error))
        }
    }
}

/// An error and its causes, each once: some errors tell their cause themselves, others leave that to us.
fn explain(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| match text.is_empty() {
        true => cause,
        false if text.contains(&cause) => text,
        false => format!("{text}: {cause}"),
    })
}

fn serve(arguments: ServeArgs) -> Result<()> {
    let config = match (arguments.config, arguments.device) {
        (Some(path), None) => ServerConfig::read_to_serve(&path, arguments.server)?,
        (None, device) if device.is_some() || arguments.server.control_socket.is_some() => {
            let mut config = ServerConfig::new(device.into_iter().collect());
            config.override_with(arguments.server);
            config
        }
        _ => {
            return Err(exit::UsageError(
                "there is nothing to serve; give --socket-path PATH, --config FILE or --control-socket PATH",
            )
            .into());
        }
    };
    let sockets = InheritedSockets::of_environment().map_err(vfio_user_blk::OpenError::from)?;
    // Before the first thread, so that none of them is interrupted in its place.
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("cannot handle signals")?;
    let server = Server::start_on(&config, sockets)?;
    announce(&server).context("cannot write to standard output")?;
    let manager = service::ServiceManager::of_environment();
    manager.ready(server.devices().count());
    let (stop, sandbox) = (server.stop_handle(), server.sandbox());
    thread::Builder::new().name("signals".into()).spawn(move || {
        sandbox.enter();
        let mut stopping = false;
        for signal in signals.forever() {
            if stopping {
                log::warn!("stopping without waiting for the storage");
                std::process::exit(128 + signal);
            }
            stopping = true;
            log::info!("stopping; a second signal stops at once");
            manager.stopping();
            stop.stop();
        }
    })?;
    // The last of all threads; nothing but waiting is left.
    server.sandbox().enter();
    Ok(server.join()?)
}

/// Reads a configuration as `serve` would, and opens nothing that is in it.
fn check(arguments: &CheckArgs) -> Result<()> {
    let path = &arguments.config;
    let config = ServerConfig::read(path)?;
    let mut out = io::stdout().lock();
    let plural = |number: usize| if number == 1 { "" } else { "s" };
    let (devices, workers) = (config.devices.len(), config.workers());
    let (s, t) = (plural(devices), plural(workers));
    writeln!(out, "{}: fine: {devices} device{s}, {workers} worker{t}", path.display())?;
    for device in &config.devices {
        writeln!(out, "  {} ({})", device.socket_path.display(), vfio_user_blk::describe(device))?;
    }
    Ok(out.flush()?)
}

/// Says what is served where, and how QEMU attaches it.
fn announce(server: &Server) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for (path, description) in server.devices() {
        writeln!(out, "listening on {} ({description})", path.display())?;
        writeln!(out, "  attach it with: -device '{}'", qemu_device(&path))?;
    }
    writeln!(out, "QEMU (10.1 or newer) must share the guest's memory, once for all devices:")?;
    writeln!(out, "  -object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem")?;
    out.flush()
}

/// The JSON that QEMU's -device takes. A quote in the path would end the shell's.
fn qemu_device(path: &Path) -> String {
    let device = serde_json::json!({
        "driver": "vfio-user-pci",
        "socket": { "type": "unix", "path": path.to_string_lossy() },
    });
    device.to_string().replace('\'', "'\\''")
}
