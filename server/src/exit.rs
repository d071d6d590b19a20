//! The statuses that the command exits with.

use anyhow::Error;
use vfio_user_blk::OpenError;
use vfio_user_blk::config::ConfigFileError;

/// Something failed at run time: a file, a socket, the storage.
const FAILURE: u8 = 1;
/// Words that are not understood; also what clap exits with.
const USAGE: u8 = 2;
/// The doctor has found something to mend.
const UNWELL: u8 = 3;
/// A configuration that makes no sense: sysexits.h's EX_CONFIG. Another try would end in the same way.
const CONFIG: u8 = 78;

/// What they mean, for the manual.
pub(crate) const MEANINGS: &[(&str, &str)] = &[
    (
        "0",
        "It did what it was asked for; for serve: it was told to stop, and all that was completed is on stable storage.",
    ),
    ("1", "Something failed at run time: a file, a socket, the storage, the other side."),
    ("2", "The command line is not understood."),
    (
        "3",
        "doctor: something is wrong, or slower than it could be; what, and what to do about it, is on standard output.",
    ),
    (
        "78",
        "The configuration makes no sense: the message says where, and what is allowed there. Starting again is no use.",
    ),
    ("130, 143", "A second SIGINT or SIGTERM ended it, without waiting for the storage."),
];

/// Words that clap takes, and that say nothing.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub(crate) &'static str);

/// What a doctor says at the end.
#[derive(Debug, thiserror::Error)]
#[error("{errors} error{}, {warnings} warning{}", if *.errors == 1 { "" } else { "s" }, if *.warnings == 1 { "" } else { "s" })]
pub(crate) struct Unwell {
    pub(crate) errors: usize,
    pub(crate) warnings: usize,
}

/// The status for an error.
pub(crate) fn status(error: &Error) -> u8 {
    let nonsense = matches!(
        error.downcast_ref(),
        Some(OpenError::Server(_) | OpenError::Invalid { .. } | OpenError::Inherited(_))
    );
    if error.is::<ConfigFileError>() || nonsense {
        CONFIG
    } else if error.is::<UsageError>() {
        USAGE
    } else if error.is::<Unwell>() {
        UNWELL
    } else {
        FAILURE
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use vfio_user_blk::Server;
    use vfio_user_blk::config::{DeviceConfig, ServerConfig};

    use super::*;

    #[test]
    fn a_configuration_that_makes_no_sense_is_told_from_one_that_cannot_be_had() {
        let file = ServerConfig::parse(Path::new("a.toml"), "workers = 0").unwrap_err();
        assert_eq!(status(&file.into()), CONFIG);
        let start = |change: fn(&mut DeviceConfig)| {
            let mut device = DeviceConfig::new("/no/such/folder/blk.sock");
            change(&mut device);
            status(&Server::start(&ServerConfig::new(vec![device])).map(drop).unwrap_err().into())
        };
        assert_eq!(start(|device| device.queue_size = Some(3)), CONFIG);
        assert_eq!(start(|_| {}), FAILURE);
        assert_eq!(status(&UsageError("what?").into()), USAGE);
        assert_eq!(status(&Unwell { errors: 0, warnings: 1 }.into()), UNWELL);
    }
}
