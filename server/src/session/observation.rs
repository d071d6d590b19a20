//! What a session knows of its client and of the driver, told to operators who ask what is wrong.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use serde::Serialize;
use vfio_user::{Capabilities, Version};
use virtio::memory::MemoryFile;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_IN_ORDER, VIRTIO_F_IOMMU_PLATFORM,
    VIRTIO_F_RING_PACKED, VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::attendance::Attendance;
use super::negotiation::MAX_MSG_FDS;

/// The features by the names of the specification (virtio 1.3, sections 6 and 5.2.3).
const FEATURES: &[(u32, &str)] = &[
    (VIRTIO_BLK_F_SIZE_MAX, "BLK_SIZE_MAX"),
    (VIRTIO_BLK_F_SEG_MAX, "BLK_SEG_MAX"),
    (VIRTIO_BLK_F_RO, "BLK_RO"),
    (VIRTIO_BLK_F_BLK_SIZE, "BLK_BLK_SIZE"),
    (VIRTIO_BLK_F_FLUSH, "BLK_FLUSH"),
    (VIRTIO_BLK_F_TOPOLOGY, "BLK_TOPOLOGY"),
    (VIRTIO_BLK_F_CONFIG_WCE, "BLK_CONFIG_WCE"),
    (VIRTIO_BLK_F_MQ, "BLK_MQ"),
    (VIRTIO_BLK_F_DISCARD, "BLK_DISCARD"),
    (VIRTIO_BLK_F_WRITE_ZEROES, "BLK_WRITE_ZEROES"),
    (VIRTIO_RING_F_INDIRECT_DESC, "INDIRECT_DESC"),
    (VIRTIO_RING_F_EVENT_IDX, "EVENT_IDX"),
    (VIRTIO_F_VERSION_1, "VERSION_1"),
    (VIRTIO_F_IOMMU_PLATFORM, "ACCESS_PLATFORM"),
    (VIRTIO_F_RING_PACKED, "RING_PACKED"),
    (VIRTIO_F_IN_ORDER, "IN_ORDER"),
    (VIRTIO_F_RING_RESET, "RING_RESET"),
];

/// The bits of the device status (section 2.1).
const STATUS: &[(u32, &str)] = &[
    (VIRTIO_CONFIG_S_ACKNOWLEDGE, "ACKNOWLEDGE"),
    (VIRTIO_CONFIG_S_DRIVER, "DRIVER"),
    (VIRTIO_CONFIG_S_DRIVER_OK, "DRIVER_OK"),
    (VIRTIO_CONFIG_S_FEATURES_OK, "FEATURES_OK"),
    (VIRTIO_CONFIG_S_NEEDS_RESET, "DEVICE_NEEDS_RESET"),
    (VIRTIO_CONFIG_S_FAILED, "FAILED"),
];

/// What a session knows of its client at some moment. The names are those of docs/control.md.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Observation {
    /// `None` until the client has sent VERSION.
    pub(crate) protocol: Option<Protocol>,
    pub(crate) device_status: Vec<&'static str>,
    /// Why it needs a reset, or did the last time.
    pub(crate) fault: Option<String>,
    /// Those in force.
    pub(crate) features: Vec<String>,
    pub(crate) interrupts: &'static str,
    pub(crate) queues: Vec<ObservedQueue>,
    pub(crate) memory: ObservedMemory,
    pub(crate) kicks: ObservedKicks,
}

/// What was agreed on, and what was offered for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Protocol {
    /// `major.minor`.
    pub(crate) version: String,
    pub(crate) client: Bounds,
    pub(crate) server: Bounds,
    /// What the client is known by.
    pub(crate) quirks: Vec<&'static str>,
}

/// The capabilities of one side as they hold: with the specification's values for those that it did not name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Bounds {
    pub(crate) max_msg_fds: u64,
    /// Bytes.
    pub(crate) max_data_xfer_size: u64,
    pub(crate) max_dma_maps: u64,
    /// Bytes, or'ed together.
    pub(crate) pgsizes: u64,
    pub(crate) write_multiple: bool,
}

