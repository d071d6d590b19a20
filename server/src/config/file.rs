//! The configuration file.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::device::{DeviceConfig, InvalidDevice};

/// A whole server.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerConfig {
    /// Worker threads, at least 1; as many as there are processors if it is not said.
    #[serde(default)]
    pub workers: Option<usize>,
    /// The devices, at least one.
    #[serde(rename = "device", default)]
    pub devices: Vec<DeviceConfig>,
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigFileError {
    /// It cannot be read.
    #[error("{path}: cannot read it: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is not TOML, or has unknown or missing keys: with line and column.
    #[error("{path}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong where.
        source: Box<toml::de::Error>,
    },
    /// It names no device.
    #[error("{path}: there is no device in it; add a [[device]] table with a socket_path")]
    NoDevice {
        /// The file.
        path: PathBuf,
    },
    /// A device makes no sense.
    #[error("{path}: device {number} ({}): {source}", socket_path.display())]
    Device {
        /// The file.
        path: PathBuf,
        /// Which [[device]] table, from 1.
        number: usize,
        /// Its socket.
        socket_path: PathBuf,
        /// What is wrong with it.
        source: InvalidDevice,
    },
    /// Two devices want the same socket.
    #[error("{path}: device {number} has the socket_path {} of another device", socket_path.display())]
    SameSocket {
        /// The file.
        path: PathBuf,
        /// Which [[device]] table, from 1.
        number: usize,
        /// The socket.
        socket_path: PathBuf,
    },
    /// No threads.
    #[error("{path}: workers is 0; at least one thread must serve the queues")]
    NoWorkers {
        /// The file.
        path: PathBuf,
    },
}

impl ServerConfig {
    /// Reads a file and checks it.
    ///
    /// # Errors
    /// With the file, the place in it, and what is allowed there.
    pub fn read(path: &Path) -> Result<Self, ConfigFileError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigFileError::Read { path: path.to_owned(), source })?;
        Self::parse(path, &text)
    }

    /// Understands the text of a file; `path` is for the errors.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigFileError> {
        let path = || path.to_owned();
        let config: Self =
            toml::from_str(text).map_err(|source| ConfigFileError::Parse { path: path(), source: Box::new(source) })?;
        if config.workers == Some(0) {
            return Err(ConfigFileError::NoWorkers { path: path() });
        }
        if config.devices.is_empty() {
            return Err(ConfigFileError::NoDevice { path: path() });
        }
        let mut sockets = HashSet::new();
        for (number, device) in (1..).zip(&config.devices) {
            let socket_path = device.socket_path.clone();
            if let Err(source) = device.check() {
                return Err(ConfigFileError::Device { path: path(), number, socket_path, source });
            }
            if !sockets.insert(&device.socket_path) {
                return Err(ConfigFileError::SameSocket { path: path(), number, socket_path });
            }
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Cache, Doorbell, PollPolicy, Size, StoreKind};

    fn parse(text: &str) -> Result<ServerConfig, ConfigFileError> {
        ServerConfig::parse(Path::new("test.toml"), text)
    }

    #[test]
    fn every_word_is_understood() {
        let config = parse(
            r#"
            workers = 2
            [[device]]
            socket_path = "a.sock"
            store = "file"
            blk_file = "a.img"
            size = "1G"
            read_only = true
            num_queues = 2
            queue_size = 128
            serial = "A"
            cache = "none"
            fixed_buffers = true
            poll = "always"
            doorbell = "mapped"
            [[device]]
            socket_path = "b.sock"
            size = 1048576
            "#,
        )
        .unwrap();
        let mut first = DeviceConfig::new("a.sock");
        first.store = Some(StoreKind::File);
        first.blk_file = Some("a.img".into());
        first.size = Some(Size(1 << 30));
        first.read_only = true;
        first.num_queues = Some(2);
        first.queue_size = Some(128);
        first.serial = Some("A".into());
        first.cache = Some(Cache::None);
        first.fixed_buffers = true;
        first.poll = Some(PollPolicy::Always);
        first.doorbell = Some(Doorbell::Mapped);
        let mut second = DeviceConfig::new("b.sock");
        second.size = Some(Size(1 << 20));
        assert_eq!(config, ServerConfig { workers: Some(2), devices: vec![first, second] });
    }

    #[test]
    fn errors_name_the_place() {
        for (text, words) in [
            ("", "no device"),
            ("workers = 0", "workers is 0"),
            ("[[device]]", "socket_path"),
            ("[[device]]\nsocket_path = \"a\"\nsise = 1", "sise"),
            ("[[device]]\nsocket_path = \"a\"\nstore = \"flie\"", "line 3"),
            ("[[device]]\nsocket_path = \"a\"\nsize = \"big\"", "such as 512M"),
            ("[[device]]\nsocket_path = \"a\"\nsize = -1", "negative"),
            ("[[device]]\nsocket_path = \"a\"\nqueue_size = 3", "device 1 (a): queue_size is 3"),
            ("[[device]]\nsocket_path = \"a\"\n[[device]]\nsocket_path = \"a\"", "device 2"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with("test.toml: ") && error.contains(words), "{text:?} gave {error:?}");
        }
    }
}
