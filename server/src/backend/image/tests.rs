//! Images that cannot be served, and chains of those that can. What requests do is tested by the contract's suite, and
//! against QEMU's tools in the test bed.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use imago::StorageExt;
use proptest::prelude::*;

use super::layer_file::LayerFile;
use super::testing::{open_entrance, qcow2};
use super::*;
use crate::backend::contract::Rig;
use crate::backend::uring::Waker;

const MIB: u64 = 1 << 20;

fn options(path: &Path) -> ImageOptions {
    let path = path.to_owned();
    ImageOptions { path, format: Format::Qcow2, read_only: false, cache: Cache::Writeback, size: None }
}

fn open(options: &ImageOptions) -> Result<ImageStore, ImageError> {
    ImageStore::open(options, &open_entrance())
}

fn refusal(options: &ImageOptions) -> ImageError {
    open(options).map(drop).unwrap_err()
}

/// An image of 1 MiB, and its folder.
fn image() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = qcow2(&dir.path().join("image"), MIB, |image| image);
    (dir, path)
}

/// Writes bytes into a file.
fn patch(path: &Path, at: u64, bytes: &[u8]) {
    File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

fn number(path: &Path, at: u64) -> u64 {
    let mut bytes = [0; 8];
    File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
    u64::from_be_bytes(bytes)
}

fn rig(store: &ImageStore) -> Rig {
    Rig::on(store, |waker: &Waker| Uring::without_kernel(waker))
}

#[test]
fn an_image_is_closed_and_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    for cache in [Cache::None, Cache::Writeback] {
        let sized = ImageOptions { size: Some(MIB), cache, ..options(&path) };
        let store = open(&sized).unwrap();
        let info = store.info();
        assert_eq!((info.capacity, info.optimal_io_size, info.read_only, info.discard), (MIB, 65536, false, true));
        rig(&store).write(4096, &[7; 4096], false);
        assert_eq!(number(&path, 72), 1, "it is open");
        drop(store);
        assert_eq!(number(&path, 72), 0, "it is closed");
        let reading = ImageOptions { read_only: true, cache, ..options(&path) };
        let store = open(&reading).unwrap();
        assert!(store.info().read_only && !store.info().discard);
        assert_eq!(rig(&store).read(4096, 4096), [7; 4096]);
        // To be read it may be open more than once.
        drop(open(&reading).unwrap());
        assert_eq!(number(&path, 72), 0);
        drop(store);
        let other = refusal(&ImageOptions { size: Some(2 * MIB), ..options(&path) });
        assert!(matches!(other.reason, ImageFailure::File(OpenFailure::SizeDiffers { .. })), "{other}");
        assert_eq!(number(&path, 72), 0, "it was not opened");
    }
}

/// Whoever opens it at any moment finds the old size, or the new one with all that it needs.
#[test]
fn the_size_in_the_file_changes_once_for_all() {
    let (_dir, path) = image();
    let store = open(&options(&path)).unwrap();
    let over = AtomicBool::new(false);
    let sizes = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let file = File::open(&path).unwrap();
            let mut sizes = vec![MIB];
            while !over.load(Ordering::Relaxed) {
                let mut bytes = [0; 8];
                file.read_exact_at(&mut bytes, 24).unwrap();
                let size = u64::from_be_bytes(bytes);
                if sizes.last() != Some(&size) {
                    sizes.push(size);
                }
            }
            sizes
        });
        for times in 2..40 {
            assert_eq!(store.resize(Some(times * MIB)).unwrap(), times * MIB);
        }
        over.store(true, Ordering::Relaxed);
        watcher.join().unwrap()
    });
    assert!(sizes.is_sorted(), "{sizes:?}");
    drop(store);
    assert_eq!(open(&options(&path)).unwrap().info().capacity, 39 * MIB);
}

