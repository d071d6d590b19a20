//! Whether the server gives up what it does not need.

use clap::ValueEnum;
use serde::Deserialize;

/// Whether the server's threads enter the sandbox: docs/security.md says what that is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum SandboxMode {
    /// System calls, files and capabilities that serving does not need are given up
    #[default]
    On,
    /// Nothing is given up: for debuggers, profilers and other tools that work inside of the process
    Off,
}
