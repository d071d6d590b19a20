//! The registers of the common configuration.

/// A register of the common configuration (section 4.1.4.3).
#[allow(missing_docs, reason = "named as in the specification")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommonRegister {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    ConfigMsixVector,
    NumQueues,
    DeviceStatus,
    ConfigGeneration,
    QueueSelect,
    QueueSize,
    QueueMsixVector,
    QueueEnable,
    QueueNotifyOff,
    QueueDesc,
    QueueDriver,
    QueueDevice,
    QueueNotifConfigData,
    QueueReset,
}

impl CommonRegister {
    /// Where the register lies in the structure, and how wide it is, in bytes.
    pub const fn place(self) -> (u64, usize) {
        match self {
            CommonRegister::DeviceFeatureSelect => (0, 4),
            CommonRegister::DeviceFeature => (4, 4),
            CommonRegister::DriverFeatureSelect => (8, 4),
            CommonRegister::DriverFeature => (12, 4),
            CommonRegister::ConfigMsixVector => (16, 2),
            CommonRegister::NumQueues => (18, 2),
            CommonRegister::DeviceStatus => (20, 1),
            CommonRegister::ConfigGeneration => (21, 1),
            CommonRegister::QueueSelect => (22, 2),
            CommonRegister::QueueSize => (24, 2),
            CommonRegister::QueueMsixVector => (26, 2),
            CommonRegister::QueueEnable => (28, 2),
            CommonRegister::QueueNotifyOff => (30, 2),
            CommonRegister::QueueDesc => (32, 8),
            CommonRegister::QueueDriver => (40, 8),
            CommonRegister::QueueDevice => (48, 8),
            CommonRegister::QueueNotifConfigData => (56, 2),
            CommonRegister::QueueReset => (58, 2),
        }
    }
}