#[test]
fn what_is_held_back_is_read_and_not_in_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, [1; 200]).unwrap();
    let file = LayerFile::open(&path, Access::Exclusive, false).unwrap();
    file.hold_back(72).unwrap();
    file.write(&[2; 10][..], 60).unwrap();
    file.write(&[3; 20][..], 70).unwrap();
    let in_file = |from: usize, to: usize| fs::read(&path).unwrap()[from..to].to_vec();
    assert_eq!(in_file(0, 72), [1; 72]);
    assert_eq!(in_file(72, 90), [3; 18], "behind it");
    let mut all = [0; 200];
    file.read(&mut all[..], 0).unwrap();
    let new = [vec![1; 60], vec![2; 10], vec![3; 20], vec![1; 110]].concat();
    assert_eq!(all[..], new);
    let mut some = [0; 4];
    file.read(&mut some[..], 69).unwrap();
    assert_eq!(some, [2, 3, 3, 3]);
    assert_eq!(file.let_go(), new[..72]);
    assert_eq!(in_file(0, 72), [1; 72]);
    file.read(&mut some[..], 69).unwrap();
    assert_eq!(some, [1, 1, 1, 3], "as the file has it");
}

#[test]
fn files_that_are_no_images_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let told = |change: fn(&mut ImageOptions)| {
        let mut options = options(&path);
        change(&mut options);
        let error = refusal(&options);
        assert!(error.to_string().starts_with(&path.display().to_string()), "{error}");
        error.reason
    };
    assert!(matches!(told(|_| {}), ImageFailure::Missing));
    assert!(matches!(told(|options| (options.size, options.read_only) = (Some(MIB), true)), ImageFailure::Missing));
    assert!(matches!(told(|options| options.size = Some(513)), ImageFailure::File(OpenFailure::Size(513))));
    assert!(!path.exists());
    fs::write(&path, [0; 4096]).unwrap();
    assert!(told(|_| {}).to_string().contains("store = \"file\""));
    fs::write(&path, []).unwrap();
    assert!(matches!(told(|_| {}), ImageFailure::NotQcow2));
    let vmdk = |options: &mut ImageOptions| (options.format, options.read_only) = (Format::Vmdk, true);
    assert!(matches!(told(vmdk), ImageFailure::Format(_)));
    assert!(matches!(told(|options| options.format = Format::Vmdk), ImageFailure::ReadOnlyFormat));
    // QEMU's usual kind of VMDK.
    fs::write(&path, [b"KDMV".as_slice(), &[0; 508]].concat()).unwrap();
    assert!(told(vmdk).to_string().contains("sparse"), "{}", told(vmdk));
}

#[test]
fn what_an_image_needs_and_we_have_not_is_named() {
    type Case = (u64, &'static [u8], fn(&ImageFailure) -> bool, &'static str);
    let cases: [Case; 16] = [
        (4, &[0, 0, 0, 4], |reason| matches!(reason, ImageFailure::Unsupported(_)), "version 4"),
        (4, &[0, 0, 0, 2], |reason| matches!(reason, ImageFailure::OldVersion), "compat=1.1"),
        (72 + 7, &[1], |reason| matches!(reason, ImageFailure::Dirty), "check -r all"),
        (72 + 7, &[3], |reason| matches!(reason, ImageFailure::Corrupt), "corrupt"),
        (72 + 7, &[4], |reason| matches!(reason, ImageFailure::Unsupported(_)), "external data file"),
        (72 + 7, &[8], |reason| matches!(reason, ImageFailure::Unsupported(_)), "zlib"),
        (72 + 7, &[16], |reason| matches!(reason, ImageFailure::Unsupported(_)), "extended L2"),
        (72, &[0x80], |reason| matches!(reason, ImageFailure::Unsupported(_)), "0x8000000000000000"),
        (35, &[2], |reason| matches!(reason, ImageFailure::Unsupported(_)), "encryption (method 2)"),
        (20, &[0, 0, 0, 8], |reason| matches!(reason, ImageFailure::Damaged(_)), "2^8"),
        (20, &[0, 0, 0, 200], |reason| matches!(reason, ImageFailure::Damaged(_)), "2^200"),
        (96, &[0, 0, 0, 7], |reason| matches!(reason, ImageFailure::Damaged(_)), "2^7 bits"),
        (96, &[0xff; 4], |reason| matches!(reason, ImageFailure::Damaged(_)), "bits"),
        (36, &[0xff; 4], |reason| matches!(reason, ImageFailure::Damaged(_)), "L1 table cannot have"),
        (56, &[0xff; 4], |reason| matches!(reason, ImageFailure::Damaged(_)), "refcount table cannot have"),
        (24, &[0x7f, 0xff, 0, 0], |reason| matches!(reason, ImageFailure::Damaged(_)), "too few"),
    ];
    for (at, bytes, expected, words) in cases {
        let (_dir, path) = image();
        patch(&path, at, bytes);
        let error = refusal(&options(&path));
        assert!(expected(&error.reason) && error.to_string().contains(words), "{at}, {bytes:?}: {error}");
    }
}

