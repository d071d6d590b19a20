//! What a function is, in a form that outlives the process: exported, kept or sent, imported.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The state of a function, but for the lines and masks of its client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FunctionState {
    /// The layout of this structure, [`FunctionState::VERSION`].
    pub version: u32,
    /// The configuration space, 256 bytes.
    pub config: Vec<u8>,
    /// The causes that assert INTx.
    pub intx_causes: u8,
    /// The client put MSI-X in use by installing lines.
    pub msix_armed: bool,
    /// One entry for every MSI-X vector.
    pub msix_table: Vec<MsixEntryState>,
}

impl FunctionState {
    /// The version that this crate writes, and the only one that it reads.
    pub const VERSION: u32 = 1;
}

/// The state of one MSI-X vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixEntryState {
    /// The table entry: message address, upper address, data, vector control, little endian.
    pub registers: [u8; 16],
    /// The client wrote the entry, so that its mask bit counts.
    pub written: bool,
    /// The vector's bit in the Pending Bit Array.
    pub pending: bool,
}

/// Why a state was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ImportError {
    /// The layout is of another version.
    #[error("the function's state has version {got}, this program reads {}", FunctionState::VERSION)]
    Version {
        /// The version found.
        got: u32,
    },
    /// The configuration space has another size.
    #[error("the configuration space has {got} bytes instead of 256")]
    ConfigLength {
        /// The number of bytes found.
        got: usize,
    },
    /// A register that can't change differs from this function's: the state is another function's.
    #[error("the byte at {offset:#x} of the configuration space differs in read-only bits")]
    ReadOnly {
        /// The offset of the first such byte.
        offset: usize,
    },
    /// The function has another number of vectors.
    #[error("the state has {got} MSI-X vectors, the function {expected}")]
    Vectors {
        /// The number found.
        got: usize,
        /// The function's own.
        expected: usize,
    },
    /// A table entry has bits set that always are zero.
    #[error("reserved bits are set in the table entry of MSI-X vector {vector}")]
    ReservedEntryBits {
        /// The vector.
        vector: usize,
    },
}
