//! The words of `ctl`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

use super::{DeviceConfig, FabricChoice, FaultConfig, RateLimits, Size};
use crate::backend::power_cut::PowerCut;

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
    /// Have it take requests again, and send those again that its storage has failed
    Resume(DeviceArgs),
    /// Pause a device, and put what it has completed on stable storage: its image can be copied until it is resumed
    Drain(DeviceArgs),
    /// Write an overlay's changes into its base, which must be no other device's: the overlay is empty then, and the disk as before
    Commit(DeviceArgs),
    /// Forget an overlay's changes: the disk is its base again
    Discard(DiscardArgs),
    /// Show what a device's queues have done
    Statistics(DeviceArgs),
    /// Have them count anew; metrics go on as they were
    ResetStatistics(DeviceArgs),
    /// Set how fast a device may be used, at once, in place of the limits that it has
    SetLimits(SetLimitsArgs),
    /// Put a fabric between a device and its store, in place of what is there
    SetFabric(SetFabricArgs),
    /// Cut a device's power, which it was given power_cut for: its client is disconnected, and the next one finds what was
    /// flushed, and of the rest what survives
    PowerCut(PowerCutArgs),
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

/// Whose changes to forget
#[derive(Clone, Debug, Args)]
pub struct DiscardArgs {
    /// Its name, its socket, or the file name of that, with or without extension
    pub device: String,

    /// Even if a client is connected, whose guest then finds another disk under its feet
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

/// How fast a device may be used
#[derive(Clone, Debug, Args)]
pub struct SetLimitsArgs {
    /// Its name, its socket, or the file name of that, with or without extension
    pub device: String,

    /// none, or numbers such as iops=1000,bandwidth=100M, and read_iops, write_iops, read_bandwidth, write_bandwidth, iops_burst,
    /// bandwidth_burst; what is not named is without limit
    pub limits: RateLimits,
}

/// How far away a device's store is to seem
#[derive(Clone, Debug, Args)]
pub struct SetFabricArgs {
    /// Its name, its socket, or the file name of that, with or without extension
    pub device: String,

    /// none, 25g-tor, 100g-spine, cxl-pool, a [[fabric]] of the server's configuration file, or numbers such as
    /// round_trip=20us,jitter=2us,bandwidth=3G,credits=128
    pub fabric: FabricChoice,
}

/// Which device loses its power
#[derive(Clone, Debug, Args)]
pub struct PowerCutArgs {
    /// Its name, its socket, or the file name of that, with or without extension
    pub device: String,

    /// What becomes of completed writes that were not flushed
    #[arg(long, value_enum, default_value_t)]
    pub mode: PowerCut,

    /// Where the choice of what survives starts: the same writes and the same seed leave the same
    #[arg(long, value_name = "N", default_value_t)]
    pub seed: u64,
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
