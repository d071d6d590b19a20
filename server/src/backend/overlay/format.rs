//! An overlay in a file.
//!
//! | bytes | what |
//! |---|---|
//! | 0 to 4096 | the header, written when the file is made and when it is emptied |
//! | from 4096 on | the map: two bits a sector, in words of 64 bits, the first sector lowest: 0 the base's, 1 zero, 2 the overlay's own |
//! | from the next multiple of 1 MiB on | the sectors, each where it is on the disk; the file ends with the disk |
//!
//! All numbers are little-endian. The header:
//!
//! | bytes | what |
//! |---|---|
//! | 0 | `VUB-COW\n` |
//! | 8 | 4 bytes: version, 1 |
//! | 12 | 4 bytes: bit 0 if the base has a time of modification, bit 1 while the overlay is committed, bit 2 while it is discarded |
//! | 16 | bytes of the disk |
//! | 24 | bytes of the base |
//! | 32 | the base's fingerprint |
//! | 40 | the time when the base was last changed: seconds since 1970, signed |
//! | 48 | and nanoseconds |
//! | 56 | FNV-1a of bytes 0 to 56 |
//!
//! The file is sparse: what was never written takes no room, of the map too.
//!
//! # What a crash leaves
//!
//! Sectors are written first, and the map, in which they are looked up, only by a flush or a durable write, after the sectors
//! have been put on stable storage: see `commit`. Words of the map are changed in place. Should a crash cut off a write of
//! several, then each that has arrived speaks of sectors that are there, and each that has not is as the flush before left it:
//! the flush that was cut off was never answered. Sectors that no map speaks of are left over from unflushed writes, and are
//! never looked at.
//!
//! An overlay that is committed is marked before its base is changed, and the mark goes with the last of its sectors: while it
//! is marked, base and overlay together are the disk, whatever of the overlay the base has already, and of the base only the
//! size is looked at: a base that is smaller than the disk is made as large first. One that is discarded is marked before the first of its sectors goes; what is found of it then is
//! discarded.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::base::{BaseIdentity, fnv};
use super::map::{Map, PAGE};
use super::{OverlayError, OverlayFailure};
use crate::backend::SECTOR;
use crate::backend::file::free;

const MAGIC: [u8; 8] = *b"VUB-COW\n";
const VERSION: u32 = 1;
const HEADER: u64 = 4096;
/// What the word of flags may have.
const MODIFIED: u32 = 1;
const COMMITTED: u32 = 2;
const DISCARDED: u32 = 4;
/// Where sectors start is a multiple of this, for file systems and devices that like large steps.
const ALIGNMENT: u64 = 1 << 20;
/// Bytes of the map that are read at a time.
const READ: usize = 256 * PAGE;

/// What a file's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Bytes of the disk.
    pub(super) capacity: u64,
    /// What it lies over.
    pub(super) base: BaseIdentity,
    /// What is being done to it as a whole.
    pub(super) fate: Fate,
}

/// What is being done to an overlay as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Fate {
    /// Nothing.
    #[default]
    Kept,
    /// It is written into its base.
    Committed,
    /// It is forgotten.
    Discarded,
}

impl Header {
    /// Where the map is.
    pub(super) const MAP: u64 = HEADER;

    /// Where the sectors are.
    pub(super) fn sectors(&self) -> u64 {
        let map = Map::pages_for(self.capacity) as u64 * PAGE as u64;
        (Self::MAP + map).next_multiple_of(ALIGNMENT)
    }

    /// Bytes of the file.
    fn file_len(&self) -> Option<u64> {
        self.sectors().checked_add(self.capacity)
    }

