//! NBD servers that know their clients by pre-shared keys: nbdkit and qemu-nbd, both with GnuTLS.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use client::BlockOptions;
use tempfile::TempDir;
use vfio_user_blk::config::DeviceConfig;

use crate::nbd::{Authority, Export, Kind, kill_under, start};
use crate::rig::{Rig, exercise};
use crate::workload::{Arena, Workload};

const ALICE: &str = "alice:6c6f6e6720656e6f75676820746f2062652061206b657920666f7220616c6963";
const QEMU: &str = "qemu:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

/// A folder with `keys.psk`, as QEMU wants to have it.
struct Keys(TempDir);

impl Keys {
    fn new(lines: &[&str]) -> Self {
        let keys = Self(tempfile::tempdir().unwrap());
        fs::write(keys.file(), lines.join("\n") + "\n").unwrap();
        fs::set_permissions(keys.file(), fs::Permissions::from_mode(0o600)).unwrap();
        keys
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("keys.psk")
    }

    fn nbdkit(&self, kind: Kind) -> Export {
        Export::with(kind, &["--tls=require".into(), format!("--tls-psk={}", self.file().display())])
    }

    /// By a priority string of GnuTLS's.
    fn qemu(&self, priority: &str) -> Export {
        let dir = self.0.path().display();
        let object = format!("tls-creds-psk,id=tls0,endpoint=server,dir={dir},priority={priority}");
        Export::with(Kind::QemuRaw, &["--object".into(), object, "--tls-creds".into(), "tls0".into()])
    }
}

/// A device of the user's, by the words of the configuration.
fn device(export: &Export, keys: &Keys, username: Option<&str>) -> DeviceConfig {
    DeviceConfig {
        nbd_uri: Some(export.uri().replace("nbd+unix", "nbds+unix").parse().unwrap()),
        nbd_tls_psk_file: Some(keys.file()),
        nbd_tls_username: username.map(str::to_owned),
        ..export.device(keys.0.path())
    }
}

fn rig(device: &DeviceConfig) -> Rig {
    Rig::devices(|folder| vec![DeviceConfig { socket_path: folder.join("blk.sock"), ..device.clone() }])
}

/// Each use of an export is of sectors that nobody has written: it is the so-manyth.
fn use_it(device: &DeviceConfig, number: u64) {
    let rig = rig(device);
    let mut machine = rig.boot_with(&BlockOptions { queues: 2, ..BlockOptions::default() });
    exercise(&mut machine.queues);
    let workload = Workload {
        first_sector: 8192 + number * 4096,
        requests: 1000,
        largest: 300,
        sectors: 4096,
        depth: 32,
        ..Workload::default()
    };
    workload.run(&mut machine.queues[0], &Arena::new(&machine.memory, &workload));
}

fn refusal(device: &DeviceConfig) -> String {
    start(device).map(drop).unwrap_err()
}

#[test]
fn a_key_is_all_that_it_takes() {
    let keys = Keys::new(&[ALICE, QEMU]);
    let nbdkit = keys.nbdkit(Kind::NbdkitMemory);
    use_it(&device(&nbdkit, &keys, Some("alice")), 0);
    // As libnbd has it.
    let uri = nbdkit.uri().replace("nbd+unix://", "nbds+unix://alice@");
    let uri = format!("{uri}&tls-psk-file={}", keys.file().display());
    use_it(&DeviceConfig { nbd_uri: Some(uri.parse().unwrap()), ..nbdkit.device(keys.0.path()) }, 1);
}

/// The priorities are those of the server: what it has to choose from is what we offer.
#[test]
fn qemu_takes_keys_by_all_that_is_offered() {
    let keys = Keys::new(&[ALICE, QEMU]);
    for priority in ["NORMAL", "NORMAL:-VERS-TLS1.3", "NORMAL:-VERS-TLS1.3:-CHACHA20-POLY1305"] {
        let qemu = keys.qemu(priority);
        use_it(&device(&qemu, &keys, None), 0);
        use_it(&device(&qemu, &keys, Some("alice")), 1);
    }
}

/// What would let others read along, later or at once, is not agreed to.
#[test]
fn suites_without_authenticated_data_are_refused() {
    let keys = Keys::new(&[QEMU]);
    for priority in ["NORMAL:-VERS-TLS1.3:-AEAD", "NORMAL:-VERS-ALL:+VERS-TLS1.1"] {
        let error = refusal(&device(&keys.qemu(priority), &keys, None));
        assert!(error.contains("does not take the key") && error.contains("TLS be 1.3"), "{priority}: {error}");
    }
}

#[test]
fn whoever_has_no_right_key_is_refused() {
    let keys = Keys::new(&[ALICE, QEMU]);
    let swapped = Keys::new(&[&ALICE.replace("6c", "6d"), "carol:0011"]);
    for export in [keys.nbdkit(Kind::NbdkitMemory), keys.qemu("NORMAL"), keys.qemu("NORMAL:-VERS-TLS1.3")] {
        let file = swapped.file().display().to_string();
        for user in ["alice", "carol"] {
            let error = refusal(&device(&export, &swapped, Some(user)));
            assert!(error.contains(&format!("does not take the key of \"{user}\" in {file}")), "{error}");
        }
        let error = refusal(&device(&export, &swapped, None));
        assert!(error.contains(&file) && error.contains("there is no key of \"qemu\""), "{error}");
        // It still serves others.
        let right = device(&export, &keys, None);
        exercise(&mut rig(&right).boot().queues);
    }
}

#[test]
fn a_server_without_the_key_is_refused() {
    let keys = Keys::new(&[QEMU]);
    let authority = Authority::new("localhost");
    let certificates = format!("--tls-certificates={}", authority.path().display());
    let export = Export::with(Kind::NbdkitMemory, &["--tls=require".into(), certificates]);
    let error = refusal(&device(&export, &keys, None));
    assert!(error.contains("shows a certificate"), "{error}");
    let plain = Export::with(Kind::NbdkitMemory, &[]);
    let error = refusal(&device(&plain, &keys, None));
    assert!(error.contains("has no TLS"), "{error}");
}

#[test]
fn a_killed_server_is_shown_the_key_again() {
    let keys = Keys::new(&[QEMU]);
    for mut export in [keys.nbdkit(Kind::NbdkitFile), keys.qemu("NORMAL")] {
        let rig = rig(&device(&export, &keys, None));
        kill_under(rig, &mut export);
    }
}
