//! Images for tests.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use imago::FormatCreateBuilder;
use imago::qcow2::{Qcow2, Qcow2CreateBuilder};

use super::layer_file::LayerFile;

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
