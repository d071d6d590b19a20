//! The cache folder: what was fetched once, for every later run and every clone.
//!
//! An entry is a folder named by a hash of its *manifest*, the text that says what it is made of, so that a changed
//! manifest is another entry. It is filled under a temporary name and renamed when it is whole: an entry that exists
//! is complete, whatever interrupted the run that made it. A lock on the folder lets one process fill it at a time.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::Progress;

/// How the names of folders end that are not whole yet.
const PARTIAL: &str = ".partial";

/// The folder `vfio-user-blk` in `$XDG_CACHE_HOME`, or in `~/.cache`.
#[derive(Debug)]
pub(crate) struct Cache {
    root: PathBuf,
}

impl Cache {
    pub(crate) fn open() -> Result<Self> {
        // The XDG specification wants a path that is not absolute to be ignored.
        let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let base = absolute("XDG_CACHE_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
            .context("no place for a cache: set XDG_CACHE_HOME or HOME to an absolute path")?;
        Self::at(base.join("vfio-user-blk"))
    }

    fn at(root: PathBuf) -> Result<Self> {
        fs::create_dir_all(&root).with_context(|| {
            format!("cannot create the cache folder {}: set XDG_CACHE_HOME to a writable folder", root.display())
        })?;
        Ok(Self { root })
    }

    /// The folder of the entry `name` with this `manifest`. If there is none yet, `build` fills an empty folder. `build`
    /// also gets a folder that outlives entries, for downloads that an interrupted run may leave half done.
    pub(crate) fn entry(
        &self,
        name: &str,
        manifest: &str,
        progress: &Progress,
        build: impl FnOnce(&Path, &Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let entry = self.root.join(format!("{name}-{:016x}", fnv1a(manifest.as_bytes())));
        if entry.is_dir() {
            return Ok(entry);
        }
        let _lock = self.lock(progress)?;
        if entry.is_dir() {
            return Ok(entry); // another process made it while we waited
        }
        self.remove_partial()?;
        let partial = tempfile::Builder::new()
            .suffix(PARTIAL)
            .tempdir_in(&self.root)
            .with_context(|| format!("cannot make a folder in {}", self.root.display()))?;
        build(partial.path(), &self.root.join("downloads"))?;
        fs::write(partial.path().join("manifest"), manifest).context("cannot write the manifest of a cache entry")?;
        fs::rename(partial.path(), &entry).with_context(|| format!("cannot rename to {}", entry.display()))?;
        Ok(entry)
    }

    /// Removes what interrupted runs have left, as far as it can: a child of theirs may be at its last write still, and
    /// a later run comes.
    fn remove_partial(&self) -> Result<()> {
        let context = || format!("cannot read {}", self.root.display());
        for entry in fs::read_dir(&self.root).with_context(context)? {
            let entry = entry.with_context(context)?;
            if entry.file_name().to_string_lossy().ends_with(PARTIAL) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        Ok(())
    }

    fn lock(&self, progress: &Progress) -> Result<Flock<File>> {
        let path = self.root.join("lock");
        let file = File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
        let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((file, Errno::EWOULDBLOCK)) => file,
            Err((_, error)) => bail!("cannot lock {}: {error}", path.display()),
        };
        let step = progress.step("waiting for another process to fill the cache");
        let lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .with_context(|| format!("cannot lock {}", path.display()))?;
        step.done("done");
        Ok(lock)
    }
}

/// FNV-1a, 64 bits: a name that is the same with every compiler, which std's hasher does not promise.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("cache")).unwrap();
        (dir, cache)
    }

    #[test]
    fn an_entry_is_built_once_for_each_manifest() {
        let (_dir, cache) = cache();
        let progress = Progress::silent();
        let build = |text: &'static str| move |dir: &Path, _: &Path| Ok(fs::write(dir.join("file"), text)?);
        let one = cache.entry("tree", "a b", &progress, build("one")).unwrap();
        let again = cache.entry("tree", "a b", &progress, |_, _| panic!("built twice")).unwrap();
        let two = cache.entry("tree", "a c", &progress, build("two")).unwrap();
        assert_eq!(one, again);
        assert_ne!(one, two);
        assert_eq!(fs::read_to_string(one.join("file")).unwrap(), "one");
        assert_eq!(fs::read_to_string(two.join("file")).unwrap(), "two");
        assert_eq!(fs::read_to_string(two.join("manifest")).unwrap(), "a c");
    }

    #[test]
    fn a_failed_build_leaves_nothing_and_an_interrupted_one_is_removed() {
        let (_dir, cache) = cache();
        let interrupted = cache.root.join("x.partial");
        fs::create_dir(&interrupted).unwrap();
        let progress = Progress::silent();
        let failed = cache.entry("tree", "a", &progress, |dir, _| {
            fs::write(dir.join("half"), "")?;
            bail!("the network went away")
        });
        assert!(failed.unwrap_err().to_string().contains("network"));
        let left: Vec<_> = fs::read_dir(&cache.root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["lock"]);
        assert!(cache.entry("tree", "a", &progress, |_, _| Ok(())).unwrap().is_dir());
    }

    #[test]
    fn builders_at_the_same_time_build_once() {
        let (_dir, cache) = cache();
        let builds = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let entry = cache.entry("tree", "a", &Progress::silent(), |dir, _| {
                        builds.fetch_add(1, Ordering::Relaxed);
                        Ok(fs::write(dir.join("file"), "whole")?)
                    });
                    assert_eq!(fs::read_to_string(entry.unwrap().join("file")).unwrap(), "whole");
                });
            }
        });
        assert_eq!(builds.into_inner(), 1);
    }

    #[test]
    fn fnv1a_is_the_published_function() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }
}
