//! What the operator says: the same words on the command line and, with underscores, in a TOML file.

mod bench;
mod cli;
mod ctl;
mod device;
mod doctor;
mod fabric;
mod fault;
mod file;
mod limits;
mod nbd_tls;
mod numbers;
mod on_error;
mod overlay;
mod place;
mod rates;
mod sandbox;
mod server;
mod size;
mod socket;
mod top;

pub use bench::{BenchArgs, CompletionMode, Kick, Switch, Workload};
pub use cli::{CheckArgs, Cli, Command, CompletionsArgs, ManArgs, ServeArgs};
pub use ctl::{
    AddFaultArgs, CtlArgs, CtlCommand, DEFAULT_CONTROL_SOCKET, DeviceArgs, DiscardArgs, FaultArgs, FaultCommand,
    PowerCutArgs, ReleaseFaultArgs, RemoveArgs, RemoveFaultArgs, ResizeArgs, SetFabricArgs, SetLimitsArgs,
    TriggerFaultArgs, TriggerKind,
};
pub use device::{Cache, DeviceConfig, Doorbell, InvalidDevice, PollPolicy, StoreKind};
pub use doctor::DoctorArgs;
pub use fabric::{Delay, FabricChoice, FabricConfig, InvalidFabric};
pub use fault::{Decimal, FaultConfig, FaultKind, FaultOn, InvalidFault, Sectors, Wait};
pub use file::ConfigFileError;
pub use limits::ClientLimits;
pub use nbd_tls::InvalidNbdTls;
pub use numbers::{NumberList, NumberListError};
pub use on_error::{InvalidOnError, OnError};
pub use overlay::{InvalidOverlay, OverlayKind};
pub use rates::{InvalidRates, RateLimits};
pub use sandbox::SandboxMode;
pub use server::{InvalidServer, ServerConfig};
pub use size::{Size, SizeError};
pub use socket::{SocketMode, SocketModeError};
pub use top::{SortBy, TopArgs};
