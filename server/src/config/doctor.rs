//! The words of `doctor`.

use std::path::PathBuf;

use clap::Args;

use super::DEFAULT_CONTROL_SOCKET;

/// What to look at
#[derive(Clone, Debug, Args)]
pub struct DoctorArgs {
    /// Control socket of the server
    #[arg(long, value_name = "PATH", default_value = DEFAULT_CONTROL_SOCKET)]
    pub socket: PathBuf,

    /// Print what the server says of each device as JSON, an array
    #[arg(long)]
    pub json: bool,

    /// A device's name, its socket, or the file name of that, with or without extension [default: all devices]
    pub device: Option<String>,
}
