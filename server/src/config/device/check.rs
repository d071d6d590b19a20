//! What a device cannot be.

use super::{Cache, DeviceConfig, Doorbell, PollPolicy, StoreKind};
use crate::config::Size;
use crate::config::fabric::{FabricChoice, InvalidFabric};
use crate::config::fault::InvalidFault;
use crate::config::nbd_tls::InvalidNbdTls;
use crate::config::on_error::InvalidOnError;
use crate::config::overlay::InvalidOverlay;
use crate::config::rates::InvalidRates;

/// Why a device cannot be as it is described. The names are those of the configuration file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidDevice {
    /// A store in a file without one.
    #[error("store = \"file\", \"qcow2\" or \"vmdk\" needs blk_file, the image or block device to serve")]
    NoFile,
    /// A file for a store that has none.
    #[error("blk_file is for store = \"file\", \"qcow2\" and \"vmdk\" only; leave it out, or leave store out")]
    FileUnused,
    /// A cache for a store that has none.
    #[error(
        "cache is for store = \"file\", \"qcow2\" and \"vmdk\" only, \
         and writeback or writethrough for store = \"nbd\"; leave it out"
    )]
    CacheUnused,
    /// Pinned memory for a store that has no use for it.
    #[error("fixed_buffers is for store = \"file\" with cache = \"none\" only; leave it out")]
    FixedBuffersUnused,
    /// Polled completions for a store that has none.
    #[error("iopoll is for store = \"file\" with cache = \"none\" only; leave it out")]
    IopollUnused,
    /// Number of queues.
    #[error("num_queues is {0}; it must be from 1 to 64")]
    NumQueues(u16),
    /// Size of the queues.
    #[error("queue_size is {0}; it must be a power of two from 2 to 1024")]
    QueueSize(u16),
    /// A list that lets nobody in.
    #[error("allow_uids is empty; leave it out to serve all users that the socket lets in")]
    NobodyAllowed,
    /// Number of ranges.
    #[error("max_dma_maps is {0}; it must be from 1 to 65535")]
    MaxDmaMaps(u32),
    /// Size of a region access.
    #[error("max_data_xfer_size is {0}; it must be from 4K to 64M")]
    MaxDataXferSize(Size),
    /// The serial.
    #[error("serial {0:?} must be at most 20 printable ASCII characters")]
    Serial(String),
    /// A doorbell that wakes nobody, and a worker that sleeps.
    #[error("doorbell = \"mapped\" wakes no worker; it needs poll = \"always\"")]
    MappedDoorbell,
    /// A name that cannot be one.
    #[error("name {0:?} must be 1 to 64 letters, digits, and any of . _ - : /")]
    Name(String),
    /// The size.
    #[error("size is {0}; it must be a multiple of 512 bytes, and more than 0")]
    Size(Size),
    /// The NBD store without an export.
    #[error("store = \"nbd\" needs nbd_uri, the export to serve")]
    NoNbdUri,
    /// What only an NBD store has.
    #[error(
        "nbd_uri, nbd_connections, nbd_deadline and nbd_tls_* are for store = \"nbd\" only; leave them out, or leave store out"
    )]
    NbdUnused,
    /// TLS, and what only TLS has.
    #[error(transparent)]
    NbdTls(#[from] InvalidNbdTls),
    /// Connections.
    #[error("nbd_connections is {0}; it must be from 1 to 64")]
    NbdConnections(u16),
    /// Deadline.
    #[error("nbd_deadline is {0}; it must be from 1 to 86400 seconds")]
    NbdDeadline(u32),
    /// A size for a store that has its own.
    #[error("an NBD export has its own size; leave size out")]
    NbdSize,
    /// The overlay.
    #[error(transparent)]
    Overlay(#[from] InvalidOverlay),
    /// A fault.
    #[error("fault {number}: {source}")]
    Fault {
        /// Which `[[device.fault]]` table, from 1.
        number: usize,
        /// What is wrong with it.
        source: InvalidFault,
    },
    /// How fast it may be used.
    #[error(transparent)]
    Rates(#[from] InvalidRates),
    /// What lies before its store.
    #[error(transparent)]
    Fabric(#[from] InvalidFabric),
    /// What becomes of errors, and of power cuts.
    #[error(transparent)]
    OnError(#[from] InvalidOnError),
}

impl DeviceConfig {
    /// Checks that the words make sense together.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), InvalidDevice> {
        let file = self.store_kind() == StoreKind::File;
        let has_file = self.store_kind().has_file();
        if has_file && self.blk_file.is_none() && self.overlay_of.is_none() {
            return Err(InvalidDevice::NoFile);
        }
        if !has_file && self.blk_file.is_some() {
            return Err(InvalidDevice::FileUnused);
        }
        let nbd = self.store_kind() == StoreKind::Nbd;
        // The cache of an overlay is its own.
        let plain = self.overlay().is_none();
        if plain && !has_file && self.cache.is_some_and(|cache| !nbd || cache == Cache::None) {
            return Err(InvalidDevice::CacheUnused);
        }
        self.check_nbd(nbd)?;
        if self.fixed_buffers && !(file && self.cache() == Cache::None) {
            return Err(InvalidDevice::FixedBuffersUnused);
        }
        if self.iopoll && !(file && self.cache() == Cache::None) {
            return Err(InvalidDevice::IopollUnused);
        }
        if !(1..=64).contains(&self.num_queues()) {
            return Err(InvalidDevice::NumQueues(self.num_queues()));
        }
        if !self.queue_size().is_power_of_two() || !(2..=1024).contains(&self.queue_size()) {
            return Err(InvalidDevice::QueueSize(self.queue_size()));
        }
        if let Some(size) = self.size.filter(|size| size.0 == 0 || !size.0.is_multiple_of(512)) {
            return Err(InvalidDevice::Size(size));
        }
        if self.doorbell() == Doorbell::Mapped && self.poll() != PollPolicy::Always {
            return Err(InvalidDevice::MappedDoorbell);
        }
        if self.allow_uids.as_ref().is_some_and(Vec::is_empty) {
            return Err(InvalidDevice::NobodyAllowed);
        }
        self.limits()?;
        self.check_overlay()?;
        self.check_on_error()?;
        for (number, fault) in (1..).zip(&self.faults) {
            fault.check(self.num_queues()).map_err(|source| InvalidDevice::Fault { number, source })?;
        }
        self.rates.map_or(Ok(None), |rates| rates.limits())?;
        // Who else is called by name is known to the server.
        if let Some(own @ FabricChoice::Own(_)) = &self.fabric {
            own.find(&[])?;
        }
        if let Some(name) = self.name.as_ref().filter(|name| !is_name(name)) {
            return Err(InvalidDevice::Name(name.clone()));
        }
        match &self.serial {
            Some(serial) if serial.len() > 20 || !serial.bytes().all(|byte| (b' '..=b'~').contains(&byte)) => {
                Err(InvalidDevice::Serial(serial.clone()))
            }
            _ => Ok(()),
        }
    }

    fn check_nbd(&self, nbd: bool) -> Result<(), InvalidDevice> {
        let numbers = self.nbd_connections.is_some() || self.nbd_deadline.is_some();
        let tls = self.has_nbd_tls();
        if self.nbd_uri.is_none() || !nbd {
            return match nbd {
                true => Err(InvalidDevice::NoNbdUri),
                false if self.nbd_uri.is_some() || numbers || tls => Err(InvalidDevice::NbdUnused),
                false => Ok(()),
            };
        }
        if self.size.is_some() && self.overlay().is_none() {
            return Err(InvalidDevice::NbdSize);
        }
        self.nbd_credentials()?;
        if !(1..=64).contains(&self.nbd_connections()) {
            return Err(InvalidDevice::NbdConnections(self.nbd_connections()));
        }
        if !(1..=86400).contains(&self.nbd_deadline()) {
            return Err(InvalidDevice::NbdDeadline(self.nbd_deadline()));
        }
        Ok(())
    }
}

/// Whether it can stand in a log, a table and a label as it is.
fn is_name(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-:/".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_go_together_is_refused() {
        let check = |change: fn(&mut DeviceConfig)| {
            let mut device = DeviceConfig::new("blk.sock");
            change(&mut device);
            device.check()
        };
        assert_eq!(check(|_| {}), Ok(()));
        assert_eq!(check(|device| device.store = Some(StoreKind::File)), Err(InvalidDevice::NoFile));
        assert_eq!(check(|device| device.blk_file = Some("a".into())), Ok(()));
        let with_file = check(|device| {
            device.blk_file = Some("a".into());
            device.store = Some(StoreKind::Null);
        });
        assert_eq!(with_file, Err(InvalidDevice::FileUnused));
        for kind in [StoreKind::Qcow2, StoreKind::Vmdk] {
            let mut image = DeviceConfig::new("blk.sock");
            image.store = Some(kind);
            assert_eq!(image.check(), Err(InvalidDevice::NoFile));
            image.blk_file = Some("a".into());
            image.cache = Some(Cache::Writeback);
            assert_eq!(image.check(), Ok(()));
            image.fixed_buffers = true;
            assert_eq!(image.check(), Err(InvalidDevice::FixedBuffersUnused));
        }
        assert_eq!(check(|device| device.cache = Some(Cache::None)), Err(InvalidDevice::CacheUnused));
        assert_eq!(check(|device| device.fixed_buffers = true), Err(InvalidDevice::FixedBuffersUnused));
        assert_eq!(check(|device| device.iopoll = true), Err(InvalidDevice::IopollUnused));
        type Option = (fn(&mut DeviceConfig), InvalidDevice);
        let direct_only: [Option; 2] = [
            (|device| device.fixed_buffers = true, InvalidDevice::FixedBuffersUnused),
            (|device| device.iopoll = true, InvalidDevice::IopollUnused),
        ];
        for (set, refusal) in direct_only {
            for (cache, result) in [(Cache::None, Ok(())), (Cache::Writeback, Err(refusal))] {
                let mut device = DeviceConfig::new("blk.sock");
                device.blk_file = Some("a".into());
                device.cache = Some(cache);
                set(&mut device);
                assert_eq!(device.check(), result);
            }
        }
        assert_eq!(check(|device| device.doorbell = Some(Doorbell::Mapped)), Err(InvalidDevice::MappedDoorbell));
        let polled = check(|device| {
            device.doorbell = Some(Doorbell::Mapped);
            device.poll = Some(PollPolicy::Always);
        });
        assert_eq!(polled, Ok(()));
        assert_eq!(check(|device| device.allow_uids = Some(vec![])), Err(InvalidDevice::NobodyAllowed));
        assert_eq!(check(|device| device.allow_uids = Some(vec![0])), Ok(()));
        fn nbd(uri: &str, change: fn(&mut DeviceConfig)) -> Result<(), InvalidDevice> {
            let mut device = DeviceConfig::new("blk.sock");
            device.nbd_uri = Some(uri.parse().unwrap());
            change(&mut device);
            device.check()
        }
        assert_eq!(nbd("nbd://host", |_| {}), Ok(()));
        assert_eq!(check(|device| device.store = Some(StoreKind::Nbd)), Err(InvalidDevice::NoNbdUri));
        assert_eq!(nbd("nbd://host", |device| device.blk_file = Some("a".into())), Err(InvalidDevice::NbdUnused));
        assert_eq!(nbd("nbd://host", |device| device.store = Some(StoreKind::Memory)), Err(InvalidDevice::NbdUnused));
        assert_eq!(check(|device| device.nbd_deadline = Some(1)), Err(InvalidDevice::NbdUnused));
        assert_eq!(nbd("nbd://host", |device| device.size = Some(Size(512))), Err(InvalidDevice::NbdSize));
        assert_eq!(nbd("nbds://host", |_| {}), Err(InvalidNbdTls::NoCredentials.into()));
        assert_eq!(check(|device| device.nbd_tls_username = Some("a".into())), Err(InvalidDevice::NbdUnused));
        assert_eq!(nbd("nbd://host", |device| device.cache = Some(Cache::Writethrough)), Ok(()));
        assert_eq!(nbd("nbd://host", |device| device.cache = Some(Cache::None)), Err(InvalidDevice::CacheUnused));
        let connections = nbd("nbd://host", |device| device.nbd_connections = Some(65));
        assert_eq!(connections, Err(InvalidDevice::NbdConnections(65)));
        assert_eq!(nbd("nbd://host", |device| device.nbd_deadline = Some(0)), Err(InvalidDevice::NbdDeadline(0)));
        assert_eq!(check(|device| device.num_queues = Some(64)), Ok(()));
        assert_eq!(check(|device| device.num_queues = Some(0)), Err(InvalidDevice::NumQueues(0)));
        assert_eq!(check(|device| device.num_queues = Some(65)), Err(InvalidDevice::NumQueues(65)));
        assert_eq!(check(|device| device.queue_size = Some(1024)), Ok(()));
        for size in [0, 1, 3, 96, 2048] {
            let mut device = DeviceConfig::new("blk.sock");
            device.queue_size = Some(size);
            assert_eq!(device.check(), Err(InvalidDevice::QueueSize(size)));
        }
        for size in [4095, (64 << 20) + 1, u64::MAX] {
            let mut device = DeviceConfig::new("blk.sock");
            device.max_data_xfer_size = Some(Size(size));
            assert_eq!(device.check(), Err(InvalidDevice::MaxDataXferSize(Size(size))));
        }
        for maps in [0, 65536] {
            let mut device = DeviceConfig::new("blk.sock");
            device.max_dma_maps = Some(maps);
            assert_eq!(device.check(), Err(InvalidDevice::MaxDmaMaps(maps)));
        }
        assert_eq!(check(|device| device.size = Some(Size(0))), Err(InvalidDevice::Size(Size(0))));
        assert_eq!(check(|device| device.size = Some(Size(513))), Err(InvalidDevice::Size(Size(513))));
        assert_eq!(check(|device| device.name = Some("vm-1/root.0".into())), Ok(()));
        for name in ["", "two words", "quo\"te", "é", &"x".repeat(65)] {
            let mut device = DeviceConfig::new("blk.sock");
            device.name = Some(name.into());
            assert_eq!(device.check(), Err(InvalidDevice::Name(name.into())));
        }
        assert_eq!(check(|device| device.serial = Some("12345678901234567890".into())), Ok(()));
        assert!(check(|device| device.serial = Some("123456789012345678901".into())).is_err());
        assert!(check(|device| device.serial = Some("tab\t".into())).is_err());
    }
}
