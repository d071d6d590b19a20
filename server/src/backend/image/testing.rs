//! Images for tests.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use imago::FormatCreateBuilder;
use imago::qcow2::{Qcow2, Qcow2CreateBuilder};

use super::layer_file::LayerFile;
use crate::config::SandboxMode;
use crate::sandbox::{Entrance, Sandbox};

/// A qcow2 image of so many bytes, with what else is asked for.
pub(super) fn qcow2(
    path: &Path,
    size: u64,
    change: impl FnOnce(Qcow2CreateBuilder<LayerFile>) -> Qcow2CreateBuilder<LayerFile>,
) -> PathBuf {
    let file = LayerFile::create(path).unwrap();
    change(Qcow2::create_builder(file).size(size)).create().unwrap();
    path.to_owned()
}

/// An image `image` above an image `middle` above a raw file `base`, all of zeroes.
pub(in crate::backend) fn backed(folder: &Path, size: u64) {
    File::create(folder.join("base")).unwrap().set_len(size).unwrap();
    qcow2(&folder.join("middle"), size, |image| image.backing("base".into(), "raw".into()));
    qcow2(&folder.join("image"), size, |image| image.backing("middle".into(), "qcow2".into()));
    assert!(fs::metadata(folder.join("image")).unwrap().len() > 0);
}

/// Takes the mark of an image that is open from a copy of it.
pub(in crate::backend) fn close(path: &Path) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0xff];
    file.read_exact_at(&mut byte, 79).unwrap();
    assert_eq!(byte, [1], "an image that is open to be written is marked");
    file.write_all_at(&[0], 79).unwrap();
}

/// The way into no sandbox.
pub(in crate::backend) fn open_entrance() -> Entrance {
    let entrance = Entrance::default();
    entrance.open(&Sandbox::new(SandboxMode::Off, &[], &[]).unwrap());
    entrance
}
