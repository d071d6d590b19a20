//! The words of `ctl`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

use super::{DeviceConfig, FaultConfig, Size};

/// Where a server's control socket is expected, for those who do not say.
pub const DEFAULT_CONTROL_SOCKET: &str = "/run/vfio-user-blk/control.sock";

/// What to ask of a running server
#[derive(Clone, Debug, Args)]
pub struct CtlArgs {
    /// Control socket of the server
    #[arg(long, global = true, value_name = "PATH", default_value = DEFAULT_CONTROL_SOCKET)]
    pub socket: PathBuf,

    /// Print the server's answer as JSON
    #[arg(long, global = true)]
    pub json: bool,

    /// What to do
    #[command(subcommand)]
    pub command: CtlCommand,
}

/// What to do
#[allow(clippy::large_enum_variant, reason = "there is only one of it")]
#[derive(Clone, Debug, Subcommand)]
pub enum CtlCommand {
    /// Show the devices
    List,
    /// Serve one more device
    Add(DeviceConfig),
    /// Serve a device no longer: what it has completed is on stable storage then
    Remove(RemoveArgs),
    /// Change a device's size; its guest sees that at once
    Resize(ResizeArgs),
    /// Have a device take no requests: its guest sees a slow disk
    Pause(DeviceArgs),
    /// Have it take requests again
    Resume(DeviceArgs),
    /// Pause a device, and put what it has completed on stable storage: its image can be copied until it is resumed
    Drain(DeviceArgs),
    /// Show what a device's queues have done
    Statistics(DeviceArgs),
    /// Have them count anew; metrics go on as they were
    ResetStatistics(DeviceArgs),
    /// Have things go wrong with a device, on purpose
    Fault(FaultArgs),
    /// Stop the server, after what is in flight
    Stop,
    /// Show the versions of the server and of its control socket
    Version,
}

/// Which device
#[derive(Clone, Debug, Args)]
pub struct DeviceArgs {
    /// Its name, its socket, or the file name of that, with or without extension
    pub device: String,
}

/// Which device to remove
#[derive(Clone, Debug, Args)]
pub struct RemoveArgs {
    /// Its name, its socket, or the file name of that, with or without extension
    pub device: String,

    /// Even if a client is connected, whose guest then loses the disk
    #[arg(long)]
    pub force: bool,
}

/// How large a device is to be
#[derive(Clone, Debug, Args)]
pub struct ResizeArgs {
    /// Its name, its socket, or the file name of that, with or without extension
    pub device: String,

    /// The size, such as 20G [default: what its image or block device has by now]
    pub size: Option<Size>,

    /// Even if that is less than it has, and what lies beyond is lost
    #[arg(long)]
    pub shrink: bool,
}

/// What is to go wrong, or no more
#[derive(Clone, Debug, Args)]
pub struct FaultArgs {
    /// What to do
    #[command(subcommand)]
    pub command: FaultCommand,
}

/// What is to go wrong, or no more
#[allow(clippy::large_enum_variant, reason = "there is only one of it")]
#[derive(Clone, Debug, Subcommand)]
pub enum FaultCommand {
    /// Have one thing more go wrong
    Add(AddFaultArgs),
    /// Show what goes wrong, and how often it has
    List(DeviceArgs),
    /// Have one thing go wrong no more, or all; what it held goes on
    Remove(RemoveFaultArgs),
    /// Have what is stuck go on; what comes after may get stuck again
    Release(ReleaseFaultArgs),
    /// Have one thing go wrong now, once
    Trigger(TriggerFaultArgs),
}

/// What is to go wrong
#[derive(Clone, Debug, Args)]
pub struct AddFaultArgs {
    /// The device: its name, its socket, or the file name of that, with or without extension
    pub device: String,

    /// What is to go wrong with it
    #[command(flatten)]
    pub rule: FaultConfig,
}

/// What is to go wrong no more
#[derive(Clone, Debug, Args)]
pub struct RemoveFaultArgs {
    /// The device: its name, its socket, or the file name of that, with or without extension
    pub device: String,

    /// The fault's number, as fault list shows it
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub id: Option<u32>,

    /// All of them
    #[arg(long)]
    pub all: bool,
}

/// What is to go on
#[derive(Clone, Debug, Args)]
pub struct ReleaseFaultArgs {
    /// The device: its name, its socket, or the file name of that, with or without extension
    pub device: String,

    /// The number of the fault that holds it, as fault list shows it [default: all]
    pub id: Option<u32>,
}

/// What is to go wrong now
#[derive(Clone, Debug, Args)]
pub struct TriggerFaultArgs {
    /// The device: its name, its socket, or the file name of that, with or without extension
    pub device: String,

    /// What goes wrong
    #[arg(value_enum)]
    pub what: TriggerKind,

    /// Request queue whose interrupt it is, from 0 [default: all]
    #[arg(long, value_name = "N")]
    pub queue: Option<u16>,
}

/// What can go wrong by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum TriggerKind {
    /// The device needs a reset, and takes no requests until then
    NeedsReset,
    /// The client is disconnected
    CloseSession,
    /// An interrupt is sent for nothing
    SpuriousInterrupt,
}