#[test]
fn tables_must_lie_in_the_file() {
    let (l1, refcounts) = (40, 48);
    let mut refused = 0;
    for (header, garbage) in [
        (l1, 0),
        (l1, 65537),
        (l1, 1 << 40),
        (l1, u64::MAX << 16),
        (refcounts, 0),
        (refcounts, 512),
        (refcounts, 1 << 56),
    ] {
        let (_dir, path) = image();
        patch(&path, header, &u64::to_be_bytes(garbage));
        assert!(matches!(refusal(&options(&path)).reason, ImageFailure::Damaged(_)), "{header}: {garbage:#x}");
        refused += 1;
    }
    for (header, garbage) in [(l1, (1 << 63) | 512), (l1, 1 << 40), (refcounts, 512), (refcounts, 1 << 40)] {
        let (_dir, path) = image();
        patch(&path, number(&path, header), &u64::to_be_bytes(garbage));
        let error = refusal(&options(&path));
        assert!(error.to_string().contains("entry 0 of its"), "{header}: {garbage:#x}: {error}");
        refused += 1;
    }
    assert_eq!(refused, 11);
}

#[test]
fn a_file_that_was_cut_off_is_refused() {
    let (dir, path) = image();
    rig(&open(&options(&path)).unwrap()).write(0, &[1; 65536], true);
    let bytes = fs::read(&path).unwrap();
    for len in [1, 4, 71, 72, 103, 104, 4096, 65536, 65537, 131_072] {
        let cut = dir.path().join("cut");
        fs::write(&cut, &bytes[..len]).unwrap();
        for read_only in [false, true] {
            let error = refusal(&ImageOptions { read_only, ..options(&cut) });
            assert!(matches!(error.reason, ImageFailure::NotQcow2 | ImageFailure::Damaged(_)), "{len}: {error}");
        }
    }
}

#[test]
fn a_chain_says_which_of_its_files_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    let above = |name: &str, backing: &str, format: &str| {
        let _ = fs::remove_file(file(name));
        qcow2(&file(name), MIB, |image| image.backing(backing.into(), format.into()))
    };
    let top = above("top", "base", "raw");
    let error = refusal(&options(&top));
    assert!(matches!(error.reason, ImageFailure::PartMissing), "{error}");
    assert_eq!((&error.path, &error.child), (&file("base"), &Some(top.clone())));
    assert!(error.to_string().contains("base (named by"), "{error}");

    // An absolute name, and QEMU's way to say that it is a file.
    fs::write(file("base"), vec![9; MIB as usize]).unwrap();
    for name in ["base".to_owned(), "file:base".to_owned(), file("base").display().to_string()] {
        let store = open(&options(&above("top", &name, "raw"))).unwrap();
        assert_eq!(rig(&store).read(0, 512), [9; 512]);
    }
    for (name, format) in [("nbd://host/disk", "raw"), ("json:{}", "raw"), ("base", "vhdx")] {
        let error = refusal(&options(&above("top", name, format)));
        assert!(matches!(error.reason, ImageFailure::Backing(_)), "{error}");
    }

    // Without a format: the kind of the extension is changed, so that there is none that says it.
    let top = above("top", "base", "raw");
    let bytes = fs::read(&top).unwrap();
    let at = bytes.windows(4).position(|bytes| bytes == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    patch(&top, at as u64, &[0x12, 0x34, 0x56, 0x78]);
    assert!(matches!(refusal(&options(&top)).reason, ImageFailure::BackingFormat { .. }));
}

