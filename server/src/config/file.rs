//! The configuration file.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::device::InvalidDevice;
use super::place;
use super::server::{InvalidServer, ServerConfig};

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
    /// There is nothing to serve, and nobody could add a device.
    #[error(
        "{path}: there is no device in it; add a [[device]] table with a socket_path, or a control_socket (--control-socket), by \
         which devices are added"
    )]
    NoDevice {
        /// The file.
        path: PathBuf,
    },
    /// A device makes no sense.
    #[error("{path}: line {line}: device {number} ({}): {source}", socket_path.display())]
    Device {
        /// The file.
        path: PathBuf,
        /// Where it is said, from 1.
        line: usize,
        /// Which [[device]] table, from 1.
        number: usize,
        /// Its socket.
        socket_path: PathBuf,
        /// What is wrong with it.
        source: InvalidDevice,
    },
    /// Two devices want the same socket.
    #[error("{path}: line {line}: device {number} has the socket_path {} of another device", socket_path.display())]
    SameSocket {
        /// The file.
        path: PathBuf,
        /// Where it is said, from 1.
        line: usize,
        /// Which [[device]] table, from 1.
        number: usize,
        /// The socket.
        socket_path: PathBuf,
    },
    /// What is said of the workers makes no sense.
    #[error("{path}: line {line}: {source}")]
    Server {
        /// The file.
        path: PathBuf,
        /// Where it is said, from 1.
        line: usize,
        /// What is wrong.
        source: InvalidServer,
    },
}

impl ServerConfig {
    /// Reads a file and checks it.
    ///
    /// # Errors
    /// With the file, the place in it, and what is allowed there.
    pub fn read(path: &Path) -> Result<Self, ConfigFileError> {
        Self::read_with(path, Self::default())
    }

    /// The same, to be served: with what `options` say of the workers and of the control socket, which come before the file.
    ///
    /// # Errors
    /// As [`read`](Self::read); and if there would be nothing to serve.
    pub fn read_to_serve(path: &Path, options: Self) -> Result<Self, ConfigFileError> {
        let config = Self::read_with(path, options)?;
        if config.devices.is_empty() && config.control_socket.is_none() {
            return Err(ConfigFileError::NoDevice { path: path.to_owned() });
        }
        Ok(config)
    }

