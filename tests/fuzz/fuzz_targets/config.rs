//! The configuration file: any text is a server that makes sense, or an error that says where it does not.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use vfio_user_blk::config::{ServerConfig, Size};

fuzz_target!(|text: &str| {
    match ServerConfig::parse(Path::new("fuzz.toml"), text) {
        Ok(config) => {
            assert!(config.workers != Some(0));
            for (at, device) in config.devices.iter().enumerate() {
                assert_eq!(device.check(), Ok(()));
                let twins = config.devices.iter().skip(at + 1).filter(|other| other.socket_path == device.socket_path);
                assert_eq!(twins.count(), 0, "two devices on {}", device.socket_path.display());
            }
        }
        Err(error) => assert!(error.to_string().starts_with("fuzz.toml: "), "{error}"),
    }
    // A size stands in quotes in the file: its own words, without the file around them.
    if let Ok(size) = text.parse::<Size>() {
        assert!(size.0 == 0 || text.bytes().any(|byte| (b'1'..=b'9').contains(&byte)), "{text:?} is {size}");
    }
});