#[test]
fn a_chain_ends() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: String| dir.path().join(name);
    let above = |name: String, backing: String| {
        qcow2(&file(name), MIB, |image| image.backing(backing, "qcow2".into()));
    };
    above("own".into(), "own".into());
    above("one".into(), "other".into());
    above("other".into(), "one".into());
    for name in ["own", "one"] {
        let error = refusal(&options(&file(name.into())));
        assert!(matches!(error.reason, ImageFailure::Loop), "{error}");
    }
    // As many as there may be, and one more.
    qcow2(&file("0".into()), MIB, |image| image);
    let last = chain::MAX_LAYERS;
    (1..=last).for_each(|n| above(n.to_string(), (n - 1).to_string()));
    let store = open(&options(&file((last - 1).to_string()))).unwrap();
    assert_eq!(rig(&store).read(0, 512), [0; 512]);
    drop(store);
    assert!(matches!(refusal(&options(&file(last.to_string()))).reason, ImageFailure::TooDeep(_)));
}

#[test]
fn all_of_a_chain_is_locked() {
    let dir = tempfile::tempdir().unwrap();
    super::testing::backed(dir.path(), MIB);
    let file = |name: &str| options(&dir.path().join(name));
    let store = open(&file("image")).unwrap();
    assert!(matches!(refusal(&file("image")).reason, ImageFailure::File(OpenFailure::Busy)));
    assert!(matches!(refusal(&file("middle")).reason, ImageFailure::File(OpenFailure::Busy)));
    drop(open(&ImageOptions { read_only: true, ..file("middle") }).unwrap());
    // Two images on one below them.
    let other = qcow2(&dir.path().join("other"), MIB, |image| image.backing("middle".into(), "qcow2".into()));
    drop(open(&options(&other)).unwrap());
    drop(store);
    drop(open(&file("middle")).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// An image with a few bytes of its tables and its header changed is refused or served: requests end, with an error or
    /// without, and take the process nowhere.
    #[test]
    fn garbage_in_an_image_is_survived(
        changes in prop::collection::vec((prop_oneof![0u64..120, 0u64..5 * 4096], any::<u64>(), 1usize..9), 1..6),
        offset in 0u64..240,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = qcow2(&dir.path().join("image"), MIB, |image| image.cluster_size(4096));
        rig(&open(&options(&path)).unwrap()).write(0, &[1; 65536], false);
        for (at, bytes, len) in changes {
            patch(&path, at, &bytes.to_be_bytes()[..len.min(8)]);
        }
        for read_only in [true, false] {
            let Ok(store) = open(&ImageOptions { read_only, ..options(&path) }) else { continue };
            let mut rig = rig(&store);
            let capacity = store.info().capacity;
            let at = (offset * 4096).min(capacity.saturating_sub(8192));
            let at = at - at % 512;
            let len = (capacity - at).min(8192);
            let mut ops = vec![Op::Read { offset: at }];
            if !read_only {
                ops.push(Op::Write { offset: at, durable: true });
                ops.push(Op::WriteZeroes { offset: at, len, unmap: true, durable: false });
                ops.push(Op::Discard { offset: at, len });
            }
            ops.push(Op::Flush);
            for op in ops {
                let moves = matches!(op, Op::Read { .. } | Op::Write { .. });
                let buffers = if moves { rig.guest.buffers(&[(0, len)]) } else { Default::default() };
                // Any answer will do.
                let _ = rig.one(op, buffers).result;
            }
        }
    }
}