impl From<&Capabilities> for Bounds {
    fn from(side: &Capabilities) -> Self {
        Self {
            max_msg_fds: side.max_msg_fds(),
            max_data_xfer_size: side.max_data_xfer_size(),
            max_dma_maps: side.max_dma_maps(),
            pgsizes: side.pgsizes(),
            write_multiple: side.write_multiple.unwrap_or(false),
        }
    }
}

/// A queue as the driver has set it up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct ObservedQueue {
    pub(crate) enabled: bool,
    pub(crate) running: bool,
    /// Entries.
    pub(crate) size: u16,
    /// Of MSI-X; `None` if the driver wants no interrupt, or takes INTx.
    pub(crate) vector: Option<u16>,
    /// Whether the client has given an eventfd for it.
    pub(crate) vector_connected: bool,
}

/// The client's memory as far as it is mapped for the device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct ObservedMemory {
    pub(crate) ranges: u64,
    pub(crate) bytes: u64,
    /// Those that came without a file: they are out of our reach.
    pub(crate) unreachable_ranges: u64,
    pub(crate) unreachable_bytes: u64,
    /// A queue was kicked, and nothing had been written to its ring: its pages are private to the client.
    pub(crate) found_blank: bool,
    pub(crate) files: Vec<ObservedFile>,
}

/// A file that ranges of memory point into, mapped shared and whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct ObservedFile {
    pub(crate) bytes: u64,
    /// `memfd`, `tmpfs`, `hugetlbfs` or `other`.
    pub(crate) kind: &'static str,
    /// Bytes of its pages, as its file system has them.
    pub(crate) page_size: u64,
    pub(crate) writable: bool,
}

/// How kicks have arrived.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct ObservedKicks {
    pub(crate) by_message: u64,
    /// Of these, messages that wanted no reply.
    pub(crate) posted: u64,
    pub(crate) by_eventfd: u64,
    /// Eventfds that the client was given for doorbells.
    pub(crate) eventfds: u64,
    /// Whether the client was offered a page for them.
    pub(crate) mapped_page: bool,
}

/// What a session notes down for [`Observation`] while it serves a client.
#[derive(Debug, Default)]
pub(super) struct Notes {
    pub(super) protocol: Option<Protocol>,
    pub(super) fault: Option<String>,
    pub(super) found_blank: bool,
    pub(super) by_message: u64,
    pub(super) posted: u64,
    pub(super) by_eventfd: u64,
}

impl Notes {
    /// A version was agreed on.
    pub(super) fn agreed(&mut self, proposed: &Version, answer: &Version) {
        let theirs = &proposed.capabilities;
        let mut quirks = Vec::new();
        // The set that QEMU's vfio-user-pci sends, and nobody else that we know.
        let qemu = theirs.max_msg_fds == Some(MAX_MSG_FDS)
            && theirs.max_dma_maps == Some(65535)
            && theirs.write_multiple == Some(true)
            && theirs.migration.is_some();
        if qemu {
            quirks.push("looks like QEMU: it drops the device if a reply takes more than 5 s, and takes no reply larger than its request");
            quirks.push("looks like QEMU: the MSI-X table is its own, and a masked vector is one without an eventfd");
        }
        if proposed.capabilities != Capabilities::default() && answer.capabilities == Capabilities::default() {
            quirks.push("its VERSION had no room for our capabilities: the specification's defaults hold");
        }
        self.protocol = Some(Protocol {
            version: format!("{}.{}", answer.major, answer.minor),
            client: theirs.into(),
            server: (&answer.capabilities).into(),
            quirks,
        });
    }

    /// A queue's doorbell was written to.
    pub(super) fn kicked_by_message(&mut self, posted: bool) {
        self.by_message = self.by_message.wrapping_add(1);
        self.posted = self.posted.wrapping_add(posted.into());
    }
}

