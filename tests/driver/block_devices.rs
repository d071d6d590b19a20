//! Disks on block devices of the kernel's: loop devices, which need root.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use vfio_user_blk::Server;
use vfio_user_blk::config::{Cache, ServerConfig};

use crate::images::random_operations;
use crate::rig::{DISK, Rig, ram};

/// A loop device, for as long as this lives.
struct Loop {
    device: PathBuf,
}

impl Loop {
    /// One on a file, with sectors of so many bytes; `None` where there is none to be had, which is said.
    fn new(file: &Path, sector: u32) -> Option<Loop> {
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show", "--sector-size", &sector.to_string()]).arg(file);
        let why = match losetup.output() {
            Ok(output) if output.status.success() => {
                let device = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
                return Some(Loop { device });
            }
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => error.to_string(),
        };
        println!("cannot run: no loop device (losetup, as root): {why}");
        None
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("--detach").arg(&self.device).status();
        assert!(detached.is_ok_and(|status| status.success()), "{} is left", self.device.display());
    }
}

#[test]
fn a_disk_on_a_block_device_is_what_the_device_is() {
    for (seed, sector, cache) in [(8000, 512, Cache::None), (8100, 4096, Cache::None), (8200, 4096, Cache::Writeback)] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        File::create(&file).unwrap().set_len(DISK).unwrap();
        let Some(device) = Loop::new(&file, sector) else { return };
        let rig = Rig::devices(|folder| {
            let mut disk = ram(&folder.join("blk.sock"));
            (disk.size, disk.cache) = (None, Some(cache));
            disk.blk_file = Some(device.device.clone());
            vec![disk]
        });
        let mut machine = rig.boot();
        let config = machine.driver.config().unwrap();
        assert_eq!((config.capacity * 512, config.blk_size), (DISK, Some(sector)));

        let mut disk = vec![0; DISK as usize];
        random_operations(&mut machine.queues[0], &mut disk, seed, 1000);
        machine.queues[0].flush().unwrap();
        let mut stored = vec![0; DISK as usize];
        File::open(&file).unwrap().read_exact_at(&mut stored, 0).unwrap();
        assert!(stored == disk, "{sector}, {cache:?}");

        // What is given back is the device's, which gives it back to its file.
        for zeroes in [false, true] {
            let queue = &mut machine.queues[0];
            (0..DISK / 512).step_by(512).for_each(|at| queue.write(at, &[7; 1 << 18]).unwrap());
            queue.flush().unwrap();
            let full = fs::metadata(&file).unwrap().blocks();
            let sectors = (DISK / 512) as u32;
            if zeroes {
                queue.write_zeroes(0, sectors, true).unwrap()
            } else {
                queue.discard(0, sectors).unwrap()
            }
            queue.flush().unwrap();
            let left = fs::metadata(&file).unwrap().blocks();
            assert!(left < full / 4, "{zeroes}: {left} of {full} blocks are left");
        }

        // Nobody else may have it: neither another server nor what asks for it alone, as mount does.
        let alone = File::options().read(true).write(true).custom_flags(libc::O_EXCL).open(&device.device);
        assert_eq!(alone.unwrap_err().raw_os_error(), Some(libc::EBUSY));
        let mut second = ram(&folder.path().join("second.sock"));
        second.size = None;
        second.blk_file = Some(device.device.clone());
        let refused = Server::start(&ServerConfig::new(vec![second])).map(drop).unwrap_err().to_string();
        assert!(refused.contains("it is in use"), "{refused}");
        drop(machine);
        rig.stop();
    }
}
