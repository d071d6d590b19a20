//! The layout of the common configuration, struct virtio_pci_common_cfg (virtio 1.3, section 4.1.4.3).

use std::ops::Range;

/// A register of the common configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Field {
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
    AdminQueueIndex,
    AdminQueueNum,
}

/// Every register and its bytes. There are no gaps.
pub(super) const FIELDS: [(Field, Range<usize>); 20] = [
    (Field::DeviceFeatureSelect, 0x00..0x04),
    (Field::DeviceFeature, 0x04..0x08),
    (Field::DriverFeatureSelect, 0x08..0x0c),
    (Field::DriverFeature, 0x0c..0x10),
    (Field::ConfigMsixVector, 0x10..0x12),
    (Field::NumQueues, 0x12..0x14),
    (Field::DeviceStatus, 0x14..0x15),
    (Field::ConfigGeneration, 0x15..0x16),
    (Field::QueueSelect, 0x16..0x18),
    (Field::QueueSize, 0x18..0x1a),
    (Field::QueueMsixVector, 0x1a..0x1c),
    (Field::QueueEnable, 0x1c..0x1e),
    (Field::QueueNotifyOff, 0x1e..0x20),
    (Field::QueueDesc, 0x20..0x28),
    (Field::QueueDriver, 0x28..0x30),
    (Field::QueueDevice, 0x30..0x38),
    (Field::QueueNotifConfigData, 0x38..0x3a),
    (Field::QueueReset, 0x3a..0x3c),
    (Field::AdminQueueIndex, 0x3c..0x3e),
    (Field::AdminQueueNum, 0x3e..0x40),
];

/// The registers that an access of `length` bytes at `offset` touches, in ascending order.
pub(super) fn touched(offset: usize, length: usize) -> impl Iterator<Item = (Field, Range<usize>)> {
    let end = offset.saturating_add(length);
    FIELDS.into_iter().filter(move |(_, field)| field.start < end && offset < field.end)
}

/// Pairs the bytes of a register's value, which lies at `field`, with those of an access that starts at `offset`.
pub(super) fn overlap<V: IntoIterator, A: IntoIterator>(
    value: V,
    field: &Range<usize>,
    access: A,
    offset: usize,
) -> impl Iterator<Item = (V::Item, A::Item)> {
    let value = value.into_iter().take(field.len()).skip(offset.saturating_sub(field.start));
    value.zip(access.into_iter().skip(field.start.saturating_sub(offset)))
}
