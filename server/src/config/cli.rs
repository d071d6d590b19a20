//! The command line.

use std::path::PathBuf;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use super::{BenchArgs, CtlArgs, DeviceConfig, DoctorArgs, ServerConfig, TopArgs};

/// Virtio block devices for QEMU and other vfio-user clients, served from user space
#[derive(Debug, Parser)]
#[command(version, about)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// The words that are understood.
    pub fn words() -> clap::Command {
        // A device needs its socket, here as anywhere; a server with a control socket needs no device.
        let instead =
            |socket: clap::Arg| socket.required(false).required_unless_present_any(["config", "control_socket"]);
        Self::command().mut_subcommand("serve", |serve| serve.mut_arg("socket_path", instead))
    }

    /// Understands the arguments of this process, or ends it with what is wrong with them.
    pub fn read() -> Self {
        Self::from_arg_matches(&Self::words().get_matches())
            .unwrap_or_else(|error| error.format(&mut Self::words()).exit())
    }
}

/// What to do
#[allow(clippy::large_enum_variant, reason = "there is only one of it")]
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve one device, or all devices of a configuration file, until SIGTERM or SIGINT
    Serve(ServeArgs),
    /// Put a load on a served disk, from user space and without a VM
    Bench(BenchArgs),
    /// Look at the devices of a running server and change them, by its control socket
    Ctl(CtlArgs),
    /// Show what the devices of a running server are doing, in a terminal
    Top(TopArgs),
    /// Say what is wrong with the devices of a running server, what is slow, and what to do about it
    Doctor(DoctorArgs),
    /// Read a configuration file and say what is wrong with it, or what it describes; opens nothing
    Check(CheckArgs),
    /// Print a script that completes this command's words in a shell
    Completions(CompletionsArgs),
    /// Print a manual page: vfio-user-blk man serve | man -l -
    Man(ManArgs),
}

/// What to serve
#[derive(Debug, Args)]
#[command(arg_required_else_help = true)]
pub struct ServeArgs {
    /// TOML file with a [[device]] table for each device, in place of the options below
    #[arg(long, value_name = "FILE", conflicts_with = "device")]
    pub config: Option<PathBuf>,

    /// What concerns the whole server
    #[command(flatten)]
    pub server: ServerConfig,

    /// The device
    #[command(flatten)]
    pub device: Option<DeviceConfig>,
}

/// What to check
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// TOML file with a [[device]] table for each device
    #[arg(value_name = "FILE")]
    pub config: PathBuf,
}

/// For whom
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

/// Which page
#[derive(Debug, Args)]
pub struct ManArgs {
    /// The command that it is of [default: the page that names all]
    #[arg(value_name = "COMMAND")]
    pub command: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SandboxMode;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::words().debug_assert();
    }

    #[test]
    fn a_device_or_a_file_but_not_both() {
        let parse = |arguments: &[&str]| {
            let found = Cli::words().try_get_matches_from(["vfio-user-blk", "serve"].iter().chain(arguments))?;
            Cli::from_arg_matches(&found).map(|cli| match cli.command {
                Command::Serve(serve) => serve,
                _ => panic!("not what was asked for"),
            })
        };
        let device = parse(&["--socket-path", "a", "--size", "64M", "--num-queues", "2"]).unwrap().device.unwrap();
        assert_eq!((device.num_queues(), device.size_or_default()), (2, 64 << 20));
        assert!(parse(&["--config", "a.toml", "--workers", "3"]).unwrap().device.is_none());
        let pinned = parse(&["--socket-path", "a", "--worker-cpus", "1,0", "--queue-workers", "1"]).unwrap();
        assert_eq!(pinned.server.worker_cpus.unwrap().as_slice(), [1, 0]);
        assert_eq!(pinned.device.unwrap().queue_workers.unwrap().as_slice(), [1]);
        assert!(parse(&["--config", "a.toml", "--queue-workers", "1"]).is_err(), "the file's devices say that");
        assert!(parse(&["--config", "a.toml", "--socket-path", "a"]).is_err());
        assert_eq!(parse(&["--config", "a.toml", "--sandbox", "off"]).unwrap().server.sandbox, Some(SandboxMode::Off));
        let allowed = parse(&["--socket-path", "a", "--allow-uid", "0", "--allow-uid", "107"]).unwrap().device.unwrap();
        assert_eq!(allowed.allow_uids, Some(vec![0, 107]));
        assert!(parse(&["--socket-path", "a", "--socket-mode", "rw"]).is_err());
        assert!(parse(&["--size", "64M"]).is_err(), "a device without a socket");
        assert!(parse(&["--workers", "2"]).is_err(), "nothing to serve");
        let none = parse(&["--control-socket", "a", "--control-allow", "b", "--control-allow", "c"]).unwrap();
        assert!(none.device.is_none() && none.server.control_allow().len() == 2);
        assert!(parse(&["--control-socket", "a", "--size", "64M"]).is_err(), "a device without a socket");
        let limited =
            parse(&["--socket-path", "a", "--limits", "iops=5", "--fabric", "25g-tor"]).unwrap().device.unwrap();
        assert_eq!(limited.rates, Some("iops=5".parse().unwrap()));
        assert_eq!(limited.fabric, Some("25g-tor".parse().unwrap()));
        assert!(parse(&["--control-socket", "a", "--socket-path", "b"]).unwrap().device.is_some());
        assert!(parse(&[]).is_err());
        assert!(parse(&["--socket-path", "a", "--size", "big"]).is_err());
    }
}