    fn encode(&self) -> Vec<u8> {
        let BaseIdentity { capacity, fingerprint, modified } = self.base;
        let (seconds, nanoseconds) = modified.unwrap_or_default();
        let mut bytes = Vec::with_capacity(HEADER as usize);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        let fate = match self.fate {
            Fate::Kept => 0,
            Fate::Committed => COMMITTED,
            Fate::Discarded => DISCARDED,
        };
        bytes.extend((u32::from(modified.is_some()) | fate).to_le_bytes());
        for number in [self.capacity, capacity, fingerprint, seconds.cast_unsigned(), nanoseconds.cast_unsigned()] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(fnv(&bytes).to_le_bytes());
        bytes.resize(HEADER as usize, 0);
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Self, OverlayFailure> {
        let number = |at: usize| {
            let bytes = bytes.get(at..).and_then(|bytes| bytes.first_chunk());
            bytes.map(|bytes| u64::from_le_bytes(*bytes)).ok_or(OverlayFailure::NotAnOverlay)
        };
        if !bytes.starts_with(&MAGIC) {
            return Err(OverlayFailure::NotAnOverlay);
        }
        let version = (number(8)? & u64::from(u32::MAX)) as u32;
        if version != VERSION {
            return Err(OverlayFailure::Version(version));
        }
        if bytes.get(..56).map(fnv) != Some(number(56)?) {
            return Err(OverlayFailure::Damaged);
        }
        let modified = (number(40)?.cast_signed(), number(48)?.cast_signed());
        let flags = (number(8)? >> 32) as u32;
        let modified = (flags & MODIFIED != 0).then_some(modified);
        let base = BaseIdentity { capacity: number(24)?, fingerprint: number(32)?, modified };
        let fate = match flags & !MODIFIED {
            0 => Fate::Kept,
            COMMITTED => Fate::Committed,
            DISCARDED => Fate::Discarded,
            _ => return Err(OverlayFailure::Damaged),
        };
        Ok(Self { capacity: number(16)?, base, fate })
    }

    /// Makes a file, which is there whole or not at all.
    pub(super) fn create(&self, path: &Path) -> Result<(), OverlayError> {
        let at = |path: &Path, action| {
            let path = path.to_owned();
            move |source| OverlayError { path, reason: OverlayFailure::System { action, source } }
        };
        let len = self.file_len().ok_or(io::ErrorKind::FileTooLarge.into()).map_err(at(path, "cannot make it"))?;
        let mut unfinished = path.as_os_str().to_owned();
        unfinished.push(".new");
        let unfinished = PathBuf::from(unfinished);
        let made = (|| {
            let file = OpenOptions::new().write(true).create(true).truncate(true).open(&unfinished)?;
            file.set_len(len)?;
            file.write_all_at(&self.encode(), 0)?;
            file.sync_all()?;
            // Refuses where another server was faster, in place of taking its file away.
            fs::hard_link(&unfinished, path)
        })();
        let removed = fs::remove_file(&unfinished);
        made.map_err(at(path, "cannot make it"))?;
        removed.map_err(at(&unfinished, "cannot remove it"))?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(at(folder, "cannot sync it"))
    }

    /// Writes it anew, onto stable storage: a sector, which is there whole or as it was.
    pub(super) fn rewrite(&self, file: &File) -> io::Result<()> {
        let bytes = self.encode();
        file.write_all_at(bytes.get(..SECTOR as usize).unwrap_or_default(), 0)?;
        file.sync_data()
    }

    /// Reads a file's header and checks that it lies over this base, and that the file is as long as it must be.
    pub(super) fn read(file: &File, len: u64, base: &BaseIdentity) -> Result<Self, OverlayFailure> {
        let mut bytes = [0; 64];
        file.read_exact_at(&mut bytes, 0).map_err(|_| OverlayFailure::NotAnOverlay)?;
        let header = Self::decode(&bytes)?;
        if header.fate == Fate::Committed {
            // Nobody knows what the base has by now. Its size is the one that it had, or, if it was smaller, that of the disk.
            let made = if base.capacity == header.capacity { base.capacity } else { header.base.capacity };
            BaseIdentity { capacity: made, ..*base }.check(base)?;
        } else {
            header.base.check(base)?;
        }
        if header.file_len() != Some(len) || header.capacity < base.capacity {
            return Err(OverlayFailure::Damaged);
        }
        Ok(header)
    }
}

/// Forgets the map, for good when this returns, and frees the sectors.
pub(super) fn forget(file: &File, header: &Header) -> io::Result<()> {
    let end = header.file_len().unwrap_or(u64::MAX);
    if !free(file, Header::MAP, end - Header::MAP) {
        // Where holes cannot be made, the map is what counts.
        let zeroes = vec![0; READ];
        let mut at = Header::MAP;
        while at < header.sectors() {
            let piece = zeroes.get(..READ.min((header.sectors() - at) as usize)).unwrap_or_default();
            file.write_all_at(piece, at)?;
            at += piece.len() as u64;
        }
    }
    file.sync_data()
}

/// Reads a map.
pub(super) fn load(file: &File, map: &Map, capacity: u64) -> Result<(), OverlayFailure> {
    let mut left = Map::pages_for(capacity) * PAGE;
    let mut buffer = vec![0; READ.min(left)];
    let (mut at, mut page) = (Header::MAP, 0);
    while left > 0 {
        let len = READ.min(left);
        let Some(pages) = buffer.get_mut(..len) else { break };
        let unread = |source| OverlayFailure::System { action: "cannot read its map", source };
        file.read_exact_at(pages, at).map_err(unread)?;
        for stored in pages.chunks(PAGE) {
            map.load_page(page, stored).map_err(|_| OverlayFailure::Damaged)?;
            page += 1;
        }
        at += len as u64;
        left -= len;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_understood_and_others_refused() {
        for modified in [None, Some((1_700_000_000, 999_999_999)), Some((-1, 0))] {
            let base = BaseIdentity { capacity: 4096, fingerprint: 7, modified };
            for fate in [Fate::Kept, Fate::Committed, Fate::Discarded] {
                let header = Header { capacity: 8192, base, fate };
                assert_eq!(Header::decode(&header.encode()).unwrap(), header);
            }
            let header = Header { capacity: 8192, base, fate: Fate::Kept };
            let bytes = header.encode();
            assert_eq!(bytes.len() as u64, HEADER);
            for at in 0..64 {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1;
                assert!(Header::decode(&damaged).is_err(), "byte {at}");
            }
            assert!(Header::decode(&bytes[..63]).is_err());
        }
    }
}