impl Attendance<'_> {
    /// All that is known now.
    pub(super) fn observe(&mut self) -> Observation {
        let notes = &self.notes;
        let function = &self.device.function;
        let interrupts = function.interrupts();
        let registers = function.export();
        let features = function.driver_features();
        let queues = (0..function.num_queues()).zip(&registers.queues).map(|(index, registers)| {
            let vector =
                Some(registers.msix_vector).filter(|vector| u32::from(*vector) < interrupts.count(pci::Irq::Msix));
            ObservedQueue {
                enabled: registers.enabled,
                running: self.data_path.is_running(index),
                size: registers.size,
                vector,
                vector_connected: vector.is_some_and(|vector| interrupts.has_line(vector)),
            }
        });
        Observation {
            protocol: notes.protocol.clone(),
            device_status: STATUS
                .iter()
                .filter(|(bit, _)| u32::from(registers.device_status) & bit != 0)
                .map(|(_, name)| *name)
                .collect(),
            fault: notes.fault.clone(),
            features: names(features),
            interrupts: if interrupts.msix_in_use() { "msix" } else { "intx" },
            queues: queues.collect(),
            memory: ObservedMemory { found_blank: notes.found_blank, ..self.memory.observe() },
            kicks: ObservedKicks {
                by_message: notes.by_message,
                posted: notes.posted,
                by_eventfd: notes.by_eventfd,
                eventfds: self.doorbells.len() as u64,
                mapped_page: self.device.doorbell_page.is_some(),
            },
        }
    }
}

/// Features by name, or number.
fn names(features: u64) -> Vec<String> {
    let name = |bit: u32| FEATURES.iter().find(|(known, _)| *known == bit).map(|(_, name)| (*name).to_owned());
    (0..u64::BITS)
        .filter(|bit| features >> bit & 1 != 0)
        .map(|bit| name(bit).unwrap_or_else(|| format!("bit {bit}")))
        .collect()
}

/// What a file of guest memory is.
pub(super) fn observe_file(file: &Arc<MemoryFile>) -> ObservedFile {
    let (kind, page_size) = file.as_file().map_or(("other", 0), kind);
    ObservedFile { bytes: file.len(), kind, page_size, writable: file.writable() }
}

fn kind(file: &File) -> (&'static str, u64) {
    let Ok(about) = fstatfs(file) else { return ("other", 0) };
    let page_size = u64::try_from(about.block_size()).unwrap_or(0);
    let kind = match about.filesystem_type() {
        HUGETLBFS_MAGIC => "hugetlbfs",
        // A memfd is a file of a tmpfs that is mounted nowhere; its name tells.
        TMPFS_MAGIC => match nix::fcntl::readlink(format!("/proc/self/fd/{}", file.as_raw_fd()).as_str()) {
            Ok(name) if name.to_string_lossy().starts_with("/memfd:") => "memfd",
            _ => "tmpfs",
        },
        _ => "other",
    };
    (kind, page_size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_have_their_names() {
        let some = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << 60;
        assert_eq!(names(some), ["EVENT_IDX", "VERSION_1", "bit 60"]);
    }

    #[test]
    fn only_what_speaks_as_qemu_is_taken_for_it() {
        let qemu = Capabilities {
            max_msg_fds: Some(16),
            max_data_xfer_size: Some(1 << 20),
            max_dma_maps: Some(65535),
            pgsizes: Some(4096),
            write_multiple: Some(true),
            migration: Some(vfio_user::Migration { pgsize: Some(4096), max_bitmap_size: Some(1 << 28) }),
        };
        let quirks = |capabilities: &Capabilities| {
            let version = Version { major: 0, minor: 0, capabilities: capabilities.clone() };
            let mut notes = Notes::default();
            notes.agreed(&version, &version);
            notes.protocol.unwrap().quirks.len()
        };
        assert_eq!(quirks(&qemu), 2);
        assert_eq!(quirks(&Capabilities { migration: None, ..qemu.clone() }), 0);
        assert_eq!(quirks(&Capabilities::default()), 0);
        let proposed = Version { major: 0, minor: 0, capabilities: qemu };
        let mut notes = Notes::default();
        notes.agreed(&proposed, &Version::default());
        assert!(notes.protocol.unwrap().quirks[2].contains("no room"));
    }
}
