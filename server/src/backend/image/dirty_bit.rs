//! The mark of a qcow2 image that is being changed.
//!
//! imago keeps reference counts in memory longer than the tables that they count, so that those in the file can be wrong
//! when a server is killed, or the machine loses its power. Whoever took such an image for whole would give clusters away
//! that are in use. The format has a bit for that: it is set as long as the image is open to be written, so that an image
//! which was not closed is refused, here and by QEMU, until its counts have been made anew from the tables.

use std::io;

use imago::{Storage, StorageExt};

use super::layer_file::LayerFile;

/// The byte of the header (version 3) with the bit, and the bit.
const BYTE: u64 = 79;
const BIT: u8 = 1;

/// An image that is marked.
#[derive(Debug)]
pub(super) struct DirtyBit(LayerFile);

impl DirtyBit {
    /// Marks an image of version 3, on stable storage.
    pub(super) fn set(file: LayerFile) -> io::Result<Self> {
        let mark = Self(file);
        mark.change(|byte| byte | BIT)?;
        Ok(mark)
    }

    /// Takes the mark away. All that the image's reader has in memory is to be on stable storage before.
    pub(super) fn clear(&self) -> io::Result<()> {
        self.change(|byte| byte & !BIT)
    }

    /// The image's file.
    pub(super) fn file(&self) -> &LayerFile {
        &self.0
    }

    fn change(&self, change: impl FnOnce(u8) -> u8) -> io::Result<()> {
        let mut byte = [0];
        self.0.read(&mut byte[..], BYTE)?;
        let [old] = byte;
        self.0.write(&[change(old)][..], BYTE)?;
        self.0.sync()
    }
}
