//! What the operator says: the same words on the command line and, with underscores, in a TOML file.

mod bench;
mod cli;
mod ctl;
mod device;
mod fault;
mod file;
mod limits;
mod numbers;
mod overlay;
mod place;
mod sandbox;
mod server;
mod size;
mod socket;

pub use bench::{BenchArgs, CompletionMode, Kick, Switch, Workload};
pub use cli::{CheckArgs, Cli, Command, CompletionsArgs, ManArgs, ServeArgs};
pub use ctl::{
    AddFaultArgs, CtlArgs, CtlCommand, DEFAULT_CONTROL_SOCKET, DeviceArgs, FaultArgs, FaultCommand, ReleaseFaultArgs,
    RemoveArgs, RemoveFaultArgs, ResizeArgs, TriggerFaultArgs, TriggerKind,
};
pub use device::{Cache, DeviceConfig, Doorbell, InvalidDevice, PollPolicy, StoreKind};
pub use fault::{Decimal, FaultConfig, FaultKind, FaultOn, InvalidFault, Sectors, Wait};
pub use file::ConfigFileError;
pub use limits::ClientLimits;
pub use numbers::{NumberList, NumberListError};
pub use overlay::{InvalidOverlay, OverlayKind};
pub use sandbox::SandboxMode;
pub use server::{InvalidServer, ServerConfig};
pub use size::{Size, SizeError};
pub use socket::{SocketMode, SocketModeError};
