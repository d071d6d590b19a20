//! A virtio device, whatever carries it.

/// What a transport needs to know of a device (virtio 1.3 §2): its identity, its features, its configuration space.
/// The queues are somebody else's: they run beside the transport, on other threads.
pub trait VirtioDevice: Send {
    /// The virtio device ID (§5).
    fn device_id(&self) -> u16;

    /// The PCI class code: base class, sub-class and programming interface, 24 bits.
    fn class_code(&self) -> u32;

    /// The device's own feature bits that it offers; those of rings and transport are not its concern.
    fn features(&self) -> u64;

    /// How many virtqueues it has.
    fn num_queues(&self) -> u16;

    /// The most entries of each of them: a power of two.
    fn max_queue_size(&self) -> u16;

    /// Bytes of its configuration space.
    fn config_len(&self) -> usize;

    /// Reads its configuration space; bytes beyond the end are zero.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// Writes its configuration space; what cannot be written is ignored.
    fn write_config(&mut self, offset: usize, data: &[u8]);

    /// The driver has set FEATURES_OK with these features, all of them offered.
    fn features_acked(&mut self, features: u64);

    /// The device was reset: nothing is negotiated any more.
    fn reset(&mut self);
}