    fn read_with(path: &Path, options: Self) -> Result<Self, ConfigFileError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigFileError::Read { path: path.to_owned(), source })?;
        Self::parse_with(path, &text, options)
    }

    /// Understands the text of a file; `path` is for the errors.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigFileError> {
        Self::parse_with(path, text, Self::default())
    }

    fn parse_with(path: &Path, text: &str, options: Self) -> Result<Self, ConfigFileError> {
        let path = || path.to_owned();
        let mut config: Self =
            toml::from_str(text).map_err(|source| ConfigFileError::Parse { path: path(), source: Box::new(source) })?;
        config.override_with(options);
        let mut sockets = HashSet::new();
        for (number, device) in (1..).zip(&config.devices) {
            let socket_path = device.socket_path.clone();
            let fabric = device.fabric.as_ref().map(|fabric| fabric.find(&config.fabrics)).transpose();
            if let Err(source) = device.check().and(fabric.map(drop).map_err(InvalidDevice::from)) {
                let line = place::line(text, Some(number), &source.to_string());
                return Err(ConfigFileError::Device { path: path(), line, number, socket_path, source });
            }
            if !sockets.insert(&device.socket_path) {
                let line = place::line(text, Some(number), "socket_path");
                return Err(ConfigFileError::SameSocket { path: path(), line, number, socket_path });
            }
        }
        config.check().map_err(|source| {
            let line = place::line(text, None, &source.to_string());
            ConfigFileError::Server { path: path(), line, source }
        })?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Cache, DeviceConfig, Doorbell, PollPolicy, SandboxMode, Size, StoreKind};

    fn parse(text: &str) -> Result<ServerConfig, ConfigFileError> {
        ServerConfig::parse(Path::new("test.toml"), text)
    }

    #[test]
    fn every_word_is_understood() {
        let config = parse(
            r#"
            workers = 2
            worker_cpus = [0, "1"]
            sqpoll = true
            sqpoll_idle = 5
            sqpoll_cpus = "2-3"
            sandbox = "off"
            control_socket = "control.sock"
            control_mode = "0660"
            control_allow = ["/srv/images"]
            metrics_address = "127.0.0.1:9100"
            metrics_remote = true
            metrics_socket = "metrics.sock"
            [[device]]
            socket_path = "a.sock"
            socket_mode = "0660"
            socket_group = "kvm"
            allow_uids = [0, 107]
            store = "file"
            blk_file = "a.img"
            size = "1G"
            read_only = true
            num_queues = 2
            queue_size = 128
            serial = "A"
            cache = "none"
            fixed_buffers = true
            iopoll = true
            queue_workers = [1, 0]
            poll = "always"
            doorbell = "mapped"
            packed = true
            in_order = false
            max_guest_memory = "64G"
            max_dma_maps = 1000
            max_fds = 20
            max_data_xfer_size = "64K"
            any_memory_file = true
            name = "root"
            fabric = "100g-spine"
            limits = { iops = 1000 }
            [[device]]
            socket_path = "b.sock"
            size = 1048576
            "#,
        )
        .unwrap();
        let mut first = DeviceConfig::new("a.sock");
        first.socket_mode = Some("0660".parse().unwrap());
        first.socket_group = Some("kvm".into());
        first.allow_uids = Some(vec![0, 107]);
        first.store = Some(StoreKind::File);
        first.blk_file = Some("a.img".into());
        first.size = Some(Size(1 << 30));
        first.read_only = true;
        first.num_queues = Some(2);
        first.queue_size = Some(128);
        first.serial = Some("A".into());
        first.cache = Some(Cache::None);
        first.fixed_buffers = true;
        first.iopoll = true;
        first.queue_workers = Some("1,0".parse().unwrap());
        first.poll = Some(PollPolicy::Always);
        first.doorbell = Some(Doorbell::Mapped);
        first.packed = Some(true);
        first.in_order = Some(false);
        first.max_guest_memory = Some(Size(64 << 30));
        first.max_dma_maps = Some(1000);
        first.max_fds = Some(20);
        first.max_data_xfer_size = Some(Size(64 << 10));
        first.any_memory_file = true;
        first.name = Some("root".into());
        first.fabric = Some("100g-spine".parse().unwrap());
        first.rates = Some("iops=1000".parse().unwrap());
        let mut second = DeviceConfig::new("b.sock");
        second.size = Some(Size(1 << 20));
        let expected = ServerConfig {
            workers: Some(2),
            worker_cpus: Some("0,1".parse().unwrap()),
            sqpoll: true,
            sqpoll_idle: Some(5),
            sqpoll_cpus: Some("2,3".parse().unwrap()),
            sandbox: Some(SandboxMode::Off),
            control_socket: Some("control.sock".into()),
            control_mode: Some("0660".parse().unwrap()),
            control_allow: Some(vec!["/srv/images".into()]),
            metrics_address: Some("127.0.0.1:9100".parse().unwrap()),
            metrics_remote: true,
            metrics_socket: Some("metrics.sock".into()),
            devices: vec![first, second],
            fabrics: vec![],
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn errors_name_the_place() {
        for (text, words) in [
            ("\nworkers = 0\n[[device]]\nsocket_path = \"a\"", "line 2: workers is 0"),
            ("worker_cpus = [\"0-\"]\n[[device]]\nsocket_path = \"a\"", "such as 0,2,4-7"),
            ("[[device]]", "socket_path"),
            ("[[device]]\nsocket_path = \"a\"\nsise = 1", "sise"),
            ("[[device]]\nsocket_path = \"a\"\nstore = \"flie\"", "line 3"),
            ("[[device]]\nsocket_path = \"a\"\nsize = \"big\"", "such as 512M"),
            ("[[device]]\nsocket_path = \"a\"\nsize = -1", "negative"),
            ("[[device]]\nsocket_path = \"a\"\nsocket_mode = \"rw\"", "octal"),
            ("[[device]]\nsocket_path = \"a\"\nsocket_mode = 660", "line 3"),
            ("sandbox = \"of\"\n[[device]]\nsocket_path = \"a\"", "line 1"),
            ("[[device]]\nsocket_path = \"a\"\nqueue_size = 3", "line 3: device 1 (a): queue_size is 3"),
            ("[[device]]\nsocket_path = \"a\"\n[[device]]\nsocket_path = \"a\"", "line 4: device 2"),
            ("[[device]]\nsocket_path = \"a\"\nstore = \"file\"", "line 3: device 1 (a): store"),
            ("[[device]]\nsocket_path = \"a\"\n[device.limits]\niops = 0", "line 3: device 1 (a): limits: iops is 0"),
            ("[[device]]\nsocket_path = \"a\"\nfabric = \"b\"", "line 3: device 1 (a): fabric \"b\" is not known"),
            ("[[device]]\nsocket_path = \"a\"\n[[fabric]]\nname = \"none\"\nround_trip = \"1s\"", "is taken"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with("test.toml: ") && error.contains(words), "{text:?} gave {error:?}");
        }
    }
}
