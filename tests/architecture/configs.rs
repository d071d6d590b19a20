//! Every example in configs/ is a configuration that the server takes.

#![allow(clippy::unwrap_used, reason = "a failure is the result of a test")]

use std::fs;
use std::path::PathBuf;

use vfio_user_blk::config::ServerConfig;

fn examples() -> Vec<PathBuf> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs");
    let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    paths
}

#[test]
fn every_example_is_understood() {
    let examples = examples();
    assert!(!examples.is_empty());
    for path in examples {
        let text = fs::read_to_string(&path).unwrap();
        let config = ServerConfig::parse(&path, &text).unwrap_or_else(|error| panic!("{error}"));
        assert!(text.starts_with("# "), "{}: it does not say what it is for", path.display());
        assert!(!config.devices.is_empty() || config.control_socket.is_some());
    }
}

/// An example from which a line was dropped or misspelt must not pass for one that works.
#[test]
fn a_misspelt_key_is_an_error_that_names_it() {
    for path in examples() {
        let text = fs::read_to_string(&path).unwrap().replacen("socket_path", "socket_pathh", 1);
        let error = ServerConfig::parse(&path, &text).unwrap_err().to_string();
        assert!(error.contains("socket_pathh") && error.contains("line"), "{error}");
    }
}
