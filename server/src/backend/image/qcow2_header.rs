//! What a qcow2 image says of itself (QEMU's docs/interop/qcow2.txt), and whether it can be true.
//!
//! The reader of the format trusts the image with the sizes of the tables that it reads into memory, and with where they are.
//! Here it is made sure of first, with QEMU's limits.

use std::path::{Path, PathBuf};

use imago::StorageExt;

use super::chain::LayerFormat;
use super::error::ImageFailure;
use super::layer_file::LayerFile;
use crate::backend::SECTOR;

const MAGIC: u32 = 0x5146_49fb;
/// Bytes of the header of version 2, and of what version 3 has at least.
pub(super) const LEN_V2: usize = 72;
const LEN_V3: usize = 104;
/// Of clusters, from 512 bytes to 2 MiB.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Bytes of the longest name of a backing file.
const MAX_NAME: u32 = 1023;
/// Bytes of the largest tables.
pub(super) const MAX_L1: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
/// The most header extensions that are looked at; there are five kinds.
const MAX_EXTENSIONS: usize = 64;
/// The extension that names the format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// Bits of what a reader must know to read the image.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
/// The rest of them that have names.
const INCOMPATIBLE: [(u64, &str); 3] =
    [(1 << 2, "an external data file"), (1 << 3, "another compression than zlib"), (1 << 4, "extended L2 entries")];

/// Where entries of tables point, without their flags.
const L1_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const REFCOUNT_OFFSET: u64 = 0xffff_ffff_ffff_fe00;

/// What is needed of a header.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Bytes of the disk.
    pub(super) size: u64,
    /// Bytes.
    pub(super) cluster_size: u32,
    /// 2 or 3.
    pub(super) version: u32,
    pub(super) backing: Option<(PathBuf, LayerFormat)>,
}

fn damaged<T>(what: impl Into<String>) -> Result<T, ImageFailure> {
    Err(ImageFailure::Damaged(what.into()))
}

/// Bytes of a file, read as numbers.
struct Bytes(Vec<u8>);

impl Bytes {
    /// As many as there are, up to `len`; zeroes behind the end of the file.
    fn read(file: &LayerFile, offset: u64, len: usize) -> Result<Self, ImageFailure> {
        let mut bytes = vec![0; len];
        file.read(bytes.as_mut_slice(), offset).map_err(ImageFailure::Format)?;
        Ok(Self(bytes))
    }

    fn u32(&self, at: usize) -> u32 {
        let bytes = self.0.get(at..).and_then(|bytes| bytes.first_chunk());
        bytes.map_or(0, |bytes| u32::from_be_bytes(*bytes))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at)) << 32 | u64::from(self.u32(at.saturating_add(4)))
    }
}

impl Header {
    /// Reads the header and the two tables that it points to, and checks them.
    pub(super) fn read(file: &LayerFile) -> Result<Self, ImageFailure> {
        let header = Bytes::read(file, 0, LEN_V3)?;
        if header.u32(0) != MAGIC {
            return Err(ImageFailure::NotQcow2);
        }
        let (version, bits) = (header.u32(4), header.u32(20));
        let least = if version == 3 { LEN_V3 } else { LEN_V2 };
        if file.len() < least as u64 {
            return damaged(format!("the file ends within its header, after {} bytes", file.len()));
        }
        if !(2..=3).contains(&version) {
            return Err(ImageFailure::Unsupported(format!("version {version} of the format")));
        }
        if !CLUSTER_BITS.contains(&bits) {
            return damaged(format!("its clusters cannot have 2^{bits} bytes"));
        }
        match header.u32(32) {
            0 => {}
            method => return Err(ImageFailure::Unsupported(format!("encryption (method {method})"))),
        }
        if version == 3 {
            features(header.u64(72))?;
            let (order, len) = (header.u32(96), header.u32(100));
            if order > 6 {
                return damaged(format!("its reference counts cannot have 2^{order} bits"));
            }
            if u64::from(len) > 1 << bits || (len as usize) < LEN_V3 {
                return damaged(format!("its header cannot have {len} bytes"));
            }
        }
        let (size, cluster) = (header.u64(24), 1u64 << bits);
        check_size(size)?;
        let l1 = Table { name: "L1 table", at: header.u64(40), len: u64::from(header.u32(36)) * 8, mask: L1_OFFSET };
        if l1.len > MAX_L1 {
            return damaged(format!("its L1 table cannot have {} entries", l1.len / 8));
        }
        // Each of its entries is of a table with a cluster of entries.
        if u128::from(l1.len / 8) * u128::from(cluster / 8) * u128::from(cluster) < u128::from(size) {
            return damaged(format!("its L1 table has {} entries, too few for {size} bytes", l1.len / 8));
        }
        l1.check(file, cluster)?;
        let len = u64::from(header.u32(56)) << bits;
        if len > MAX_REFCOUNT_TABLE || len == 0 {
            return damaged(format!("its refcount table cannot have {} clusters", header.u32(56)));
        }
        Table { name: "refcount table", at: header.u64(48), len, mask: REFCOUNT_OFFSET }.check(file, cluster)?;
        let extensions = if version == 2 { LEN_V2 as u64 } else { u64::from(header.u32(100)) };
        let backing = backing(file, &header, extensions, cluster)?;
        Ok(Self { size, cluster_size: cluster as u32, version, backing })
    }
}

