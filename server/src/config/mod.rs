//! What the operator says: the same words on the command line and, with underscores, in a TOML file.

mod bench;
mod cli;
mod device;
mod file;
mod size;

pub use bench::{BenchArgs, CompletionMode, Kick, Workload};
pub use cli::{Cli, Command, ServeArgs};
pub use device::{Cache, DeviceConfig, Doorbell, InvalidDevice, PollPolicy, StoreKind};
pub use file::{ConfigFileError, ServerConfig};
pub use size::{Size, SizeError};
