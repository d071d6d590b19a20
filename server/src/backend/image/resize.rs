//! A larger size for a qcow2 image.
//!
//! A smaller one there is not: imago gives each part that is cut off a table of its own first, gigabytes of them where an image is
//! large and empty.
//!
//! imago makes an image larger by writing its header twice, with the place of a larger L1 table and with the size, and waits for
//! nothing in between. Here the header is held back meanwhile, and the file has the old one until all that the new one is going to
//! speak of is on stable storage: wherever it is cut off, the image has the size that it had, and all its blocks, or the new size,
//! and zeroes in what is new.
//!
//! What is new need not be zero by itself. The backing file may be longer than the image was; the last cluster may hold bytes
//! behind the old end, and so may others, since whoever makes an image smaller need not forget what he cuts off.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use imago::format::PreallocateMode;
use imago::{Mapping, Storage, StorageExt};

use super::Disk;
use super::chain::Image;
use super::layer_file::LayerFile;
use super::qcow2_header::{LEN_V2, MAX_L1};

/// Where the header has the size of the disk, 8 bytes.
const SIZE: Range<usize> = 24..32;

/// As much of a header as imago writes for another size: what version 2 has.
#[derive(Clone, Copy)]
struct Fields([u8; LEN_V2]);

impl Fields {
    fn read(file: &LayerFile) -> io::Result<Self> {
        let mut bytes = [0; LEN_V2];
        file.read(&mut bytes[..], 0)?;
        Ok(Self(bytes))
    }

    /// Of what [`LayerFile::let_go`] returned.
    fn of(held: &[u8]) -> io::Result<Self> {
        let bytes = held.first_chunk().ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(Self(*bytes))
    }

    fn write(&self, file: &LayerFile) -> io::Result<()> {
        file.write(&self.0[..], 0)
    }

    /// The same, but for the size.
    fn of_size(mut self, size: u64) -> Self {
        self.0[SIZE].copy_from_slice(&size.to_be_bytes());
        self
    }
}

impl Disk {
    /// Gives an image of `now` bytes `wanted` bytes, which are more. What is new reads as zeroes.
    ///
    /// # Errors
    /// If it cannot have that many; it has as many as before then.
    pub(super) fn resize(&self, now: u64, wanted: u64) -> io::Result<()> {
        let _watch = super::Watch(&self.half_done);
        let refused = |why: String| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        let Some(mark) = &self.mark else { return refused(format!("it is read-only, and has {now} bytes")) };
        if wanted < now {
            let why = "it gets no smaller while it is served; qemu-img resize --shrink makes it smaller when it is not";
            return refused(why.to_owned());
        }
        // An entry of the L1 table is of a cluster of entries, of which each is of a cluster.
        let reach = self.cluster_size.saturating_mul(self.cluster_size / 8).max(1);
        let most = (MAX_L1 / 8).saturating_mul(reach);
        if wanted > most {
            return refused(format!("with clusters of {} bytes an image has {most} bytes at most", self.cluster_size));
        }
        let mut image = self.alone();
        let grown = grow(&mut image, mark.file(), now, wanted);
        if grown.is_err() && image.resize_shrink(now).is_err() {
            // What its header has is not known: whoever opens it next is to look.
            self.half_done.store(true, Ordering::Relaxed);
        }
        grown
    }
}

fn grow(image: &mut Image, file: &LayerFile, now: u64, wanted: u64) -> io::Result<()> {
    // What it speaks of may be in memory only.
    image.flush()?;
    let before = Fields::read(file)?;
    file.hold_back(LEN_V2)?;
    let resized = image.resize_grow(wanted, PreallocateMode::None).and_then(|()| image.flush());
    let mut held = file.let_go();
    if resized.is_err() {
        // As the image takes it to be; it is made smaller again.
        file.write(&held[..], 0)?;
        return resized;
    }
    let after = Fields::of(&held)?;
    if let Some(fields) = held.first_chunk_mut() {
        *fields = before.0;
    }
    // The rest of their block, which may be more than the header.
    file.write(&held[..], 0)?;
    file.sync()?;
    // Clusters of the old table may be used again from here on.
    after.of_size(now).write(file)?;
    file.sync()?;
    if zero(image, now..wanted)? {
        image.flush()?;
        file.sync()?;
    }
    after.write(file)?;
    file.sync()
}

/// Makes zero what is not zero of a range; says whether there was any.
fn zero(image: &mut Image, range: Range<u64>) -> io::Result<bool> {
    let (mut at, mut any) = (range.start, false);
    while at < range.end {
        let (is_zero, len) = match image.get_mapping(at, range.end - at)? {
            (_, 0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            (mapping, len) => (matches!(mapping, Mapping::Zero { .. }), len),
        };
        if !is_zero {
            image.discard_to_zero(at, len)?;
            any = true;
        }
        at = at.saturating_add(len);
    }
    Ok(any)
}
