//! The numbers of the commands.

/// A command of the protocol (section "Commands").
///
/// [`Header::command`](crate::Header::command) stays a plain number, because a peer may send any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Command {
    /// Agree on a version and on capabilities: the first message of a connection.
    Version = 1,
    /// Give the server a range of DMA addresses.
    DmaMap = 2,
    /// Take ranges of DMA addresses back.
    DmaUnmap = 3,
    /// Ask what the device is.
    DeviceGetInfo = 4,
    /// Ask what a region is.
    DeviceGetRegionInfo = 5,
    /// Ask for the file descriptors that stand for accesses to parts of a region.
    DeviceGetRegionIoFds = 6,
    /// Ask what an interrupt index is.
    DeviceGetIrqInfo = 7,
    /// Configure, mask, unmask or trigger interrupts.
    DeviceSetIrqs = 8,
    /// Read from a region.
    RegionRead = 9,
    /// Write to a region.
    RegionWrite = 10,
    /// Server to client: read memory that was mapped without a file descriptor.
    DmaRead = 11,
    /// Server to client: write memory that was mapped without a file descriptor.
    DmaWrite = 12,
    /// Reset the device.
    DeviceReset = 13,
    /// Several small writes to regions in one message.
    RegionWriteMulti = 15,
    /// Get, set or probe a feature (migration).
    DeviceFeature = 16,
    /// Read migration data.
    MigDataRead = 17,
    /// Write migration data.
    MigDataWrite = 18,
}

impl Command {
    /// Every command, in the order of the numbers.
    pub const ALL: [Command; 17] = [
        Command::Version,
        Command::DmaMap,
        Command::DmaUnmap,
        Command::DeviceGetInfo,
        Command::DeviceGetRegionInfo,
        Command::DeviceGetRegionIoFds,
        Command::DeviceGetIrqInfo,
        Command::DeviceSetIrqs,
        Command::RegionRead,
        Command::RegionWrite,
        Command::DmaRead,
        Command::DmaWrite,
        Command::DeviceReset,
        Command::RegionWriteMulti,
        Command::DeviceFeature,
        Command::MigDataRead,
        Command::MigDataWrite,
    ];

    /// The command with this number, if there is one.
    pub fn from_number(number: u16) -> Option<Command> {
        Command::ALL.into_iter().find(|c| c.number() == number)
    }

    /// The number on the wire.
    pub const fn number(self) -> u16 {
        self as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_specification_s() {
        let numbers: Vec<u16> = Command::ALL.iter().map(|c| c.number()).collect();
        let expected: Vec<u16> = (1..=13).chain(15..=18).collect();
        assert_eq!(numbers, expected);
        for number in 0..=u16::MAX {
            let command = Command::from_number(number);
            assert_eq!(command.is_some(), expected.contains(&number), "{number}");
            assert!(command.is_none_or(|c| c.number() == number));
        }
    }
}
