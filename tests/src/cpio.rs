//! Writes an initramfs: a cpio archive in the `newc` format (the kernel's "initramfs buffer format"), of folders,
//! files and symbolic links that belong to root. Archives may follow each other in one initramfs.

use std::collections::BTreeSet;
use std::io::{self, Write};

/// An archive on its way into `out`. Paths are relative, without a `.`; the folders above an entry come by themselves.
pub(crate) struct Archive<W> {
    out: W,
    inodes: u32,
    folders: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, inodes: 0, folders: BTreeSet::new() }
    }

    pub(crate) fn folder(&mut self, path: &str) -> io::Result<()> {
        let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
        for folder in ends.filter_map(|end| path.get(..end)).filter(|folder| !folder.is_empty()) {
            if self.folders.insert(folder.to_owned()) {
                self.entry(folder, 0o040_755, &[])?;
            }
        }
        Ok(())
    }

    pub(crate) fn file(&mut self, path: &str, permissions: u32, data: &[u8]) -> io::Result<()> {
        self.parent(path)?;
        self.entry(path, 0o100_000 | permissions, data)
    }

    pub(crate) fn link(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.parent(path)?;
        self.entry(path, 0o120_777, target.as_bytes())
    }

    /// Ends the archive; the next one may follow in the same file.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn parent(&mut self, path: &str) -> io::Result<()> {
        path.rsplit_once('/').map_or(Ok(()), |(folder, _)| self.folder(folder))
    }

    fn entry(&mut self, path: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        let size = u32::try_from(data.len()).map_err(|_| io::Error::other(format!("{path}: larger than 4 GiB")))?;
        self.inodes += 1;
        let header = [
            self.inodes,
            mode,
            0, // uid
            0, // gid
            1, // links
            0, // mtime
            size,
            0, // the device of the file, major and minor
            0,
            0, // the device that the file is, major and minor
            0,
            path.len() as u32 + 1,
            0, // checksum, of another format
        ];
        write!(self.out, "070701")?;
        for field in header {
            write!(self.out, "{field:08x}")?;
        }
        self.out.write_all(path.as_bytes())?;
        // The name ends in a NUL; header and name, then the data, are padded to 4 bytes.
        self.pad(1, 6 + 8 * header.len() + path.len() + 1)?;
        self.out.write_all(data)?;
        self.pad(0, data.len())
    }

    fn pad(&mut self, nul: usize, length: usize) -> io::Result<()> {
        let padding = length.next_multiple_of(4) - length;
        self.out.write_all(&[0; 4][..nul + padding])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The entries as (path, mode, data), read back by the format's description.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        while !bytes.is_empty() {
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| {
                let digits = std::str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).unwrap();
                usize::from_str_radix(digits, 16).unwrap()
            };
            let (mode, size, name) = (field(1), field(6), field(11));
            let path = std::str::from_utf8(&bytes[110..110 + name - 1]).unwrap().to_owned();
            let data = (110 + name).next_multiple_of(4);
            entries.push((path, mode as u32, bytes[data..data + size].to_vec()));
            bytes = &bytes[(data + size).next_multiple_of(4)..];
        }
        entries
    }

    #[test]
    fn entries_are_aligned_and_folders_come_first_and_once() {
        let mut archive = Archive::new(Vec::new());
        archive.file("bin/tool", 0o755, b"12345").unwrap();
        archive.link("bin/other", "tool").unwrap();
        archive.file("init", 0o700, b"").unwrap();
        archive.folder("lib/modules").unwrap();
        let entries = read(&archive.finish().unwrap());
        let expected: [(&str, u32, &[u8]); 7] = [
            ("bin", 0o040_755, b""),
            ("bin/tool", 0o100_755, b"12345"),
            ("bin/other", 0o120_777, b"tool"),
            ("init", 0o100_700, b""),
            ("lib", 0o040_755, b""),
            ("lib/modules", 0o040_755, b""),
            ("TRAILER!!!", 0, b""),
        ];
        let expected: Vec<_> = expected.iter().map(|(p, m, d)| ((*p).to_owned(), *m, d.to_vec())).collect();
        assert_eq!(entries, expected);
    }
}