/// What no reader may pass over.
fn features(incompatible: u64) -> Result<(), ImageFailure> {
    if incompatible & CORRUPT != 0 {
        return Err(ImageFailure::Corrupt);
    }
    if incompatible & DIRTY != 0 {
        return Err(ImageFailure::Dirty);
    }
    if let Some((_, name)) = INCOMPATIBLE.iter().find(|(bit, _)| incompatible & bit != 0) {
        return Err(ImageFailure::Unsupported((*name).to_owned()));
    }
    match incompatible {
        0 => Ok(()),
        unknown => Err(ImageFailure::Unsupported(format!("features that came later (bits {unknown:#x})"))),
    }
}

/// Of a disk.
pub(super) fn check_size(size: u64) -> Result<(), ImageFailure> {
    use crate::backend::file::OpenFailure;
    match size {
        0 => Err(OpenFailure::Empty.into()),
        size if !size.is_multiple_of(SECTOR) => {
            Err(ImageFailure::Unsupported(format!("a disk of {size} bytes, which is no multiple of 512")))
        }
        _ => Ok(()),
    }
}

/// A table of places in the file.
struct Table {
    name: &'static str,
    at: u64,
    /// Bytes.
    len: u64,
    /// The bits of an entry that are a place.
    mask: u64,
}

impl Table {
    fn check(&self, file: &LayerFile, cluster: u64) -> Result<(), ImageFailure> {
        let Self { name, at, len, mask } = self;
        if !at.is_multiple_of(cluster) || at.checked_add(*len).is_none_or(|end| end > file.len()) || *at == 0 {
            return damaged(format!("its {name} cannot be at {at:#x}"));
        }
        let entries = Bytes::read(file, *at, usize::try_from(*len).unwrap_or_default())?;
        for index in 0..entries.0.len() / 8 {
            let entry = entries.u64(index * 8);
            let place = entry & mask;
            if place != 0 && (!place.is_multiple_of(cluster) || place >= file.len()) {
                return damaged(format!("entry {index} of its {name} cannot point to {place:#x}"));
            }
        }
        Ok(())
    }
}

/// The name and the format of the backing file, if there is one.
fn backing(
    file: &LayerFile,
    header: &Bytes,
    mut at: u64,
    cluster: u64,
) -> Result<Option<(PathBuf, LayerFormat)>, ImageFailure> {
    let (place, len) = (header.u64(8), header.u32(16));
    if place == 0 || len == 0 {
        return Ok(None);
    }
    if len > MAX_NAME || place.saturating_add(len.into()) > cluster {
        return damaged("the name of its backing file cannot be there");
    }
    let name = Bytes::read(file, place, len as usize)?.0;
    let Ok(name) = String::from_utf8(name) else {
        return damaged("the name of its backing file is no text");
    };
    for _ in 0..MAX_EXTENSIONS {
        let head = Bytes::read(file, at, 8)?;
        let (kind, len) = (head.u32(0), head.u32(4));
        let start = at.saturating_add(8);
        if kind == 0 {
            break;
        }
        at = start.saturating_add(u64::from(len).next_multiple_of(8));
        if at > cluster {
            return damaged("its header does not end");
        }
        if kind == BACKING_FORMAT {
            let format = Bytes::read(file, start, len as usize)?.0;
            let format = String::from_utf8_lossy(&format).into_owned();
            return Ok(Some((backing_path(&name)?, LayerFormat::named(&format)?)));
        }
    }
    Err(ImageFailure::BackingFormat { name })
}

/// The file that a name means, which may be one of QEMU's other ways to name something.
fn backing_path(name: &str) -> Result<PathBuf, ImageFailure> {
    let path = name.strip_prefix("file:").unwrap_or(name);
    // What stands before a colon is a protocol, unless a slash comes first.
    match path.split_once(':') {
        Some((protocol, _)) if !protocol.contains('/') => Err(ImageFailure::Backing(format!("{name:?}"))),
        _ => Ok(Path::new(path).to_owned()),
    }
}
